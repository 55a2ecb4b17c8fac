"""Problems a run trains and evaluates on, from a local file or a data set of the Hugging Face hub.

Every record is checked when it is loaded: a question and a final answer that a reward can be
computed from, or one sentence that names the file, the line and the reason. Worked solutions are
reduced to their final answer.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.rewards.extraction import extract_boxed

QUESTION_COLUMNS = ("question", "problem", "prompt", "input")
ANSWER_COLUMNS = ("answer", "final_answer", "gold", "target", "solution")
ID_COLUMNS = ("problem_id", "id", "unique_id", "task_id")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")

_GSM8K_ANSWER_MARK = "####"


class DataError(ValueError):
    """A data set that cannot be used; the message is one sentence with the place and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question and the answer its reward is computed from."""

    problem_id: str
    """Unique within a data set; random choices for the problem derive from it."""
    question: str
    """The text that a template turns into a prompt."""
    answer: str | list[str]
    """The accepted final answer; of a list, each one is accepted. Empty for a problem that has a
    verifier or tests instead."""
    level: int | None = None
    """Difficulty as the data set states it, 1 to 5 for MATH."""
    verifier: Callable[[str | None], float] | None = None
    """Scores an extracted answer (None: there is none) from 0 to 1, in place of comparing it with
    `answer`; picklable."""
    columns: dict[str, object] = field(default_factory=dict)
    """The record's other columns, passed to a user's reward under their names."""

    @property
    def answer_text(self) -> str:
        """The accepted answers as one text, to be shown."""
        return self.answer if isinstance(self.answer, str) else " or ".join(self.answer)


def load_problems(
    source: str,
    *,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """Problems in the order of the source.

    Args:
        source: a local .jsonl, .json or .parquet file, or a data set of the hub as `owner/name` or
            `owner/name:configuration` (`openai/gsm8k:main`).
        split: of a hub data set; a local file is one split, whatever is asked for.
        question_column, answer_column: None: the first of QUESTION_COLUMNS, ANSWER_COLUMNS that is
        there. limit: at most so many problems, from the start.

    Returns:
        At least one problem. Ids come from a column of ID_COLUMNS where there is one, else from
        the file name and the record's number; repeated ids get a suffix.

    Raises:
        DataError: the source cannot be read, a record is malformed, or a column is missing.
        ValueError: `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected None or a positive number of problems, got {limit}")
    path = Path(source)
    if path.suffix in FILE_SUFFIXES or path.exists():
        records, stem = _file_records(path), path.stem
    else:
        records, stem = _hub_records(source, split), f"{source}/{split}"
    columns: tuple[str, str] | None = None
    problems: list[Problem] = []
    taken_ids: set[str] = set()
    for place, number, record in itertools.islice(records, limit):
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected an object with columns, got {_kind(record)}")
        if columns is None:
            columns = (
                _column(record, question_column, QUESTION_COLUMNS, "question", place),
                _column(record, answer_column, ANSWER_COLUMNS, "answer", place),
            )
        question, answer = columns
        problem_id = _distinct(_record_id(record, f"{stem}/{number}"), taken_ids)
        problems.append(
            Problem(
                problem_id=problem_id,
                question=_question(record, question, place),
                answer=_answer(record, answer, place),
            )
        )
    if not problems:
        raise DataError(f"{source}: expected at least one problem, got none")
    return problems


_Record = tuple[str, int, object]


def _file_records(path: Path) -> Iterator[_Record]:
    if path.suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{path}: expected a {', '.join(FILE_SUFFIXES)} file, got {path.suffix or 'a folder'}"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    readers = {".jsonl": _jsonl_records, ".json": _json_records, ".parquet": _parquet_records}
    return readers[path.suffix](path)


def _jsonl_records(path: Path) -> Iterator[_Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            yield place, number, _decoded_json(line, place)


def _json_records(path: Path) -> Iterator[_Record]:
    content = _decoded_json(path.read_bytes(), str(path))
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, got {_kind(content)}")
    for number, record in enumerate(content, start=1):
        yield f"{path}, record {number}", number, record


def _parquet_records(path: Path) -> Iterator[_Record]:
    # pyarrow comes with datasets; imported here because it takes part of a second.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({_first_line(error)})") from error
    number = itertools.count(1)
    for batch in table.iter_batches():
        for record in batch.to_pylist():
            row = next(number)
            yield f"{path}, row {row}", row, record


def _hub_records(source: str, split: str) -> Iterator[_Record]:
    # Imported here because it takes seconds and local files do not need it.
    import datasets

    name, _, configuration = source.partition(":")
    try:
        rows: Iterable[object] = datasets.load_dataset(name, configuration or None, split=split)
    except ConnectionError as error:
        raise DataError(
            f"{source}: not a local file, and the Hugging Face hub cannot be reached for a "
            f"data set of that name ({_first_line(error)})"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{source}: not a local file, and the Hugging Face hub gave no data set of that name "
            f"with split {split!r} ({_first_line(error)})"
        ) from error
    for number, record in enumerate(rows, start=1):
        yield f"{source}, split {split}, row {number}", number, record


def _decoded_json(content: bytes, place: str) -> object:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(
            f"{place}: not valid JSON ({where}column {error.colno}: {error.msg})"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: not valid JSON (nested too deeply)") from error


def _column(
    record: dict[str, object], asked: str | None, common: tuple[str, ...], meaning: str, place: str
) -> str:
    found = [name for name in ([asked] if asked else common) if name in record]
    if not found:
        expected = f"a column {asked!r}" if asked else f"a column named {' or '.join(common)}"
        advice = "" if asked else f"; name it with {meaning}_column"
        there = ", ".join(record) or "none"
        raise DataError(f"{place}: expected {expected} for the {meaning}, got {there}{advice}")
    return found[0]


def _question(record: dict[str, object], column: str, place: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{place}: expected a non-empty text in column {column!r}, got {_kind(value)}"
        )
    return value.strip()


def _answer(record: dict[str, object], column: str, place: str) -> str:
    value = record.get(column)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{place}: expected one final answer in column {column!r}, got {_kind(value)}"
        )
    answer = _final_answer(value)
    if not answer:
        raise DataError(f"{place}: the solution in column {column!r} holds no final answer")
    return answer


def _final_answer(solution: str) -> str:
    """What follows GSM8K's ####, the last \\boxed{} of a MATH solution, or the text itself."""
    if _GSM8K_ANSWER_MARK in solution:
        return solution.rpartition(_GSM8K_ANSWER_MARK)[2].strip()
    if "\\boxed" in solution:
        return extract_boxed(solution) or ""
    return solution.strip()


def _record_id(record: dict[str, object], default: str) -> str:
    for column in ID_COLUMNS:
        value = record.get(column)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value)
    return default


def _distinct(problem_id: str, taken: set[str]) -> str:
    candidates = itertools.chain([problem_id], (f"{problem_id}#{n}" for n in itertools.count(2)))
    chosen = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(chosen)
    return chosen


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "an empty text" if not value.strip() else repr(value[:40])
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {value!r}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
