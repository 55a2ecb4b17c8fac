"""Scores of reward models as rewards of general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.config import RewardOptions, UsageError
from trainer.rewards.user_reward import UserReward

if TYPE_CHECKING:
    from trainer.reward_scores import RewardModel

READS: dict[str, Literal["summary", "whole"]] = {"helpful": "summary", "harmless": "whole"}
"""What each reward model reads of a completion."""


@dataclass(frozen=True, slots=True)
class PreferenceReward:
    """A reward model's score where a prompt is a general one of its kind, or of no stated kind."""

    model: RewardModel
    kind: str
    """What the column `kind` says of its prompts."""

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """The scores, None for other prompts; `columns` as for a user's reward."""
        questions = columns["question"]
        kinds = columns.get("kind", [None] * len(prompts))
        chosen = [
            place
            for place, is_general in enumerate(columns["is_general"])
            if is_general and kinds[place] in (None, self.kind)
        ]
        scores = self.model.scores(
            [questions[place] for place in chosen], [completions[place] for place in chosen]
        )
        by_place = dict(zip(chosen, scores, strict=True))
        return [by_place.get(place) for place in range(len(prompts))]


def preference_rewards(options: RewardOptions) -> list[UserReward]:
    """The reward models that the options name, their configs checked; weights are read when first
    needed.

    Raises:
        UsageError: a model that cannot be read, or has another head.

    Source: DeepSeek-R1 (2501.12948 v2), section 3.1: helpfulness on the final summary alone,
    harmlessness on the whole response.
    """
    # Loading models needs the embedded tasks, which need this package.
    from trainer.reward_scores import RewardModel

    rewards = []
    for name, folder in options.reward_models.items():
        try:
            model = RewardModel(folder, reads=READS[name])
        except UsageError as error:
            raise UsageError(f"--{name}-model: {error}") from error
        reward = PreferenceReward(model, name)
        rewards.append(UserReward(name, options.preference_weight, reward))
    return rewards
