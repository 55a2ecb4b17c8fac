"""The problems and the reward that every trainer of `bench_train_step.py` gets."""

import hashlib

TEMPLATE = "chat"
GROUP_SIZE, MAX_NEW_TOKENS = 8, 128
# Of every step, for all trainers; SmolLM2 answers them in some 70 of the 128 tokens.
QUESTIONS = ("What is 12 + 9?", "How much is 4 times 6?")


def coin(completions: list[str], **_: object) -> list[float]:
    """0 or 1 by the text, so that hardly any group has rewards all alike."""
    return [float(hashlib.blake2b(text.encode()).digest()[0] & 1) for text in completions]
