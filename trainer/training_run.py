"""What every training run has, whatever it learns from: a claimed directory, saving and resuming,
Ctrl-C, the clock of its phases, and the exit codes of its command line.

Exit codes: 0 done; 2 a mistake of the caller, in one sentence; 130 interrupted, saved, with the
command that resumes.
"""

import atexit
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from trainer.checkpoints import (
    CheckpointStore,
    RunState,
    restore_adapters,
    restore_optimizer,
    restore_reference,
    step_of,
)
from trainer.config import RunConfig, UsageError
from trainer.fsdp import (
    MainRankFailedError,
    World,
    any_rank,
    from_main_rank,
    let_main_rank_speak,
    start_world,
    stop_world,
    weights_checksum,
)
from trainer.host_memory import use_one_heap
from trainer.memory_check import OutOfMemoryError, RunMemory
from trainer.policy import Policy
from trainer.run_folder import claim_run_folder, finish_run_folder, is_finished, result_paths
from trainer.run_log import RunLog
from trainer.stop_signal import SIGNALS, InterruptedRunError, StopSignal

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


@dataclass(slots=True, kw_only=True)
class TrainingRun:
    """What the loop of a run works with."""

    config: RunConfig
    world: World
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    reference: Policy | None = None
    optimizer: torch.optim.Optimizer
    store: CheckpointStore
    log: RunLog
    memory: RunMemory
    stop: StopSignal
    fingerprint: str
    """`trainer.run_folder.config_fingerprint`."""
    total_steps: int
    completed: int
    """Steps made so far, those of earlier starts included."""
    drawn: int = 0
    """Problems or sequences taken from the data by those steps."""
    saved: int
    """Step of the newest checkpoint, 0 for none."""

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and at the last, happens at this
        one."""
        return step == self.total_steps or (every > 0 and step % every == 0)

    def weights_checksum(self) -> str:
        """Of the policy, as it is now."""
        # Not of merged weights, which round in another way on another number of ranks.
        return weights_checksum(self.world, self.policy.model.named_parameters())

    def restore(self, checkpoint: Path) -> None:
        """Gives a run whose weights are those of the checkpoint (with adapters: of the base) the
        rest of its state.

        Raises:
            UsageError: the state is that of another run, or of other weights.
        """
        state = RunState.read(checkpoint)
        if state.config != self.fingerprint:
            raise UsageError(
                f"--run-dir: {checkpoint} was saved with other options or other data than these"
            )
        self.drawn = state.problems
        restore_optimizer(checkpoint, self.policy, self.optimizer)
        if self.policy.adapters is not None:
            restore_adapters(checkpoint, self.policy.adapters)
        if self.reference is not None:
            restore_reference(checkpoint, self.reference)
        if state.weights != self.weights_checksum():
            raise UsageError(
                f"--run-dir: other weights were read from {checkpoint} than were saved"
            )
        if self.world.is_main and state.log_bytes != self.log.sync():
            self.log.message(
                f"warning: metrics.jsonl is not as long as when {checkpoint.name} was saved; its "
                f"curves may have a gap"
            )
        self.log.message(f"going on after step {state.step}")

    def save(self) -> None:
        """Starts to save the last completed step, unless it is saved already or there is none."""
        if self.saved == self.completed:
            return
        state = RunState(
            step=self.completed,
            problems=self.drawn,
            log_bytes=self.log.sync(),
            sampler_step=self.completed,
            weights=self.weights_checksum(),
            config=self.fingerprint,
        )
        waited = self.store.save(
            state,
            self.policy,
            self.optimizer,
            self.reference,
            self.tokenizer,
            is_last=self.completed == self.total_steps,
        )
        if waited:
            self.log.message(
                f"the checkpoint of step {self.completed} waited {waited:.1f} s until the one "
                f"before was written"
            )
        self.saved = self.completed

    def save_if_due(self) -> None:
        """Saves the last completed step, if a checkpoint is due after it and not made."""
        if self.is_due(self.completed, self.config.checkpoint.save_every):
            self.save()

    def stop_if_asked(self) -> None:
        """Saves the last completed step and leaves the loop, if any rank got a Ctrl-C.

        Raises:
            InterruptedRunError: it did.
            CheckpointError: the last checkpoint could not be written.
        """
        self.store.check()
        if any_rank(self.world, self.stop.requested):
            self.save()
            self.store.wait()
            saved = f"saved after step {self.completed}"
            raise InterruptedRunError(
                f"interrupted, {saved if self.completed else 'no step was complete'}"
            )


class PhaseClock:
    """Seconds spent in each phase of a step, as metrics."""

    def __init__(self, log: RunLog, memory: RunMemory) -> None:
        self.log, self.memory = log, memory
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of its block to that of the name; an allocation that fails there is one of
        the phase."""
        self.log.phase(name)
        started = time.perf_counter()
        with self.memory.phase(name):
            yield
        seconds = time.perf_counter() - started
        self.seconds[f"seconds/{name}"] = self.seconds.get(f"seconds/{name}", 0.0) + seconds

    def metrics(self, tokens: int) -> dict[str, float | None]:
        """The seconds, and the rate of completion tokens over all phases."""
        return {**self.seconds, "tokens_per_second": tokens / sum(self.seconds.values())}


