"""Tries to get out of the sandbox it runs in, and reports what held.

A script for the sandbox, standard library only: `code_probe.py REQUEST RESULT` with two file
descriptors. The request says where the traps are that the caller has set outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

_CLONE_NEWUSER = 0x10000000
_PIECE_BYTES = 1 << 16


def attempts(request: dict[str, Any]) -> Iterator[tuple[str, Callable[[], bool]]]:
    """What is tried, and a function that returns whether the sandbox held."""
    yield "user", lambda: os.getuid() != 0 and _status("CapEff") == 0
    yield "memory", lambda: _refused(lambda: bytearray(request["memory_bytes"]), MemoryError)
    yield "file size", lambda: _bytes_written(1) <= request["file_bytes"]
    yield "processor time", lambda: _cpu_limit() == request["cpu_seconds"]
    if request["level"] != "bubblewrap":
        return
    yield "capabilities", lambda: _status("CapBnd") == 0 and _status("NoNewPrivs") == 1
    yield "network", lambda: _refused(lambda: _connect(socket.AF_INET, request["tcp"]))
    yield "local sockets", lambda: _refused(lambda: _connect(socket.AF_UNIX, request["unix"]))
    yield "host files", lambda: not os.path.exists(request["file"])
    yield (
        "host processes",
        lambda: len([name for name in os.listdir("/proc") if name.isdigit()]) < 5,
    )
    yield "environment", lambda: set(os.environ) <= set(request["environment"])
    yield "system files", lambda: _read_only("/x") and _read_only("/usr/bin/x")
    yield "room in /tmp", lambda: _bytes_written(64) <= request["tmp_bytes"]
    yield "processes", lambda: _forks(2 * request["processes"]) < request["processes"]
    yield "new namespaces", lambda: ctypes.CDLL(None).unshare(_CLONE_NEWUSER) == -1
    if request["filtered"]:
        yield "system calls", lambda: _refused(lambda: socket.socket(socket.AF_NETLINK))


def _refused(action: Callable[[], object], error: type[BaseException] = OSError) -> bool:
    try:
        action()
    except error:
        return True
    return False


def _read_only(path: str) -> bool:
    return _refused(lambda: open(path, "w"))


def _connect(family: int, address: Any) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        client.connect(tuple(address) if isinstance(address, list) else "\0" + address)


def _bytes_written(num_files: int) -> int:
    """Bytes that fit into that many files in /tmp, which are removed again."""
    total = 0
    names = [f"/tmp/probe-{os.getpid()}-{at}" for at in range(num_files)]
    for name in names:
        with contextlib.suppress(OSError), open(name, "wb", buffering=0) as file:
            while True:
                total += file.write(bytes(_PIECE_BYTES))
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(name)
    return total


def _forks(most: int) -> int:
    """How many children can be alive at once, up to `most`."""
    read_end, write_end = os.pipe()
    children: list[int] = []
    with contextlib.suppress(OSError):
        while len(children) < most:
            child = os.fork()
            if child == 0:
                os.close(write_end)
                os.read(read_end, 1)
                os._exit(0)
            children.append(child)
    os.close(write_end)
    for child in children:
        os.waitpid(child, 0)
    return len(children)


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        values = dict(line.split(":", 1) for line in status)
    return int(values[field], 16)


def _cpu_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_CPU)[0]


def main(request_fd: str, result_fd: str) -> None:
    """Makes every attempt and writes one line of JSON: the name of each, and whether it held."""
    with open(int(request_fd), "rb") as request_file:
        request = json.load(request_file)
    held = {name: attempt() for name, attempt in attempts(request)}
    with open(int(result_fd), "w") as result:
        result.write(json.dumps(held) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
