"""Runs of several seeds side by side, on completions made by hand."""

import io
import json
import math
from pathlib import Path

import pytest

from trainer.compare_runs import NO_STEP, CompareOptions, compare, main, mean_and_error, run_curves
from trainer.rewards import Reward
from trainer.run_log import RunLog, Sample
from trainer.tasks import Problem

ENGLISH = "<think> two and three makes five </think> <answer> 5 </answer>"
MIXED = "<think> two and three makes 二 加 三 得 五 </think> <answer> 5 </answer>"


def made(length: int, *, correct: bool, completion: str = ENGLISH) -> Sample:
    return Sample.of(
        Problem(problem_id="p", question="two plus three ?", answer="5"),
        Reward(total=float(correct), parts={}, extracted="5", correct=correct, status="ok"),
        prompt="",
        completion=completion,
        length=length,
        finish_reason="stop" if length < 80 else "length",
    )


def write_run(folder: Path, by_step: dict[int, list[Sample]]) -> Path:
    """A run directory whose held-out and training completions of a step are the same."""
    with RunLog(folder, total_steps=max(by_step), stream=io.StringIO()) as log:
        for step, samples in by_step.items():
            log.log_step(step, {}, samples=samples, eval_samples=samples)
    return folder


def options(*runs: str, out: Path, **others: object) -> CompareOptions:
    return CompareOptions(runs=runs, out=out, **others)  # type: ignore[arg-type]


def test_standard_error_is_that_of_the_mean() -> None:
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    # Deviations -2, -1, 3: a variance of 14 / 2, and of the mean 7 / 3.
    assert mean == 3.0 and error == pytest.approx(math.sqrt(7 / 3), rel=1e-12)
    assert mean_and_error([4.0]) == (4.0, None)


def test_values_are_means_over_the_completions_they_are_about(tmp_path: Path) -> None:
    samples = [
        made(10, correct=True),
        made(20, correct=False),
        made(80, correct=False, completion=MIXED),
        made(30, correct=True),
    ]
    run = write_run(tmp_path / "run", {0: samples})
    curves = run_curves(run, options(f"a={run}", out=tmp_path / "out"))
    assert curves["accuracy"][0] == 0.5 and curves["truncated"][0] == 0.25
    assert curves["length"][0] == 35.0
    assert curves["length/correct"][0] == 20.0 and curves["length/wrong"][0] == 50.0
    # Words are counted by script, 1.6 Han characters making one.
    assert curves["consistency"][0] == pytest.approx((3 + 4 / (4 + 5 / 1.6)) / 4, rel=1e-12)


def test_training_completions_of_several_steps_are_one_point(tmp_path: Path) -> None:
    wrong, right = made(40, correct=False), made(10, correct=True)
    by_step = {1: [wrong], 2: [right, right, right], 3: [right], 4: [right], 5: [wrong]}
    run = write_run(tmp_path / "run", by_step)
    asked = options(f"a={run}", out=tmp_path / "out", samples="training", every=2, until=4)
    curves = run_curves(run, asked)
    # The mean over four completions, not over two steps; and no value of wrong ones at 4.
    assert curves["accuracy"] == {2: 0.75, 4: 1.0}
    assert curves["length/wrong"] == {2: 40.0}


def test_comparison_holds_each_run_and_their_means(tmp_path: Path) -> None:
    runs = [
        f"short={write_run(tmp_path / 's0', {0: [made(10, correct=True)]})}",
        f"short={write_run(tmp_path / 's1', {0: [made(14, correct=True)]})}",
        f"long={write_run(tmp_path / 'l0', {0: [made(50, correct=False)]})}",
    ]
    table = compare(options(*runs, out=tmp_path / "made" / "out.v1", measures=("length",)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[2:] == [["short", "2", "0", "12.0 +- 2.0"], ["long", "1", "0", "50.0"]]
    kept = json.loads((tmp_path / "made" / "out.v1.json").read_text())
    assert kept["values"] == {"short": {"length": {"0": [10, 14]}}, "long": {"length": {"0": [50]}}}
    assert (tmp_path / "made" / "out.v1.png").read_bytes().startswith(b"\x89PNG")


def test_only_steps_that_all_runs_have_are_averaged(tmp_path: Path) -> None:
    one = [made(10, correct=True)]
    runs = [
        f"a={write_run(tmp_path / 'r0', {0: one, 1: one, 2: one})}",
        f"a={write_run(tmp_path / 'r1', {0: one, 2: one})}",
    ]
    compare(options(*runs, out=tmp_path / "out"))
    assert list(json.loads((tmp_path / "out.json").read_text())["values"]["a"]["length"]) == [
        "0",
        "2",
    ]


def test_file_of_samples_is_a_run_of_which_the_end_is_known(tmp_path: Path) -> None:
    line = {"question": "two ?", "completion": ENGLISH, "correct": True, "length": 12}
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps(line) + "\n")
    run = write_run(tmp_path / "run", {0: [made(10, correct=True)]})
    table = compare(options(f"file={samples}", f"run={run}", out=tmp_path / "out"))
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["values"]["file"]["length"] == {str(NO_STEP): [12]}
    assert "| end " in table


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--runs", "nothing"], "--runs: expected LABEL=PATH, got 'nothing'"),
        (["--runs", "a=empty"], "--runs: expected completions (held-out) in empty, got none"),
        (["--runs", "a=x", "--measures", "speed"], "--measures: expected some of accuracy"),
        (["--runs", "a=x", "--template", "misspelt"], "--template: expected one of"),
        (["--runs", "a=x", "--until", "-1"], "--until: expected a number >= 0, got -1"),
    ],
)
def test_mistake_gets_one_sentence(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
