"""The R1 pipeline: `torchrun trainer/train.py r1-tiny`, every stage in one run directory.

Stages run one after the other. One that trains or samples is a command of its own, which each rank
starts as a child process, so that its memory is free again afterwards, and which a person can give
by hand. A stage that is done is not made again; one that was killed goes on, since the same command
does. What was made from inputs that have changed since, or with other options, is neither used nor
made again silently.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from trainer.command_line import check_flag_names, one_sentence_errors
from trainer.config import DataOptions, UsageError
from trainer.durable import write_atomically
from trainer.fsdp import COLLECTIVE_TIMEOUT, World, from_main_rank, stop_world
from trainer.pipeline_check import check_inputs, selected_stages
from trainer.pipeline_options import PipelineConfig
from trainer.pipeline_presets import PIPELINES
from trainer.run_folder import lock_folder
from trainer.sample_files import WriteResults
from trainer.stage_record import State, finish_stage, start_stage, state_of
from trainer.stages import STAGES_FOLDER, Stage, pipeline_stages
from trainer.stop_signal import die_with_parent, forwarded_signals
from trainer.training_run import by_hand, check_child

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = "pipeline.json"
REPLACED_FOLDER = "replaced"


def parse_pipeline_options(arguments: Sequence[str]) -> PipelineConfig:
    """The config of `preset [--flag value ...]`.

    Raises:
        UsageError: an unknown flag, a value that cannot be used, or one that must be given.
        SystemExit: after printing the reference, when `--help` is among the arguments.
    """
    preset, *flags = arguments
    names = [*(each.name for group in (PipelineConfig, DataOptions) for each in fields(group))]
    known = [f"--{name.replace('_', '-')}" for name in (*names, "from", "help")]
    # What stands in quotes after --flags belongs to a stage.
    check_flag_names([word for word in flags if " " not in word], known)
    with one_sentence_errors():
        config = tyro.cli(
            PipelineConfig,
            prog=f"torchrun trainer/train.py {preset}",
            args=flags,
            default=PIPELINES[preset][1],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )
    for name, value in (("--model", config.model), ("--dataset", config.data.dataset)):
        if not value:
            raise UsageError(f"{name}: the preset {preset} needs it to be given")
    return config


def run_pipeline(config: PipelineConfig) -> None:
    """Makes the stages that are left, of those that the options select.

    Raises:
        UsageError: an option, a file or a model that cannot be used, or a stage that was made from
            something else than is there now.
        InterruptedRunError: a stage's command was.
        SystemExit: a stage's command ended with an error, which it showed itself.
    """
    stages = pipeline_stages(config)
    with ExitStack() as stack:
        world = _join_ranks()
        stack.callback(stop_world)
        from_main_rank(world, lambda: _claim(config, stages, stack))
        selected = selected_stages(config, stages)
        for stage in selected:
            if from_main_rank(world, partial(_is_left, config, stage)):
                _make(stage, config, world)
        if world.is_main:
            print(f"\nThe stages are complete: {config.run_folder / STAGES_FOLDER}")
            _print_results(selected[-1])


def _join_ranks() -> World:
    """The processes that torchrun started, or this one alone; no accelerator is touched."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    return World(rank=rank, size=size, device=torch.device("cpu"))


def _claim(config: PipelineConfig, stages: Sequence[Stage], stack: ExitStack) -> None:
    """Checks all that the run needs, before any of it is computed."""
    check_inputs(config, stages)
    stack.enter_context(lock_folder(config.run_folder, "--run-dir"))
    known: set[Path] = set()
    for stage in selected_stages(config, stages):
        # What is made on the way is looked at when its turn comes.
        if not known.isdisjoint(stage.inputs) or _state(config, stage) != "done":
            known.update(stage.output_paths)
    write_atomically(config.run_folder / CONFIG_FILE, config.to_json())


def _state(config: PipelineConfig, stage: Stage) -> State:
    """Whether a stage is done, left, or another one; raises UsageError for another one that is not
    to be made again."""
    state, why = state_of(stage, config.run_folder)
    if state == "other" and stage.name != config.only and config.from_stage is None:
        raise UsageError(
            f"{stage.folder} was made from {why}: --from {stage.name} makes it and the "
            f"stages after it again (they are kept in {REPLACED_FOLDER}/)"
        )
    return state


def _is_left(config: PipelineConfig, stage: Stage) -> bool:
    """Whether a stage has to be made; says so, and clears its place."""
    state = _state(config, stage)
    if state == "done":
        print(f"stage {stage.name}: done", flush=True)
        return False
    if state == "other":
        _set_aside(stage, config.run_folder)
    how = by_hand(stage.command) if stage.command else f"from {', '.join(map(str, stage.inputs))}"
    print(f"\nstage {stage.name}\n  {how}", flush=True)
    start_stage(stage, config.run_folder)
    return True


def _set_aside(stage: Stage, run_folder: Path) -> None:
    """Moves what was made from other inputs out of the way."""
    replaced = run_folder / REPLACED_FOLDER
    replaced.mkdir(exist_ok=True)
    number = 1 + len(list(replaced.glob(f"{stage.folder.name}.*")))
    stage.folder.rename(replaced / f"{stage.folder.name}.{number}")


def _make(stage: Stage, config: PipelineConfig, world: World) -> None:
    started = time.perf_counter()
    counts: dict[str, int] = {}
    if stage.step is None:
        with _fresh_store(world) as environment:
            _run_command(stage, environment)
    else:
        counts = from_main_rank(world, lambda: _run_step(stage))
    seconds = time.perf_counter() - started
    from_main_rank(
        world,
        lambda: finish_stage(stage, config.run_folder, counts=counts, seconds=seconds),
    )


def _run_step(stage: Stage) -> dict[str, int]:
    assert stage.step is not None
    try:
        counts = stage.step.run(stage.folder)
    except UsageError as error:
        raise UsageError(f"stage {stage.name}: {error}") from error
    print("  " + ", ".join(f"{name} {count}" for name, count in counts.items()), flush=True)
    return counts


def _run_command(stage: Stage, environment: dict[str, str]) -> None:
    """Runs a stage's command in a child process, which gets the signals that this one gets."""
    script, *flags = stage.command
    command = [sys.executable, str(ROOT / script), *flags]
    with forwarded_signals() as forward_to:
        child = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
        forward_to(child)
        code = child.wait()
    check_child(code, f"stage {stage.name}")


@contextmanager
def _fresh_store(world: World) -> Iterator[dict[str, str]]:
    """The environment of a stage's processes, with a store that no other stage has written to."""
    environment = dict(os.environ)
    if world.size == 1:
        yield environment
        return
    # It lives on the main rank until the processes of all ranks have ended.
    stores = []
    if world.is_main:
        host = environment["MASTER_ADDR"]
        stores = [dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)]
    port = from_main_rank(world, lambda: stores[0].port)
    yield environment | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    dist.barrier()


def _print_results(stage: Stage) -> None:
    """The table, where this is the stage that writes it."""
    if isinstance(stage.step, WriteResults):
        table = stage.folder / "results.md"
        print(f"\n{table.read_text()}\n{table}")
