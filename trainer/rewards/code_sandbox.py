"""The sandbox of graded programs: bubblewrap, an unprivileged user, limits, a system call filter.

A command started here sees read-only system folders and interpreter, a private /proc, a small
/tmp, no network, none of the caller's environment, files, processes or open descriptors other
than those passed on purpose. `code_selftest.open_sandbox` tries all of that out before any is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.rewards.code_seccomp import seccomp_filter

NOBODY = 65534
"""Uid and gid that programs run under, inside the sandbox always, outside when root starts it."""

_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_SYSTEM_FOLDERS = tuple(
    f"/usr/{name}" for name in ("bin", "lib", "lib32", "lib64", "libexec", "include")
)
_STACK_BYTES = 64 << 20
_SMALL_TMPFS_BYTES = 1 << 20
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    # Sets of strings keep their order, so that a program gives the same output every time.
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class SandboxUnavailable(RuntimeError):
    """No sandbox of the level asked for can be had on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run of a program may use; whoever exceeds one is stopped."""

    cpu_seconds: float = 4.0
    """Processor time of each process, rounded up to whole seconds."""
    wall_slack_seconds: float = 2.0
    """Real time beyond the processor time."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    file_bytes: int = 16 << 20
    """Size of any one file."""
    tmp_bytes: int = 64 << 20
    """Size of /tmp."""
    processes: int = 64
    """Processes and threads alive at once."""
    open_files: int = 64
    """File descriptors of each process."""
    output_bytes: int = 1 << 20
    """Bytes on stdout or stderr; a test whose expected output is longer allows for it."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive finite number, got {value}")

    @property
    def cpu_seconds_whole(self) -> int:
        """The processor limit as the kernel takes it."""
        return -int(-self.cpu_seconds // 1)

    @property
    def wall_seconds(self) -> float:
        """Real time from start to kill."""
        return self.cpu_seconds_whole + self.wall_slack_seconds


@dataclass(slots=True)
class BoxProcess:
    """A command running in the sandbox."""

    process: subprocess.Popen[bytes]
    status_fd: int | None
    """Where bubblewrap reports how the command ended; None without bubblewrap."""

    def exit_code(self) -> int | None:
        """Waits for the end; the exit code of the command, 128 + signal where one ended it.

        None when the sandbox itself failed, so that the command may not have run at all.
        """
        # The process group is certain to be the command's for as long as nobody has reaped it.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
        code = self.process.returncode
        if self.status_fd is None:
            return 128 - code if code < 0 else code
        with open(self.status_fd, "rb", closefd=False) as status:
            for line in status:
                report = json.loads(line)
                if "exit-code" in report:
                    return int(report["exit-code"])
        return None

    def kill(self) -> None:
        """Kills the command, with everything it started where there is a PID namespace."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Sandbox:
    """Starts commands under one level of protection; thread-safe.

    Args:
        bwrap: path of bubblewrap; None for limits alone.
        python: interpreter that runs Python in the sandbox, a path.
        packages: folders put on the path of Python programs, such as a site-packages with numpy.
            Programs can read all that lies in them.

    Raises:
        SandboxUnavailable: a tool of util-linux is missing.
    """

    def __init__(self, *, bwrap: str | None, python: str, packages: Sequence[str] = ()) -> None:
        self.python = python
        self.bwrap = bwrap
        packages = [str(Path(folder).resolve()) for folder in packages]
        self._filter = seccomp_filter() if bwrap else None
        self.environment = _ENVIRONMENT | {"PYTHONPATH": ":".join(packages)}
        # Set from outside the user namespace: whoever is out of memory, it is not the trainer.
        self._before = [_tool("choom"), "-n", "1000", "--"]
        if starts_as_root():
            user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            self._before += [_tool("setpriv"), *user, "--"]
        self._prlimit = _tool("prlimit")
        self._mounts = _mounts(python, packages)

    @property
    def has_filter(self) -> bool:
        """Whether a system call filter is on."""
        return self._filter is not None

    def python_command(self, script: str, *arguments: str) -> list[str]:
        """The command that runs a short Python script on arguments."""
        # No site module and no bytecode: a start in half the time that writes nothing.
        return [self.python, "-s", "-S", "-B", "-X", "utf8", "-c", script, *arguments]

    @contextlib.contextmanager
    def start(
        self,
        command: Sequence[str],
        limits: Limits,
        *,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
    ) -> Iterator[BoxProcess]:
        """Runs `command` for as long as the context lasts; leaving it kills what is left.

        Args:
            command: absolute path of an executable inside the sandbox, and arguments.
            limits: of this run; nothing here waits, so the real time is the caller's to keep.
            pass_fds: descriptors the command inherits under the same numbers.
            stdin, stdout, stderr: as for `subprocess.Popen`.
        """
        with contextlib.ExitStack() as stack:
            status_fd = None
            bwrap_fds: list[int] = []
            before = list(self._before)
            if self.bwrap is not None:
                status_fd, status_write = os.pipe()
                stack.callback(os.close, status_fd)
                write_end = stack.enter_context(open(status_write, "wb"))
                bwrap_fds.append(status_write)
                before += [self.bwrap, *_isolation(limits), *self._mounts]
                before += ["--json-status-fd", str(status_write)]
                if self._filter is not None:
                    filter_fd = stack.enter_context(passed_data(self._filter))
                    bwrap_fds.append(filter_fd)
                    before += ["--seccomp", str(filter_fd)]
                before.append("--")
            process = subprocess.Popen(
                [*before, self._prlimit, *self._limit_flags(limits), "--", *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[*pass_fds, *bwrap_fds],
                cwd="/" if self.bwrap else "/tmp",
                env=self.environment,
                start_new_session=True,
            )
            stack.enter_context(process)
            box = BoxProcess(process, status_fd)
            stack.callback(box.kill)
            if status_fd is not None:
                write_end.close()
            yield box

    def _limit_flags(self, limits: Limits) -> list[str]:
        seconds = limits.cpu_seconds_whole
        flags = [
            f"--as={limits.memory_bytes}",
            # A program that ignores the signal at the first is killed at the second.
            f"--cpu={seconds}:{seconds + 1}",
            f"--fsize={limits.file_bytes}",
            f"--nofile={limits.open_files}",
            f"--stack={_STACK_BYTES}",
            "--core=0",
        ]
        # Without a user namespace of its own, a user's other processes would count as well.
        if self.bwrap or starts_as_root():
            flags.append(f"--nproc={limits.processes}")
        return flags


@contextlib.contextmanager
def passed_data(data: bytes) -> Iterator[int]:
    """A descriptor of an unnamed file that holds `data`, sealed so that nobody can change it."""
    fd = os.memfd_create("data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        file.seek(0)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd


def starts_as_root() -> bool:
    """Whether commands have to be given another user: limits and permissions do not bind root."""
    return os.geteuid() == 0


def open_to_all(path: str) -> bool:
    """Whether any user can read the file or folder at `path`."""
    real = Path(path).resolve()
    folders_open = all(folder.stat().st_mode & 0o001 for folder in real.parents)
    return folders_open and bool(real.stat().st_mode & 0o004)


def choose_python(asked: str | None) -> str:
    """The interpreter for the sandbox, links resolved.

    Args:
        asked: a path; None takes the running interpreter or, where root runs it and the user that
            programs run under may not read it, the system's python3.

    Raises:
        ValueError: there is none that this user may read.
    """
    system = shutil.which("python3", path=_SYSTEM_PATH)
    choices = [asked] if asked is not None else [sys.executable, *([system] if system else [])]
    for choice in choices:
        real = os.path.realpath(choice)
        if os.path.isfile(real) and (not starts_as_root() or open_to_all(real)):
            return real
    raise ValueError(
        f"python: expected an interpreter that uid {NOBODY} can read, got {' and '.join(choices)}"
    )


def _tool(name: str) -> str:
    path = shutil.which(name, path=_SYSTEM_PATH)
    if path is None:
        raise SandboxUnavailable(f"code sandbox: expected {name} (util-linux) in {_SYSTEM_PATH}")
    return os.path.realpath(path)


def _isolation(limits: Limits) -> list[str]:
    flags = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    flags += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "box"]
    flags += ["--die-with-parent", "--new-session"]
    flags += ["--size", str(limits.tmp_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return flags


def _mounts(python: str, packages: Sequence[str]) -> list[str]:
    """Flags for a root folder that holds system tools, the interpreter and nothing to find."""
    prefix = Path(python).parent.parent
    shown = [*_SYSTEM_FOLDERS, python, str(prefix / "lib"), str(prefix / "lib64")]
    shown.append("/etc/ld.so.cache")
    flags = []
    for path in dict.fromkeys(shown):
        if os.path.exists(path):
            flags += ["--ro-bind", path, path]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            flags += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            flags += ["--ro-bind", f"/{name}", f"/{name}"]
    flags += ["--proc", "/proc", "--dev", "/dev"]
    # Installed packages may hold test data, and a start-up file there would run in every program.
    hidden = [
        str(folder)
        for root in {Path("/usr"), prefix}
        for folder in sorted(root.glob("lib*/python3*/*-packages"))
    ]
    for folder in [*hidden, "/dev/shm"]:
        flags += ["--size", str(_SMALL_TMPFS_BYTES), "--tmpfs", folder]
    for folder in hidden:
        flags += ["--remount-ro", folder]
    for folder in packages:
        flags += ["--ro-bind", folder, folder]
    flags += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return flags
