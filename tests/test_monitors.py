"""What a run is judged by, on cases that can be counted by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from trainer.monitors import (
    DIVERGENCE_WINDOW,
    DRGRPO_REFLECTION,
    R1_REFLECTION,
    DivergenceAlarm,
    Trend,
    category,
    cons_at_k,
    language_share,
    lengths_by_correctness,
    majorities_right,
    pass_at_1,
    reflection_rate,
    reflection_words,
    repetition,
    trend,
    unanimous_shares,
    zero_spread_share,
)


def test_pass_at_1_averages_problems_not_samples() -> None:
    assert pass_at_1([[True], [False, False, False]]) == 0.5


def test_pass_at_1_refuses_a_problem_without_samples() -> None:
    with pytest.raises(ValueError, match="at least one problem and one sample"):
        pass_at_1([[True], []])


def test_cons_at_k_counts_equivalent_answers_together() -> None:
    answers_PK = [["3", "1/2", "0.5", "3.5", "\\frac12"]]
    assert cons_at_k(answers_PK, [[False, True, True, False, True]]) == 1.0


def test_cons_at_k_outvotes_a_right_minority() -> None:
    assert cons_at_k([["4", "4", "5"]], [[False, False, True]]) == 0.0


def test_cons_at_k_breaks_a_tie_for_the_answer_that_came_first() -> None:
    assert cons_at_k([["5", "4", "4", "5"]], [[True, False, False, True]]) == 1.0
    assert cons_at_k([["4", "5", "5", "4"]], [[False, True, True, False]]) == 0.0


def test_cons_at_k_gives_missing_answers_no_vote() -> None:
    assert cons_at_k([[None, None, "5"]], [[False, False, True]]) == 1.0
    assert cons_at_k([[None, None]], [[False, False]]) == 0.0


def test_cons_at_k_refuses_shapes_that_disagree() -> None:
    with pytest.raises(ValueError, match="extracted_PK: expected the shape of correct_PK"):
        cons_at_k([["5"]], [[True, True]])


def agree_by_first_letter(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    return [one[0] == other[0] for one, other in pairs]


def test_majority_joins_answers_that_agree_though_their_keys_differ() -> None:
    extracted, correct = [["ax", "b", "b", "ay", "az"]], [[False, True, True, False, False]]
    assert majorities_right(extracted, correct) == [True]
    assert majorities_right(extracted, correct, agree_by_first_letter) == [False]


def test_majority_tie_of_joined_groups_goes_to_the_one_that_came_first() -> None:
    extracted = [["b", "ax", "ay", "b"], ["ax", "b", "b", "ay"]]
    correct = [[False, True, True, False]] * 2
    correct[1] = [True, False, False, True]
    assert majorities_right(extracted, correct, agree_by_first_letter) == [False, True]


def test_majority_asks_about_each_pair_of_different_answers_once() -> None:
    asked: list[tuple[str, str]] = []

    def never(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        asked.extend(pairs)
        return [False] * len(pairs)

    majorities_right([["1", "x", "1.0", "y", "x"]], [[False] * 5], never)
    assert asked == [("1", "x"), ("1", "y"), ("x", "y")]


def test_reflection_rate_of_the_r1_list_needs_whole_words() -> None:
    texts = ["Wait, that is off.", "the butter of the attribute", "let me CHECK", "terror", ""]
    assert reflection_rate(texts, R1_REFLECTION) == pytest.approx(2 / 5)


def test_reflection_rate_of_the_drgrpo_list_finds_parts_of_words() -> None:
    texts = ["after rechecking", "Let me Re-Evaluate it", "wait, try again", "I check it"]
    assert reflection_rate(texts, DRGRPO_REFLECTION) == 0.5


def test_reflection_rate_of_no_texts_is_zero() -> None:
    assert reflection_rate([]) == 0.0


def test_reflection_words_counts_every_occurrence_in_one_text() -> None:
    assert reflection_words("Wait, wait: but the butter. CHECK!", R1_REFLECTION) == 4
    assert reflection_words("recheck it, then go over the steps", DRGRPO_REFLECTION) == 2
    assert reflection_words("", R1_REFLECTION) == 0


@pytest.mark.parametrize(
    ("truncated", "extracted", "correct", "expected"),
    [
        (True, None, False, "truncated"),
        (True, "5", True, "truncated"),
        (False, "5", True, "correct"),
        (False, "5", False, "incorrect"),
        (False, None, False, "unformatted"),
    ],
)
def test_category_of_a_completion(
    truncated: bool, extracted: str | None, correct: bool, expected: str
) -> None:
    assert category(truncated=truncated, extracted=extracted, correct=correct) == expected


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([7] * 10, 6 / 7), ([1, 2] * 4, 3 / 5)],
)
def test_repetition_is_the_share_of_ngrams_seen_before(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share)


def test_language_share_leaves_out_mathematics_and_texts_without_words() -> None:
    assert language_share("so the value of x is $\\frac{1}{2}$ and we are done") == 1.0
    mixed = language_share("we know that 答案是正确的 because of this")
    assert mixed is not None and 0.3 < mixed < 0.9
    assert language_share("$x = 5$") is None
    assert language_share(
        "we know that 答案是正确的 because of this", "几加一得二？"
    ) == pytest.approx(1 - mixed)


def test_lengths_are_split_by_correctness() -> None:
    lengths = lengths_by_correctness([10, 20, 60], [True, True, False])
    assert (lengths.mean, lengths.correct, lengths.wrong) == (30.0, 15.0, 60.0)


def test_lengths_of_an_empty_part_are_none() -> None:
    lengths = lengths_by_correctness([10], [True])
    assert (lengths.mean, lengths.correct, lengths.wrong) == (10.0, 10.0, None)
    assert lengths_by_correctness([], []).mean is None


def test_lengths_refuse_flags_of_another_number() -> None:
    with pytest.raises(ValueError, match="correct_S: expected 2 values"):
        lengths_by_correctness([1, 2], [True])


def test_zero_spread_share_counts_groups_of_equal_rewards() -> None:
    assert zero_spread_share([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.2, 0.2]]) == 0.75


def test_unanimous_shares_tell_all_right_from_all_wrong() -> None:
    groups = [[True, True], [True, False], [False, False], [False, False], [True]]
    assert unanimous_shares(groups) == (pytest.approx(0.4), pytest.approx(0.4))


def noise(seed: int, size: float, count: int = 60) -> np.ndarray:
    return size * np.random.default_rng(seed).standard_normal(count)


def alarms(learned: np.ndarray, verified: np.ndarray) -> tuple[list[float], list[str]]:
    """`divergence/helpful` of every step, and all sentences."""
    alarm, flags, sentences = DivergenceAlarm(["helpful"]), [], []
    for step, (score, accuracy) in enumerate(zip(learned, verified, strict=True), start=1):
        values = {"reward/helpful": float(score), "reward/accuracy": float(accuracy)}
        found, told = alarm.add(step, values)
        flags.append(found["divergence/helpful"])
        sentences += told
    return flags, sentences


def test_alarm_is_raised_once_when_the_score_rises_and_accuracy_falls() -> None:
    """As figure 6 of DeepSeek-R1: accuracy follows the score for a while, then falls."""
    learned = np.linspace(0, 2, 60) + noise(0, 0.05)
    turn = 30
    verified = np.concatenate([np.linspace(0.4, 0.6, turn), np.linspace(0.6, 0.3, 60 - turn)])
    flags, sentences = alarms(learned, verified + noise(1, 0.01))
    assert sum(flags[:turn]) == 0 and all(flags[turn + DIVERGENCE_WINDOW :])
    (sentence,) = sentences
    assert "helpful rose by" in sentence and "accuracy fell by" in sentence


@pytest.mark.parametrize(
    ("rise", "fall"), [(2.0, 0.0), (0.0, -0.3), (2.0, 0.3), (-2.0, -0.3)], ids=str
)
def test_alarm_needs_both_trends(rise: float, fall: float) -> None:
    learned = np.linspace(0, rise, 60) + noise(2, 0.2)
    verified = 0.5 + np.linspace(0, fall, 60) + noise(3, 0.05)
    assert not any(alarms(learned, verified)[0])


def test_alarm_is_rare_where_there_is_noise_alone() -> None:
    """Each of 200 series of 60 steps has 45 windows, which share their steps."""
    raised = sum(any(alarms(noise(i, 1.0), noise(1000 + i, 1.0))[0]) for i in range(200))
    assert raised <= 2


def test_alarm_is_quiet_without_a_learned_reward_or_before_its_window_is_full() -> None:
    assert DivergenceAlarm([]).add(1, {"reward/accuracy": 0.5}) == ({}, [])
    early = slice(0, DIVERGENCE_WINDOW - 1)
    assert not any(alarms(np.arange(60.0)[early], -np.arange(60.0)[early])[0])
    # General prompts come in the last part only.
    alarm = DivergenceAlarm(["helpful"])
    for step in range(1, 3 * DIVERGENCE_WINDOW):
        score = float(step) if step > 2 * DIVERGENCE_WINDOW else None
        found, _ = alarm.add(step, {"reward/helpful": score, "reward/accuracy": -float(step)})
        assert found == {"divergence/helpful": 0.0}
    found, sentences = alarm.add(99, {"reward/helpful": 99.0, "reward/accuracy": -99.0})
    assert found == {"divergence/helpful": 1.0} and len(sentences) == 1


def test_trend_is_that_of_linear_regression() -> None:
    values = noise(4, 1.0, 16) + 0.1 * np.arange(16)
    slope, _ = np.polyfit(np.arange(16), values, 1)
    correlation = np.corrcoef(np.arange(16), values)[0, 1]
    measured = trend(values)
    assert measured.change == pytest.approx(15 * slope, rel=1e-9)
    # The t value of a slope is that of the correlation.
    expected = correlation * math.sqrt(14 / (1 - correlation**2))
    assert measured.t == pytest.approx(expected, rel=1e-9)
    assert trend([1.0, 1.0, 1.0]) == Trend(change=0.0, t=0.0)
    assert trend([1.0, 2.0, 3.0]).t == math.inf
    with pytest.raises(ValueError, match="at least 3 values"):
        trend([1.0, 2.0])
