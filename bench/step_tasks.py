"""The problems and the reward that every trainer of `bench_train_step.py` gets."""

import hashlib

TEMPLATE = "chat"
NUM_PROMPTS, GROUP_SIZE, MAX_NEW_TOKENS = 2, 8, 128


def questions() -> list[str]:
    """Sums and products; SmolLM2 answers them in some 70 tokens of the 128 it may take."""
    return [
        f"What is {index + 12} + {2 * index + 9}?"
        if index % 2
        else f"How much is {index + 3} times {index + 5}?"
        for index in range(32)
    ]


def coin(completions: list[str], **_: object) -> list[float]:
    """0 or 1 by the text, so that hardly any group has rewards all alike."""
    return [float(hashlib.blake2b(text.encode()).digest()[0] & 1) for text in completions]
