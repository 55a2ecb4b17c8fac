"""The R1-Zero loop: `torchrun trainer/train.py [preset] [--flag value ...]`.

Sample prompts, roll out, score, compute advantages, update the policy, give the sampler the new
weights, evaluate, log, save. Without arguments it runs the embedded default. `start_run` in
`setup_run.py` makes what the loop works with.

`training_run.py` holds what is not particular to it, exit codes among them.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch

import kernels
from trainer.checkpoints import step_of
from trainer.command_line import parse_command_line
from trainer.config import RolloutOptions, TrainConfig
from trainer.dry_run import dry_run, split_arguments
from trainer.evaluation import evaluate
from trainer.fsdp import gather_in_order
from trainer.packing import UpdateSample
from trainer.pipeline import parse_pipeline_options, run_pipeline
from trainer.pipeline_presets import PIPELINES
from trainer.policy_update import PolicyUpdate
from trainer.report import write_page
from trainer.rollout import Completion
from trainer.rollout.server_sampler import ServerSampler
from trainer.run_log import Sample
from trainer.samples import (
    RolloutArguments,
    ScoredCompletion,
    Scoring,
    require_finite_logprobs,
    rollout,
    sample_metrics,
    start_rollout,
    weights_age,
)
from trainer.setup_run import Run, start_run
from trainer.tasks import Problem
from trainer.training_run import (
    PhaseClock,
    end_process,
    exit_code_of,
    finish_run,
    is_complete,
    open_run,
)

# What changed over a run, by metric: its name for people, a factor, and the form of a value.
RESULTS = {
    "eval/pass@1": ("held-out pass@1", 100.0, "{:.1f} %"),
    "eval/cons@k": ("held-out cons@k", 100.0, "{:.1f} %"),
    "eval/length/mean": ("response length", 1.0, "{:.1f} tokens"),
}


def train(run: Run) -> None:
    """Makes the steps that are left.

    Raises:
        InterruptedRunError: after a Ctrl-C, once the run is saved.
        NonFiniteError, ParityError: before a value that is not finite, or that float64 does not
            confirm, reaches the weights.
        OutOfMemoryError: an allocation failed.
    """
    config = run.config
    policy_update = PolicyUpdate(run.policy, run.reference, run.optimizer, config, run.world)
    if run.completed == 0:
        evaluate_and_log(run, 0, {}, [])
    for step in range(run.completed + 1, config.optimizer.steps + 1):
        clock = PhaseClock(run.log, run.memory)
        scored_PG = scored_step(run, step, clock)
        # A checkpoint has to find in the buffer what older weights sampled.
        run.save_if_due()
        run.stop_if_asked()
        run.sampler.release_memory()
        with clock.phase("update"):
            chosen_PG = chosen_groups(scored_PG, config.rollout)
            update_metrics = policy_update(with_advantages(chosen_PG, config), step)
            reset_reference_if_due(run, step)
        run.completed, run.drawn = step, run.drawn + len(scored_PG)
        with clock.phase("sync"):
            run.sync_sampler()
        metrics = sample_metrics(scored_PG) | clock.metrics(count_tokens(scored_PG))
        metrics["rollout/weights_age"] = weights_age(scored_PG, step)
        metrics["rollout/groups_trained_on"] = float(len(chosen_PG))
        evaluate_and_log(run, step, metrics | update_metrics, scored_PG)
        if not config.rollout.async_steps:
            run.save_if_due()
            run.stop_if_asked()
    run.save_if_due()
    run.store.wait()
    run.buffer.drop_up_to(run.completed)


def scored_step(run: Run, step: int, clock: PhaseClock) -> list[list[ScoredCompletion]]:
    """Completions of the step's problems with their rewards, on every rank: those that an earlier
    start left, or new ones."""
    weights, options = run.weights_checksum(), run.config.rollout
    with clock.phase("rollout"):
        kept_PG = run.buffer.read(
            step, weights, lambda count: [run.source.problem(run.drawn + i) for i in range(count)]
        )
        if kept_PG is not None:
            start_next_step(run, step)
    if kept_PG is not None:
        return kept_PG
    scored_PG: list[list[ScoredCompletion]] = []
    for draw in range(options.max_draws if options.zero_spread == "resample" else 1):
        with clock.phase("rollout"):
            scoring, completions_PG = sample_step(run, step, draw)
            start_next_step(run, step)
        with clock.phase("score"):
            scored_PG += gather_in_order(run.world, scoring.finish(completions_PG))
        if len(chosen_groups(scored_PG, options)) == options.num_prompts:
            break
    with clock.phase("score"):
        require_finite_logprobs(scored_PG, step)
        run.buffer.drop_up_to(run.store.needed_from())
        run.buffer.write(step, weights, scored_PG)
    return scored_PG


def sample_step(run: Run, step: int, draw: int) -> tuple[Scoring, list[list[Completion]]]:
    """Completions of this rank's problems of a draw of the step from the current policy, and their
    scoring, which goes on meanwhile."""
    problems, options = step_problems(run, step, draw), step_options(run, step, draw)
    scoring = Scoring(run.prompter, problems)
    completions_PG = rollout(run.sampler, run.prompter, problems, **options, on_group=scoring.add)
    return scoring, completions_PG


def start_next_step(run: Run, step: int) -> None:
    """Starts to sample the step after, from the weights this one begins with, if `--async-steps`
    says so."""
    is_last = step == run.config.optimizer.steps
    if run.config.rollout.async_steps and not is_last:
        assert isinstance(run.sampler, ServerSampler)
        problems, options = step_problems(run, step + 1, 0), step_options(run, step + 1, 0)
        start_rollout(run.sampler, run.prompter, problems, **options)


def step_problems(run: Run, step: int, draw: int) -> list[Problem]:
    """This rank's problems of a draw of a step that is still to be made."""
    num_prompts = run.config.rollout.num_prompts
    first = run.drawn + (step - run.completed - 1 + draw) * num_prompts
    return [run.source.problem(first + place) for place in run.world.shard(range(num_prompts))]


