"""From problems to scored completions: what the update learns from and what an evaluation counts.

Shapes: P prompts, G completions per prompt.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.config import NonFiniteError, UsageError
from trainer.monitors import (
    CATEGORIES,
    DRGRPO_REFLECTION,
    category,
    language_share,
    lengths_by_correctness,
    reflection_rate,
    reflection_words,
    repetition,
    unanimous_shares,
    zero_spread_share,
)
from trainer.rewards import Reward
from trainer.rewards.grading import STATUSES, Attempt
from trainer.rewards.scoring import GradedGroup, Scorer
from trainer.rollout import AheadSampler, Completion, Sampler
from trainer.run_log import Sample
from trainer.seeds import derive_key
from trainer.tasks import Problem
from trainer.templates import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCompletion:
    """One completion of a problem with its reward."""

    problem: Problem
    prompt_ids: list[int]
    completion: Completion
    text: str
    """The completion without the token that ended it, unless that is part of a stop string."""
    reward: Reward


class Prompter:
    """Turns problems into prompts and completions into rewards.

    Args:
        tokenizer: of the model.
        template: made for the tokenizer (`Template.for_tokenizer`).
        scorer: made for the template; the caller closes it.
        max_prompt_tokens: longest prompt accepted.
        limit: what that follows from, for the message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        scorer: Scorer,
        *,
        max_prompt_tokens: int,
        limit: str,
    ) -> None:
        self.tokenizer, self.template, self.scorer = tokenizer, template, scorer
        self.max_prompt_tokens, self.limit = max_prompt_tokens, limit

    @classmethod
    def within(
        cls,
        positions: int,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        scorer: Scorer,
    ) -> "Prompter":
        """One that leaves room for a token at least of what the model has room for."""
        limit = "the model's positions"
        return cls(tokenizer, template, scorer, max_prompt_tokens=positions - 1, limit=limit)

    def encode(self, problem: Problem) -> list[int]:
        """Token ids of the problem's prompt.

        Raises:
            UsageError: it is empty or too long.
        """
        token_ids = self.template.prompt_ids(problem.question, self.tokenizer)
        if not 0 < len(token_ids) <= self.max_prompt_tokens:
            raise UsageError(
                f"problem {problem.problem_id}: expected a prompt of 1 to {self.max_prompt_tokens} "
                f"tokens ({self.limit}), got {len(token_ids)}"
            )
        return token_ids

    def score(
        self, problems: Sequence[Problem], completions_PG: Sequence[Sequence[Completion]]
    ) -> list[list[ScoredCompletion]]:
        """Rewards of the completions of each problem, `[P][G]`."""
        return Scoring(self, problems).finish(completions_PG)

    def attempts(self, problem: Problem, completions_G: Sequence[Completion]) -> list[Attempt]:
        """Completions of a problem as rewards see them."""
        prompt = self.template.prompt(problem.question, self.tokenizer)
        return [
            Attempt(
                problem=problem,
                prompt=prompt,
                text=self._text(completion),
                token_ids=completion.token_ids,
                truncated=completion.finish_reason == "length",
            )
            for completion in completions_G
        ]

    def record(self, scored: ScoredCompletion) -> Sample:
        """The completion as it is kept in the run's files."""
        return Sample.of(
            scored.problem,
            scored.reward,
            prompt=self.template.prompt(scored.problem.question, self.tokenizer),
            completion=scored.text,
            length=len(scored.completion.token_ids),
            finish_reason=scored.completion.finish_reason,
            mean_logprob=float(scored.completion.logprobs.mean()),
            weights_step=scored.completion.weights_step,
        )

    def _text(self, completion: Completion) -> str:
        token_ids = completion.token_ids
        if token_ids[-1] == self.tokenizer.eos_token_id:
            token_ids = token_ids[:-1]
        text = self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)
        assert isinstance(text, str)
        return text


