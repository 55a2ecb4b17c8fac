"""Ctrl-C as a request: the step is finished or abandoned where nothing is lost, and the run
saved."""

import signal
import time
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes a Ctrl-C on to processes that the terminal has already given it to.
SECOND_PRESS_SECONDS = 2.0


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
