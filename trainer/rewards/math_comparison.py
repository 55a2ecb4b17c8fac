"""Whether an answer equals one of its golds; runs in a worker process."""

from __future__ import annotations

import logging

import math_verify


def compare(golds: list[str], answer: str, mode: str) -> tuple[bool, str]:
    """Whether the answer equals any of the golds, and the status of the comparison."""
    read = math_verify.parse(f"${answer}$", parsing_timeout=None)
    if not read:
        return False, "parse_fail"
    correct = any(
        math_verify.verify(
            math_verify.parse(f"${gold}$", parsing_timeout=None), read, timeout_seconds=None
        )
        for gold in golds
    )
    return bool(correct), "ok"


def warm_up() -> None:
    """Load everything that a comparison may need."""
    logging.disable(logging.CRITICAL)
    compare(["1"], "\\frac{1}{2}", "strict")
