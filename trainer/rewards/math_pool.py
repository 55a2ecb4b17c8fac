"""Long-lived worker processes that compare answers, and the threads that feed them.

One thread per worker takes jobs from a shared queue, so any number of callers in any threads can
submit at once. A worker's own CPU limit is the usual end of a hard comparison; the wall-clock
deadline here, several times as long, is for a worker that does not get to run at all.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import trainer

WALL_SECONDS_PER_CPU_SECOND = 5.0
START_SECONDS = 120.0
WORKER_MEMORY_BYTES = 2 << 30

_READ_BYTES = 1 << 16


class WorkerStartError(RuntimeError):
    """A worker process did not start."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a worker said: whether the answers are equal, and how the comparison ended."""

    correct: bool
    status: str
    repeatable: bool
    """False where the wall clock decided, so that another try may end otherwise."""


class WorkerPool:
    """Compares (golds, answer, mode) in worker processes; `submit` may be called from any thread.

    Args:
        workers: number of processes that compare.
        timeout_seconds: CPU seconds that one comparison may take.
    """

    def __init__(self, workers: int, timeout_seconds: float) -> None:
        self._jobs: SimpleQueue[tuple[dict[str, Any], Future[Verdict]] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_serve, args=(self._jobs, timeout_seconds), name="math-grader", daemon=True
            )
            for _ in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, golds: list[str], answer: str, mode: str) -> Future[Verdict]:
        """The verdict to come; its `result()` raises WorkerStartError where no worker starts."""
        verdict: Future[Verdict] = Future()
        self._jobs.put(({"golds": golds, "answer": answer, "mode": mode}, verdict))
        return verdict

    def close(self) -> None:
        """Finish the jobs that are queued, then end all workers."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


def _serve(
    jobs: SimpleQueue[tuple[dict[str, Any], Future[Verdict]] | None], timeout_seconds: float
) -> None:
    worker = _Worker(timeout_seconds)
    while (job := jobs.get()) is not None:
        request, verdict = job
        try:
            verdict.set_result(worker.compare(request))
        except WorkerStartError as error:
            verdict.set_exception(error)
        if not worker.is_alive():
            worker.stop()
            worker = _Worker(timeout_seconds)
    worker.stop()


class _Worker:
    """One worker process and its pipes; used by one thread."""

    def __init__(self, timeout_seconds: float) -> None:
        self._wall_seconds = timeout_seconds * WALL_SECONDS_PER_CPU_SECOND
        self._ids = itertools.count()
        self._is_ready = False
        self._received = b""
        # -P and PYTHONPATH: the package is found, and nothing in the current folder is.
        search_path = [str(Path(trainer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "trainer.math_answers.worker"),
                *(str(WORKER_MEMORY_BYTES), str(timeout_seconds)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search_path))},
        )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def compare(self, request: dict[str, Any]) -> Verdict:
        if not self._is_ready:
            if self._read_reply(START_SECONDS) is None:
                self._kill()
                raise WorkerStartError(
                    "MathGrader: expected a worker process to start, got none; "
                    "its message is on the standard error of this process"
                )
            self._is_ready = True
        request_id = next(self._ids)
        deadline = time.monotonic() + self._wall_seconds
        try:
            self._write(json.dumps(request | {"id": request_id}).encode() + b"\n")
        except BrokenPipeError:
            self._kill()
            return Verdict(False, "crash", repeatable=False)
        while (reply := self._read_reply(deadline - time.monotonic())) is not None:
            # A reply with another id belongs to a request that was already given up.
            if reply.get("id", request_id) == request_id:
                return Verdict(reply.get("correct", False), reply["status"], repeatable=True)
        status = "timeout" if self.is_alive() else "crash"
        self._kill()
        return Verdict(False, status, repeatable=False)

    def stop(self) -> None:
        """End the process: politely when it is idle, at once when it does not listen."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._kill()
        self._process.stdout.close()

    def _kill(self) -> None:
        # The process group: the worker and the child that does its work.
        if self.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        while data:
            data = data[self._process.stdin.write(data) or 0 :]

    def _read_reply(self, seconds: float) -> dict[str, Any] | None:
        """The next reply; None when the time is over or the process has ended."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._received:
            remaining_ms = 1000 * (deadline - time.monotonic())
            if remaining_ms <= 0 or not poll.poll(remaining_ms):
                return None
            data = os.read(self._process.stdout.fileno(), _READ_BYTES)
            if not data:
                return None
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply
