"""Analysis of base models: a whole one on a small model, and its measures on cases made by hand."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer import analyze, evaluate
from trainer.estimates import Estimate, pass_at_k
from trainer.testing import write_bigram_model, write_sums


@pytest.fixture(autouse=True)
def deterministic_no_longer() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def flags(inputs: Path, out: Path, **changed: object) -> list[str]:
    options: dict[str, object] = {
        "model": inputs / "model",
        "suite": inputs / "sums.jsonl",
        "problems": 40,
        "samples": 4,
        "max_new_tokens": 16,
        "grader": "exact",
        "cpu_threads": 1,
        "out": out,
        **changed,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


SETTINGS = ["--templates", "none", "tiny", "--temperatures", "0.3", "1.0"]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert analyze.main([*flags(inputs, out), *SETTINGS]) == 0
    return out


def read(folder: Path) -> dict[str, list[dict[str, dict[str, dict[str, float]]]]]:
    return json.loads((folder / "analysis.json").read_text())


def samples_of(folder: Path, setting: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / setting / "samples-sums.jsonl").open()]


def test_template_that_the_model_knows_is_chosen_and_temperatures_follow(whole: Path) -> None:
    result = read(whole)
    assert [each["template"] for each in result["templates"]] == ["none", "tiny"]
    assert [each["template"] for each in result["temperatures"]] == ["tiny", "tiny"]
    rates = [each["estimates"]["answering"]["value"] for each in result["templates"]]
    # By the model's table a completion answers at once with 0.1, or thinks and then answers with
    # 0.9; three standard errors of 160 samples are 0.068.
    assert rates[1] == pytest.approx(0.1 + 0.9 * 0.9, abs=0.068)
    assert rates[0] < 0.8


def test_estimates_are_those_of_the_samples(whole: Path) -> None:
    found = read(whole)["temperatures"][1]["estimates"]
    samples = samples_of(whole, "tiny-temperature-1")
    assert len(samples) == 160
    correct_PK = [[bool(one["correct"]) for one in samples[i : i + 4]] for i in range(0, 160, 4)]
    for k in (1, 2, 4):
        expected = pass_at_k(correct_PK, k)
        assert expected is not None
        assert found[f"pass@{k}"]["value"] == pytest.approx(expected.value)
    assert found["pass@4"]["value"] == pytest.approx(sum(map(any, correct_PK)) / 40)
    in_place = sum(one["extracted"] is not None for one in samples)
    assert found["in_place"]["value"] == pytest.approx(in_place / 160)


def test_table_has_a_row_of_each_setting(whole: Path) -> None:
    lines = (whole / "analysis.md").read_text().splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows == ["template", "none", "tiny", "temperature", "0.3", "1"]
    # Columns are aligned as text, too.
    assert len({len(line) for line in lines[:4]}) == 1


def test_same_command_again_samples_nothing(
    inputs: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (whole / "analysis.json").read_bytes()
    monkeypatch.setattr(evaluate, "evaluate_model", None)
    assert analyze.main([*flags(inputs, whole), *SETTINGS]) == 0
    assert (whole / "analysis.json").read_bytes() == before


def test_two_ranks_keep_the_samples_of_one(inputs: Path, whole: Path, tmp_path: Path) -> None:
    assert (
        analyze.main([*flags(inputs, tmp_path, ranks=2), "--templates=tiny", "--temperatures=1"])
        == 0
    )
    setting = "tiny-temperature-1"
    texts = [[one["completion"] for one in samples_of(at, setting)] for at in (whole, tmp_path)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("sys.exit(2)", 2),
        ("sys.exit(130)", 130),
        ("raise RuntimeError('broken')", 1),
        ("os.kill(os.getpid(), 9)", 1),
    ],
)
def test_only_a_mistake_in_an_evaluation_is_one_of_the_caller(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends: str,
    code: int,
) -> None:
    (tmp_path / "evaluate.py").write_text(f"import os, sys\n{ends}\n")
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    try:
        ended = analyze.main([*flags(inputs, tmp_path / "out", engine="vllm"), *SETTINGS])
    except SystemExit as error:
        assert "its command ended with exit code" in str(error)
        ended = 1
    assert ended == code
    assert ("error: evaluation" in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize(
    ("completion", "answers"),
    [
        ("So the answer is 12.", True),
        ("Answer: 12", True),
        ("the final answer would then be: 12", True),
        ("#### 12", True),
        (r"so \boxed{12}", True),
        ("<think> so <answer> 12", True),
        ("所以答案是12", True),
        ("The answer\nis left to the reader", False),
        ("Question: how many apples are there?", False),
        ("He answers the phone. What is 3 + 4?", False),
        ("", False),
    ],
)
def test_answer_counts_wherever_it_is_stated(completion: str, answers: bool) -> None:
    assert analyze.states_answer(completion, None) is answers
    assert analyze.states_answer(completion, "12")


def made(problem: str, completion: str, *, correct: bool) -> dict[str, object]:
    return {
        "problem_id": problem,
        "completion": completion,
        "extracted": "1" if correct else None,
        "correct": correct,
        "finish_reason": "stop" if correct else "length",
    }


def test_measures_of_samples_made_by_hand() -> None:
    samples = [
        made("a", "Wait, let me double-check. Recheck!", correct=True),
        made("a", "no", correct=True),
        made("b", "But I rethink", correct=False),
        made("b", "no", correct=False),
    ]
    given = Estimate(value=0.5, low=None, high=None)
    setting = analyze.measure("none", 0.6, {"pass@1": given}, samples)
    values = {name: each and each.value for name, each in setting.estimates.items()}
    assert values == {
        "pass@1": 0.5,
        "answering": 0.5,
        "in_place": 0.5,
        "ended": 0.5,
        "correct/reflecting": 0.5,
        "correct/other": 0.5,
    }
    # Whole words of one list, parts of words of the other.
    assert {word for word, count in setting.words.items() if count} == {
        *("wait", "check", "but"),
        *("double-check", "recheck", "rethink"),
    }
    nobody = analyze.measure("none", 0.6, {}, samples[1:2])
    assert nobody.estimates["correct/reflecting"] is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model=none/where"], "--suite: expected a data set"),
        (["--templates", "r2"], "--templates: expected"),
        (["--temperatures", "0"], "temperature: expected a number > 0"),
        (["--temperature", "0.5"], "did you mean --temperatures"),
        (["--samples", "0"], "--samples: expected a number >= 1"),
        (["--suite=no.jsonl", "--model=/no"], "no.jsonl: no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_gives_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error