class Scoring:
    """The rewards of one rollout; groups that come early are graded while others are sampled.

    Args:
        prompter: whose rewards.
        problems: of the rollout.
    """

    def __init__(self, prompter: Prompter, problems: Sequence[Problem]) -> None:
        self.prompter, self.problems = prompter, problems
        self.attempts: dict[int, list[Attempt]] = {}
        self.started: dict[int, Future[GradedGroup]] = {}

    def add(self, place: int, completions_G: Sequence[Completion]) -> None:
        """Starts to grade the completions of the problem at that place."""
        self.attempts[place] = self.prompter.attempts(self.problems[place], completions_G)
        self.started[place] = self.prompter.scorer.start(self.attempts[place])

    def finish(
        self, completions_PG: Sequence[Sequence[Completion]]
    ) -> list[list[ScoredCompletion]]:
        """Rewards of all completions, `[P][G]`; the same whatever was added before.

        Raises:
            UsageError: a user's reward returned something else than numbers.
        """
        attempts_PG = [
            self.attempts.get(place) or self.prompter.attempts(problem, completions_PG[place])
            for place, problem in enumerate(self.problems)
        ]
        rewards_PG = self.prompter.scorer.finish(attempts_PG, self.started)
        scored_PG = []
        for place, problem in enumerate(self.problems):
            prompt_ids = self.prompter.encode(problem)
            of_group = zip(
                completions_PG[place], attempts_PG[place], rewards_PG[place], strict=True
            )
            scored_PG.append(
                [
                    ScoredCompletion(
                        problem=problem,
                        prompt_ids=prompt_ids,
                        completion=completion,
                        text=attempt.text,
                        reward=reward,
                    )
                    for completion, attempt, reward in of_group
                ]
            )
        return scored_PG


class RolloutArguments(TypedDict):
    """What `rollout` and `start_rollout` need to know, beside what they sample."""

    num_samples: int
    max_new_tokens: int
    temperature: float
    stream: tuple[int, str, int]
    first_prompt: int


