"""Shapes of published models, so that a run can be planned without a download, and for the presets
that train them the node that they are planned for and what the papers report."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config


def _shape(
    family: Callable[..., PretrainedConfig],
    width: int,
    inner: int,
    layers: int,
    heads: int,
    *,
    vocabulary: int,
    key_value_heads: int = 8,
    tied: bool = False,
) -> PretrainedConfig:
    """A model of a family, by its config.json."""
    return family(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


# Qwen2.5 and Llama 3.
_qwen = partial(_shape, Qwen2Config, vocabulary=152064)
_llama = partial(_shape, LlamaConfig, vocabulary=128256)

SHAPES: dict[str, PretrainedConfig] = {
    "smollm2": _llama(576, 1536, 30, 9, key_value_heads=3, vocabulary=49152, tied=True),
    "Qwen/Qwen2.5-Math-1.5B": _qwen(
        1536, 8960, 28, 12, key_value_heads=2, vocabulary=151936, tied=True
    ),
    "Qwen/Qwen2.5-Math-7B": _qwen(3584, 18944, 28, 28, key_value_heads=4),
    "Qwen/Qwen2.5-14B": _qwen(5120, 13824, 48, 40),
    "Qwen/Qwen2.5-32B": _qwen(5120, 27648, 64, 40),
    "lkevinzc/Llama-3.2-3B-NuminaQA": _llama(3072, 8192, 28, 24, tied=True),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.3-70B-Instruct": _llama(8192, 28672, 80, 64),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a preset needs, and what came of it in its paper."""

    expected: str
    ranks: int = 8
    gpu_gib: int = 80
    """Memory of each rank's GPU."""


ONE_NODE = Recipe("")
"""Of presets without numbers of a paper."""
_DR_GRPO = "Dr. GRPO (2503.20783), table 4, greedy, at most 3,000 tokens: AIME24"
_DISTILLED = "DeepSeek-R1 (2501.12948), distilled, pass@1: AIME24"
_R1 = "DeepSeek-R1 (2501.12948 v2), of 671B: AIME24 pass@1"

RECIPES: dict[str, Recipe] = {
    "dr-grpo-1.5b": Recipe(
        f"{_DR_GRPO} 20.0, AMC 53.0, MATH500 74.2, Minerva 25.7, Olympiad 37.6, average 42.1 % "
        "(33.1 before)"
    ),
    "dr-grpo-3b": Recipe(
        f"{_DR_GRPO} 6.7, AMC 18.1, MATH500 50.0, Minerva 14.3, Olympiad 14.7, average 20.7 % "
        "(0.1 before)"
    ),
    "dr-grpo-7b": Recipe(
        f"{_DR_GRPO} 43.3, AMC 62.7, MATH500 80.0, Minerva 30.1, Olympiad 41.0, average 51.4 % "
        "(38.2 before), 27 hours on 8 A100"
    ),
    "r1-zero": Recipe(
        f"{_R1} 15.6 -> 77.9, MATH-500 95.9, GPQA Diamond 75.8, LiveCodeBench 50.0 %, 198 hours "
        "on 512 H800",
        ranks=32,
    ),
    "r1-zero-qwen-32b": Recipe(
        "DeepSeek-R1 (2501.12948 v2), Qwen2.5-32B-Zero: AIME24 pass@1 47.0, cons@64 60.0, MATH-500 "
        "91.6, GPQA Diamond 55.0, LiveCodeBench 40.2 %",
        ranks=32,
    ),
    "r1": Recipe(
        f"{_R1} R1-Zero 77.9, Dev1 59.0, Dev2 74.0, Dev3 78.1, R1 79.8; MATH-500 95.9, 94.2, 95.9, "
        "95.4, 97.3; GPQA Diamond 75.8, 66.1, 70.7, 71.2, 71.5; LiveCodeBench 50.0, 57.5, 63.5, "
        "64.6, 65.9 %",
        ranks=32,
    ),
    "r1-distill-qwen-1.5b": Recipe(
        f"{_DISTILLED} 28.9, MATH-500 83.9, GPQA Diamond 33.8, LiveCodeBench 16.9 %"
    ),
    "r1-distill-qwen-7b": Recipe(
        f"{_DISTILLED} 55.5, MATH-500 92.8, GPQA Diamond 49.1, LiveCodeBench 37.6 %"
    ),
    "r1-distill-qwen-14b": Recipe(
        f"{_DISTILLED} 69.7, MATH-500 93.9, GPQA Diamond 59.1, LiveCodeBench 53.1 %"
    ),
    "r1-distill-qwen-32b": Recipe(
        f"{_DISTILLED} 72.6, MATH-500 94.3, GPQA Diamond 62.1, LiveCodeBench 57.2 %", ranks=32
    ),
    "r1-distill-llama-8b": Recipe(
        f"{_DISTILLED} 50.4, MATH-500 89.1, GPQA Diamond 49.0, LiveCodeBench 39.6 %"
    ),
    "r1-distill-llama-70b": Recipe(
        f"{_DISTILLED} 70.0, MATH-500 94.5, GPQA Diamond 65.2, LiveCodeBench 57.5 %",
        ranks=32,
        gpu_gib=140,
    ),
}
