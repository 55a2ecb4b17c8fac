"""Watches a running process: its output up to a limit, its time up to a deadline."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Ending = Literal["exited", "record", "wall", "output"]
"""Why `watch` returned: the process ended, a whole line arrived on the record pipe, the deadline
passed, or a pipe went over its limit."""

_READ_BYTES = 1 << 16
_DRAIN_SECONDS = 1.0


@dataclass(slots=True)
class Capture:
    """What came out of a pipe so far."""

    fd: int
    limit: int
    """Bytes; more than this ends the watch."""
    is_record: bool = False
    """The first whole line ends the watch."""
    data: bytearray = field(default_factory=bytearray)


def watch(pid: int, captures: Sequence[Capture], *, wall_seconds: float) -> Ending:
    """Reads the pipes until there is a reason to stop; memory stays within the limits of all.

    Args:
        pid: a child process that nobody has waited for yet; it is neither killed nor reaped here.
        captures: pipes to read, which the process may share with others.
        wall_seconds: from now to the deadline.
    """
    deadline = time.monotonic() + wall_seconds
    pidfd = os.pidfd_open(pid)
    try:
        return _watch(pidfd, {capture.fd: capture for capture in captures}, deadline)
    finally:
        os.close(pidfd)


def _watch(pidfd: int, captures: dict[int, Capture], deadline: float) -> Ending:
    poller = select.poll()
    for fd in (pidfd, *captures):
        poller.register(fd, select.POLLIN)
    exited = False
    while captures or not exited:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return "exited" if exited else "wall"
        for fd, _ in poller.poll(remaining * 1000):
            if fd == pidfd:
                # What it wrote is in the pipes; a process it left behind must not hold them open.
                exited = True
                deadline = min(deadline, time.monotonic() + _DRAIN_SECONDS)
                poller.unregister(fd)
                continue
            capture = captures[fd]
            chunk = os.read(fd, _READ_BYTES)
            if not chunk:
                poller.unregister(fd)
                del captures[fd]
                continue
            capture.data += chunk
            if len(capture.data) > capture.limit:
                return "output"
            if capture.is_record and b"\n" in chunk:
                return "record"
    return "exited"
