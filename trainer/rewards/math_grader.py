"""Grades final answers of mathematics problems against their golds.

Same text and same rational number are decided here. Everything else goes to worker processes
(`math_pool`), which read both sides with our own grammar, compare them exactly or numerically to
many digits, and ask math-verify only about what that grammar leaves out. Model text is never
evaluated as code, and its cost is bounded before anything is computed.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

from trainer.math_answers.reading import why_unusable
from trainer.rewards.matching import MAX_ANSWER_CHARS, answers_match
from trainer.rewards.math_pool import Verdict, WorkerPool

GRADE_STATUSES = ("ok", "timeout", "parse_fail", "too_long", "crash")
MODES = ("strict", "lenient")

Gold = str | list[str]


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether an answer equals its gold, and how that was found."""

    correct: bool
    status: str
    """One of GRADE_STATUSES; whatever is not "ok" is never correct.

    "ok": compared. "parse_fail": there is no answer, or it cannot be read, or the gold cannot be
    used. "too_long": longer than MAX_ANSWER_CHARS and not the gold's very text. "timeout": would
    cost, or did cost, more than allowed. "crash": the worker process died.
    """


class MathGrader:
    """Grades answers against golds in worker processes; a context manager.

    `grade` may be called from any thread and from several at once, in the process that made the
    grader. The same input gets the same grade: the limit of a comparison is CPU time, and answers
    are cached.

    Args:
        workers: processes that compare.
        timeout_seconds: CPU seconds that the comparison of one answer may take.
        mode: "strict" for training: equal means equal. "lenient" for parity with published
            evaluations: also right is what math-verify accepts of LaTeX with its default settings,
            such as decimals equal to six places or the last side of any equation.
        cache_size: graded pairs that are remembered.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout_seconds: float = 2.0,
        mode: Literal["strict", "lenient"] = "strict",
        cache_size: int = 50_000,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(
                f"timeout_seconds: expected a positive, finite number, got {timeout_seconds}"
            )
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if cache_size < 0:
            raise ValueError(f"cache_size: expected 0 or more, got {cache_size}")
        self._mode = mode
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[tuple[str, ...], str], Grade] = OrderedDict()
        self._lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._is_closed = False
        self._pool = WorkerPool(workers, timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; grading is over."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._pool.close()

    def grade(self, pairs: Sequence[tuple[Gold, str | None]]) -> list[Grade]:
        """One grade per (gold, answer), in order; never raises for what an answer holds.

        Args:
            pairs: the gold, or a list of golds any of which may match, and the final answer as
                `extract_answer` gives it; None where there is no answer, which is a "parse_fail".

        Raises:
            TypeError: a gold or an answer is not of these types.
            RuntimeError: the grader is closed, or belongs to another process, or no worker starts.
        """
        if self._is_closed:
            raise RuntimeError("MathGrader: expected an open grader, got a closed one")
        if os.getpid() != self._owner_pid:
            raise RuntimeError("MathGrader: expected the process that made it, got a fork of it")
        keys = [(_gold_tuple(gold), _checked_answer(answer)) for gold, answer in pairs]
        grades = {key: self._grade_here(*key) for key in dict.fromkeys(keys)}
        verdicts = {
            (golds, answer): self._pool.submit(list(_usable(golds)), answer, self._mode)
            for (golds, answer), grade in grades.items()
            if grade is None and answer is not None
        }
        for (golds, answer), verdict in verdicts.items():
            grades[golds, answer] = self._remember(golds, answer, verdict.result())
        return [grade for key in keys if (grade := grades[key]) is not None]

    def _grade_here(self, golds: tuple[str, ...], answer: str | None) -> Grade | None:
        """The grade where it takes no worker to tell."""
        usable = _usable(golds)
        if answer is None or not usable:
            return Grade(False, "parse_fail")
        if any(answers_match(gold, answer) for gold in usable):
            return Grade(True, "ok")
        if len(answer.strip()) > MAX_ANSWER_CHARS:
            return Grade(False, "too_long")
        with self._lock:
            grade = self._cache.get((golds, answer))
            if grade is not None:
                self._cache.move_to_end((golds, answer))
        return grade

    def _remember(self, golds: tuple[str, ...], answer: str, verdict: Verdict) -> Grade:
        grade = Grade(verdict.correct, verdict.status)
        if verdict.repeatable:
            with self._lock:
                self._cache[golds, answer] = grade
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        return grade


@lru_cache(maxsize=50_000)
def check_gold(gold: str) -> str | None:
    """Why a gold cannot be used, in one clause; None when it can.

    For the loading of data: a problem whose gold cannot be used teaches nothing, since no answer
    to it is ever graded as correct.
    """
    if not gold.strip():
        return "it is empty"
    if len(gold.strip()) > MAX_ANSWER_CHARS:
        return f"it is longer than {MAX_ANSWER_CHARS} characters"
    return why_unusable(gold)


def _usable(golds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(gold for gold in golds if check_gold(gold) is None)


def _gold_tuple(gold: Gold) -> tuple[str, ...]:
    is_several = isinstance(gold, list | tuple)
    golds = (gold,) if isinstance(gold, str) else tuple(gold) if is_several else ()
    if not golds or not all(isinstance(one, str) for one in golds):
        raise TypeError(f"gold: expected a string or a list of strings, got {gold!r}")
    return golds


def _checked_answer(answer: str | None) -> str | None:
    if answer is not None and not isinstance(answer, str):
        raise TypeError(f"answer: expected a string or None, got {type(answer).__name__}")
    return answer
