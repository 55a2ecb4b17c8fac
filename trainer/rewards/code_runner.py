"""Runs one program on one test in the sandbox, and judges the result outside of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

from trainer.rewards import code_driver
from trainer.rewards.code_checker import outputs_match, values_match
from trainer.rewards.code_process import Capture, watch
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


class Runner:
    """Runs programs in one sandbox; thread-safe, holds nothing between runs."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._driver = self._compiled_driver()

    def _compiled_driver(self) -> bytes:
        """The driver's bytecode, made by the interpreter that will run it."""
        limits = Limits()
        with contextlib.ExitStack() as stack:
            source_fd = stack.enter_context(passed_data(Path(code_driver.__file__).read_bytes()))
            box = stack.enter_context(
                self._sandbox.start(
                    self._sandbox.python_command(_COMPILE_DRIVER, str(source_fd)),
                    limits,
                    pass_fds=[source_fd],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            output, errors = _output_captures(box, limits.output_bytes)
            ending = watch(box.process.pid, [output, errors], wall_seconds=limits.wall_seconds)
            if ending != "exited" or box.exit_code() != 0:
                raise SandboxUnavailable(f"code sandbox: no Python in it: {_tail(errors)}")
            return bytes(output.data)

    def compile_cpp(self, source: bytes, compiler: str, limits: Limits) -> bytes | TestOutcome:
        """The binary, or the outcome of every test where there is none."""
        with contextlib.ExitStack() as stack:
            source_fd = stack.enter_context(passed_data(source))
            arguments = [*_COMPILE_FLAGS, f"/proc/self/fd/{source_fd}"]
            box = stack.enter_context(
                self._sandbox.start(
                    ["/bin/sh", "-c", _COMPILE_SCRIPT, "sh", compiler, *arguments],
                    limits,
                    pass_fds=[source_fd],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            binary, errors = _output_captures(box, limits.output_bytes)
            ending = watch(box.process.pid, [binary, errors], wall_seconds=limits.wall_seconds)
            if ending != "exited":
                detail = "compiler ran out of time" if ending == "wall" else "too much output"
                return TestOutcome(status="compile_error", detail=detail)
            exit_code = box.exit_code()
        if exit_code is None:
            return TestOutcome(status="sandbox_error", detail=_tail(errors))
        if exit_code != 0:
            return TestOutcome(status="compile_error", detail=_head(errors))
        return bytes(binary.data)

    def run_stdin(self, program: Executable, test: StdinTest, limits: Limits) -> TestOutcome:
        """Runs the program on the test's input and compares what it printed."""
        expected_bytes = len(test.output.encode())
        most = max(limits.output_bytes, expected_bytes + _ROOM_BEYOND_EXPECTED)
        with contextlib.ExitStack() as stack:
            content_fd = stack.enter_context(passed_data(program.content))
            input_fd = stack.enter_context(passed_data(test.input.encode()))
            fds = [content_fd]
            command = [f"/proc/self/fd/{content_fd}"]
            if program.is_python:
                driver_fd = stack.enter_context(passed_data(self._driver))
                fds.append(driver_fd)
                command = self._driver_command(driver_fd, "stdin", content_fd)
            box = stack.enter_context(
                self._sandbox.start(
                    command,
                    limits,
                    pass_fds=fds,
                    stdin=input_fd,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            output, errors = _output_captures(box, most)
            started = time.monotonic()
            ending = watch(box.process.pid, [output, errors], wall_seconds=limits.wall_seconds)
            if ending == "wall":
                return _wall_timeout()
            if ending == "output":
                return TestOutcome(status="output_limit")
            failure = _failed_exit(box, errors, limits, time.monotonic() - started)
        if failure is not None:
            return failure
        actual = output.data.decode(errors="replace")
        right = outputs_match(
            test.output, actual, tolerance=test.tolerance, ignore_case=test.ignore_case
        )
        return TestOutcome(status="passed" if right else "wrong")

    def run_function(self, source: bytes, test: FunctionTest, limits: Limits) -> TestOutcome:
        """Calls the test's function in the sandbox and compares the value that came back."""
        request = {
            "source": source.decode("utf-8", "surrogatepass"),
            "setup": test.setup,
            "entry_point": test.entry_point,
            "arguments": test.arguments,
        }
        expected_bytes = len(json.dumps(test.expected))
        most = max(limits.output_bytes, expected_bytes + _ROOM_BEYOND_EXPECTED)
        with contextlib.ExitStack() as stack:
            result_fd, result_write = _pipe(stack)
            box = self._start_driver(stack, "function", request, [result_write.fileno()], limits)
            result_write.close()
            result = Capture(result_fd.fileno(), most, is_record=True)
            errors = _error_capture(box, limits.output_bytes)
            started = time.monotonic()
            ending = watch(box.process.pid, [result, errors], wall_seconds=limits.wall_seconds)
            if ending == "wall":
                return _wall_timeout()
            if ending == "output":
                return TestOutcome(status="output_limit")
            if ending == "exited":
                failure = _failed_exit(box, errors, limits, time.monotonic() - started)
                ended = TestOutcome(status="crash", detail="ended before the call returned")
                return failure or ended
        return _judge_result(bytes(result.data), test)

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
            errors = _error_capture(program, limits.output_bytes)
            started = time.monotonic()
            captures = [verdict, errors, _error_capture(check, limits.output_bytes)]
            ending = watch(check.process.pid, captures, wall_seconds=limits.wall_seconds)
            elapsed = time.monotonic() - started
            if ending == "wall":
                return _wall_timeout()
            if ending == "output":
                return TestOutcome(status="output_limit")
            if ending == "exited":
                failure = _failed_exit(check, captures[-1], limits, elapsed)
                return failure or TestOutcome(status="crash", detail="the check gave no verdict")
            judged = json.loads(verdict.data)
            if judged["status"] == "gone":
                return _end_of_program(program, errors, limits, elapsed)
            return TestOutcome(status=judged["status"], detail=judged["detail"])

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


def _failed_exit(
    box: BoxProcess, errors: Capture, limits: Limits, elapsed: float
) -> TestOutcome | None:
    """The outcome of a program that has ended by itself, or None where it ended well."""
    exit_code = box.exit_code()
    if exit_code == 0:
        return None
    if exit_code is None:
        return TestOutcome(status="sandbox_error", detail=_tail(errors))
    killed_late = exit_code == _KILLED_EXIT and elapsed >= limits.cpu_seconds_whole
    if exit_code == _OUT_OF_CPU_EXIT or killed_late:
        return TestOutcome(status="timeout", detail=f"over {limits.cpu_seconds_whole} s of CPU")
    if exit_code == code_driver.COMPILE_ERROR_EXIT:
        return TestOutcome(status="compile_error", detail=_tail(errors))
    return TestOutcome(status="crash", detail=f"exit code {exit_code}: {_tail(errors)}")


def _end_of_program(
    program: BoxProcess, errors: Capture, limits: Limits, elapsed: float
) -> TestOutcome:
    """Why a program did not answer a call."""
    remaining = [Capture(errors.fd, errors.limit, data=errors.data)]
    ending = watch(program.process.pid, remaining, wall_seconds=_SECONDS_TO_EXIT)
    failure = _failed_exit(program, errors, limits, elapsed) if ending == "exited" else None
    return failure or TestOutcome(status="crash", detail="ended before the call returned")


def _wall_timeout() -> TestOutcome:
    return TestOutcome(status="timeout", detail="over the real-time limit", overran_wall=True)


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read_fd, write_fd = os.pipe()
    read_end = stack.enter_context(open(read_fd, "rb", buffering=0))
    return read_end, stack.enter_context(open(write_fd, "wb", buffering=0))


def _output_captures(box: BoxProcess, limit: int) -> tuple[Capture, Capture]:
    assert box.process.stdout is not None
    return Capture(box.process.stdout.fileno(), limit), _error_capture(box, limit)


def _error_capture(box: BoxProcess, limit: int) -> Capture:
    assert box.process.stderr is not None
    return Capture(box.process.stderr.fileno(), limit)


def _head(errors: Capture) -> str:
    return errors.data[: 4 * _MAX_DETAIL_CHARS].decode(errors="replace").strip()[:_MAX_DETAIL_CHARS]


def _tail(errors: Capture) -> str:
    return errors.data[-_MAX_DETAIL_CHARS:].decode(errors="replace").strip()
