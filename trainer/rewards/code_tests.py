"""Tests that programs are graded by, checked when they are made.

A test that no answer could be judged by is refused here, when data loads, and never rewarded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trainer.rewards.code_driver import plain_value

Language = Literal["python", "cpp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinTest:
    """The program reads `input` and has to print `output`; see `outputs_match`."""

    input: str
    output: str
    tolerance: float | None = None
    """Numbers may differ by this much, absolutely or relatively; None compares tokens as text."""
    ignore_case: bool = False
    """For statements that say YES may be printed in any case."""
    cpu_seconds: float | None = None
    """The data set's own limit, multiplied by the grader's factor for the language."""

    def __post_init__(self) -> None:
        _check_text("input", self.input)
        _check_text("output", self.output)
        if not self.output.strip():
            raise ValueError("output: expected text, got none, which any silent program would pass")
        _check_positive(tolerance=self.tolerance, cpu_seconds=self.cpu_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTest:
    """`entry_point(*arguments)` has to return `expected`; see `values_match`. Python only."""

    entry_point: str
    """A function, or `Class.method`, called on an instance made without arguments."""
    arguments: tuple[Any, ...]
    """JSON values."""
    expected: Any
    """A JSON value, which stays outside the sandbox."""
    setup: str = ""
    """Code that runs before the program, in its namespace: imports that it may rely on."""
    tolerance: float | None = None
    cpu_seconds: float | None = None

    def __post_init__(self) -> None:
        _check_entry_point(self.entry_point)
        _check_source("setup", self.setup)
        for name, value in (("arguments", self.arguments), ("expected", self.expected)):
            try:
                json.dumps(plain_value(value))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
        _check_positive(tolerance=self.tolerance, cpu_seconds=self.cpu_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckTest:
    """Test code that calls the program's function and asserts, as in HumanEval. Python only.

    The code is data that the user trusts for the verdict. It runs in a sandbox of its own, away
    from the program: `candidate` and `entry_point` are stand-ins that send arguments to the
    program's sandbox and bring the value back. Arguments and values are copies, of builtin types
    only, so a test that looks at what a call did to its arguments cannot pass.
    """

    entry_point: str
    code: str
    """Defines `check(candidate)`, or calls the function by its name."""
    setup: str = ""
    """Trusted code that runs before it, for helpers it uses: the prompt of a HumanEval problem."""
    cpu_seconds: float | None = None
    """For all calls together."""

    def __post_init__(self) -> None:
        _check_entry_point(self.entry_point)
        _check_source("code", self.code)
        _check_source("setup", self.setup)
        if "assert" not in self.code and "raise" not in self.code:
            raise ValueError("code: expected an assertion, got none, which any program would pass")
        _check_positive(cpu_seconds=self.cpu_seconds)


CodeTest = StdinTest | FunctionTest | CheckTest


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Source text and the language it is in."""

    source: str
    language: Language = "python"

    def __post_init__(self) -> None:
        if self.language not in get_args(Language):
            raise ValueError(
                f"language: expected one of {', '.join(get_args(Language))}, got {self.language!r}"
            )


def code_test(record: Mapping[str, Any]) -> CodeTest:
    """The test that a record of a data set describes, by the fields of one of the three classes.

    `{"input", "output"}` makes a `StdinTest`, `{"entry_point", "arguments", "expected"}` a
    `FunctionTest` and `{"entry_point", "code"}` a `CheckTest`; optional fields may follow.

    Raises:
        ValueError: other fields, or values the class refuses.
    """
    fields = dict(record)
    if "arguments" in fields:
        fields["arguments"] = tuple(fields["arguments"])
    for kind, required in (
        (StdinTest, {"input", "output"}),
        (FunctionTest, {"entry_point", "arguments", "expected"}),
        (CheckTest, {"entry_point", "code"}),
    ):
        if required <= fields.keys() <= set(kind.__dataclass_fields__):
            return kind(**fields)
    raise ValueError(
        "test: expected the fields of a stdin, function or check test, "
        f"got {', '.join(map(str, fields)) or 'none'}"
    )


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected str, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected encodable text, got a lone surrogate") from None


def _check_source(name: str, source: object) -> None:
    _check_text(name, source)
    try:
        compile(str(source), name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: expected Python, got {error}") from None


def _check_entry_point(entry_point: str) -> None:
    if not all(part.isidentifier() for part in entry_point.split(".")):
        raise ValueError(f"entry_point: expected a name or Class.method, got {entry_point!r}")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {value}")
