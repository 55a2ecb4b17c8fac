"""Length and repetition rewards against values worked out by hand, and against TRL's."""

import math
import random

import pytest

from trainer.rewards.penalties import (
    cosine_length_reward,
    linear_length_rewards,
    overlong_penalty,
    repetition_penalty,
)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0.0), (16_384, 0.0), (17_408, -0.25), (18_432, -0.5), (20_480, -1.0), (20_481, -1.0)],
)
def test_overlong_penalty_is_that_of_dapo(length: int, expected: float) -> None:
    assert overlong_penalty(length, max_length=20_480, buffer=4_096) == expected


def test_overlong_penalty_without_a_buffer_is_a_step() -> None:
    assert [overlong_penalty(n, max_length=10, buffer=0) for n in (9, 10, 11)] == [0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("length", "correct", "expected"),
    [
        (0, True, 1.0),
        (25, True, 0.75 + 0.25 / math.sqrt(2)),
        (50, True, 0.75),
        (100, True, 0.5),
        (500, True, 0.5),
        (0, False, -1.0),
        (50, False, -0.75),
        (100, False, -0.5),
        (500, False, -0.5),
    ],
)
def test_cosine_reward_is_half_a_wave_between_its_ends(
    length: int, correct: bool, expected: float
) -> None:
    assert cosine_length_reward(length, max_length=100, correct=correct) == pytest.approx(expected)


def test_linear_rewards_rank_a_group_by_length() -> None:
    lengths, correct = [10, 20, 30, 10, 20, 30], [True] * 3 + [False] * 3
    assert linear_length_rewards(lengths, correct) == [0.5, 0.0, -0.5, 0.0, 0.0, -0.5]
    assert linear_length_rewards([7, 7], [True, False]) == [0.0, 0.0]
    assert linear_length_rewards([], []) == []


@pytest.mark.parametrize(
    ("items", "ngram", "expected"),
    [
        ([1, 2, 3, 4], 3, 0.0),
        ([5] * 102, 3, 1 / 100 - 1),
        ([1, 2, 1, 2, 1], 2, 2 / 4 - 1),
        ("a b a b c".split(), 1, 3 / 5 - 1),
        ([1, 2], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_repetition_penalty_counts_ngrams_seen_before(
    items: list[object], ngram: int, expected: float
) -> None:
    assert repetition_penalty(items, ngram=ngram) == pytest.approx(expected)


def test_penalties_agree_with_trl() -> None:
    rewards = pytest.importorskip("trl.rewards")
    generator = random.Random(0)
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=60, soft_punish_cache=25)
    repetition = rewards.get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0)
    for _ in range(200):
        ids = generator.choices(range(4), k=generator.randrange(80))
        expected = overlong(completion_ids=[ids])[0]
        assert overlong_penalty(len(ids), max_length=60, buffer=25) == pytest.approx(expected)
        expected = repetition(completion_ids=[ids])[0]
        assert repetition_penalty(ids, ngram=3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlong_penalty(-1, max_length=5, buffer=1), "length: expected a number >= 0"),
        (lambda: overlong_penalty(1, max_length=5, buffer=6), "buffer: expected 0 to max_length"),
        (lambda: cosine_length_reward(1, max_length=0, correct=True), "max_length: expected"),
        (lambda: linear_length_rewards([1], []), "correct_G: expected 1 values"),
        (lambda: repetition_penalty([1], ngram=0), "ngram: expected a number >= 1"),
    ],
    ids=["length", "buffer", "max-length", "group", "ngram"],
)
def test_penalties_refuse_arguments_out_of_range(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
