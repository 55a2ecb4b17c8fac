"""The command line of evaluation: whole small evaluations, repeated, compared and refused."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trainer import evaluate, sample
from trainer.evaluation_options import EvaluateOptions, suite_name
from trainer.suites import PROTOCOLS, SUITES
from trainer.testing import write_bigram_model, write_sums

ROOT = Path(__file__).resolve().parent.parent
Outcome = tuple[int, str, str]
Main = Callable[[list[str]], Outcome]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    for name in PROTOCOLS["dr-grpo"].suites:
        lines = (folder / "sums.jsonl").read_text().splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[: 5 + len(name)]) + "\n")
    return folder


def flags(inputs: Path, out: Path, **changed: object) -> list[str]:
    options: dict[str, object] = {
        "model": inputs / "model",
        "template": "tiny",
        "grader": "exact",
        "max_new_tokens": 16,
        "temperature": 1.0,
        "suite": inputs / "sums.jsonl",
        "samples": 6,
        "out": out,
        **changed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


@pytest.fixture
def main_here(capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def call(arguments: list[str]) -> Outcome:
        capsys.readouterr()
        code = evaluate.main(arguments)
        return code, *capsys.readouterr()

    yield call
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation that is complete."""
    out = tmp_path_factory.mktemp("whole")
    assert evaluate.main(flags(inputs, out)) == 0
    torch.use_deterministic_algorithms(False)
    return out


def read_samples(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"samples-{name}.jsonl").open()]


def estimate(folder: Path, name: str, suite: str = "sums") -> float:
    return json.loads((folder / "result.json").read_text())["suites"][suite]["estimates"][name][
        "value"
    ]


def test_result_agrees_with_the_samples_that_are_kept(whole: Path) -> None:
    samples = read_samples(whole, "sums")
    assert len(samples) == 55 * 6
    right = [sample for sample in samples if sample["correct"]]
    # Of the model's random digits a tenth is right.
    assert 10 < len(right) < 55
    assert estimate(whole, "pass@1") == pytest.approx(len(right) / len(samples))
    assert estimate(whole, "length/mean") == pytest.approx(
        sum(int(str(sample["length"])) for sample in samples) / len(samples)
    )
    cut = [sample for sample in samples if sample["finish_reason"] == "length"]
    assert estimate(whole, "category/truncated") == pytest.approx(len(cut) / len(samples))
    solved = {sample["problem_id"] for sample in right}
    assert estimate(whole, "pass@4") <= len(solved) / 55
    for one in right:
        assert str(one["completion"]).endswith(f"<answer> {one['answer']} </answer>")


def test_same_command_again_prints_the_result_without_sampling(
    inputs: Path, whole: Path, main_here: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "evaluate_model", None)
    code, out, _ = main_here([*flags(inputs, whole), "--rows-per-batch=3"])
    assert code == 0 and "The evaluation is complete" in out and "| pass@1" in out


def test_other_settings_do_not_overwrite_a_result(
    inputs: Path, whole: Path, main_here: Main
) -> None:
    code, _, err = main_here(flags(inputs, whole, top_p=0.9))
    assert code == 2
    assert "holds an evaluation with --top-p None, not 0.9; name another folder" in err


def test_two_ranks_keep_the_samples_of_one(inputs: Path, whole: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "trainer/evaluate.py", *flags(inputs, tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
        capture_output=True,
    )
    ours, theirs = read_samples(whole, "sums"), read_samples(tmp_path, "sums")
    for one, other in zip(ours, theirs, strict=True):
        assert one["completion"] == other["completion"]
        assert one["correct"] == other["correct"]


@pytest.mark.parametrize(
    ("new_tokens", "words", "sentence"),
    [
        (1000, 3, "--max-new-tokens: expected at most 2.. for .*sums.jsonl, the model's 256 posit"),
        (
            16,
            300,
            r"problem .*: expected a prompt of 1 to 255 tokens \(the model's positions\), got",
        ),
    ],
)
def test_samples_that_do_not_fit_the_model_are_refused_by_flags_that_there_are(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    new_tokens: int,
    words: int,
    sentence: str,
) -> None:
    problem = {"question": "1 " * words, "answer": "2"}
    (tmp_path / "sums.jsonl").write_text(json.dumps(problem) + "\n")
    options = {
        "model": inputs / "model",
        "template": "tiny",
        "dataset": tmp_path / "sums.jsonl",
        "problems": "all",
        "grader": "exact",
        "max_new_tokens": new_tokens,
        "out": tmp_path / "samples.jsonl",
    }
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert sample.main(given) == 2
    torch.use_deterministic_algorithms(False)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"error: {sentence}.*", error), error


