"""Shapes of published models, so that a run can be planned without a download, and what the papers
report of the presets that train them."""

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config


def _qwen(width: int, inner: int, layers: int, heads: int, **changed: object) -> Qwen2Config:
    """A model of the Qwen2.5 family, by its config.json."""
    return Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **{"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False, **changed},
    )


SHAPES: dict[str, PretrainedConfig] = {
    "smollm2": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-Math-1.5B": _qwen(
        1536, 8960, 28, 12, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True
    ),
    "Qwen/Qwen2.5-Math-7B": _qwen(3584, 18944, 28, 28, num_key_value_heads=4),
    "Qwen/Qwen2.5-32B": _qwen(5120, 27648, 64, 40),
    "lkevinzc/Llama-3.2-3B-NuminaQA": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}

NODES = {"r1-zero": (128, 80), "r1-zero-qwen-32b": (32, 80)}
"""Ranks and GiB of each one's GPU that a preset is planned for, where that is not one node."""
ONE_NODE = (8, 80)

_DR_GRPO = "Dr. GRPO (2503.20783), table 4, greedy, at most 3,000 tokens: AIME24"
EXPECTED = {
    "dr-grpo-1.5b": f"{_DR_GRPO} 20.0, AMC 53.0, MATH500 74.2, Minerva 25.7, Olympiad 37.6, "
    "average 42.1 % (33.1 before)",
    "dr-grpo-3b": f"{_DR_GRPO} 6.7, AMC 18.1, MATH500 50.0, Minerva 14.3, Olympiad 14.7, "
    "average 20.7 % (0.1 before)",
    "dr-grpo-7b": f"{_DR_GRPO} 43.3, AMC 62.7, MATH500 80.0, Minerva 30.1, Olympiad 41.0, "
    "average 51.4 % (38.2 before)",
    "r1-zero": "DeepSeek-R1 (2501.12948 v2), R1-Zero of 671B: AIME24 pass@1 15.6 -> 77.9 %, "
    "MATH-500 95.9, GPQA Diamond 75.8, LiveCodeBench 50.0 %",
    "r1-zero-qwen-32b": "DeepSeek-R1 (2501.12948 v2), Qwen2.5-32B-Zero: AIME24 pass@1 47.0, cons@64 "
    "60.0, MATH-500 91.6, GPQA Diamond 55.0, LiveCodeBench 40.2 %",
}
"""What the papers report of the models that the presets train."""
