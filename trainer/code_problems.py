"""Readers of data sets whose problems are answered by a program: tests instead of a gold.

Programs are asked for in one fenced block, which is where the reward looks for them.
"""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.data_records import DataError, RecordContent, kind_of, text_of
from trainer.rewards.code_tests import CheckTest, CodeTest, FunctionTest, StdinTest, code_test

ASK_PROGRAM = (
    "Write a Python program that reads standard input and prints the answer to standard output. "
    "Give it in one ```python block."
)
ASK_FUNCTION = "Give the complete Python code in one ```python block."
MOST_TEST_BYTES = 1 << 28
"""Of one problem's private tests, unpacked: what a broken file may cost."""


def read_tests(record: RecordContent, place: str, question: str) -> tuple[str, list[CodeTest]]:
    """A statement in the column `question`, and a list of tests in the column `tests` with the
    fields of `trainer.rewards.code_tests`; `input` and `output` is a test of a whole program.

    Raises:
        DataError: there is no test, or one that nothing could be judged by.
    """
    listed = record.get("tests")
    if not isinstance(listed, list) or not listed:
        raise DataError(
            f"{place}: expected a list of tests in column 'tests', got {kind_of(listed)}"
        )
    tests = []
    for number, test in enumerate(listed, start=1):
        with _refused_at(f"{place}, test {number}"):
            tests.append(code_test(_as_object(test)))
    ask = ASK_PROGRAM if isinstance(tests[0], StdinTest) else ASK_FUNCTION
    return f"{text_of(record, question, place)}\n\n{ask}", tests


def read_human_eval(record: RecordContent, place: str) -> tuple[str, list[CodeTest]]:
    """HumanEval: the start of a function, and code that checks the whole of it.

    Raises:
        DataError: a column is missing, or does not hold Python.
    """
    prompt = _source(record, "prompt", place)
    entry_point, code = text_of(record, "entry_point", place), _source(record, "test", place)
    with _refused_at(place):
        test = CheckTest(entry_point=entry_point, code=code, setup=prompt)
    return f"Complete this function.\n\n```python\n{prompt}```\n\n{ASK_FUNCTION}", [test]


def read_live_code_bench(record: RecordContent, place: str) -> tuple[str, list[CodeTest]]:
    """LiveCodeBench (code generation): public and private tests, of programs or of a method.

    Raises:
        DataError: a column is missing, or tests cannot be read.
    """
    statement = text_of(record, "question_content", place)
    cases = [
        *_json_list(text_of(record, "public_test_cases", place), place),
        *_private_cases(text_of(record, "private_test_cases", place), place),
    ]
    function = _decoded(record.get("metadata") or "{}", place).get("func_name")
    tests: list[CodeTest] = []
    for number, case in enumerate(cases, start=1):
        with _refused_at(f"{place}, test {number}"):
            tests.append(_live_code_bench_test(_as_object(case), function))
    if not tests:
        raise DataError(f"{place}: expected tests, got none")
    if function is None:
        return f"{statement}\n\n{ASK_PROGRAM}", tests
    starter = text_of(record, "starter_code", place)
    return f"{statement}\n\nStart from:\n\n```python\n{starter}\n```\n\n{ASK_FUNCTION}", tests


def _live_code_bench_test(case: dict[str, Any], function: str | None) -> CodeTest:
    if function is None:
        return StdinTest(input=case["input"], output=case["output"])
    return FunctionTest(
        entry_point=f"Solution.{function}",
        arguments=tuple(json.loads(line) for line in case["input"].split("\n")),
        expected=json.loads(case["output"]),
    )


def _private_cases(text: str, place: str) -> list[object]:
    """JSON as it stands, or as a pickled text, compressed, in base 64."""
    if text.startswith("["):
        return _json_list(text, place)
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(text, validate=True), MOST_TEST_BYTES)
        if not unpacker.eof:
            raise DataError(f"{place}: private tests of more than {MOST_TEST_BYTES} bytes")
        unpickled = _TextUnpickler(io.BytesIO(pickled)).load()
    except DataError:
        raise
    except (
        AttributeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        zlib.error,
    ) as error:
        raise DataError(f"{place}: private tests that cannot be unpacked ({error})") from error
    return _json_list(unpickled, place)


class _TextUnpickler(pickle.Unpickler):
    """Loads texts, numbers and lists; anything a pickle could run is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"expected a pickled text, got {module_name}.{global_name}")


def _json_list(text: object, place: str) -> list[object]:
    cases = _decoded(text, place)
    if not isinstance(cases, list):
        raise DataError(f"{place}: expected a JSON list of tests, got {kind_of(cases)}")
    return cases


def _decoded(text: object, place: str) -> Any:
    try:
        return json.loads(text)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: expected JSON, got {kind_of(text)} ({error})") from error


def _as_object(test: object) -> dict[str, Any]:
    if not isinstance(test, dict):
        raise ValueError(f"test: expected an object, got {kind_of(test)}")
    return test


def _source(record: RecordContent, column: str, place: str) -> str:
    """Program text, whose indentation must stay."""
    text_of(record, column, place)
    return str(record[column])


@contextmanager
def _refused_at(place: str) -> Iterator[None]:
    """What is wrong with a test becomes a DataError with its place."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{place}: expected a field {error}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: {error}") from error
