"""Tasks of reasoning-gym as problems: made as the run goes, scored by their own verifiers.

A task is named `gym:NAME` or `gym:NAME:option=value,...` with options of the generator, such as
`gym:chain_sum:max_terms=3,max_digits=2`. Every problem is generated from its own seed.

Needs the extra `reasoning-gym`. Source: Stojanovski et al. 2025, arXiv 2505.24760.
"""

import difflib
import importlib
import importlib.util
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from trainer.config import UsageError
from trainer.seeds import derive_key
from trainer.tasks import Problem

PREFIX = "gym:"
_RUNS_ANSWERS = "its verifier runs the answer as code"
EXCLUDED = {
    "coin_flip": "its verifier gives 0.93 on average for always answering 0",
    "game_of_life_halting": "its verifier gives 1.0 to any text that is not the right answer",
    "composite": "it is made of other tasks; name those",
    **dict.fromkeys(
        (
            "binary_matrix",
            "countdown",
            "intermediate_integration",
            "n_queens",
            "polynomial_multiplication",
            "puzzle24",
            "simple_integration",
            "spiral_matrix",
            "string_insertion",
        ),
        _RUNS_ANSWERS,
    ),
}
"""Tasks of reasoning-gym 0.1.25 that cannot be trained on, with the reason. That an answer is run
(`eval`, or `parse_expr` of sympy, which uses it) was read in their `score_answer`."""
MOST_ATTEMPTS = 1000


@dataclass(frozen=True, slots=True)
class GymVerifier:
    """Scores answers to one generated problem with `score_answer` of its task."""

    source: str
    """The task as it was named."""
    entry: Mapping[str, Any] = field(repr=False)
    """The problem as reasoning-gym made it."""

    def __call__(self, answer: str | None) -> float:
        """From 0 to 1; 0 without an answer, and for one that the task's verifier cannot read."""
        if answer is None:
            return 0.0
        try:
            score = float(_scorer(self.source).score_answer(answer, self.entry))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # What verifiers of the package raise on text in a form that they do not expect.
            return 0.0
        return min(max(score, 0.0), 1.0)


class GymProblems:
    """An endless sequence of problems of one task, none of them held out."""

    def __init__(self, source: str, seed: int, held_out: Collection[str]) -> None:
        """Args: source: as `gym:NAME`. held_out: questions that do not occur.

        Raises:
            UsageError: as `check_task`.
        """
        check_task(source)
        self.source, self.seed, self.held_out = source, seed, held_out

    def problem(self, index: int) -> Problem:
        """The problem at a place of the sequence.

        Raises:
            UsageError: nearly all that the task generates is held out.
        """
        for attempt in range(MOST_ATTEMPTS):
            key = derive_key(self.seed, self.source, index, attempt)
            problem = _generate(self.source, key, f"{self.source}-{self.seed}-{index}")
            if problem.question not in self.held_out:
                return problem
        raise UsageError(
            f"--dataset: {self.source} makes no problem that is not held out; evaluate on "
            f"fewer (--eval-problems), or give options that make more different ones"
        )


def gym_problems(source: str, count: int) -> list[Problem]:
    """The same `count` problems for every run, all with different questions.

    Raises:
        UsageError: as `check_task`, or the task has too few different problems.
    """
    check_task(source)
    problems: dict[str, Problem] = {}
    for attempt in range(count + MOST_ATTEMPTS):
        if len(problems) == count:
            break
        key = derive_key(0, f"{source} held out", attempt)
        problem = _generate(source, key, f"{source}-held-out-{len(problems)}")
        problems.setdefault(problem.question, problem)
    if len(problems) < count:
        raise UsageError(
            f"{source}: expected {count} different problems, got {len(problems)} in "
            f"{count + MOST_ATTEMPTS} attempts"
        )
    return list(problems.values())


def check_task(source: str) -> None:
    """Refuses a name, as `gym:NAME` or `gym:NAME:option=value,...`, that cannot be used.

    Raises:
        UsageError: the package is missing, or the task is unknown, excluded or has no such options.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UsageError(f"{source}: needs a package, pip install 'onepass-rl[reasoning-gym]'")
    task, options = _parse(source)
    if task in EXCLUDED:
        raise UsageError(f"{source}: this task is excluded, {EXCLUDED[task]}")
    known = importlib.import_module("reasoning_gym.factory").DATASETS
    if task not in known:
        close = difflib.get_close_matches(task, set(known) - set(EXCLUDED), n=3)
        hint = f"; did you mean {' or '.join(close)}" if close else ""
        raise UsageError(f"{source}: expected a task of reasoning-gym, got {task!r}{hint}")
    try:
        _make(task, options, 0)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"{source}: options that the task refuses ({error})") from error


def _parse(source: str) -> tuple[str, dict[str, Any]]:
    task, _, given = source.removeprefix(PREFIX).partition(":")
    return task, dict(_option(source, part) for part in given.split(",") if part)


def _option(source: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{source}: expected option=value after the task's name, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value.strip()


def _generate(source: str, key: int, problem_id: str) -> Problem:
    entry = _make(*_parse(source), key)[0]
    return Problem(
        problem_id=problem_id,
        question=entry["question"],
        # Some tasks have no single answer; only their verifier knows a right one.
        answer=entry["answer"] or "",
        verifier=GymVerifier(source, entry),
    )


def _make(task: str, options: dict[str, Any], key: int) -> Any:
    # Their generators take seeds of 32 bits.
    create_dataset = importlib.import_module("reasoning_gym").create_dataset
    return create_dataset(task, size=1, seed=key % 2**32, **options)


@lru_cache(maxsize=8)
def _scorer(source: str) -> Any:
    """A generator of the task; its `score_answer` reads the entry that it is given."""
    return _make(*_parse(source), 0)
