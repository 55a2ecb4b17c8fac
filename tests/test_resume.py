"""Exact resume: runs killed with SIGKILL in the midst of everything end with the bits of one that
was left alone.

A process dies by its own hand, at a profiler event (a call or a return, of Python or C) drawn at
random from those of one phase; the uninterrupted run has counted them.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from safetensors.torch import load_file

from trainer import checkpoint_writing, train, training_run
from trainer.checkpoints import CheckpointStore
from trainer.policy_update import PolicyUpdate
from trainer.rollout_buffer import RolloutBuffer
from trainer.run_log import read_metrics
from trainer.samples import Scoring
from trainer.testing import write_bigram_model, write_sums

STEPS = 6
TIMES = ("seconds/", "tokens_per_second")
# Where a run may die: the object that holds the function, and its name.
PHASES: dict[str, tuple[Any, str]] = {
    "rollout": (train, "sample_step"),
    "scoring": (Scoring, "finish"),
    "buffer": (RolloutBuffer, "write"),
    "update": (PolicyUpdate, "__call__"),
    "copying": (CheckpointStore, "save"),
    "writing": (checkpoint_writing, "_write"),
    "publishing": (checkpoint_writing.BackgroundWriter, "_publish"),
    "export": (shutil, "copytree"),
    "finishing": (training_run, "finish_run_folder"),
}


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When a process kills itself."""

    phase: str
    call: int
    """The how manieth call of the phase, from 1."""
    event: int
    """After how many profiler events in it."""


@contextmanager
def watched(events: Path, kill: Kill | None) -> Iterator[None]:
    """Counts calls and events of all phases, and kills the process at its time."""
    with pytest.MonkeyPatch.context() as patch:
        for phase, (owner, name) in PHASES.items():
            patch.setattr(owner, name, watch(phase, getattr(owner, name), events, kill))
        yield


def watch(
    phase: str, function: Callable[..., Any], events: Path, kill: Kill | None
) -> Callable[..., Any]:
    calls = 0

    def watched_function(*arguments: object, **keywords: object) -> Any:
        nonlocal calls
        calls += 1
        is_last = kill is not None and (kill.phase, kill.call) == (phase, calls)
        seen = 0

        def count(frame: FrameType, kind: str, argument: object) -> None:
            nonlocal seen
            seen += 1
            if is_last and kill is not None and seen >= kill.event:
                os.kill(os.getpid(), signal.SIGKILL)

        # Before the call, because it may be the last.
        with events.open("a") as lines:
            lines.write(json.dumps([phase, calls]) + "\n")
        outer = sys.getprofile()
        sys.setprofile(count)
        try:
            return function(*arguments, **keywords)
        finally:
            sys.setprofile(outer)
            with events.open("a") as lines:
                lines.write(json.dumps([phase, calls, seen]) + "\n")
            # In another step, or with other threads, there may be fewer events than were counted.
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)

    return watched_function


def run_watched(
    arguments: list[str], record: Path, kill: Kill | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    rank = environment["RANK"]
    with (record / f"output-{rank}").open("w") as text:
        with redirect_stdout(text), redirect_stderr(text):
            with watched(record / f"events-{rank}", kill):
                code = train.main(arguments)
    sys.exit(code)


def start(
    arguments: list[str], record: Path, kill: Kill | None = None, ranks: int = 1
) -> list[BaseProcess]:
    """Starts the ranks of a run; the last one is to die.

    Args:
        record: folder for the output and the events of each rank.
    """
    record.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train", "torch.utils.tensorboard"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dies = kill if rank == ranks - 1 else None
        process = context.Process(target=run_watched, args=(arguments, record, dies, environment))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], record: Path) -> None:
    for rank, process in enumerate(processes):
        process.join(timeout=120)
        assert process.exitcode == 0, (record / f"output-{rank}").read_text()


def die(processes: list[BaseProcess], record: Path) -> None:
    processes[-1].join(timeout=120)
    output = (record / f"output-{len(processes) - 1}").read_text()
    assert processes[-1].exitcode == -signal.SIGKILL, output
    for process in processes[:-1]:
        process.kill()
        process.join()


