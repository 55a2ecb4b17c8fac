"""Rewards that look at a completion's length and repetitions: one number from lengths or token ids.

Lengths are tokens, the token that ended the completion included. Symbols as in the papers: |y| the
length, L_max the longest completion there can be, L_cache the buffer below it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

COSINE_CORRECT = (0.5, 1.0)
"""Cosine reward of a right answer at L_max and at length 0."""
COSINE_WRONG = (-0.5, -1.0)
"""The same of a wrong one: giving up early costs more than running out of room."""


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """From 0 at `max_length - buffer` tokens down in a straight line to -1 at `max_length`.

        R = 0                                   for |y| <= L_max - L_cache
        R = ((L_max - L_cache) - |y|) / L_cache in between
        R = -1                                  for |y| > L_max

    Args:
        length: |y|, at least 0.
        max_length: L_max, at least 1.
        buffer: L_cache, from 0 to `max_length`; 0 leaves the step from 0 to -1 beyond L_max.

    Raises:
        ValueError: an argument is out of its range.

    Source: DAPO, arXiv 2503.14476, eq. 13 (L_max 20,480, L_cache 4,096).
    """
    _check_length(length, max_length)
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer: expected 0 to max_length = {max_length}, got {buffer}")
    if length > max_length:
        return -1.0
    over = length - (max_length - buffer)
    return -over / buffer if over > 0 else 0.0


def cosine_length_reward(
    length: int,
    *,
    max_length: int,
    correct: bool,
    correct_values: tuple[float, float] = COSINE_CORRECT,
    wrong_values: tuple[float, float] = COSINE_WRONG,
) -> float:
    """Half a cosine wave over the length: a right answer earns more when short, a wrong one less.

        R = v_long + (v_short - v_long) (1 + cos(pi min(|y| / L_max, 1))) / 2

    Args:
        length: |y|, at least 0.
        max_length: L_max, at least 1.
        correct: which of the two pairs of values holds.
        correct_values, wrong_values: (v_long, v_short), the rewards at L_max and at length 0.

    Raises:
        ValueError: an argument is out of its range.

    Source: Yeo et al. 2025, arXiv 2502.03373, appendix C.1; the values are those of open-r1 and
    TRL. The paper also gives completions beyond L_max a penalty, which is `overlong_penalty` here.
    """
    _check_length(length, max_length)
    at_long, at_short = correct_values if correct else wrong_values
    share = min(length / max_length, 1.0)
    return at_long + (at_short - at_long) * (1 + math.cos(math.pi * share)) / 2


def linear_length_rewards(lengths_G: Sequence[int], correct_G: Sequence[bool]) -> list[float]:
    """Each completion's place between the shortest and the longest of its group.

        lambda = 1/2 - (|y| - min) / (max - min);  R = lambda if right, min(0, lambda) if wrong

    Args:
        lengths_G: |y| of the completions of one prompt.
        correct_G: whether each has the right answer.

    Returns:
        `[G]`, from -0.5 to 0.5; all 0 where all lengths are the same.

    Raises:
        ValueError: the two differ in length.

    Source: Kimi k1.5, arXiv 2501.12599, section 2.3.3, as open-r1 implements it.
    """
    if len(lengths_G) != len(correct_G):
        raise ValueError(
            f"correct_G: expected {len(lengths_G)} values as in lengths_G, got {len(correct_G)}"
        )
    if not lengths_G:
        return []
    shortest, spread = min(lengths_G), max(lengths_G) - min(lengths_G)
    if spread == 0:
        return [0.0] * len(lengths_G)
    places_G = [0.5 - (length - shortest) / spread for length in lengths_G]
    return [
        place if correct else min(0.0, place)
        for place, correct in zip(places_G, correct_G, strict=True)
    ]


def repetition_penalty(items: Sequence[Hashable], *, ngram: int = 3) -> float:
    """Minus the share of n-grams that occurred before: 0 for no repetition, towards -1 for a loop.

        R = (distinct n-grams) / (n-grams) - 1

    Args:
        items: token ids, which work for every language, or words.
        ngram: n, at least 1.

    Returns:
        From -1 (exclusive) to 0; 0 where there are fewer than n items. Time linear in the items.

    Raises:
        ValueError: n is not positive.

    Source: Yeo et al. 2025, arXiv 2502.03373, repetition penalty; the form is that of TRL (n 3).
    """
    if ngram < 1:
        raise ValueError(f"ngram: expected a number >= 1, got {ngram}")
    total = len(items) - ngram + 1
    if total < 1:
        return 0.0
    distinct = len(set(zip(*(items[start : start + total] for start in range(ngram)), strict=True)))
    return distinct / total - 1.0


def _check_length(length: int, max_length: int) -> None:
    if length < 0:
        raise ValueError(f"length: expected a number >= 0, got {length}")
    if max_length < 1:
        raise ValueError(f"max_length: expected a number >= 1, got {max_length}")
