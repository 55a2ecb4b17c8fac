"""The problems and the reward that every trainer of `bench_train_step.py` gets."""

import hashlib

NAMES = ("Ann", "Bo", "Cai", "Dora", "Emil", "Fay", "Gus", "Hana")
NUM_PROMPTS, GROUP_SIZE, MAX_NEW_TOKENS = 2, 8, 128


def questions() -> list[str]:
    """Word problems of one length, more or less, and all different."""
    return [
        f"{name} has {3 + index} boxes with {2 * index + 4} pencils in each. {name} gives "
        f"{index + 5} pencils to a friend and buys {index + 7} more. How many pencils does "
        f"{name} have now?"
        for index, name in enumerate(NAMES * 4)
    ]


def coin(completions: list[str], **_: object) -> list[float]:
    """0 or 1 by the text, so that hardly any group has rewards all alike."""
    return [float(hashlib.blake2b(text.encode()).digest()[0] & 1) for text in completions]
