"""Runs one program on one test in the sandbox, and judges the result outside of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

from trainer.rewards import code_driver
from trainer.rewards.code_checker import outputs_match, values_match
from trainer.rewards.code_process import Capture, Ending, watch
from trainer.rewards.code_sandbox import (
    BoxProcess,
    Limits,
    Sandbox,
    SandboxUnavailable,
    passed_data,
)
from trainer.rewards.code_tests import CheckTest, FunctionTest, StdinTest

TestStatus = Literal[
    "passed",
    "wrong",
    "crash",
    "timeout",
    "output_limit",
    "compile_error",
    "sandbox_error",
    "not_run",
]
"""`crash`: ended by an exception, a signal or a limit other than time. `sandbox_error`: the sandbox
failed to run the program. `not_run`: an earlier test made it pointless."""

_COMPILE_FLAGS = ("-std=gnu++20", "-O2", "-x", "c++")
_COMPILE_SCRIPT = """
folder=$(mktemp -d) && "$@" -o "$folder/program" && cat "$folder/program"
code=$?
rm -rf "$folder"
exit $code
"""
_COMPILE_DRIVER = """
import marshal, sys
source = open(int(sys.argv[1]), "rb").read()
code = compile(source, "code_driver.py", "exec", dont_inherit=True, optimize=2)
sys.stdout.buffer.write(marshal.dumps(code))
"""
_RUN_DRIVER = """
import marshal, sys
exec(marshal.loads(open(int(sys.argv.pop(1)), "rb").read()))
"""
_OUT_OF_CPU_EXIT = 128 + signal.SIGXCPU
_KILLED_EXIT = 128 + signal.SIGKILL
_MAX_DETAIL_CHARS = 400
_ROOM_BEYOND_EXPECTED = 1 << 16
_SECONDS_TO_EXIT = 1.0
_NO_RESULT = "ended before the call returned"


@dataclass(frozen=True, slots=True, kw_only=True)
class TestOutcome:
    """How one program did on one test."""

    status: TestStatus
    detail: str = ""
    """What went wrong, in a few words, part of them the program's own."""
    overran_wall: bool = False
    """The real-time limit was what stopped it, not the processor limit."""
    retried: bool = False
    """This is the outcome of a second run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executable:
    """A program that can be run: Python source, or a compiled binary."""

    content: bytes
    is_python: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """A command that has ended or been stopped."""

    ending: Ending
    exit_code: int | None
    """128 + signal where one ended it; None where it was stopped, or the sandbox failed."""
    output: bytes
    errors: bytes
    seconds: float


class Runner:
    """Runs programs in one sandbox; thread-safe, holds nothing between runs."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._driver = self._compiled_driver()

    def _compiled_driver(self) -> bytes:
        """The driver's bytecode, made by the interpreter that will run it."""
        with passed_data(Path(code_driver.__file__).read_bytes()) as source_fd:
            command = self._sandbox.python_command(_COMPILE_DRIVER, str(source_fd))
            run = self._run(command, Limits(), pass_fds=[source_fd])
        if run.exit_code != 0:
            raise SandboxUnavailable(f"code sandbox: no Python in it: {_tail(run.errors)}")
        return run.output

    def compile_cpp(self, source: bytes, compiler: str, limits: Limits) -> bytes | TestOutcome:
        """The binary, or the outcome of every test where there is none."""
        with passed_data(source) as source_fd:
            arguments = [*_COMPILE_FLAGS, f"/proc/self/fd/{source_fd}"]
            command = ["/bin/sh", "-c", _COMPILE_SCRIPT, "sh", compiler, *arguments]
            run = self._run(command, limits, pass_fds=[source_fd])
        if run.exit_code == 0:
            return run.output
        if run.ending != "exited":
            detail = "out of time" if run.ending == "wall" else "too much output"
            return TestOutcome(status="compile_error", detail=f"compiler: {detail}")
        if run.exit_code is None:
            return TestOutcome(status="sandbox_error", detail=_tail(run.errors))
        return TestOutcome(status="compile_error", detail=_head(run.errors))

    def run_stdin(self, program: Executable, test: StdinTest, limits: Limits) -> TestOutcome:
        """Runs the program on the test's input and compares what it printed."""
        with contextlib.ExitStack() as stack:
            content_fd = stack.enter_context(passed_data(program.content))
            input_fd = stack.enter_context(passed_data(test.input.encode()))
            fds = [content_fd]
            command = [f"/proc/self/fd/{content_fd}"]
            if program.is_python:
                driver_fd = stack.enter_context(passed_data(self._driver))
                fds.append(driver_fd)
                command = self._driver_command(driver_fd, "stdin", content_fd)
            limits = _with_room_for(len(test.output.encode()), limits)
            run = self._run(command, limits, pass_fds=fds, stdin=input_fd)
        if run.ending == "exited" and run.exit_code == 0:
            actual = run.output.decode(errors="replace")
            right = outputs_match(
                test.output, actual, tolerance=test.tolerance, ignore_case=test.ignore_case
            )
            return TestOutcome(status="passed" if right else "wrong")
        if program.is_python and run.exit_code == code_driver.COMPILE_ERROR_EXIT:
            return TestOutcome(status="compile_error", detail=_tail(run.errors))
        return _failure(run, limits)

    def run_function(self, source: bytes, test: FunctionTest, limits: Limits) -> TestOutcome:
        """Calls the test's function in the sandbox and compares the value that came back."""
        request = {
            "source": source.decode("utf-8", "surrogatepass"),
            "setup": test.setup,
            "entry_point": test.entry_point,
            "arguments": test.arguments,
        }
        limits = _with_room_for(len(json.dumps(test.expected)), limits)
        with contextlib.ExitStack() as stack:
            result_fd, result_write = _pipe(stack)
            box = self._start_driver(stack, "function", request, [result_write.fileno()], limits)
            result_write.close()
            result = Capture(result_fd.fileno(), limits.output_bytes, is_record=True)
            run = _watched(box, limits, result)
        return _judge_result(run.output, test) if run.ending == "record" else _failure(run, limits)

    def run_check(self, source: bytes, test: CheckTest, limits: Limits) -> TestOutcome:
        """Runs the test's code in one sandbox against the program in another."""
        program_request = {
            "source": source.decode("utf-8", "surrogatepass"),
            "entry_point": test.entry_point,
        }
        check_request = {
            "entry_point": test.entry_point,
            "setup": test.setup,
            "code": test.code,
            "max_reply_bytes": limits.output_bytes,
        }
        with contextlib.ExitStack() as stack:
            calls_read, calls_write = _pipe(stack)
            replies_read, replies_write = _pipe(stack)
            verdict_read, verdict_write = _pipe(stack)
            program_ends = [calls_read, replies_write]
            check_ends = [calls_write, replies_read, verdict_write]
            fds = [end.fileno() for end in program_ends]
            program = self._start_driver(stack, "serve", program_request, fds, limits)
            fds = [end.fileno() for end in check_ends]
            check = self._start_driver(stack, "check", check_request, fds, limits)
            for end in (*program_ends, *check_ends):
                end.close()
            verdict = Capture(verdict_read.fileno(), _ROOM_BEYOND_EXPECTED, is_record=True)
            run = _watched(check, limits, verdict, _error_capture(program, limits))
            if run.ending != "record":
                return _failure(run, limits)
            judged = json.loads(run.output)
            if judged["status"] != "gone":
                return TestOutcome(status=judged["status"], detail=judged["detail"])
            # It may have closed its end of the pipe and live on, which is not waited for long.
            last = _watched(program, replace(limits, cpu_seconds=_SECONDS_TO_EXIT))
            if last.ending != "exited":
                return TestOutcome(status="crash", detail=_NO_RESULT)
            return _failure(replace(last, seconds=run.seconds + last.seconds), limits)

    def _run(
        self,
        command: Sequence[str],
        limits: Limits,
        *,
        pass_fds: Sequence[int],
        stdin: int = subprocess.DEVNULL,
    ) -> _Run:
        with self._sandbox.start(
            command,
            limits,
            pass_fds=pass_fds,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as box:
            assert box.process.stdout is not None
            return _watched(box, limits, Capture(box.process.stdout.fileno(), limits.output_bytes))

    def _start_driver(
        self,
        stack: contextlib.ExitStack,
        mode: str,
        request: dict[str, Any],
        fds: Sequence[int],
        limits: Limits,
    ) -> BoxProcess:
        driver_fd = stack.enter_context(passed_data(self._driver))
        request_fd = stack.enter_context(passed_data(json.dumps(request).encode()))
        return stack.enter_context(
            self._sandbox.start(
                self._driver_command(driver_fd, mode, request_fd, *fds),
                limits,
                pass_fds=[driver_fd, request_fd, *fds],
                stderr=subprocess.PIPE,
            )
        )

    def _driver_command(self, driver_fd: int, mode: str, *fds: int) -> list[str]:
        return self._sandbox.python_command(_RUN_DRIVER, str(driver_fd), mode, *map(str, fds))


def _judge_result(line: bytes, test: FunctionTest) -> TestOutcome:
    try:
        reply = json.loads(line.partition(b"\n")[0], parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        return TestOutcome(status="wrong", detail="the result cannot be read")
    if "value" in reply:
        right = values_match(test.expected, reply["value"], tolerance=test.tolerance)
        return TestOutcome(status="passed" if right else "wrong")
    detail = str(reply.get("detail"))[:_MAX_DETAIL_CHARS]
    if reply.get("failed") == "compile":
        return TestOutcome(status="compile_error", detail=detail)
    return TestOutcome(status="wrong" if reply.get("failed") == "value" else "crash", detail=detail)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a JSON number, got {name}")


def _watched(box: BoxProcess, limits: Limits, *captures: Capture) -> _Run:
    """Waits for the end of a command; the first of the captures is its output."""
    errors = _error_capture(box, limits)
    started = time.monotonic()
    ending = watch(box.process.pid, [*captures, errors], wall_seconds=limits.wall_seconds)
    seconds = time.monotonic() - started
    exit_code = box.exit_code() if ending == "exited" else None
    output = bytes(captures[0].data) if captures else b""
    return _Run(ending, exit_code, output, bytes(errors.data), seconds)


def _failure(run: _Run, limits: Limits) -> TestOutcome:
    """The outcome of a run that brought no result to judge."""
    if run.ending == "wall":
        return TestOutcome(status="timeout", detail="over the real-time limit", overran_wall=True)
    if run.ending == "output":
        return TestOutcome(status="output_limit", detail=f"over {limits.output_bytes} bytes")
    if run.exit_code is None:
        return TestOutcome(status="sandbox_error", detail=_tail(run.errors))
    if run.exit_code == 0:
        return TestOutcome(status="crash", detail=_NO_RESULT)
    killed_late = run.exit_code == _KILLED_EXIT and run.seconds >= limits.cpu_seconds_whole
    if run.exit_code == _OUT_OF_CPU_EXIT or killed_late:
        return TestOutcome(status="timeout", detail=f"over {limits.cpu_seconds_whole} s of CPU")
    return TestOutcome(status="crash", detail=f"exit code {run.exit_code}: {_tail(run.errors)}")


def _with_room_for(expected_bytes: int, limits: Limits) -> Limits:
    """Limits that allow an output as long as the expected one."""
    most = max(limits.output_bytes, expected_bytes + _ROOM_BEYOND_EXPECTED)
    return replace(limits, output_bytes=most)


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read_fd, write_fd = os.pipe()
    read_end = stack.enter_context(open(read_fd, "rb", buffering=0))
    return read_end, stack.enter_context(open(write_fd, "wb", buffering=0))


def _error_capture(box: BoxProcess, limits: Limits) -> Capture:
    assert box.process.stderr is not None
    return Capture(box.process.stderr.fileno(), limits.output_bytes)


def _head(errors: bytes) -> str:
    return errors[: 4 * _MAX_DETAIL_CHARS].decode(errors="replace").strip()[:_MAX_DETAIL_CHARS]


def _tail(errors: bytes) -> str:
    return errors[-_MAX_DETAIL_CHARS:].decode(errors="replace").strip()
