"""What a record of a data set asks and accepts, by the kind of problem it holds.

A reader turns one record into the parts of a problem, or raises DataError with the place and the
reason. Readers are made from the first record, so that all records are read from the same columns.
"""

import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from trainer.code_problems import read_human_eval, read_live_code_bench, read_tests
from trainer.data_records import DataError, RecordContent, kind_of, text_of
from trainer.rewards.code_tests import CodeTest
from trainer.rewards.extraction import extract_boxed
from trainer.rewards.math_grader import check_gold
from trainer.seeds import derive_shuffle

QUESTION_COLUMNS = ("question", "problem", "prompt", "input", "Question", "Problem")
ANSWER_COLUMNS = ("answer", "final_answer", "gold", "target", "solution", "Answer", "Solution")
CHOICE_COLUMNS = (
    "Correct Answer",
    "Incorrect Answer 1",
    "Incorrect Answer 2",
    "Incorrect Answer 3",
)

Kind = Literal["answer", "prompt", "choice", "tests", "human-eval", "live-code-bench"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_GSM8K_ANSWER_MARK = "####"
_LEVEL = re.compile(r"(?:Level )?(\d)(?:\.0)?")
_LETTERS = "ABCD"


class Parts(NamedTuple):
    """What a record says about a problem."""

    question: str
    answer: str | list[str]
    tests: tuple[CodeTest, ...]
    used_columns: frozenset[str]
    """Columns that the parts were read from."""


Reader = Callable[[RecordContent, str], Parts]


def make_reader(
    kind: Kind,
    record: RecordContent,
    place: str,
    *,
    question_column: str | None,
    answer_column: str | None,
) -> Reader:
    """The reader for records like this first one.

    Raises:
        DataError: it lacks a column that the kind needs.
    """
    if kind == "choice":
        for column in ("Question", *CHOICE_COLUMNS):
            _column(record, column, (), "multiple choice", place)
        return _read_choice
    if kind == "human-eval":
        return _code_reader(read_human_eval, frozenset(("prompt", "test")))
    if kind == "live-code-bench":
        cases = frozenset(("question_content", "public_test_cases", "private_test_cases"))
        return _code_reader(read_live_code_bench, cases)
    question = _column(record, question_column, QUESTION_COLUMNS, "question", place)
    if kind == "tests":
        return _code_reader(
            lambda record, place: read_tests(record, place, question),
            frozenset((question, "tests")),
        )
    if kind == "prompt":
        return lambda record, place: Parts(
            text_of(record, question, place), "", (), frozenset((question,))
        )
    answer = _column(record, answer_column, ANSWER_COLUMNS, "answer", place)

    def read_answer(record: RecordContent, place: str) -> Parts:
        return Parts(
            text_of(record, question, place),
            _answers(record.get(answer), answer, place),
            (),
            frozenset((question, answer)),
        )

    return read_answer


def level_of(record: RecordContent) -> int | None:
    """The level a record states, as `3`, `3.0` or `Level 3`; None where it states none, as MATH's
    `Level ?`."""
    match = _LEVEL.fullmatch(str(record.get("level", "")).strip())
    return int(match.group(1)) or None if match else None


def _read_choice(record: RecordContent, place: str) -> Parts:
    """GPQA: four choices in an order that depends on the question alone, answered by a letter.

    Source: the prompt of simple-evals, which DeepSeek-R1 (arXiv 2501.12948) uses; the letter is
    asked for without its form, which the template states.
    """
    question = text_of(record, "Question", place)
    choices = [text_of(record, column, place) for column in CHOICE_COLUMNS]
    order = derive_shuffle(len(choices), 0, f"choices of {question}")
    listed = "\n".join(
        f"{letter}) {choices[at]}" for letter, at in zip(_LETTERS, order, strict=True)
    )
    asked = f"{question}\n\n{listed}\n\nAnswer with the letter of the right choice: A, B, C or D."
    used_columns = frozenset(("Question", *CHOICE_COLUMNS))
    return Parts(asked, _LETTERS[order.index(0)], (), used_columns)


def _code_reader(
    read: Callable[[RecordContent, str], tuple[str, list[CodeTest]]], used_columns: frozenset[str]
) -> Reader:
    def read_parts(record: RecordContent, place: str) -> Parts:
        question, tests = read(record, place)
        return Parts(question, "", tuple(tests), used_columns)

    return read_parts


def _column(
    record: RecordContent, asked: str | None, common: tuple[str, ...], meaning: str, place: str
) -> str:
    found = [name for name in ([asked] if asked else common) if name in record]
    if not found:
        expected = f"a column {asked!r}" if asked else f"a column named {' or '.join(common)}"
        advice = "" if asked else f"; name it with {meaning}_column"
        there = ", ".join(record) or "none"
        raise DataError(f"{place}: expected {expected} for the {meaning}, got {there}{advice}")
    return found[0]


def _answers(value: object, column: str, place: str) -> str | list[str]:
    """One gold, or a list of different ones, each checked."""
    values = value if isinstance(value, list) else [value]
    golds = list(dict.fromkeys(_gold(each, column, place) for each in values))
    if not golds:
        raise DataError(f"{place}: expected a final answer in column {column!r}, got an empty list")
    return golds[0] if len(golds) == 1 else golds


def _gold(value: object, column: str, place: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{place}: expected a final answer in column {column!r}, got {kind_of(value)}"
        )
    gold = _final_answer(value)
    if not gold:
        raise DataError(f"{place}: the solution in column {column!r} holds no final answer")
    reason = check_gold(gold)
    if reason is not None:
        raise DataError(f"{place}: the answer in column {column!r} cannot be graded: {reason}")
    return gold


def _final_answer(solution: str) -> str:
    """What follows GSM8K's ####, the last \\boxed{} of a MATH solution, or the text itself."""
    if _GSM8K_ANSWER_MARK in solution:
        return solution.rpartition(_GSM8K_ANSWER_MARK)[2].strip()
    if "\\boxed" in solution:
        return extract_boxed(solution) or ""
    return solution.strip()
