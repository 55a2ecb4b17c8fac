"""Evaluation on held-out problems: pass@1, cons@k and lengths, on all ranks together."""

import time
from collections.abc import Sequence

from trainer.config import TrainConfig
from trainer.fsdp import World, gather_in_order
from trainer.monitors import cons_at_k, pass_at_1
from trainer.rollout import Sampler
from trainer.samples import (
    Prompter,
    ScoredCompletion,
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


def evaluate(
    sampler: Sampler,
    prompter: Prompter,
    problems: Sequence[Problem],
    config: TrainConfig,
    world: World,
    step: int,
) -> tuple[dict[str, float | None], list[ScoredCompletion]]:
    """Samples `--eval-samples` completions of each problem and grades them.

    Returns: metrics, whose names start with eval/ (and seconds/eval), and all completions, on every
    rank.

    Collectives: one all-gather of the completions.
    """
    started = time.perf_counter()
    options = config.evaluation
    mine = world.shard(problems)
    completions_PK = rollout(
        sampler,
        prompter,
        mine,
        num_samples=options.eval_samples,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=options.eval_temperature,
        stream=(config.seed, "evaluation", step),
        first_prompt=len(problems) * world.rank // world.size,
    )
    scored_PK = gather_in_order(world, prompter.score(mine, completions_PK))
    require_finite_logprobs(scored_PK, step)
    correct_PK = [[one.reward.correct for one in samples] for samples in scored_PK]
    answers_PK = [[one.reward.extracted for one in samples] for samples in scored_PK]
    of_samples = sample_metrics(scored_PK)
    metrics: dict[str, float | None] = {
        "eval/pass@1": pass_at_1(correct_PK),
        "eval/cons@k": cons_at_k(answers_PK, correct_PK),
        **{f"eval/{name}": of_samples[name] for name in REPORTED},
        "seconds/eval": time.perf_counter() - started,
    }
    return metrics, [one for samples in scored_PK for one in samples]