def flags(inputs: Path, run_dir: Path) -> list[str]:
    """A run with all that has a state: reference, its reset, minibatches, evaluation."""
    options: dict[str, object] = {
        "model": inputs / "model",
        "dataset": inputs / "sums.jsonl",
        "run_dir": run_dir,
        "backend": "reference",
        "cpu_threads": 1,
        "steps": STEPS,
        "num_prompts": 6,
        "group_size": 4,
        "max_new_tokens": 12,
        "eval_problems": 6,
        "eval_samples": 1,
        "eval_every": 3,
        "save_every": 2,
        "minibatches": 2,
        "learning_rate": 5e-3,
        "warmup_updates": 3,
        "loss": "grpo",
        "kl": "k3",
        "kl_weight": 0.01,
        "reference_reset_every": 3,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def assert_same_run(run_dir: Path, other: Path) -> None:
    def metrics(run: Path) -> list[dict[str, float | None]]:
        return [
            {name: value for name, value in record.items() if not name.startswith(TIMES)}
            for record in read_metrics(run)
        ]

    assert metrics(run_dir) == metrics(other)
    for folder in ("rollouts", "model", f"checkpoints/step-{STEPS:05d}"):
        files = sorted(path for path in (other / folder).rglob("*") if path.is_file())
        assert files
        for path in files:
            ours, name = run_dir / path.relative_to(other), path.relative_to(other)
            if path.name in ("state.json", "checksums.json"):
                # The metrics' times have other lengths in text.
                continue
            assert ours.read_bytes() == path.read_bytes(), name
    state, expected = (
        json.loads((run / f"checkpoints/step-{STEPS:05d}/state.json").read_text())
        for run in (run_dir, other)
    )
    assert state | {"log_bytes": 0} == expected | {"log_bytes": 0}


def lines_of(record: Path, rank: int) -> list[Any]:
    """Phase and call where one begins, and the number of its events where it comes to its end."""
    return [json.loads(line) for line in (record / f"events-{rank}").read_text().splitlines()]


def draw_kill(draw: random.Random, phase: str, call: int, lines: list[Any]) -> Kill:
    (events,) = [line[2] for line in lines if len(line) == 3 and line[:2] == [phase, call]]
    return Kill(phase=phase, call=call, event=draw.randrange(1, events))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def test_run_killed_at_ten_random_moments_ends_with_the_same_bits(
    inputs: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(flags(inputs, whole), tmp_path / "of-whole"), tmp_path / "of-whole")
    lines, draw = lines_of(tmp_path / "of-whole", 0), random.Random(0)
    record = tmp_path / "of-run"
    # Calls are those of one process; each phase comes so often, whatever the kill before left.
    for phase, call in (
        ("rollout", 2),
        ("scoring", 1),
        ("buffer", 1),
        ("update", 2),
        ("writing", 1),
        ("publishing", 1),
        ("copying", 1),
        ("writing", 2),
        ("export", 1),
        ("finishing", 1),
    ):
        kill = draw_kill(draw, phase, call, lines)
        die(start(flags(inputs, run), record, kill), record)
    finish(start(flags(inputs, run), record), record)
    assert_same_run(run, whole)
    # What is scored is not sampled again: besides its steps, a rollout is cost by the first three
    # kills, and by those of the writing thread, which may find the loop in the midst of one.
    rollouts = [line for line in lines_of(record, 0) if line[0] == "rollout" and len(line) == 2]
    assert len(rollouts) <= STEPS + 6
    assert not any((run / "buffer").iterdir())


def test_two_ranks_of_which_one_is_killed_while_it_writes_end_with_the_same_bits(
    inputs: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(flags(inputs, whole), tmp_path / "of-whole", ranks=2), tmp_path / "of-whole")
    kill = draw_kill(random.Random(0), "writing", 1, lines_of(tmp_path / "of-whole", 1))
    record = tmp_path / "of-run"
    die(start(flags(inputs, run), record, kill, ranks=2), record)
    assert not list((run / "checkpoints").glob("step-*"))
    finish(start(flags(inputs, run), record, ranks=2), record)
    assert_same_run(run, whole)
    files = list((run / "model").glob("*.safetensors"))
    assert len(files) == 2 and sum(len(load_file(file)) for file in files) == 21
