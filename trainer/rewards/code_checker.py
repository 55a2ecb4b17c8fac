"""Whether a program's output or returned value is the expected one, decided outside the sandbox."""

from __future__ import annotations

import math
import re
from typing import Any

_NOT_A_NUMBER = re.compile(r"[+-]?nan", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
_MAX_NUMBER_CHARS = 400


def outputs_match(
    expected: str, actual: str, *, tolerance: float | None = None, ignore_case: bool = False
) -> bool:
    """True when both are the same sequence of tokens, which white space of any kind separates.

    Tokens are equal as text (`1e0` is not `1`, `yes` not `YES` unless `ignore_case`). With a
    `tolerance` two finite decimal numbers are equal too when |a - e| <= tolerance * max(1, |e|).
    A token `nan` equals nothing. Time is linear in the length of both.
    """
    if ignore_case:
        expected, actual = expected.casefold(), actual.casefold()
    expected_tokens, actual_tokens = expected.split(), actual.split()
    if len(expected_tokens) != len(actual_tokens):
        return False
    return all(
        _tokens_match(*pair, tolerance) for pair in zip(expected_tokens, actual_tokens, strict=True)
    )


def values_match(expected: Any, actual: Any, *, tolerance: float | None = None) -> bool:
    """True when two JSON values are equal: same structure, texts and truth values.

    Numbers are equal by exact value, 2 and 2.0 alike, and True is not 1. With a `tolerance`, two
    numbers of which at least one is a float are equal as in `outputs_match`. NaN equals nothing.
    """
    if _is_number(expected) and _is_number(actual):
        if isinstance(expected, int) and isinstance(actual, int):
            return expected == actual
        return expected == actual or _close(expected, actual, tolerance)
    if type(expected) is not type(actual) and not (_is_list(expected) and _is_list(actual)):
        return False
    if _is_list(expected):
        return len(expected) == len(actual) and all(
            values_match(*pair, tolerance=tolerance) for pair in zip(expected, actual, strict=True)
        )
    if isinstance(expected, dict):
        return expected.keys() == actual.keys() and all(
            values_match(value, actual[key], tolerance=tolerance) for key, value in expected.items()
        )
    return bool(expected == actual)


def _tokens_match(expected: str, actual: str, tolerance: float | None) -> bool:
    if _NOT_A_NUMBER.fullmatch(expected) or _NOT_A_NUMBER.fullmatch(actual):
        return False
    if expected == actual:
        return True
    if tolerance is None or max(len(expected), len(actual)) > _MAX_NUMBER_CHARS:
        return False
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(actual)):
        return False
    return _close(float(expected), float(actual), tolerance)


def _close(expected: float, actual: float, tolerance: float | None) -> bool:
    if tolerance is None:
        return False
    try:
        wanted, got = float(expected), float(actual)
    except OverflowError:  # an int beyond the range of floats
        return False
    if not (math.isfinite(wanted) and math.isfinite(got)):
        return False
    return abs(got - wanted) <= tolerance * max(1.0, abs(wanted))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
