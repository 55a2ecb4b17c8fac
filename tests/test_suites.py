"""Named data sets: where they are taken from, and what the table of them says."""

import json
from pathlib import Path

import datasets
import pytest

from trainer.config import DataOptions, UsageError
from trainer.data_records import DataError
from trainer.problem_kinds import KINDS
from trainer.problem_source import ListedProblems, open_problems
from trainer.suites import PROTOCOLS, SUITES, load_source


def write_set(path: Path, count: int, **columns: object) -> Path:
    records = [{"problem": f"{n} + 1", "answer": str(n + 1), **columns} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_table_is_consistent() -> None:
    for name, suite in SUITES.items():
        assert suite.kind in KINDS, name
        assert suite.hub is None or suite.hub.count("/") == 1, name
        assert suite.hub is None or suite.kind != "answer" or all(suite.columns), name
    for name, protocol in PROTOCOLS.items():
        for suite_name in protocol.suites:
            assert protocol.samples or SUITES[suite_name].r1_samples, (name, suite_name)


@pytest.mark.parametrize("file", ["aime24.jsonl", "drgrpo_aime.jsonl"])
def test_suite_comes_from_the_data_folder(tmp_path: Path, file: str) -> None:
    write_set(tmp_path / file, 3)
    problems = load_source("aime24", split="unused", data_dir=tmp_path, limit=2)
    assert [problem.answer for problem in problems] == ["1", "2"]


def test_suite_missing_from_the_data_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-dir: expected math500.jsonl or .* in .*got none"):
        load_source("math500", split="test", data_dir=tmp_path)


def test_suite_comes_from_the_hub_with_its_split_and_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        row = {"question": "Q", "final_answer": ["4", "2^2"], "answer": "no", "solution": "no"}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = load_source("olympiadbench", split="unused")
    assert asked == [("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")]
    assert problem.answer == ["4", "2^2"]


def test_suite_that_is_the_users_own_file_says_so() -> None:
    with pytest.raises(DataError, match="gpqa: comes from a file of your own; put gpqa.jsonl"):
        load_source("gpqa", split="test")


def test_embedded_task_has_100_problems_unless_asked() -> None:
    assert len(load_source("tiny", split="test")) == 100
    assert len(load_source("tiny", split="test", limit=7)) == 7


def test_levels_of_a_set_without_any_are_refused() -> None:
    with pytest.raises(UsageError, match="--levels: expected none for tiny"):
        load_source("tiny", split="test", levels=(3,))
    with pytest.raises(UsageError, match="--levels: expected none for tiny"):
        open_problems(DataOptions(levels=(3,)), 0)


def test_training_takes_levels_and_a_suite_to_evaluate_on(tmp_path: Path) -> None:
    training = write_set(tmp_path / "mine.jsonl", 4, level="Level 1")
    with training.open("a") as lines:
        lines.write(json.dumps({"problem": "hard", "answer": "9", "level": "Level 5"}) + "\n")
        lines.write(json.dumps({"problem": "1 + 1", "answer": "2", "level": "Level 5"}) + "\n")
    write_set(tmp_path / "math500.jsonl", 3)
    options = DataOptions(
        dataset=str(training), levels=(4, 5), eval_dataset="math500", data_dir=tmp_path
    )
    source, held_out = open_problems(options, 0)
    assert isinstance(source, ListedProblems)
    # "1 + 1" is among the held-out problems.
    assert [problem.question for problem in source.problems] == ["hard"]
    assert len(held_out) == 3
