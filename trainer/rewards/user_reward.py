"""Rewards that a user names on the command line: any function with TRL's signature.

    def reward(prompts, completions, **columns) -> list[float | None]

`prompts` and `completions` are texts, one per completion; `completion_ids` are the completions'
token ids; `question`, `answer`, `problem_id`, `is_general` and the columns of the data set follow
by name, one value per completion. None leaves a completion out of this reward.

The function is called from the main thread with all completions of a step, as TRL calls it: limits
by `signal.alarm`, as in math-verify, work nowhere else.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat

from trainer.config import UsageError

if TYPE_CHECKING:
    from trainer.rewards.grading import Attempt

_NAMED = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)(?:=(.+))?")


@dataclass(frozen=True, slots=True)
class RewardName:
    """What `package.module:function=weight` says."""

    module: str
    function: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> RewardName:
        """Reads the text; the weight is 1 where there is none.

        Raises:
            UsageError: it is not of that form, or the weight is not a finite number.
        """
        match = _NAMED.fullmatch(text)
        if match is None:
            raise UsageError(
                f"--reward: expected package.module:function or package.module:function=weight, "
                f"got {text!r}"
            )
        module, function, weight = match.groups(default="1")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UsageError(f"--reward: expected a finite weight after =, got {weight!r}")
        return cls(module, function, number)


@dataclass(frozen=True, slots=True)
class UserReward:
    """A user's reward function, ready to be called."""

    name: str
    """Name of the function, under which it is logged."""
    weight: float
    function: Callable[..., Any]

    def __call__(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """The function's value for each attempt; None (or nan) where it has none.

        Raises:
            UsageError: it did not return one finite number or None for each.
        """
        if not attempts:
            return []
        result = self.function(
            prompts=[attempt.prompt for attempt in attempts],
            completions=[attempt.text for attempt in attempts],
            completion_ids=[attempt.token_ids.tolist() for attempt in attempts],
            **_columns(attempts),
        )
        expected = f"--reward {self.name}: expected a list of {len(attempts)} numbers or None"
        if not isinstance(result, Iterable):
            raise UsageError(f"{expected}, got {type(result).__name__}")
        values = list(result)
        if len(values) != len(attempts):
            raise UsageError(f"{expected}, got {len(values)}")
        return [self._checked(value, expected) for value in values]

    @staticmethod
    def _checked(value: object, expected: str) -> float | None:
        if value is None:
            return None
        if not isinstance(value, SupportsFloat) or math.isinf(number := float(value)):
            raise UsageError(f"{expected}, got {value!r} among them")
        return None if math.isnan(number) else number


def load_user_rewards(texts: Sequence[str], taken_names: Sequence[str]) -> list[UserReward]:
    """The functions named by `package.module:function[=weight]`, imported; modules in the current
    directory are found too.

    Args:
        texts: as given on the command line.
        taken_names: names that other rewards are logged under.

    Raises:
        UsageError: a name that cannot be imported, is no function of that signature, or is taken.
    """
    loaded: list[UserReward] = []
    if texts:
        see_working_directory()
    for text in texts:
        reward = _load(RewardName.parse(text))
        if reward.name in taken_names or reward.name in [other.name for other in loaded]:
            raise UsageError(f"--reward: expected different names, got {reward.name!r} again")
        loaded.append(reward)
    return loaded


def see_working_directory() -> None:
    """Lets functions of the user be imported from where the command is given."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _load(name: RewardName) -> UserReward:
    try:
        found: Any = importlib.import_module(name.module)
    except ImportError as error:
        raise UsageError(f"--reward: {name.module} cannot be imported ({error})") from error
    for part in name.function.split("."):
        if not hasattr(found, part):
            raise UsageError(f"--reward: {name.module} has no {name.function}")
        found = getattr(found, part)
    if not callable(found) or not _takes_any_column(found):
        raise UsageError(
            f"--reward: expected {name.module}:{name.function} to be a function of prompts, "
            f"completions and **columns, got {type(found).__name__} without **columns"
        )
    return UserReward(name.function, name.weight, found)


def _takes_any_column(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _columns(attempts: Sequence[Attempt]) -> dict[str, list[object]]:
    """One list per column; None where a problem lacks it."""
    names = dict.fromkeys(name for attempt in attempts for name in attempt.problem.columns)
    columns: dict[str, list[object]] = {
        name: [attempt.problem.columns.get(name) for attempt in attempts]
        for name in names
        if name not in ("prompts", "completions", "completion_ids")
    }
    return columns | {
        "question": [attempt.problem.question for attempt in attempts],
        "answer": [attempt.problem.answer for attempt in attempts],
        "problem_id": [attempt.problem.problem_id for attempt in attempts],
        "is_general": [attempt.problem.is_general for attempt in attempts],
    }
