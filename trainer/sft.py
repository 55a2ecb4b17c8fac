"""Supervised fine-tuning: `torchrun trainer/sft.py [preset] --model DIR --dataset FILE ...`.

Take the batch of a step, update the policy by the cross entropy of its completions, evaluate, log,
save. `sft_data.py` holds what a row may be; `training_run.py` what this has in common with the
R1-Zero loop, exit codes among it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.checkpoints import CheckpointStore, step_of
from trainer.command_line import parse_config
from trainer.dry_run import dry_run_of_tuning, split_arguments
from trainer.fsdp import World, from_main_rank
from trainer.host_memory import return_free_memory
from trainer.memory_check import check_memory
from trainer.memory_plan import plan_tuning
from trainer.model_loading import load_tokenizer, open_model
from trainer.report import write_page
from trainer.run_folder import config_fingerprint
from trainer.run_log import RunLog
from trainer.setup_run import (
    check_backend,
    check_vocabulary,
    make_policy,
    named_template,
    start_of_weights,
)
from trainer.sft_config import SftConfig
from trainer.sft_data import SftData, open_data
from trainer.sft_presets import DEFAULT_PRESET, PRESETS
from trainer.sft_update import SupervisedUpdate, count_tokens
from trainer.stop_signal import StopSignal
from trainer.training_run import (
    PhaseClock,
    TrainingRun,
    end_process,
    exit_code_of,
    finish_run,
    is_complete,
    open_run,
)
from trainer.weight_update import make_optimizer

# What changed over a run; see `trainer.run_folder.finish_run_folder`.
RESULTS = {
    "loss": ("training loss", 1.0, "{:.4f} nats a token"),
    "eval/loss": ("held-out loss", 1.0, "{:.4f} nats a token"),
}


@dataclass(slots=True, kw_only=True)
class SftRun(TrainingRun):
    """Everything the loop works with."""

    config: SftConfig
    data: SftData


def train(run: SftRun) -> None:
    """Makes the steps that are left.

    Raises:
        InterruptedRunError: after a Ctrl-C, once the run is saved.
        NonFiniteError: before a value that is not finite reaches the weights.
        OutOfMemoryError: an allocation failed.
    """
    update = SupervisedUpdate(run.policy, run.optimizer, run.config, run.world, run.total_steps)
    if run.completed == 0:
        evaluate_and_log(run, update, 0, {})
    for step in range(run.completed + 1, run.total_steps + 1):
        clock, batch = PhaseClock(run.log, run.memory), run.data.batch(step)
        with clock.phase("update"):
            metrics = update(batch, step)
        run.completed, run.drawn = step, run.drawn + len(batch)
        tokens = count_tokens(batch)
        metrics["epoch"] = run.drawn / len(run.data.training)
        evaluate_and_log(run, update, step, metrics | clock.metrics(tokens))
        run.save_if_due()
        run.stop_if_asked()
    run.store.wait()


def evaluate_and_log(
    run: SftRun, update: SupervisedUpdate, step: int, metrics: dict[str, float | None]
) -> None:
    """Writes down a step, with the loss of what is held out when that is due."""
    is_evaluated = bool(run.data.held_out) and (
        step == 0 or run.is_due(step, run.config.data.eval_every)
    )
    if is_evaluated:
        clock = PhaseClock(run.log, run.memory)
        with clock.phase("eval"):
            loss = update.mean_loss(run.data.held_out)
        metrics = {**metrics, "eval/loss": loss, **clock.seconds}
        run.log.message(f"step {step}: held-out loss {loss:.4f}")
    run.log.log_step(step, metrics)
    if run.world.is_main and (is_evaluated or run.is_due(step, run.config.checkpoint.save_every)):
        write_page(run.config.run_folder)


def start_run(
    config: SftConfig,
    world: World,
    store: CheckpointStore,
    checkpoint: Path | None,
    start: str,
    data: SftData,
) -> SftRun:
    """Loads the model that `start` names and the state of the checkpoint, where there is one.

    Raises:
        UsageError: a model or a state that cannot be used.
    """
    completed = 0 if checkpoint is None else step_of(checkpoint)
    log = RunLog(
        config.run_folder,
        total_steps=data.total_steps,
        rank=world.rank,
        resume_step=None if checkpoint is None else completed,
    )
    tokenizer = load_tokenizer(start)
    model, stored = open_model(start, report=log.message)
    check_vocabulary(tokenizer, model)
    longest, text = data.store.longest(), model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", longest)
    if longest > positions:
        log.message(
            f"warning: the longest sequence has {longest} tokens, the model was made for "
            f"{positions} positions"
        )
    memory = check_memory(
        config,
        world,
        log,
        lambda _: plan_tuning(
            model.config, config, ranks=world.size, device=world.device.type, longest=longest
        ),
    )
    policy = make_policy(model, stored, config, world)
    run = SftRun(
        config=config,
        world=world,
        tokenizer=tokenizer,
        data=data,
        policy=policy,
        optimizer=make_optimizer(policy, config.optimizer),
        store=store,
        log=log,
        memory=memory,
        stop=StopSignal(),
        fingerprint=config_fingerprint(config, data.fingerprint),
        total_steps=data.total_steps,
        completed=completed,
        saved=completed,
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    return_free_memory()
    return run


def run_to_the_end(config: SftConfig) -> None:
    """Starts or continues the run of a config, and leaves its results; says so if it is complete
    already.

    Raises:
        UsageError, InterruptedRunError: see `train`.
    """
    folder = config.run_folder
    with open_run(config) as (world, store, checkpoint):
        check_backend(config.backend)
        template = named_template(config.template)
        start = from_main_rank(world, lambda: start_of_weights(config, checkpoint, print))
        data = open_data(config, template, load_tokenizer(start), world, print)
        if is_complete(world, folder, checkpoint, data.total_steps):
            return
        if checkpoint is None or step_of(checkpoint) < data.total_steps:
            run = start_run(config, world, store, checkpoint, start, data)
            with run.stop, run.log:
                train(run)
                run.memory.log_peak(run.log)
            checkpoint = store.path(run.completed)
        finish_run(world, folder, checkpoint, RESULTS)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def command(given: Sequence[str]) -> None:
        run_to_the_end(parse_config(given, PRESETS, DEFAULT_PRESET, "torchrun trainer/sft.py"))

    rest, node = split_arguments(arguments)
    return exit_code_of(
        command if node is None else partial(dry_run_of_tuning, node_text=node), rest
    )


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
