"""Evaluation on problems that are not trained on: the one way to sample, grade and measure, in
training and on its own.

Shapes: P problems, K samples per problem.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.estimates import Estimate, mean, pass_at_k, share
from trainer.fsdp import World, gather_in_order
from trainer.monitors import (
    CATEGORIES,
    DRGRPO_REFLECTION,
    R1_REFLECTION,
    AnswersAgree,
    category,
    language_share,
    majorities_right,
    pass_at_1,
    reflection_words,
    repetition,
)
from trainer.rollout import Completion, Sampler
from trainer.samples import (
    Prompter,
    ScoredCompletion,
    Scoring,
    require_finite_logprobs,
    rollout,
    sample_metrics,
)
from trainer.tasks import Problem

REPORTED = (
    "length/mean",
    "length/correct",
    "length/wrong",
    "reflection_rate",
    "truncated_fraction",
    "reward/format",
)
Estimates = dict[str, Estimate | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled for an evaluation."""

    samples: int
    """Per problem."""
    temperature: float
    """0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int


def sample_and_score(
    sampler: Sampler,
    prompter: Prompter,
    problems: Sequence[Problem],
    sampling: Sampling,
    world: World,
    *,
    stream: tuple[int, str, int],
    on_problem: Callable[[], None] = lambda: None,
) -> list[list[ScoredCompletion]]:
    """The graded completions of each problem, `[P][K]`, on every rank.

    Args:
        stream: seed, purpose and step, which the random numbers derive from.
        on_problem: called when all completions of one of this rank's problems are sampled, except
            for the last ones.

    Raises:
        NonFiniteError: the model's weights give no distribution to sample from.

    Collectives: one all-gather of the completions.
    """
    mine = world.shard(problems)
    scoring = Scoring(prompter, mine)

    def on_group(place: int, completions_K: list[Completion]) -> None:
        scoring.add(place, completions_K)
        on_problem()

    completions_PK = rollout(
        sampler,
        prompter,
        mine,
        num_samples=sampling.samples,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stream=stream,
        first_prompt=len(problems) * world.rank // world.size,
        on_group=on_group,
    )
    scored_PK = gather_in_order(world, scoring.finish(completions_PK))
    require_finite_logprobs(scored_PK, stream[2])
    return scored_PK


def evaluate(
    sampler: Sampler,
    prompter: Prompter,
    problems: Sequence[Problem],
    config: TrainConfig,
    world: World,
    step: int,
) -> tuple[dict[str, float | None], list[ScoredCompletion]]:
    """Samples `--eval-samples` completions of each held-out problem in training, and grades them.

    Returns: metrics, whose names start with eval/ (and seconds/eval), and all completions, on every
    rank.

    Collectives: one all-gather of the completions.
    """
    started = time.perf_counter()
    sampling = Sampling(
        samples=config.evaluation.eval_samples,
        temperature=config.evaluation.eval_temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    stream = (config.seed, "evaluation", step)
    scored_PK = sample_and_score(sampler, prompter, problems, sampling, world, stream=stream)
    of_samples = sample_metrics(scored_PK)
    metrics: dict[str, float | None] = {
        "eval/pass@1": pass_at_1(_correct(scored_PK)),
        "eval/cons@k": _mean_of_flags(consensus(scored_PK, prompter.scorer.answers_agree)),
        **{f"eval/{name}": of_samples[name] for name in REPORTED},
        "seconds/eval": time.perf_counter() - started,
    }
    return metrics, [one for samples in scored_PK for one in samples]


def consensus(
    scored_PK: Sequence[Sequence[ScoredCompletion]], answers_agree: AnswersAgree
) -> list[bool]:
    """Whether the majority answer of each problem is right, `[P]`; see `majorities_right`."""
    answers_PK = [[one.reward.extracted for one in samples] for samples in scored_PK]
    return majorities_right(answers_PK, _correct(scored_PK), answers_agree)


def suite_estimates(
    scored_PK: Sequence[Sequence[ScoredCompletion]], answers_agree: AnswersAgree
) -> Estimates:
    """All that is stated about the samples of a suite, each with its interval.

    Keys: `pass@1`, `pass@k` for powers of 2 up to K and `cons@K`; shares of completions by
    `category/...`, in the template's `format`, and with a reflection word (`reflection/r1`,
    `reflection/dr_grpo`); `reflection/r1_words` and `reflection/dr_grpo_words` count words of a
    completion, `reflection/dr_grpo_problems` is the share of problems with a reflecting completion;
    tokens of completions that are right, wrong, and wrong but not truncated (`length/...`);
    `repetition` and `language` (the question's), means over completions. None: of nothing.
    """
    fewest = min(map(len, scored_PK))
    correct_PK = _correct(scored_PK)
    estimates: Estimates = {
        f"pass@{k}": pass_at_k(correct_PK, k) for k in (2**n for n in range(fewest.bit_length()))
    }
    if fewest > 1 and not any(samples[0].problem.tests for samples in scored_PK):
        majorities = consensus(scored_PK, answers_agree)
        estimates[f"cons@{fewest}"] = share([[float(right)] for right in majorities])
    categories_PK = [list(map(_category, samples)) for samples in scored_PK]
    for name in CATEGORIES:
        estimates[f"category/{name}"] = share(
            [[float(each == name) for each in row] for row in categories_PK]
        )
    estimates["format"] = share(_values(scored_PK, lambda one: one.reward.parts["format"]))
    estimates |= _reflection(scored_PK)
    estimates |= {
        "length/mean": mean(_values(scored_PK, _length)),
        "length/correct": mean(_lengths(scored_PK, lambda one: one.reward.correct)),
        "length/wrong": mean(_lengths(scored_PK, lambda one: not one.reward.correct)),
        "length/wrong_ended": mean(
            _lengths(scored_PK, lambda one: _category(one) in ("incorrect", "unformatted"))
        ),
        "repetition": share(
            _values(scored_PK, lambda one: repetition(one.completion.token_ids.tolist()))
        ),
        "language": share(
            _values(scored_PK, lambda one: language_share(one.text, one.problem.question))
        ),
    }
    return estimates


def pass_at_1_by_level(
    scored_PK: Sequence[Sequence[ScoredCompletion]],
) -> dict[int, Estimate | None]:
    """pass@1 of the problems of each level there is.

    Source: DeepSeek-R1, arXiv 2501.12948 v2, figure 8.
    """
    levels = {samples[0].problem.level for samples in scored_PK} - {None}
    return {
        level: share(
            _values(
                [samples for samples in scored_PK if samples[0].problem.level == level],
                lambda one: float(one.reward.correct),
            )
        )
        for level in sorted(level for level in levels if level is not None)
    }


def _reflection(scored_PK: Sequence[Sequence[ScoredCompletion]]) -> Estimates:
    estimates: Estimates = {}
    for name, words in (("r1", R1_REFLECTION), ("dr_grpo", DRGRPO_REFLECTION)):
        counts_PK = [[reflection_words(one.text, words) for one in row] for row in scored_PK]
        estimates[f"reflection/{name}"] = share(
            [[float(count > 0) for count in row] for row in counts_PK]
        )
        estimates[f"reflection/{name}_words"] = mean(counts_PK)
    # Question level of Dr. GRPO, appendix D, without its language model; counts_PK are its words'.
    estimates["reflection/dr_grpo_problems"] = share([[float(any(row))] for row in counts_PK])
    return estimates


def _values(
    scored_PK: Sequence[Sequence[ScoredCompletion]],
    value: Callable[[ScoredCompletion], float | None],
) -> list[list[float]]:
    """The values of each problem's completions that have one."""
    return [[got for one in row if (got := value(one)) is not None] for row in scored_PK]


def _lengths(
    scored_PK: Sequence[Sequence[ScoredCompletion]], chosen: Callable[[ScoredCompletion], bool]
) -> list[list[float]]:
    return [[_length(one) for one in row if chosen(one)] for row in scored_PK]


def _length(one: ScoredCompletion) -> float:
    return float(len(one.completion.token_ids))


def _category(one: ScoredCompletion) -> str:
    return category(
        truncated=one.completion.finish_reason == "length",
        extracted=one.reward.extracted,
        correct=one.reward.correct,
    )


def _correct(scored_PK: Sequence[Sequence[ScoredCompletion]]) -> list[list[bool]]:
    return [[one.reward.correct for one in samples] for samples in scored_PK]


def _mean_of_flags(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
