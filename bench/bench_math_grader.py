"""Answers graded one by one and in a batch, against math-verify alone on the same pairs.

The pairs are those of tests/data/math_answers.txt, which are harder than a benchmark's golds: most
answers there are written in another form than their gold. A round grades all of them without a
cache; divide by `pairs` for the time of one. Accuracy and false positives are in the extra info.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import math_verify
import pytest

from trainer.rewards import MathGrader

Pair = tuple[str, str]
Grade = Callable[[list[Pair]], list[bool]]

# What only computer algebra can tell takes math-verify seconds; it would be all that is timed.
SLOW = ("\\int", "\\lim", "\\sum", "\\prod")


def labelled_pairs() -> tuple[list[Pair], list[bool]]:
    path = Path(__file__).parents[1] / "tests" / "data" / "math_answers.txt"
    pairs, labels = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") and not any(command in line for command in SLOW):
            gold, answer = line[2:].split(" || ")
            pairs.append((gold, answer))
            labels.append(line[0] == "=")
    return pairs, labels


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(workers=2, cache_size=0) as opened:
        yield opened


def one_by_one(grader: MathGrader) -> Grade:
    return lambda pairs: [grader.grade([pair])[0].correct for pair in pairs]


def in_a_batch(grader: MathGrader) -> Grade:
    return lambda pairs: [grade.correct for grade in grader.grade(pairs)]


def math_verify_alone(pairs: list[Pair]) -> list[bool]:
    return [
        bool(
            math_verify.verify(
                math_verify.parse(f"${gold}$", parsing_timeout=None),
                math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None),
                timeout_seconds=None,
            )
        )
        for gold, answer in pairs
    ]


@pytest.mark.parametrize("how", ["one-by-one", "batch", "math-verify"])
def bench_math_grader(benchmark: Any, grader: MathGrader, how: str) -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    grade = {
        "one-by-one": one_by_one(grader),
        "batch": in_a_batch(grader),
        "math-verify": math_verify_alone,
    }[how]
    pairs, labels = labelled_pairs()
    verdicts = grade(pairs)
    wrong = [label for verdict, label in zip(verdicts, labels, strict=True) if verdict != label]
    benchmark.extra_info["pairs"] = len(pairs)
    benchmark.extra_info["accuracy"] = 1 - len(wrong) / len(pairs)
    benchmark.extra_info["false_positives"] = wrong.count(False)
    if how != "math-verify":
        assert not wrong
    benchmark.pedantic(grade, args=(pairs,), rounds=1 if how == "math-verify" else 3)