@contextmanager
def open_run(config: RunConfig) -> Iterator[tuple[World, CheckpointStore, Path | None]]:
    """Joins the ranks and makes the run directory this run's own, while entered; gives the ranks,
    the checkpoints, and the newest one.

    Raises:
        UsageError: the directory cannot be used.
    """
    # A bar for every checkpoint would tear the run's own progress line apart.
    transformers.utils.logging.disable_progress_bar()
    use_one_heap()
    world = start_world(config.cpu_threads)
    with ExitStack() as stack:
        stack.callback(stop_world)
        from_main_rank(world, lambda: stack.enter_context(claim_run_folder(config)) and None)
        keep = config.checkpoint.keep_checkpoints
        store = CheckpointStore(config.run_folder, keep=keep, world=world)
        stack.callback(store.close, warn)
        yield world, store, store.latest(warn)


def is_complete(world: World, folder: Path, checkpoint: Path | None, total_steps: int) -> bool:
    """Whether a run has made its last step and left its results; the main rank says so.

    Collectives: one broadcast, where the last step is made.
    """
    if checkpoint is None or step_of(checkpoint) < total_steps:
        return False
    finished = from_main_rank(world, lambda: is_finished(folder))
    if finished and world.is_main:
        print(f"The run is complete, {total_steps} steps.")
        print("\n".join(result_paths(folder)))
    return finished


def finish_run(
    world: World, folder: Path, checkpoint: Path, results: Mapping[str, tuple[str, float, str]]
) -> None:
    """Leaves the results of a run that has made its last step; the main rank says what came of it.

    Args:
        world: the ranks.
        folder, checkpoint, results: see `finish_run_folder`.

    Collectives: one broadcast.
    """
    summary = from_main_rank(world, lambda: finish_run_folder(folder, checkpoint, results))
    if world.is_main:
        print(summary)


def warn(sentence: str) -> None:
    """Prints a warning."""
    print(f"warning: {sentence}", file=sys.stderr)


def resume_command(arguments: Sequence[str]) -> str:
    """The command line that started this process, to be given again."""
    return by_hand([sys.argv[0], *arguments])


def by_hand(command: Sequence[str]) -> str:
    """The command line that starts a script with its arguments as this process was started."""
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*launcher, *command])


def check_child(code: int, name: str) -> None:
    """Ends as a child process did, which showed its error itself; nothing follows exit code 0.

    Args:
        code: its exit code, negative for a signal.
        name: what it did.

    Raises:
        UsageError: it ended with a mistake of the caller.
        InterruptedRunError: it was interrupted.
        SystemExit: it ended in another way.
    """
    # A child that a signal reached before it could handle it ends with its negative number.
    if code in (EXIT_INTERRUPTED, *(-number for number in SIGNALS)):
        raise InterruptedRunError(f"interrupted in {name}")
    sentence = f"{name}: its command ended with exit code {code}"
    if code == EXIT_USAGE:
        raise UsageError(sentence)
    if code:
        sys.exit(f"error: {sentence}")


def exit_code_of(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Runs a command with its arguments; prints what went wrong, and returns the exit code."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        command(arguments)
    except UsageError as error:
        # Memory runs out on one rank, which alone can say so.
        if not isinstance(error, OutOfMemoryError):
            let_main_rank_speak()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    except MainRankFailedError:
        let_main_rank_speak()
        return 1
    except InterruptedRunError as interrupted:
        if is_main:
            print(f"{interrupted}; continue with\n  {resume_command(arguments)}", flush=True)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        if is_main:
            print(f"interrupted; start again with\n  {resume_command(arguments)}", flush=True)
        return EXIT_INTERRUPTED
    return 0


def end_process(code: int) -> NoReturn:
    """Ends the process with this exit code, after what is registered for its end.

    The interpreter is not taken apart: a thread of gloo that lets a tensor go while that happens
    aborts the process (pytorch#190489), and the caches of DTensor keep these threads alive.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