def step_options(run: Run, step: int, draw: int) -> RolloutArguments:
    """How the completions of a draw of a step are sampled."""
    options = run.config.rollout
    places = run.world.shard(range(options.num_prompts))
    return {
        "num_samples": options.group_size,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "stream": (run.config.seed, "rollout", step),
        "first_prompt": draw * options.num_prompts + (places[0] if places else 0),
    }


def chosen_groups(
    scored_PG: Sequence[Sequence[ScoredCompletion]], options: RolloutOptions
) -> list[Sequence[ScoredCompletion]]:
    """The groups to train on, by `--zero-spread`; at most --num-prompts of them.

    Source: dynamic sampling, DAPO (2503.14476), section 3.2.
    """

    def has_spread(group: Sequence[ScoredCompletion]) -> bool:
        totals = {one.reward.total for one in group if one.reward.total is not None}
        return len(totals) > 1

    chosen_PG = [each for each in scored_PG if options.zero_spread == "keep" or has_spread(each)]
    return chosen_PG[: options.num_prompts]


def with_advantages(
    scored_PG: Sequence[Sequence[ScoredCompletion]], config: TrainConfig
) -> list[UpdateSample]:
    """All completions with their advantages, relative to whole groups however the update splits
    them; one without a reward is masked, and its group goes without it."""
    scored = [one for group in scored_PG for one in group]
    if not scored:
        return []
    totals = [one.reward.total for one in scored]
    advantages_S = kernels.group_advantages(
        torch.tensor([math.nan if total is None else total for total in totals]),
        group_size=config.rollout.group_size,
        scale=config.loss_spec.advantage_scale,
        ddof=config.loss_spec.advantage_ddof,
        eps=config.loss_spec.advantage_eps,
    )
    return [
        UpdateSample(
            prompt_ids=one.prompt_ids,
            token_ids=one.completion.token_ids,
            sampler_logprobs=one.completion.logprobs,
            advantage=advantage,
            masked=one.reward.total is None,
        )
        for one, advantage in zip(scored, advantages_S.tolist(), strict=True)
    ]


def evaluate_and_log(
    run: Run,
    step: int,
    metrics: dict[str, float | None],
    scored_PG: Sequence[Sequence[ScoredCompletion]],
) -> None:
    """Writes down a step, with an evaluation on the held-out problems when one is due."""
    diverging, sentences = run.alarm.add(step, metrics)
    metrics = metrics | diverging
    for sentence in sentences:
        run.log.message(sentence)
    held_out: list[Sample] = []
    if run.is_due(step, run.config.evaluation.eval_every):
        run.log.phase("eval")
        with run.memory.phase("eval"):
            eval_metrics, scored = evaluate(
                run.sampler, run.prompter, run.held_out, run.config, run.world, step
            )
        metrics = metrics | eval_metrics
        held_out = [run.prompter.record(one) for one in scored]
    trained_on = [run.prompter.record(one) for group in scored_PG for one in group]
    run.log.log_step(step, metrics, samples=trained_on, eval_samples=held_out)
    if held_out and run.world.is_main:
        write_page(run.config.run_folder)


def reset_reference_if_due(run: Run, step: int) -> None:
    """Makes the policy the new reference, as R1-Zero does every 400 updates."""
    every = run.config.optimizer.reference_reset_every
    if run.reference is not None and every is not None and step % every == 0:
        run.reference.copy_weights(run.policy)


def count_tokens(scored_PG: Sequence[Sequence[ScoredCompletion]]) -> int:
    """Completion tokens of a step."""
    return sum(len(one.completion.token_ids) for group in scored_PG for one in group)


def run_to_the_end(config: TrainConfig) -> None:
    """Starts or continues the run of a config, and leaves its results; says so if it is complete
    already.

    Raises:
        UsageError, InterruptedRunError: see `train`.
    """
    folder, steps = config.run_folder, config.optimizer.steps
    with open_run(config) as (world, store, checkpoint), ExitStack() as stack:
        if is_complete(world, folder, checkpoint, steps):
            return
        if checkpoint is None or step_of(checkpoint) < steps:
            run = start_run(config, world, store, checkpoint)
            # To the end: vLLM takes the process group with it.
            stack.enter_context(closing(run.sampler))
            with run.stop, run.log, run.prompter.scorer:
                train(run)
                run.memory.log_peak(run.log)
            checkpoint = store.path(run.completed)
        finish_run(world, folder, checkpoint, RESULTS)


def _run(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] in PIPELINES:
        run_pipeline(parse_pipeline_options(arguments))
    else:
        run_to_the_end(parse_command_line(arguments))


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    rest, node = split_arguments(arguments)
    return exit_code_of(_run if node is None else partial(dry_run, node_text=node), rest)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
