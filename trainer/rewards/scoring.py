"""From completions to rewards: accuracy plus format, as in DeepSeek-R1-Zero.

Source: DeepSeek-R1, arXiv 2501.12948, section 2.2: Reward_rule = Reward_acc + Reward_format. A
completion that ran into the length limit gets accuracy 0, as in Dr. GRPO (arXiv 2503.20783).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.rewards.extraction import extract_answer, format_reward
from trainer.rewards.matching import answers_match
from trainer.templates import Template

if TYPE_CHECKING:
    from trainer.tasks import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What one completion earned, part by part."""

    total: float
    """accuracy_weight * accuracy + format_weight * format; advantages are computed from it."""
    accuracy: float
    """1.0 when the extracted answer equals the gold, else 0.0."""
    format: float
    """1.0 when the completion keeps to the template's format, else 0.0."""
    extracted: str | None
    """The answer that was graded; None when there is none or the completion was cut off."""
    correct: bool
    """The accuracy as a flag."""


def accuracy_reward(gold: str, completion: str, template: Template) -> float:
    """1.0 when the completion's final answer equals `gold`, else 0.0."""
    answer = extract_answer(completion, template)
    return 1.0 if answer is not None and answers_match(gold, answer) else 0.0


def score(
    completions: Sequence[str],
    problems: Sequence[Problem],
    template: Template,
    *,
    accuracy_weight: float = 1.0,
    format_weight: float = 1.0,
    truncated: Sequence[bool],
) -> list[Reward]:
    """Rewards of completions, in order.

    Args:
        completions: text without the prompt, one per sample.
        problems: the problem of each completion (the same one repeated within a group).
        template: where the answer is read from and which format is asked for.
        accuracy_weight, format_weight: of the two parts in `Reward.total`; finite.
        truncated: per completion, whether it hit the length limit; such a one has no answer.

    Raises:
        ValueError: the three sequences differ in length, or a weight is not finite.
    """
    if not len(completions) == len(problems) == len(truncated):
        raise ValueError(
            f"problems, truncated: expected one per completion ({len(completions)}), "
            f"got {len(problems)} and {len(truncated)}"
        )
    for name, weight in (("accuracy_weight", accuracy_weight), ("format_weight", format_weight)):
        if not math.isfinite(weight):
            raise ValueError(f"{name}: expected a finite number, got {weight}")
    rewards = []
    for completion, problem, cut_off in zip(completions, problems, truncated, strict=True):
        extracted = None if cut_off else extract_answer(completion, template)
        golds = [problem.answer] if isinstance(problem.answer, str) else problem.answer
        correct = extracted is not None and any(answers_match(gold, extracted) for gold in golds)
        accuracy, formatted = float(correct), format_reward(completion, template)
        rewards.append(
            Reward(
                total=accuracy_weight * accuracy + format_weight * formatted,
                accuracy=accuracy,
                format=formatted,
                extracted=extracted,
                correct=correct,
            )
        )
    return rewards
