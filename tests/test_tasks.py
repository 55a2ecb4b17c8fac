"""Loading problems: what is accepted, and the sentence for what is not."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trainer.data_records import DataError
from trainer.tasks import load_problems


def write_jsonl(path: Path, records: list[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_json(path: Path, records: list[object]) -> str:
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, records: list[object]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


@pytest.mark.parametrize(
    ("suffix", "write"), [("jsonl", write_jsonl), ("json", write_json), ("parquet", write_parquet)]
)
def test_every_file_kind_gives_the_same_problems(
    tmp_path: Path, suffix: str, write: Callable[[Path, list[object]], str]
) -> None:
    records: list[object] = [
        {"problem": "1 + 1?", "answer": "2"},
        {"problem": "Größe?", "answer": "½"},
    ]
    problems = load_problems(write(tmp_path / f"set.{suffix}", records))
    assert [(p.question, p.answer) for p in problems] == [("1 + 1?", "2"), ("Größe?", "½")]
    assert [p.problem_id for p in problems] == ["set/1", "set/2"]


@pytest.mark.parametrize("question", ["question", "problem", "prompt", "input"])
@pytest.mark.parametrize("answer", ["answer", "solution", "gold", "final_answer", "target"])
def test_common_column_names_are_found(tmp_path: Path, question: str, answer: str) -> None:
    source = write_jsonl(tmp_path / "set.jsonl", [{"level": 3, question: "Q", answer: "7"}])
    (problem,) = load_problems(source)
    assert (problem.question, problem.answer) == ("Q", "7")


def test_named_columns_win_over_common_ones(tmp_path: Path) -> None:
    record = {"question": "no", "answer": "no", "frage": "Q", "antwort": "7"}
    source = write_jsonl(tmp_path / "set.jsonl", [record])
    (problem,) = load_problems(source, question_column="frage", answer_column="antwort")
    assert (problem.question, problem.answer) == ("Q", "7")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("He has 6 * 7 = <<6*7=42>>42.\n#### 42", "42"),
        ("#### 1,000", "1,000"),
        ("First \\boxed{1}, so the answer is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\frac{14}{3}", "\\frac{14}{3}"),
        (142.0, "142.0"),
        (7, "7"),
        (["9.6\n"], "9.6"),
        (["0.01\n", 0.02, "0.01"], ["0.01", "0.02"]),
    ],
)
def test_solution_is_reduced_to_its_final_answer(
    tmp_path: Path, solution: object, answer: str | list[str]
) -> None:
    source = write_jsonl(tmp_path / "set.jsonl", [{"question": "Q", "solution": solution}])
    assert load_problems(source)[0].answer == answer


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}"], "line 1: expected a column named question or problem"),
        (['{"question": "Q"}'], "line 1: expected a column named answer or .*got question;"),
        (['{"question": "Q", "answer": "1"}', "{"], "line 2: not valid JSON"),
        (['{"question": "Q", "answer": "1"}', "", "[1]"], "line 3: expected an object"),
        (['{"question": "Q", "answer": ""}'], "line 1: .*final answer.*got an empty text"),
        (['{"question": "Q", "answer": null}'], "line 1: .*final answer.*got nothing"),
        (['{"question": "Q", "answer": true}'], "line 1: .*final answer.*got bool"),
        (['{"question": "Q", "answer": NaN}'], "line 1: .*final answer.*got float"),
        (['{"question": "Q", "answer": []}'], "line 1: .*final answer.*got an empty list"),
        (['{"question": "Q", "answer": ["1", " "]}'], "line 1: .*final answer.*got an empty text"),
        (['{"question": "Q", "answer": {"a": 1}}'], "line 1: .*final answer.*got a dict of 1"),
        (
            [json.dumps({"question": "Q", "answer": "9" * 5000})],
            "line 1: the answer in column 'answer' cannot be graded: it is longer than",
        ),
        (['{"question": "Q", "answer": "so ####  "}'], "line 1: .*holds no final answer"),
        (['{"question": "Q", "answer": "so \\\\boxed{4"}'], "line 1: .*holds no final answer"),
        (['{"question": " ", "answer": "1"}'], "line 1: expected a non-empty text"),
        (['{"question": [{"role": "user"}], "answer": "1"}'], "line 1: .*got a list of 1"),
        (['{"question": "Q", "answer": "1"}', '{"question": "Q"}'], "line 2: .*got nothing"),
        (["[" * 100_000], "line 1: not valid JSON"),
        ([], "expected at least one problem, got none"),
    ],
)
def test_unusable_line_is_refused_with_its_number(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_problems(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"question": "Q", "answer": "1"}\n{"question": "\xff", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8 text \(byte 15\)"):
        load_problems(str(path))


def test_missing_named_column_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "set.jsonl", [{"question": "Q", "answer": "1"}])
    with pytest.raises(DataError, match="a column 'gold' for the answer, got question, answer"):
        load_problems(source, answer_column="gold")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "no such file"),
        ("set.csv", "expected a .jsonl, .json, .parquet file"),
        ("folder", "expected a .jsonl, .json, .parquet file"),
        ("broken.parquet", "not a parquet file"),
        ("broken.json", "not valid JSON"),
        ("object.json", "expected a list of objects, got a dict of 1"),
    ],
)
def test_unusable_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "set.csv").write_text("question,answer\nQ,1\n")
    (tmp_path / "broken.parquet").write_text("not parquet")
    (tmp_path / "broken.json").write_text("[{]")
    (tmp_path / "object.json").write_text('{"question": "Q"}')
    with pytest.raises(DataError, match=message):
        load_problems(str(tmp_path / name))


@pytest.mark.parametrize(
    ("stated", "level"),
    [("Level 5", 5), (3, 3), (4.0, 4), ("2", 2), ("Level ?", None), (0.0, None), ("hard", None)],
)
def test_level_is_read_in_every_spelling(tmp_path: Path, stated: object, level: int | None) -> None:
    record = {"problem": "Q", "answer": "1", "level": stated}
    assert load_problems(write_jsonl(tmp_path / "set.jsonl", [record]))[0].level == level


def test_levels_are_chosen_before_the_limit(tmp_path: Path) -> None:
    records: list[object] = [
        {"question": f"Q{n}", "answer": "1", "level": f"Level {n % 5 + 1}"} for n in range(10)
    ]
    source = write_jsonl(tmp_path / "set.jsonl", records)
    problems = load_problems(source, levels=(4, 5), limit=3)
    assert [problem.question for problem in problems] == ["Q3", "Q4", "Q8"]


def test_a_level_that_no_problem_has_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "set.jsonl", [{"question": "Q", "answer": "1"}])
    with pytest.raises(DataError, match="expected at least one problem of level 4, 5, got none"):
        load_problems(source, levels=(5, 4))


def test_other_columns_are_kept_for_rewards(tmp_path: Path) -> None:
    record = {"question": "Q", "answer": "1", "source": "s", "hints": [1, 2]}
    (problem,) = load_problems(write_jsonl(tmp_path / "set.jsonl", [record]))
    assert problem.columns == {"source": "s", "hints": [1, 2]}


def test_several_golds_are_shown_as_one_text(tmp_path: Path) -> None:
    record = {"question": "Q", "answer": ["1/2", "0.5"]}
    (problem,) = load_problems(write_jsonl(tmp_path / "set.jsonl", [record]))
    assert problem.answer_text == "1/2 or 0.5"


def test_choices_are_listed_in_an_order_of_their_own_and_answered_by_letter(
    tmp_path: Path,
) -> None:
    records: list[object] = [
        {
            "Question": f"What is {n}?",
            "Correct Answer": f"right {n}",
            "Incorrect Answer 1": "one",
            "Incorrect Answer 2": "two",
            "Incorrect Answer 3": "three",
            "Subdomain": "Optics",
        }
        for n in range(40)
    ]
    source = write_jsonl(tmp_path / "gpqa.jsonl", records)
    problems = load_problems(source, kind="choice")
    for n, problem in enumerate(problems):
        assert f"\n{problem.answer}) right {n}\n" in problem.question
        assert problem.columns == {"Subdomain": "Optics"}
    assert {problem.answer for problem in problems} == set("ABCD")
    # Neither the place nor the id matters.
    assert load_problems(write_jsonl(tmp_path / "rest.jsonl", records[7:]), kind="choice")[
        0
    ].question == (problems[7].question)


def test_choices_that_are_missing_are_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "gpqa.jsonl", [{"Question": "Q", "Correct Answer": "1"}])
    with pytest.raises(DataError, match="line 1: expected a column 'Incorrect Answer 1'"):
        load_problems(source, kind="choice")


def test_ids_are_kept_and_made_distinct(tmp_path: Path) -> None:
    records: list[object] = [
        {"id": name, "question": "Q", "answer": "1"} for name in ("a", "a#2", "a", "a", 7, None)
    ]
    ids = [p.problem_id for p in load_problems(write_jsonl(tmp_path / "set.jsonl", records))]
    assert ids == ["a", "a#2", "a#3", "a#4", "7", "set/6"]


def test_ids_do_not_depend_on_the_limit(tmp_path: Path) -> None:
    records: list[object] = [{"question": f"Q{n}", "answer": "1"} for n in range(5)]
    source = write_jsonl(tmp_path / "set.jsonl", records)
    assert load_problems(source, limit=2) == load_problems(source)[:2]


def test_lines_after_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "Q", "answer": "1"}\nbroken\n')
    assert len(load_problems(str(path), limit=1)) == 1


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(tmp_path: Path, limit: int) -> None:
    with pytest.raises(ValueError, match="limit: expected None or a positive number"):
        load_problems(str(tmp_path / "set.jsonl"), limit=limit)


def test_hub_data_set_is_asked_for_by_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list([{"question": "Q", "answer": "so\n#### 4"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = load_problems("openai/gsm8k:main", split="test")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (problem.problem_id, problem.answer) == ("openai/gsm8k:main/test/1", "4")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "the Hugging Face hub cannot be reached .*no route"),
        (datasets.exceptions.DatasetNotFoundError("gone"), "hub gave no data set .*gone"),
        (ValueError('Unknown split "x".'), "with split 'train' .*Unknown split"),
    ],
)
def test_hub_failure_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def load_dataset(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=f"owner/name: not a local file, and .*{message}"):
        load_problems("owner/name")
