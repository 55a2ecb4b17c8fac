"""Random numbers: known values, uniformity, independence of streams."""

import numpy as np

from trainer.seeds import derive_key, derive_shuffle, uniforms


def test_uniforms_are_splitmix64_outputs() -> None:
    # First outputs of SplitMix64 for seed 1234567, as published with the reference code.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = [uniforms(np.array([1234567], dtype=np.uint64), place)[0] for place in range(3)]
    assert drawn == [(value >> 11) * 2.0**-53 for value in published]


def test_uniforms_are_uniform_over_keys_and_positions() -> None:
    keys = np.array([derive_key(3, "test", index) for index in range(400)], dtype=np.uint64)
    drawn = np.stack([uniforms(keys, position) for position in range(50)])
    assert 0.0 <= drawn.min() and drawn.max() < 1.0
    counts, _ = np.histogram(drawn, bins=20, range=(0.0, 1.0))
    # Chi-square with 19 degrees of freedom: 43.8 has probability 0.001.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    neighbours = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(drawn[1:].size)


def test_derive_key_depends_on_every_argument() -> None:
    arguments = [(0, "a", 1, 2), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 1), (0, "a", 12)]
    assert len({derive_key(*each) for each in arguments}) == len(arguments)
    assert derive_key(0, "a", 1) == derive_key(0, "a", 1) < 2**64


def test_derive_shuffle_is_a_permutation_that_depends_on_the_seed() -> None:
    first, second = derive_shuffle(50, 0, "x", 1), derive_shuffle(50, 1, "x", 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first == derive_shuffle(50, 0, "x", 1)
