"""Records of a data set, one at a time: from a local file, or from the Hugging Face hub."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
RecordContent = dict[str, object]


class DataError(ValueError):
    """A data set that cannot be used; the message is one sentence with the place and the reason."""


class Record(NamedTuple):
    """One record of a data set."""

    place: str
    """Where it stands, for messages: file and line, or data set and row."""
    number: int
    """Of its line or row, from 1."""
    content: object


def open_records(source: str, split: str) -> tuple[Iterator[Record], str]:
    """The records of a source, and a name for it that ids of its problems start with.

    Args:
        source: a local .jsonl, .json or .parquet file, or a data set of the hub as `owner/name` or
            `owner/name:configuration`.
        split: of a hub data set; a local file is one split, whatever is asked for.

    Raises:
        DataError: now or while the records are read: the source cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix in FILE_SUFFIXES or path.exists():
        return _file_records(path), path.stem
    return _hub_records(source, split), f"{source}/{split}"


def text_of(record: RecordContent, column: str, place: str) -> str:
    """The text in a column.

    Raises:
        DataError: it is missing, empty or not a text.
    """
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{place}: expected a non-empty text in column {column!r}, got {kind_of(value)}"
        )
    return value.strip()


def kind_of(value: object) -> str:
    """A value in a few words, for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "an empty text" if not value.strip() else repr(value[:40])
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {value!r}"


def _file_records(path: Path) -> Iterator[Record]:
    if path.suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{path}: expected a {', '.join(FILE_SUFFIXES)} file, got {path.suffix or 'a folder'}"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    readers = {".jsonl": _jsonl_records, ".json": _json_records, ".parquet": _parquet_records}
    return readers[path.suffix](path)


def _jsonl_records(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            yield Record(place, number, _decoded_json(line, place))


def _json_records(path: Path) -> Iterator[Record]:
    content = _decoded_json(path.read_bytes(), str(path))
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, got {kind_of(content)}")
    for number, record in enumerate(content, start=1):
        yield Record(f"{path}, record {number}", number, record)


def _parquet_records(path: Path) -> Iterator[Record]:
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
            yield Record(f"{path}, row {row}", row, record)


def _hub_records(source: str, split: str) -> Iterator[Record]:
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
        yield Record(f"{source}, split {split}, row {number}", number, record)


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
