"""Grades programs by running them in the sandbox and judging what came out of it outside.

A program gets its input, or the arguments of a call, and nothing else: expected values, test code
and the verdict stay in the parent or, for test code, in another sandbox. So there is nothing for
a program to find, and what it forges can only be its own answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from trainer.rewards.code_runner import Executable, Runner, TestOutcome, TestStatus
from trainer.rewards.code_sandbox import Limits
from trainer.rewards.code_selftest import SandboxLevel, open_sandbox
from trainer.rewards.code_tests import (
    CodeTest,
    FunctionTest,
    Language,
    Program,
    StdinTest,
)

CodeStatus = TestStatus | Literal["no_code", "too_long"]
"""Of a whole program: that of the first test not passed, or why none was run."""

DEFAULT_TIME_FACTORS: Mapping[Language, float] = {"python": 3.0, "cpp": 1.0}
"""Python is that much slower than what data sets state limits for."""
DEFAULT_LIMITS = Limits()
"""Of one test."""
COMPILE_LIMITS = Limits(
    cpu_seconds=20,
    wall_slack_seconds=60,
    memory_bytes=2 << 30,
    file_bytes=64 << 20,
    tmp_bytes=256 << 20,
    output_bytes=16 << 20,
)
"""Of compiling one program, whose binary counts as output; far above what a whole standard library
takes (4 s of a busy processor), since a right program that is out of time here counts as wrong."""

_logger = logging.getLogger(__name__)
_ENDS_THE_PROGRAM: frozenset[TestStatus] = frozenset(
    ("timeout", "output_limit", "compile_error", "sandbox_error")
)
_CACHED_BINARIES = 64
_CACHED_BINARY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeGrade:
    """How one program did on its tests."""

    status: CodeStatus
    passed: int
    """Tests passed."""
    total: int
    """Tests there are, those not run included."""
    outcomes: tuple[TestOutcome, ...]
    """One per test, in order."""

    @property
    def correct(self) -> bool:
        """All tests passed."""
        return self.status == "passed"

    @property
    def share(self) -> float:
        """Tests passed of all, in [0, 1]."""
        return self.passed / self.total

    @property
    def detail(self) -> str:
        """What went wrong at the first test not passed."""
        return next((o.detail for o in self.outcomes if o.status != "passed"), "")

    @property
    def retried(self) -> bool:
        """Some test was run twice, because the machine was loaded."""
        return any(outcome.retried for outcome in self.outcomes)


class CodeGrader:
    """Runs programs against tests in a sandbox; callable from any thread.

    Args:
        workers: programs run at the same time, over all callers.
        limits: of one test; a test with `cpu_seconds` of its own replaces that one.
        compile_limits: of compiling one C++ program.
        time_factors: by language, what a test's own `cpu_seconds` is multiplied by.
        max_source_chars: longer programs are not run.
        stop_at_failure: the tests after the first one not passed are not run. They never are
            after a timeout or an output limit, so that a program costs at most one of those.
        sandbox: "bubblewrap", or "rlimits-only" to go without protection from hostile programs.
        python: interpreter for the programs; None takes the running one, or the system's where
            root started it and the unprivileged user may not read the running one.
        packages: folders on the path of Python programs and test code, for numpy and the like;
            without any they have the standard library.
        compiler: C++ compiler, by name or path.

    Raises:
        ValueError: a setting out of range.
        SandboxUnavailable: there is no sandbox of that level here; there is no falling back.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        limits: Limits = DEFAULT_LIMITS,
        compile_limits: Limits = COMPILE_LIMITS,
        time_factors: Mapping[Language, float] = DEFAULT_TIME_FACTORS,
        max_source_chars: int = 1 << 16,
        stop_at_failure: bool = False,
        sandbox: SandboxLevel = "bubblewrap",
        python: str | None = None,
        packages: Sequence[str] = (),
        compiler: str = "g++",
    ) -> None:
        for name, value in (("workers", workers), ("max_source_chars", max_source_chars)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self._limits = limits
        self._compile_limits = compile_limits
        self._time_factors = {**DEFAULT_TIME_FACTORS, **time_factors}
        self._max_source_chars = max_source_chars
        self._stop_at_failure = stop_at_failure
        path = shutil.which(compiler)
        self._compiler = os.path.realpath(path) if path else None
        self._binaries: OrderedDict[bytes, bytes] = OrderedDict()
        self._binaries_lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            opened, self._level = stack.enter_context(
                open_sandbox(sandbox, python=python, packages=packages)
            )
            self._runner = Runner(opened)
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="code-grader")
            stack.callback(self._pool.shutdown, cancel_futures=True)
            self._open = stack.pop_all()

    @property
    def level(self) -> str:
        """The protection reached, in one line: what the self-test at the start held against."""
        return self._level

    def __enter__(self) -> CodeGrader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the tests that are running, within their limits, and releases everything."""
        self._open.close()

    def grade(
        self, programs: Sequence[str | Program | None], tests: Sequence[Sequence[CodeTest]]
    ) -> list[CodeGrade]:
        """Grades of programs, in order. No program makes it raise.

        Args:
            programs: source text (a str is Python), or None where a completion holds no program.
            tests: of each program, at least one. Hidden ones: a program that knows its tests can
                print their answers.

        Raises:
            ValueError, TypeError: the two do not fit together, or C++ without a compiler.
            RuntimeError: the grader is closed.
        """
        if len(programs) != len(tests):
            raise ValueError(
                f"tests: expected one list per program ({len(programs)}), got {len(tests)}"
            )
        jobs = []
        for at, (program, own_tests) in enumerate(zip(programs, tests, strict=True)):
            whole = Program(source=program) if isinstance(program, str) else program
            self._check_job(at, whole, own_tests)
            jobs.append((whole, tuple(own_tests)))
        futures = [self._pool.submit(self._grade_one, *job) for job in jobs]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _check_job(self, at: int, program: Program | None, tests: Sequence[CodeTest]) -> None:
        if not tests:
            raise ValueError(f"tests[{at}]: expected at least one, got none")
        for test in tests:
            if not isinstance(test, CodeTest):
                raise TypeError(f"tests[{at}]: expected code tests, got {type(test).__name__}")
        if program is None:
            return
        if not isinstance(program, Program):
            raise TypeError(
                f"programs[{at}]: expected str, Program or None, got {type(program).__name__}"
            )
        if program.language == "cpp":
            if self._compiler is None:
                raise ValueError("compiler: expected a C++ compiler for a C++ program, got none")
            if not all(isinstance(test, StdinTest) for test in tests):
                raise ValueError(f"tests[{at}]: expected stdin tests for C++, got others")

    def _grade_one(self, program: Program | None, tests: tuple[CodeTest, ...]) -> CodeGrade:
        if program is None:
            return _not_run("no_code", len(tests))
        if len(program.source) > self._max_source_chars:
            return _not_run("too_long", len(tests))
        # Lone surrogates go in as they are, for the compiler to refuse.
        content = program.source.encode("utf-8", "surrogatepass")
        if program.language == "cpp":
            binary = self._binary(content)
            if isinstance(binary, TestOutcome):
                return _grade((binary,), len(tests))
            content = binary
        executable = Executable(content=content, is_python=program.language == "python")
        outcomes: list[TestOutcome] = []
        for test in tests:
            outcome = self._run(executable, test, self._limits_of(test, program.language))
            outcomes.append(outcome)
            failed = outcome.status != "passed"
            if outcome.status in _ENDS_THE_PROGRAM or (failed and self._stop_at_failure):
                break
        return _grade(tuple(outcomes), len(tests))

    def _limits_of(self, test: CodeTest, language: Language) -> Limits:
        if test.cpu_seconds is None:
            return self._limits
        return replace(self._limits, cpu_seconds=test.cpu_seconds * self._time_factors[language])

    def _run(self, program: Executable, test: CodeTest, limits: Limits) -> TestOutcome:
        """Runs a test, once more where the machine and not the program may have been too slow."""
        outcome = self._run_once(program, test, limits)
        too_slow_machine = outcome.overran_wall and machine_is_loaded()
        if too_slow_machine or outcome.status == "sandbox_error":
            outcome = replace(self._run_once(program, test, limits), retried=True)
        if outcome.status == "sandbox_error":
            _logger.error("code sandbox failed twice to run a program: %s", outcome.detail)
        return outcome

    def _run_once(self, program: Executable, test: CodeTest, limits: Limits) -> TestOutcome:
        if isinstance(test, StdinTest):
            return self._runner.run_stdin(program, test, limits)
        if isinstance(test, FunctionTest):
            return self._runner.run_function(program.content, test, limits)
        return self._runner.run_check(program.content, test, limits)

    def _binary(self, source: bytes) -> bytes | TestOutcome:
        """The compiled program; recent small ones are kept, as many samples are alike."""
        assert self._compiler is not None
        key = hashlib.sha256(source).digest()
        with self._binaries_lock:
            if key in self._binaries:
                self._binaries.move_to_end(key)
                return self._binaries[key]
        binary = self._runner.compile_cpp(source, self._compiler, self._compile_limits)
        if isinstance(binary, bytes) and len(binary) <= _CACHED_BINARY_BYTES:
            with self._binaries_lock:
                self._binaries[key] = binary
                if len(self._binaries) > _CACHED_BINARIES:
                    self._binaries.popitem(last=False)
        return binary


def machine_is_loaded() -> bool:
    """More processes want to run than there are processors, over the last minute."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def _not_run(status: CodeStatus, num_tests: int) -> CodeGrade:
    outcomes = (TestOutcome(status="not_run"),) * num_tests
    return CodeGrade(status=status, passed=0, total=num_tests, outcomes=outcomes)


def _grade(outcomes: tuple[TestOutcome, ...], num_tests: int) -> CodeGrade:
    status: CodeStatus = next((o.status for o in outcomes if o.status != "passed"), "passed")
    missing = (TestOutcome(status="not_run"),) * (num_tests - len(outcomes))
    passed = sum(outcome.status == "passed" for outcome in outcomes)
    return CodeGrade(status=status, passed=passed, total=num_tests, outcomes=outcomes + missing)
