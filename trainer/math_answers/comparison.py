"""Grades one answer; runs in a worker process."""

from __future__ import annotations

import logging
import re

import math_verify

from trainer.math_answers.equivalence import equal_answers
from trainer.math_answers.evaluation import renew_budget
from trainer.math_answers.reading import Answer, read_answer
from trainer.math_answers.tree import TooCostlyError, UnreadableError, UnsupportedError

MATH_VERIFY_DECIMALS = 6
"""Places to which math-verify rounds decimals by default."""
EXACT_DECIMALS = 15
MAX_ALGEBRA_CHARS = 150

_COSTLY_ALGEBRA = re.compile(
    r"!|\d{5}|\*\*|\^\s*\{[^{}]*\^|\^\s*[^{}\s]\s*\^|\^\s*\{?\s*\d{3}"
    r"|\\(?:binom|prod)|\\int.*\\int.*\\int"
)
"""What computer algebra is not asked about: factorials, towers and large numbers."""


def compare(golds: list[str], answer: str, mode: str) -> tuple[bool, str]:
    """Whether the answer equals any of the golds, and the status of the comparison.

    Args:
        golds: usable ones.
        mode: "strict" or "lenient", as `MathGrader`.
    """
    read = read_answer(answer)
    status = "ok" if read.readings or read.words or read.choice else _status_of(read)
    for gold in golds:
        try:
            if _is_right(gold, read, answer, mode):
                return True, "ok"
        except TooCostlyError:
            status = "timeout"
    return False, status


def warm_up() -> None:
    """Load and run once everything that a comparison may need."""
    logging.disable(logging.CRITICAL)
    compare(["\\frac{1}{3}"], "\\int_0^1 x^2 dx", "strict")
    compare(["\\sin(2x)"], "2\\sin x\\cos x", "lenient")


def _is_right(gold: str, read: Answer, answer: str, mode: str) -> bool:
    gold_read = read_answer(gold)
    for failure in (gold_read.failure, read.failure):
        if isinstance(failure, TooCostlyError):
            raise failure
    renew_budget()
    if equal_answers(gold_read, read):
        return True
    if mode == "lenient":
        return _math_verify_accepts(
            gold, answer, MATH_VERIFY_DECIMALS, takes_numbers_from_text=True
        )
    needs_algebra = any(
        isinstance(failure, UnsupportedError) for failure in (gold_read.failure, read.failure)
    )
    can_be_read = all(
        one.readings or isinstance(one.failure, UnsupportedError) for one in (gold_read, read)
    )
    if not (needs_algebra and can_be_read):
        return False
    for text in (gold, answer):
        if len(text) > MAX_ALGEBRA_CHARS or _COSTLY_ALGEBRA.search(text):
            raise TooCostlyError("computer algebra on a long or towering formula")
    return _math_verify_accepts(gold, answer, EXACT_DECIMALS, takes_numbers_from_text=False)


def _status_of(read: Answer) -> str:
    if isinstance(read.failure, TooCostlyError):
        return "timeout"
    is_junk = isinstance(read.failure, UnreadableError)
    return "parse_fail" if is_junk and not isinstance(read.failure, UnsupportedError) else "ok"


def _math_verify_accepts(
    gold: str, answer: str, decimals: int, *, takes_numbers_from_text: bool
) -> bool:
    # Its own time limits need the main thread's alarm; the worker's CPU limit takes their place.
    # Of LaTeX it takes the whole, of other text also a number that stands somewhere in it.
    targets = [math_verify.LatexExtractionConfig()]
    if takes_numbers_from_text:
        targets.append(math_verify.ExprExtractionConfig())
    parsed = [
        math_verify.parse(f"${_bare(text)}$", targets, parsing_timeout=None)
        for text in (gold, answer)
    ]
    return bool(math_verify.verify(*parsed, float_rounding=decimals, timeout_seconds=None))


def _bare(text: str) -> str:
    stripped = text.strip()
    return stripped.strip("$") if not stripped.endswith("\\$") else stripped
