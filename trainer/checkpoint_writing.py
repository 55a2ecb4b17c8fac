"""Writing a checkpoint in the background: each rank its files, and the main rank the name that
makes them count.

The ranks' threads do not communicate: each leaves a list of what it has written, with checksums,
beside its files, and the main rank's thread waits for the lists of all. Errors are kept until the
main threads meet (`check`, `wait`).
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import UsageError
from trainer.durable import flush_to_disk, write_atomically
from trainer.fsdp import COLLECTIVE_TIMEOUT, World, gather_in_order

CHECKSUMS_FILE = "checksums.json"
POLL_SECONDS = 0.02
# When a rank leaves with an error, how long it still waits for the files of the others.
CLOSING_SECONDS = 300.0
# What a disk does to a writer; anything else is a mistake in the program and keeps its traceback.
DISK_ERRORS = (OSError, SafetensorError)

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by file."""


class CheckpointError(UsageError):
    """A checkpoint could not be written."""


class BackgroundWriter:
    """At most one checkpoint on its way to the disk. Every rank calls its methods together, but
    `close`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._jobs: list[futures.Future[None]] = []
        self._path = Path()
        self._given_up = threading.Event()

    @property
    def is_idle(self) -> bool:
        """Whether this rank's part of the last write is over."""
        return all(job.done() for job in self._jobs)

    def start(self, path: Path, partial: Path, files: Files, then: Callable[[], object]) -> None:
        """Writes files into the folder `partial`, which exists, and makes it `path` when those of
        all ranks are there.

        Args:
            files: of this rank; not changed before the write is over.
            then: called on the main rank's thread at the end.
        """
        assert not self._jobs
        self._path = path
        own = self._thread.submit(_write, partial, files, self.world.rank)
        self._jobs = [own]
        if self.world.is_main:
            self._jobs.append(self._thread.submit(self._publish, own, path, partial, then))

    def check(self) -> None:
        """Goes on at once, unless the write has failed.

        Raises:
            CheckpointError: it failed, on any rank.

        Collectives: one small one, where something was started.
        """
        if not self._jobs:
            return
        errors = [job.exception() for job in self._jobs if job.done()]
        error = next(filter(None, errors), None)
        sentences = gather_in_order(self.world, [error and self._sentence(error)])
        sentence = next(filter(None, sentences), None)
        if sentence is None:
            return
        self._given_up.set()
        self._jobs = []
        if error is not None and not isinstance(error, DISK_ERRORS):
            raise error
        raise CheckpointError(sentence) from error

    def wait(self) -> None:
        """Waits until what was started is on the disk under its name.

        Raises:
            CheckpointError: it failed, on any rank.
        """
        if not self._jobs:
            return
        # First, because the main rank's second job waits for the first of every rank.
        futures.wait(self._jobs[:1])
        self.check()
        futures.wait(self._jobs)
        self.check()
        self._jobs = []

    def close(self, warn: Callable[[str], None]) -> None:
        """Waits, on this rank alone; `warn` gets a sentence if the write failed."""
        done, late = futures.wait(self._jobs, timeout=CLOSING_SECONDS)
        self._given_up.set()
        errors = [job.exception() for job in done]
        if late:
            errors.append(TimeoutError("the files of another rank did not come"))
        for error in filter(None, errors):
            warn(self._sentence(error))
        self._jobs = []
        self._thread.shutdown()

    def _publish(
        self,
        own: futures.Future[None],
        path: Path,
        partial: Path,
        then: Callable[[], object],
    ) -> None:
        if own.exception() is not None:
            return
        deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
        lists = [_list_of(partial, rank) for rank in range(self.world.size)]
        while not all(each.exists() for each in lists):
            if self._given_up.wait(POLL_SECONDS):
                return
            if time.monotonic() > deadline:
                raise TimeoutError("the files of another rank did not come")
        checksums: dict[str, str] = {}
        for each in lists:
            checksums |= json.loads(each.read_text())
            each.unlink()
        for file in partial.rglob("*"):
            name = str(file.relative_to(partial))
            if file.is_file() and name not in checksums:
                flush_to_disk(file)
                checksums[name] = checksum(file)
        # Without a line break at the end, because its loss would go unnoticed.
        (partial / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2, sort_keys=True))
        flush_to_disk(partial / CHECKSUMS_FILE)
        for folder in (*filter(Path.is_dir, partial.rglob("*")), partial):
            flush_to_disk(folder)
        # Only a checkpoint found damaged can stand in the way.
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        flush_to_disk(path.parent)
        then()

    def _sentence(self, error: BaseException) -> str:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or repr(error)
        return f"{self._path} could not be written ({reason})"


def assign_owners(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """A rank for each name, so that the ranks' sums of sizes are alike: the largest first, each to
    the rank that has least."""
    loads = [0] * num_ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def numbered_name(stem: str, part: int, parts: int) -> str:
    """The name of one file of several, as Hugging Face numbers them; `part` counts from 0."""
    number = f"-{part + 1:05d}-of-{parts:05d}" if parts > 1 else ""
    return f"{stem}{number}.safetensors"


def damage(path: Path, world: World) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files; None where nothing is."""
    try:
        checksums = json.loads((path / CHECKSUMS_FILE).read_text())
    except (OSError, ValueError):
        return f"{CHECKSUMS_FILE} cannot be read"
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    there.remove(CHECKSUMS_FILE)
    if not isinstance(checksums, dict) or there - checksums.keys():
        return f"{CHECKSUMS_FILE} does not name every file"
    for name in sorted(checksums)[world.rank :: world.size]:
        if name not in there:
            return f"{name} is missing"
        if checksum(path / name) != checksums[name]:
            return f"{name} does not match its checksum"
    return None


def checksum(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write(partial: Path, files: Files, rank: int) -> None:
    checksums = {}
    for name, tensors in files.items():
        save_file(dict(tensors), partial / name, metadata={"format": "pt"})
        flush_to_disk(partial / name)
        checksums[name] = checksum(partial / name)
    write_atomically(_list_of(partial, rank), json.dumps(checksums))


def _list_of(partial: Path, rank: int) -> Path:
    """Where a rank's thread says what it has written."""
    return partial / f"rank-{rank:05d}.written"
