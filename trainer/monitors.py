"""What a run is judged by: accuracy, agreement, length and reflection, as pure functions; and an
alarm where a learned reward rises while the verifiable one falls.

Shape legend: P prompts, G or K completions per prompt, S completions in all, T steps of a window.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from trainer.rewards.language import MIN_WORDS, count_words, language_of
from trainer.rewards.matching import answer_key
from trainer.rewards.penalties import repetition_penalty

Category = Literal["correct", "incorrect", "unformatted", "truncated"]
CATEGORIES: tuple[Category, ...] = ("correct", "incorrect", "unformatted", "truncated")
AnswersAgree = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]
"""Tells of each pair of answers whether the two mean the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReflectionWords:
    """Words whose presence marks a completion as reflecting on its own work."""

    words: tuple[str, ...]
    """Matched without regard to case."""
    whole_words: bool
    """Match whole words only; otherwise anywhere, so that 'recheck' also finds 'rechecking'."""


R1_REFLECTION = ReflectionWords(
    words=(
        "wait",
        "mistake",
        "however",
        "but",
        "retry",
        "error",
        "verify",
        "wrong",
        "evaluate",
        "check",
    ),
    whole_words=True,
)
"""The experts' list of DeepSeek-R1, arXiv 2501.12948 v2, appendix C.2 and figure 9; whole words,
since 'but' and 'error' are parts of ordinary words (how the paper matched is not stated)."""

DRGRPO_REFLECTION = ReflectionWords(
    words=(
        "recheck",
        "rethink",
        "reassess",
        "reevaluate",
        "re-evaluate",
        "reevaluation",
        "re-examine",
        "reexamine",
        "reconsider",
        "reanalyze",
        "double-check",
        "check again",
        "think again",
        "verify again",
        "go over the steps",
    ),
    whole_words=False,
)
"""The list of Dr. GRPO, arXiv 2503.20783, appendix D, matched as substrings; 'wait' and 'try again'
are left out there as false positives. The paper also asks a language model; this does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean completion lengths in tokens; None where there is no such completion."""

    mean: float | None
    """Over all completions."""
    correct: float | None
    """Over the right ones."""
    wrong: float | None
    """Over the wrong ones."""


VERIFIED = ("reward/accuracy", "reward/code")
"""Metrics that no model judges: means over a step's completions."""
DIVERGENCE_WINDOW = 16
"""Steps that the two trends are taken over."""
DIVERGENCE_T = 3.0
"""A trend counts from so many of its standard errors on: by chance, with noise alone, one window in
200 has it, and one in 40,000 both."""