def rollout(
    sampler: Sampler,
    prompter: Prompter,
    problems: Sequence[Problem],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    stream: tuple[int, str, int],
    first_prompt: int,
    top_p: float = 1.0,
    on_group: Callable[[int, list[Completion]], None] | None = None,
) -> list[list[Completion]]:
    """Samples `num_samples` completions of each problem, `[P][G]`.

    Args:
        stream: seed, purpose and step, which the random numbers derive from,
        first_prompt: together with the place of the problem among those of all ranks.
        top_p, on_group: see `Sampler.generate`.
    """
    return sampler.generate(
        [prompter.encode(problem) for problem in problems],
        _keys(len(problems), num_samples, stream, first_prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        on_group=on_group,
    )


def start_rollout(
    sampler: AheadSampler,
    prompter: Prompter,
    problems: Sequence[Problem],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    stream: tuple[int, str, int],
    first_prompt: int,
) -> None:
    """Starts what a later `rollout` with the same arguments waits for."""
    sampler.start(
        [prompter.encode(problem) for problem in problems],
        _keys(len(problems), num_samples, stream, first_prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


def _keys(
    num_prompts: int, num_samples: int, stream: tuple[int, str, int], first_prompt: int
) -> np.ndarray:
    seed, purpose, step = stream
    keys_PG = [
        [derive_key(seed, purpose, step, first_prompt + place, g) for g in range(num_samples)]
        for place in range(num_prompts)
    ]
    return np.array(keys_PG, dtype=np.uint64).reshape(num_prompts, num_samples)


def require_finite_logprobs(scored_PG: Iterable[Iterable[ScoredCompletion]], step: int) -> None:
    """Raises NonFiniteError if the sampler's weights gave no distribution to sample from."""
    for group in scored_PG:
        for one in group:
            if not np.isfinite(one.completion.logprobs).all():
                raise NonFiniteError(
                    f"step {step}: expected finite values, got nan in the sampler's "
                    f"log-probabilities for problem {one.problem.problem_id}"
                )


def weights_age(scored_PG: Iterable[Iterable[ScoredCompletion]], step: int) -> float:
    """Updates between the weights that sampled a step's completions and those that it begins with,
    a mean over completions."""
    return _mean(step - 1 - one.completion.weights_step for group in scored_PG for one in group)


def sample_metrics(scored_PG: Sequence[Sequence[ScoredCompletion]]) -> dict[str, float | None]:
    """Rewards, lengths and reflection of a step's completions; None where a mean has no members.

    General prompts count in neither right nor wrong answers.
    """
    scored = [one for group in scored_PG for one in group]
    verified_PG = [group for group in scored_PG if not group[0].problem.is_general]
    verified = [one for group in verified_PG for one in group]
    lengths = lengths_by_correctness(
        [len(one.completion.token_ids) for one in verified],
        [one.reward.correct for one in verified],
    )
    totals_PG = [[one.reward.total for one in group] for group in scored_PG]
    all_correct, all_wrong = (
        unanimous_shares([[one.reward.correct for one in group] for group in verified_PG])
        if verified_PG
        else (None, None)
    )
    return {
        **reward_metrics([one.reward for one in scored]),
        "length/mean": _mean(len(one.completion.token_ids) for one in scored),
        "length/correct": lengths.correct,
        "length/wrong": lengths.wrong,
        **behaviour_metrics(scored),
        "truncated_fraction": _mean(one.completion.finish_reason == "length" for one in scored),
        # A group without any reward gives no gradient either.
        "zero_spread_fraction": zero_spread_share(
            [[total for total in group if total is not None] or [0.0] for group in totals_PG]
        ),
        "groups/all_correct": all_correct,
        "groups/all_wrong": all_wrong,
    }


def behaviour_metrics(scored: Sequence[ScoredCompletion]) -> dict[str, float | None]:
    """What completions look like, whatever they earned.

    Returns: shares of completions with a reflection word, by either published list
    (`reflection_rate`: DeepSeek-R1's), and the mean number of those words; `category/<name>` of
    each of CATEGORIES; `repetition` and `language_share`, means over completions, the latter over
    those with enough words.
    """
    texts = [one.text for one in scored]
    categories = [
        category(
            truncated=one.completion.finish_reason == "length",
            extracted=one.reward.extracted,
            correct=one.reward.correct,
        )
        for one in scored
        if not one.problem.is_general
    ]
    return {
        "reflection_rate": reflection_rate(texts),
        "reflection/words": _mean(reflection_words(text) for text in texts),
        "reflection/dr_grpo_rate": reflection_rate(texts, DRGRPO_REFLECTION),
        "reflection/dr_grpo_words": _mean(
            reflection_words(text, DRGRPO_REFLECTION) for text in texts
        ),
        **{
            f"category/{name}": _mean_of(float(each == name) for each in categories)
            for name in CATEGORIES
        },
        "repetition": _mean(repetition(one.completion.token_ids.tolist()) for one in scored),
        "language_share": _mean_of(
            language_share(one.text, one.problem.question) for one in scored
        ),
    }


def reward_metrics(graded: Sequence[Reward]) -> dict[str, float | None]:
    """The rewards of a step, part by part.

    Returns: `reward/mean` of the totals; for each part its mean `reward/<part>`, its standard
    deviation `reward/<part>/std` (over all, not within groups) and the share of completions that
    were left out of it, `reward/<part>/left_out`; and for each status of a grade its share among
    those graded in that way, `grade/<part>/<status>`.
    """
    metrics = {"reward/mean": _mean_of(reward.total for reward in graded)}
    for name in dict.fromkeys(name for reward in graded for name in reward.parts):
        values = [reward.parts.get(name) for reward in graded]
        present = [value for value in values if value is not None]
        metrics[f"reward/{name}"] = _mean_of(values)
        metrics[f"reward/{name}/std"] = statistics.pstdev(present) if present else None
        metrics[f"reward/{name}/left_out"] = 1 - len(present) / len(values)
        found = Counter(reward.status for reward in graded if name in reward.parts)
        for status in STATUSES.get(name, ()):
            metrics[f"grade/{name}/{status}"] = found[status] / found.total()
    return metrics


def _mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there."""
    present = [value for value in values if value is not None]
    return _mean(present) if present else None


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return sum(collected) / len(collected)
