"""Problems a run trains and evaluates on, from a local file or a data set of the Hugging Face hub.

Every record is checked when it is loaded: a question and a final answer that a reward can be
computed from, or one sentence that names the file, the line and the reason. Worked solutions are
reduced to their final answer.
"""

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from trainer.data_records import DataError, RecordContent, kind_of, open_records
from trainer.problem_kinds import Kind, Reader, level_of, make_reader
from trainer.rewards.code_tests import CodeTest

ID_COLUMNS = ("problem_id", "id", "unique_id", "task_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question and the answer its reward is computed from."""

    problem_id: str
    """Unique within a data set; random choices for the problem derive from it."""
    question: str
    """The text that a template turns into a prompt."""
    answer: str | list[str]
    """The accepted final answer; of a list, each one is accepted. Empty for a problem that has a
    verifier or tests instead, and for a general prompt."""
    tests: tuple[CodeTest, ...] = ()
    """What a program that answers the problem is graded by."""
    level: int | None = None
    """Difficulty as the data set states it, 1 to 5 for MATH."""
    verifier: Callable[[str | None], float] | None = None
    """Scores an extracted answer (None: there is none) from 0 to 1, in place of comparing it with
    `answer`; picklable."""
    columns: dict[str, object] = field(default_factory=dict)
    """The record's other columns, passed to a user's reward under their names."""

    @property
    def is_general(self) -> bool:
        """A prompt without an answer that could be verified; reward models judge its
        completions."""
        return not self.answer and not self.tests and self.verifier is None

    @property
    def answer_text(self) -> str:
        """The accepted answers as one text, to be shown."""
        return self.answer if isinstance(self.answer, str) else " or ".join(self.answer)


def load_problems(
    source: str,
    *,
    split: str = "train",
    kind: Kind = "answer",
    question_column: str | None = None,
    answer_column: str | None = None,
    levels: Collection[int] = (),
    limit: int | None = None,
) -> list[Problem]:
    """Problems in the order of the source.

    Args:
        source: a local .jsonl, .json or .parquet file, or a data set of the hub as `owner/name` or
            `owner/name:configuration` (`openai/gsm8k:main`).
        split: of a hub data set; a local file is one split, whatever is asked for.
        kind: what a record holds. "answer": a question and its final answer, a list of accepted
            ones, or a solution that ends in it. "prompt": a question alone. "choice": GPQA's
            columns. "tests": a question and tests of a program (`trainer.rewards.code_tests`).
            "human-eval", "live-code-bench": those sets' own columns.
        question_column, answer_column: for the kinds "answer", "prompt" and "tests"; None: the
            first of QUESTION_COLUMNS, ANSWER_COLUMNS that is there.
        levels: only problems of these levels (column `level`); empty: all.
        limit: at most so many problems, from the start.

    Returns:
        At least one problem. Ids come from a column of ID_COLUMNS where there is one, else from
        the file name and the record's number; repeated ids get a suffix.

    Raises:
        DataError: the source cannot be read, a record is malformed, or a column is missing.
        ValueError: `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected None or a positive number of problems, got {limit}")
    records, stem = open_records(source, split)
    read: Reader | None = None
    problems: list[Problem] = []
    taken_ids: set[str] = set()
    for place, number, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected an object with columns, got {kind_of(record)}")
        if read is None:
            read = make_reader(
                kind, record, place, question_column=question_column, answer_column=answer_column
            )
        level = level_of(record)
        if levels and level not in levels:
            continue
        question, answer, tests, used_columns = read(record, place)
        problems.append(
            Problem(
                problem_id=_distinct(_record_id(record, f"{stem}/{number}"), taken_ids),
                question=question,
                answer=answer,
                tests=tests,
                level=level,
                columns={name: value for name, value in record.items() if name not in used_columns},
            )
        )
        if len(problems) == limit:
            break
    if not problems:
        wanted = f" of level {', '.join(map(str, sorted(levels)))}" if levels else ""
        raise DataError(f"{source}: expected at least one problem{wanted}, got none")
    return problems


def _record_id(record: RecordContent, default: str) -> str:
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