class DivergenceAlarm:
    """Tells when a reward of the user's, such as a reward model's score, rises while a verifiable
    one falls: what is learned then is to please the model.

    Args:
        rewards: names of the user's rewards, as `reward/<name>` is logged.

    Source: DeepSeek-R1 (2501.12948 v2), figure 6, where the reward model's score rises and the
    performance on CodeForces falls.
    """

    def __init__(self, rewards: Sequence[str]) -> None:
        self.rewards = tuple(rewards)
        self.kept: deque[Mapping[str, float | None]] = deque(maxlen=DIVERGENCE_WINDOW)
        self.raised: set[str] = set()

    def add(
        self, step: int, metrics: Mapping[str, float | None]
    ) -> tuple[dict[str, float | None], list[str]]:
        """Takes in the metrics of the next step.

        Returns: `divergence/<name>` of each reward, 1.0 where it and a verifiable one diverge over
        the last steps and else 0.0; and a sentence for each that did not diverge a step before.
        """
        if not self.rewards or not any(metrics.get(name) is not None for name in VERIFIED):
            return {}, []
        self.kept.append(metrics)
        found: dict[str, float | None] = {}
        sentences: list[str] = []
        for reward in self.rewards:
            sentence = self._divergence(step, reward)
            found[f"divergence/{reward}"] = float(sentence is not None)
            if sentence is not None and reward not in self.raised:
                sentences.append(sentence)
            if sentence is None:
                self.raised.discard(reward)
            else:
                self.raised.add(reward)
        return found, sentences

    def _divergence(self, step: int, reward: str) -> str | None:
        for verified in VERIFIED:
            names = (f"reward/{reward}", verified)
            both = [tuple(metrics.get(name) for name in names) for metrics in self.kept]
            if len(both) < DIVERGENCE_WINDOW or any(None in values for values in both):
                continue
            learned_T, verified_T = np.array(both, dtype=np.float64).T
            rise, fall = trend(learned_T), trend(verified_T)
            if rise.t < DIVERGENCE_T or fall.t > -DIVERGENCE_T:
                continue
            return (
                f"warning: step {step}: {reward} rose by {rise.change:.3g} over the last "
                f"{DIVERGENCE_WINDOW} steps while {verified.removeprefix('reward/')} fell by "
                f"{-fall.change:.3g}; the policy may be learning to please the reward alone (less "
                f"of it, or an earlier checkpoint)"
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """The straight line through values of consecutive steps, by least squares."""

    change: float
    """From the first to the last step."""
    t: float
    """The slope in its standard errors."""


def trend(values_T: Sequence[float] | np.ndarray) -> Trend:
    """The trend of at least three values.

    Raises:
        ValueError: there are fewer.
    """
    y_T = np.asarray(values_T, dtype=np.float64)
    if len(y_T) < 3:
        raise ValueError(f"values_T: expected at least 3 values, got {len(y_T)}")
    x_T = np.arange(len(y_T)) - (len(y_T) - 1) / 2
    squares = float(x_T @ x_T)
    slope = float(x_T @ y_T) / squares
    residuals_T = y_T - y_T.mean() - slope * x_T
    error = math.sqrt(float(residuals_T @ residuals_T) / (len(y_T) - 2) / squares)
    # Without noise the line has no error; one without a slope is no trend then either.
    t = slope / error if error else math.copysign(math.inf, slope) if slope else 0.0
    return Trend(change=slope * (len(y_T) - 1), t=t)


def pass_at_1(correct_PK: Sequence[Sequence[bool]]) -> float:
    """Share of right samples, averaged over each problem's samples, then over problems.

    Source: DeepSeek-R1, arXiv 2501.12948, section on evaluation: pass@1 = 1/k sum_i p_i.

    Raises:
        ValueError: there is no problem, or a problem has no sample.
    """
    _check_samples(correct_PK)
    return _mean([_mean([float(c) for c in correct_K]) for correct_K in correct_PK])


def cons_at_k(
    extracted_PK: Sequence[Sequence[str | None]], correct_PK: Sequence[Sequence[bool]]
) -> float:
    """Share of problems whose majority answer is right; see `majorities_right`.

    Raises:
        ValueError: as `pass_at_1`, or the two disagree in shape.
    """
    _check_samples(correct_PK)
    return _mean([float(right) for right in majorities_right(extracted_PK, correct_PK)])


def majorities_right(
    extracted_PK: Sequence[Sequence[str | None]],
    correct_PK: Sequence[Sequence[bool]],
    answers_agree: AnswersAgree | None = None,
) -> list[bool]:
    """Whether the majority answer of each problem is right, `[P]`.

    Completions without an answer have no vote; of groups of equal size the one whose first member
    came first wins. A problem without any answer counts as wrong.

    Args:
        extracted_PK: the extracted answers, None where there is none.
        correct_PK: whether each was graded right; a group is right when one of its members is.
        answers_agree: called with pairs of answers to the same problem that differ by `answer_key`,
            the earlier first. An answer joins the first group whose first member it agrees with.
            None: answers agree when their keys are equal.

    Raises:
        ValueError: the two disagree in shape.

    Source: DeepSeek-R1, arXiv 2501.12948, cons@64 by majority vote.
    """
    if [len(answers_K) for answers_K in extracted_PK] != [len(row_K) for row_K in correct_PK]:
        raise ValueError("extracted_PK: expected the shape of correct_PK, got another")
    return [
        _majority_is_right(answers_K, correct_K, answers_agree)
        for answers_K, correct_K in zip(extracted_PK, correct_PK, strict=True)
    ]


def reflection_rate(texts: Sequence[str], words: ReflectionWords = R1_REFLECTION) -> float:
    """Share of texts that hold at least one of the words; 0 for no texts."""
    pattern = _word_pattern(words)
    return _mean([float(pattern.search(text) is not None) for text in texts]) if texts else 0.0


def reflection_words(text: str, words: ReflectionWords = R1_REFLECTION) -> int:
    """How many times the words occur in a text.

    Source: DeepSeek-R1, arXiv 2501.12948 v2, figure 9 counts words (its normalisation is not
    stated; the mean over completions is what is logged here).
    """
    return sum(1 for _ in _word_pattern(words).finditer(text))


def category(*, truncated: bool, extracted: str | None, correct: bool) -> Category:
    """What became of a completion: cut at the budget, without an answer, right or wrong.

    Source: Dr. GRPO, arXiv 2503.20783, figure 14 and table 5.
    """
    if truncated:
        return "truncated"
    if correct:
        return "correct"
    return "unformatted" if extracted is None else "incorrect"


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of a completion's n-grams of tokens that occurred in it before; 0 below n tokens.

    Source: seq-rep-4 of Welleck et al. 2020, arXiv 1908.04319, section 6.
    """
    return abs(repetition_penalty(token_ids, ngram=n))


def language_share(text: str, question: str = "") -> float | None:
    """Share of a completion's words that are in the question's language, by script; English where
    the question has no words. None for a text of too few words.

    Source: DeepSeek-R1, arXiv 2501.12948 v2, equation 7 and figure 7.
    """
    counts = count_words(text, language_of(question) or "en")
    return counts.target / counts.total if counts.total >= MIN_WORDS else None


def lengths_by_correctness(lengths_S: Sequence[int], correct_S: Sequence[bool]) -> Lengths:
    """Mean length in tokens of all, right and wrong completions.

    Source: Dr. GRPO, arXiv 2503.20783, figure 5, plots 3 and 4.

    Raises:
        ValueError: the two differ in length.
    """
    if len(lengths_S) != len(correct_S):
        raise ValueError(
            f"correct_S: expected {len(lengths_S)} values as in lengths_S, got {len(correct_S)}"
        )
    right = [length for length, correct in zip(lengths_S, correct_S, strict=True) if correct]
    wrong = [length for length, correct in zip(lengths_S, correct_S, strict=True) if not correct]
    return Lengths(
        mean=_mean(lengths_S) if lengths_S else None,
        correct=_mean(right) if right else None,
        wrong=_mean(wrong) if wrong else None,
    )


def zero_spread_share(rewards_PG: Sequence[Sequence[float]]) -> float:
    """Share of groups whose rewards are all the same, which give no gradient.

    Source: DAPO, arXiv 2503.14476, section 3.2 (groups of accuracy 0 or 1).

    Raises:
        ValueError: there is no group, or a group is empty.
    """
    _check_samples(rewards_PG)
    return _mean([float(max(rewards_G) == min(rewards_G)) for rewards_G in rewards_PG])


def unanimous_shares(correct_PG: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Shares of groups in which every completion is right, and in which every one is wrong.

    Source: DAPO, arXiv 2503.14476, section 3.2 and figure 3b; the first rises with training.

    Raises:
        ValueError: there is no group, or a group is empty.
    """
    _check_samples(correct_PG)
    return (
        _mean([float(all(group)) for group in correct_PG]),
        _mean([float(not any(group)) for group in correct_PG]),
    )


def _majority_is_right(
    answers_K: Sequence[str | None],
    correct_K: Sequence[bool],
    answers_agree: AnswersAgree | None,
) -> bool:
    votes: dict[object, int] = {}
    right: dict[object, bool] = {}
    first_answer: dict[object, str] = {}
    group_of: dict[object, object] = {}
    for answer, correct in zip(answers_K, correct_K, strict=True):
        if answer is None:
            continue
        key = answer_key(answer)
        if key not in group_of:
            group_of[key] = _group(key, answer, first_answer, answers_agree)
        group = group_of[key]
        first_answer.setdefault(group, answer)
        votes[group] = votes.get(group, 0) + 1
        right[group] = right.get(group, False) or correct
    # max keeps the first of equals, and a dict keeps the order in which groups came.
    return bool(votes) and right[max(votes, key=votes.__getitem__)]


def _group(
    key: object,
    answer: str,
    first_answer: dict[object, str],
    answers_agree: AnswersAgree | None,
) -> object:
    """The key of the group that an answer with a new key belongs to."""
    if answers_agree is None or not first_answer:
        return key
    agreements = answers_agree([(first, answer) for first in first_answer.values()])
    for group, agree in zip(first_answer, agreements, strict=True):
        if agree:
            return group
    return key


@lru_cache(maxsize=8)
def _word_pattern(words: ReflectionWords) -> re.Pattern[str]:
    alternatives = "|".join(re.escape(word) for word in words.words)
    boundary = r"\b" if words.whole_words else ""
    return re.compile(f"{boundary}(?:{alternatives}){boundary}", re.IGNORECASE)


def _check_samples(values_PK: Sequence[Sequence[object]]) -> None:
    if not values_PK or not all(len(values_K) for values_K in values_PK):
        raise ValueError("samples: expected at least one problem and one sample each, got none")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