def test_models_are_compared_on_the_same_problems(
    inputs: Path, whole: Path, tmp_path: Path, main_here: Main
) -> None:
    code, out, _ = main_here([*flags(inputs, tmp_path, seed=1), f"--compare={whole}"])
    assert code == 0
    row = next(line for line in reversed(out.splitlines()) if line.startswith("| sums"))
    difference = 100 * (estimate(tmp_path, "pass@1") - estimate(whole, "pass@1"))
    assert f"| {difference:+.1f} % [" in row and "p = " in row


def test_dr_grpo_protocol_is_greedy_over_five_sets_with_their_average(
    inputs: Path, tmp_path: Path, main_here: Main
) -> None:
    arguments = flags(
        inputs, tmp_path, temperature=None, samples=None, suite=None, protocol="dr-grpo"
    )
    code, out, _ = main_here([*arguments, f"--data-dir={inputs}", "--problems=9"])
    assert code == 0 and "| average" in out
    content = json.loads((tmp_path / "result.json").read_text())
    assert list(content["suites"]) == ["aime24", "amc", "math500", "minerva", "olympiadbench"]
    shares = []
    for name, suite in content["suites"].items():
        assert (suite["samples"], suite["sampling"]["temperature"]) == (1, 0.0)
        shares.append(estimate(tmp_path, "pass@1", name))
    assert content["average"]["pass@1"]["value"] == pytest.approx(sum(shares) / 5)


def test_protocols_say_how_to_sample() -> None:
    greedy = EvaluateOptions(model="m", protocol="dr-grpo")
    assert (greedy.sampling_temperature, greedy.wanted_new_tokens) == (0.0, 3000)
    assert (greedy.samples_of("amc"), greedy.reward.grader) == (1, "lenient")
    r1 = EvaluateOptions(model="m", protocol="r1", suite=("gpqa", "math500", "livecodebench"))
    assert (r1.sampling_temperature, r1.sampling_top_p) == (0.6, 0.95)
    assert [r1.samples_of(suite) for suite in r1.suites] == [64, 16, 8]
    assert r1.wanted_new_tokens == 32768
    own = EvaluateOptions(model="m", suite=("gsm8k",))
    assert own.reward.grader == "strict" and own.samples_of("gsm8k") == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "/nowhere"}, "--model: expected an existing folder"),
        ({"template": "r3"}, "--template: expected one of r1"),
        ({"suite": "none.jsonl"}, "none.jsonl: no such file"),
        (
            {"suite": "math5000"},
            "math5000: expected a file, a hub data set .*, gym:TASK or one of tiny, ",
        ),
        ({"suite": None}, "--suite: expected a data set, or --protocol, got none"),
        ({"suite": None, "protocol": "r2"}, "--protocol"),
        ({"temperature": 0}, "--samples: expected 1 with temperature 0"),
        ({"temperature": -1}, "--temperature: expected a number >= 0"),
        ({"top_p": 0}, "--top-p: expected a number > 0"),
        ({"top_p": 1.5}, "--top-p: expected a number <= 1"),
        ({"samples": 0}, "--samples: expected a number >= 1"),
        ({"max_new_tokens": 1000}, "--max-new-tokens: expected at most 2.. for sums"),
        ({"levels": 3}, "expected at least one problem of level 3"),
        ({"compare": "/nowhere"}, "/nowhere: expected the folder of an evaluation"),
        (
            {"protocol": "r1", "samples": None},
            "--samples: the protocol r1 states no number .* sums",
        ),
        ({"tempratur": 1}, "--tempratur: no such flag; did you mean --temperature"),
    ],
)
def test_mistake_is_one_sentence_and_code_2(
    inputs: Path, tmp_path: Path, main_here: Main, changed: dict[str, object], message: str
) -> None:
    code, _, err = main_here(flags(inputs, tmp_path, **changed))
    assert code == 2
    sentence = err.strip().splitlines()[-1]
    assert re.search(message, sentence), sentence


def test_missing_vllm_is_one_sentence(
    inputs: Path, tmp_path: Path, main_here: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name)
    )
    code, _, err = main_here(flags(inputs, tmp_path, engine="vllm"))
    assert code == 2 and "error: --engine: vllm is not installed; pip install" in err


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("math500", "math500"),
        ("data/my set.v2.jsonl", "my set.v2"),
        ("owner/name:main", "owner-name-main"),
        ("gym:chain_sum:max_terms=3,max_digits=2", "gym-chain_sum-max_terms=3-max_digits=2"),
    ],
)
def test_data_sets_have_names_that_files_can_have(source: str, name: str) -> None:
    assert suite_name(source) == name
    assert all(suite_name(each) == each for each in SUITES)
