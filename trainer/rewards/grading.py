"""What a completion answers, and whether that is right: compared, verified or run.

Who grades is the problem's: its tests where it has some, else its verifier, else its golds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from trainer.config import RewardOptions, UsageError
from trainer.rewards.code_extraction import extract_code
from trainer.rewards.code_grader import CodeGrader
from trainer.rewards.code_runner import TestStatus
from trainer.rewards.code_sandbox import SandboxUnavailable
from trainer.rewards.extraction import extract_answer
from trainer.rewards.matching import answers_match
from trainer.rewards.math_grader import GRADE_STATUSES, Gold, MathGrader
from trainer.templates import Template

if TYPE_CHECKING:
    from trainer.tasks import Problem

NOT_GRADED = ("no_answer", "truncated")
"""Statuses of a completion that has no answer in its place, and of one that was cut off."""
GENERAL = "general"
"""Status of a completion of a general prompt, which has no grade."""
STATUSES = {
    "accuracy": (*GRADE_STATUSES, *NOT_GRADED),
    "code": (*get_args(TestStatus), "too_long", *NOT_GRADED),
}
"""How a grade came about, by the part of the reward that it decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A completion of a problem, as rewards see it."""

    problem: Problem
    prompt: str
    """The text the completion was sampled after."""
    text: str
    """The completion."""
    token_ids: np.ndarray
    """int64 `[n]`, the completion."""
    truncated: bool
    """Cut at the length limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The grade of an attempt."""

    part: Literal["accuracy", "code"] | None
    """The part of the reward that it decides: code for problems with tests, none for general
    prompts."""
    extracted: str | None
    """The answer or program that was graded."""
    value: float = 0.0
    """From 0 to 1; only a verifier gives what is between."""
    status: str
    """One of STATUSES, or GENERAL."""

    @property
    def correct(self) -> bool:
        """Entirely right."""
        return self.value == 1.0


class AnswerGrader:
    """Grades attempts, from any thread; owns what compares answers and runs programs.

    Args:
        options: how answers are compared and programs are run.
        template: where the answer is read from.
        runs_code: opens the sandbox, which problems with tests need.

    Raises:
        UsageError: the sandbox cannot be had.
    """

    def __init__(self, options: RewardOptions, template: Template, *, runs_code: bool) -> None:
        self.template = template
        self._math: MathGrader | None = None
        self._code: CodeGrader | None = None
        with ExitStack() as stack:
            if options.grader != "exact":
                self._math = stack.enter_context(
                    MathGrader(
                        workers=options.grader_workers,
                        timeout_seconds=options.grader_timeout,
                        mode=options.grader,
                    )
                )
            if runs_code:
                try:
                    grader = CodeGrader(
                        workers=options.grader_workers,
                        sandbox=options.sandbox,
                        stop_at_failure=True,
                    )
                except SandboxUnavailable as error:
                    raise UsageError(f"--sandbox: {error}") from error
                self._code = stack.enter_context(grader)
            self._open = stack.pop_all()

    @property
    def sandbox_level(self) -> str | None:
        """The protection that programs run under, in one line; None where none are run."""
        return None if self._code is None else self._code.level

    def close(self) -> None:
        """Ends worker processes and the sandbox."""
        self._open.close()

    def grade(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        """The grade of each attempt, in order.

        Raises:
            ValueError: a problem has tests, and the grader was made without `runs_code`.
        """
        outcomes = [self._read(attempt) for attempt in attempts]
        compared, run = [], []
        for at, (attempt, outcome) in enumerate(zip(attempts, outcomes, strict=True)):
            if outcome.extracted is None:
                continue
            if outcome.part == "code":
                run.append(at)
            elif attempt.problem.verifier is not None:
                value = min(max(attempt.problem.verifier(outcome.extracted), 0.0), 1.0)
                outcomes[at] = _graded(outcome, value, "ok")
            else:
                compared.append(at)
        pairs = [(attempts[at].problem.answer, outcomes[at].extracted) for at in compared]
        for at, (correct, status) in zip(compared, self._compare(pairs), strict=True):
            outcomes[at] = _graded(outcomes[at], float(correct), status)
        if run:
            if self._code is None:
                raise ValueError("runs_code: expected True for problems with tests, got False")
            grades = self._code.grade(
                [outcomes[at].extracted for at in run], [attempts[at].problem.tests for at in run]
            )
            for at, grade in zip(run, grades, strict=True):
                outcomes[at] = _graded(outcomes[at], float(grade.correct), grade.status)
        return outcomes

    def answers_agree(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the two answers of each pair are equal, the first taken as the gold."""
        return [correct for correct, _ in self._compare(pairs)]

    def _read(self, attempt: Attempt) -> Outcome:
        """The attempt's answer, not graded yet."""
        if attempt.problem.is_general:
            return Outcome(part=None, extracted=None, status=GENERAL)
        extract = extract_code if attempt.problem.tests else extract_answer
        answer = None if attempt.truncated else extract(attempt.text, self.template)
        return Outcome(
            part="code" if attempt.problem.tests else "accuracy",
            extracted=answer,
            status="truncated" if attempt.truncated else "no_answer",
        )

    def _compare(self, pairs: Sequence[tuple[Gold, str | None]]) -> list[tuple[bool, str]]:
        """Whether each answer equals its gold, or one of its golds, and the status of the grade."""
        if self._math is not None:
            return [(grade.correct, grade.status) for grade in self._math.grade(pairs)]
        return [(_matches(gold, answer), "ok") for gold, answer in pairs]


def _graded(outcome: Outcome, value: float, status: str) -> Outcome:
    return Outcome(part=outcome.part, extracted=outcome.extracted, value=value, status=status)


def _matches(gold: Gold, answer: str | None) -> bool:
    golds = [gold] if isinstance(gold, str) else gold
    return answer is not None and any(answers_match(one, answer) for one in golds)
