"""From problems to scored completions: what the update learns from and what an evaluation counts.

Shapes: P prompts, G completions per prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer import rewards
from trainer.config import NonFiniteError, RewardOptions, UsageError
from trainer.monitors import lengths_by_correctness, reflection_rate, zero_spread_share
from trainer.rewards import Reward
from trainer.rollout import Completion, Sampler
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
        options: weights of the rewards.
        max_prompt_tokens: longest prompt accepted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        options: RewardOptions,
        *,
        max_prompt_tokens: int,
    ) -> None:
        self.tokenizer, self.template, self.options = tokenizer, template, options
        self.max_prompt_tokens = max_prompt_tokens

    def encode(self, problem: Problem) -> list[int]:
        """Token ids of the problem's prompt.

        Raises:
            UsageError: it is empty or too long.
        """
        token_ids = self.template.prompt_ids(problem.question, self.tokenizer)
        if not 0 < len(token_ids) <= self.max_prompt_tokens:
            raise UsageError(
                f"problem {problem.problem_id}: expected a prompt of 1 to {self.max_prompt_tokens} "
                f"tokens (--max-prompt-tokens), got {len(token_ids)}"
            )
        return token_ids

    def score(
        self, problems: Sequence[Problem], completions_PG: Sequence[Sequence[Completion]]
    ) -> list[list[ScoredCompletion]]:
        """Rewards of the completions of each problem, `[P][G]`."""
        flat = [
            (problem, completion)
            for problem, completions in zip(problems, completions_PG, strict=True)
            for completion in completions
        ]
        texts = [self._text(completion) for _, completion in flat]
        graded = rewards.score(
            texts,
            [problem for problem, _ in flat],
            self.template,
            accuracy_weight=self.options.accuracy_weight,
            format_weight=self.options.format_weight,
            truncated=[completion.finish_reason == "length" for _, completion in flat],
        )
        scored = iter(
            ScoredCompletion(
                problem=problem,
                prompt_ids=self.encode(problem),
                completion=completion,
                text=text,
                reward=reward,
            )
            for (problem, completion), text, reward in zip(flat, texts, graded, strict=True)
        )
        return [[next(scored) for _ in completions] for completions in completions_PG]

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
        )

    def _text(self, completion: Completion) -> str:
        token_ids = completion.token_ids
        if token_ids[-1] == self.tokenizer.eos_token_id:
            token_ids = token_ids[:-1]
        text = self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)
        assert isinstance(text, str)
        return text


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
) -> list[list[Completion]]:
    """Samples `num_samples` completions of each problem, `[P][G]`.

    Args:
        stream: seed, purpose and step, which the random numbers derive from,
        first_prompt: together with the place of the problem among those of all ranks.
    """
    seed, purpose, step = stream
    keys_PG = np.array(
        [
            [derive_key(seed, purpose, step, first_prompt + place, g) for g in range(num_samples)]
            for place in range(len(problems))
        ],
        dtype=np.uint64,
    ).reshape(len(problems), num_samples)
    prompts = [prompter.encode(problem) for problem in problems]
    return sampler.generate(
        prompts, keys_PG, max_new_tokens=max_new_tokens, temperature=temperature
    )


def require_finite_logprobs(scored_PG: Iterable[Iterable[ScoredCompletion]], step: int) -> None:
    """Raises NonFiniteError if the sampler's weights gave no distribution to sample from."""
    for group in scored_PG:
        for one in group:
            if not np.isfinite(one.completion.logprobs).all():
                raise NonFiniteError(
                    f"step {step}: expected finite values, got nan in the sampler's "
                    f"log-probabilities for problem {one.problem.problem_id}"
                )


def sample_metrics(scored_PG: Sequence[Sequence[ScoredCompletion]]) -> dict[str, float | None]:
    """Rewards, lengths and reflection of a step's completions; None where a mean has no members."""
    scored = [one for group in scored_PG for one in group]
    graded = [one.reward for one in scored]
    lengths = lengths_by_correctness(
        [len(one.completion.token_ids) for one in scored], [reward.correct for reward in graded]
    )
    return {
        "reward/mean": _mean(reward.total for reward in graded),
        "reward/accuracy": _mean(reward.accuracy for reward in graded),
        "reward/format": _mean(reward.format for reward in graded),
        "length/mean": lengths.mean,
        "length/correct": lengths.correct,
        "length/wrong": lengths.wrong,
        "reflection_rate": reflection_rate([one.text for one in scored]),
        "truncated_fraction": _mean(one.completion.finish_reason == "length" for one in scored),
        "zero_spread_fraction": zero_spread_share(
            [[one.reward.total for one in group] for group in scored_PG]
        ),
    }


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return sum(collected) / len(collected)
