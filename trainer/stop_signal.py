"""Ctrl-C as a request: the step is finished or abandoned where nothing is lost, and the run
saved; and signals of processes that work for another one."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes a Ctrl-C on to processes that the terminal has already given it to.
SECOND_PRESS_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec as little as possible may happen.
_LIBC = ctypes.CDLL(None)


class InterruptedRunError(Exception):
    """The run was asked to stop and has been saved."""


class StopSignal:
    """While entered, SIGINT and SIGTERM set `requested`; a later second SIGINT ends the process at
    once."""

    def __init__(self) -> None:
        self.requested = False
        self._first_at = 0.0

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first_at = True, now
        elif number == signal.SIGINT and now - self._first_at > SECOND_PRESS_SECONDS:
            raise KeyboardInterrupt


def die_with_parent() -> None:
    """Called in a child process: the kernel kills it when its parent ends, however that ends."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def forwarded_signals() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """While entered, SIGINT and SIGTERM go to the child process that the given function names."""
    children: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)
        if not children:
            early.append(number)

    def forward_to(child: subprocess.Popen[bytes]) -> None:
        children.append(child)
        for number in early:
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield forward_to
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
