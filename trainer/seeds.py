"""Random numbers as pure functions of (seed, what for, indices).

No generator is carried from step to step, so a resumed run, and a run on another number of ranks,
draws the same numbers. A stream of one completion is keyed once; its uniforms are then a
counter-based hash of the position.
"""

import hashlib
import random

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_key(seed: int, purpose: str, *indices: int) -> int:
    """A 64-bit key, as good as independent for different arguments."""
    text = f"{seed}/{purpose}/" + "/".join(map(str, indices))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def derive_shuffle(count: int, seed: int, purpose: str, *indices: int) -> list[int]:
    """A random order of range(count)."""
    order = list(range(count))
    random.Random(derive_key(seed, purpose, *indices)).shuffle(order)
    return order


def uniforms(keys: np.ndarray, position: int) -> np.ndarray:
    """One number in [0, 1) per key, for one position of its stream.

    The output function of SplitMix64 at counter `position + 1` from state `key`.

    Args:
        keys: uint64 of any shape.
        position: 0-based place in the streams.

    Returns: float64 of the same shape, multiples of 2^-53.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 14.
    """
    mixed = keys + np.uint64((position + 1) * int(_GOLDEN) & 0xFFFFFFFFFFFFFFFF)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) * 2.0**-53
