"""Whole runs, as processes: kills, interruptions, ranks, refusals. Each is one small real run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from trainer.run_log import read_metrics
from trainer.testing import write_bigram_model, write_sums
from trainer.train import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "trainer/train.py"
STEPS = 8
TIMES = ("seconds/", "tokens_per_second")
Outcome = tuple[int, str, str]
Main = Callable[[list[str]], Outcome]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def flags(inputs: Path, run_dir: Path, **changed: object) -> list[str]:
    """A run with all that has a state: reference, its reset, minibatches, evaluation."""
    options: dict[str, object] = {
        "model": inputs / "model",
        "dataset": inputs / "sums.jsonl",
        "run_dir": run_dir,
        "backend": "reference",
        "steps": STEPS,
        "num_prompts": 8,
        "group_size": 4,
        "max_new_tokens": 16,
        "eval_problems": 8,
        "eval_samples": 2,
        "eval_every": 3,
        "save_every": 2,
        "minibatches": 2,
        "learning_rate": 5e-3,
        "warmup_updates": 0,
        "loss": "grpo",
        "kl": "k3",
        "kl_weight": 0.01,
        "reference_reset_every": 3,
        **changed,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def start(arguments: list[str], ranks: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*launcher, SCRIPT, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def run(arguments: list[str], ranks: int = 1) -> Outcome:
    return finish(start(arguments, ranks))


@pytest.fixture
def main_here(capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def call(arguments: list[str]) -> Outcome:
        capsys.readouterr()
        code = main(arguments)
        return code, *capsys.readouterr()

    yield call
    torch.use_deterministic_algorithms(False)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if (run_dir / "metrics.jsonl").exists():
            records = read_metrics(run_dir)
            if records and records[-1]["step"] >= step:
                return
        time.sleep(0.005)


def results(run_dir: Path) -> list[dict[str, float | None]]:
    """The metrics, without those that measure time."""
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMES)}
        for record in read_metrics(run_dir)
    ]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "model").glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def assert_same_bits(run_dir: Path, other: Path) -> None:
    assert results(run_dir) == results(other)
    ours, theirs = weights(run_dir), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run(flags(inputs, run_dir))
    assert code == 0, err
    for result in ("report.html", "curves.png", "model"):
        assert (run_dir / result).exists() and str(run_dir / result) in out
    return run_dir


def test_run_writes_a_line_per_step_with_all_metrics(whole_run: Path) -> None:
    records = read_metrics(whole_run)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    evaluated = [record["step"] for record in records if "eval/pass@1" in record]
    assert evaluated == [0, 3, 6, 8]
    expected = (
        "reward/mean reward/accuracy reward/format length/mean length/correct length/wrong "
        "reflection_rate entropy kl clip_fraction grad_norm loss tokens_per_second seconds/rollout "
        "seconds/score seconds/update sampler/logprob_gap_mean "
        "sampler/logprob_gap_max truncated_fraction zero_spread_fraction"
    ).split()
    assert "parity/hidden_gradient" in records[1]
    for record in records[1:]:
        assert set(expected) <= record.keys()
    assert {"eval/pass@1", "eval/cons@k", "seconds/eval"} <= records[-1].keys()
    # The weights do move: the sums below compare two trainings, not two copies.
    assert records[-1]["grad_norm"] > 0 and records[-1]["entropy"] != records[1]["entropy"]


def test_killed_run_goes_on_and_ends_with_the_same_bits(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    process = start(flags(inputs, tmp_path / "run"))
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    # Killed once more, on the way from the checkpoint.
    process = start(flags(inputs, tmp_path / "run"))
    time.sleep(0.5)
    wait_for_step(tmp_path / "run", 6, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    code, _, err = run(flags(inputs, tmp_path / "run"))
    assert code == 0, err
    assert_same_bits(tmp_path / "run", whole_run)


def test_interrupted_run_is_saved_and_says_how_to_go_on(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    process = start(flags(inputs, tmp_path / "run"))
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGINT)
    code, out, _ = finish(process)
    assert code == 130
    saved = max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert int(saved.removeprefix("step-")) >= 3
    message, command = out.strip().splitlines()[-2:]
    assert "interrupted, saved after step" in message and SCRIPT in command
    code, _, err = run(flags(inputs, tmp_path / "run"))
    assert code == 0, err
    assert_same_bits(tmp_path / "run", whole_run)


def test_two_ranks_give_the_same_curve_as_one(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    code, _, err = run(flags(inputs, tmp_path / "run"), ranks=2)
    assert code == 0, err
    for ours, theirs in zip(results(tmp_path / "run"), results(whole_run), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            # They count exact zeros, which rounding makes and unmakes, and measure rounding.
            if name == "zero_gradient_fraction" or name.startswith("parity/"):
                continue
            if value is None:
                assert theirs[name] is None
                continue
            assert value == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (ours["step"], name)
    for name, weight in weights(whole_run).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], weight, rtol=1e-3, atol=1e-4)


def test_complete_run_is_not_repeated(inputs: Path, whole_run: Path, main_here: Main) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    code, out, err = main_here(flags(inputs, whole_run))
    assert code == 0, err
    assert "complete" in out and str(whole_run / "report.html") in out
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_steps_may_be_raised_after_the_end(
    inputs: Path, whole_run: Path, main_here: Main, tmp_path: Path
) -> None:
    shutil.copytree(whole_run, tmp_path / "longer")
    code, out, err = main_here(flags(inputs, tmp_path / "longer", steps=STEPS + 2))
    assert code == 0, err
    assert results(tmp_path / "longer")[: STEPS + 1] == results(whole_run)
    assert read_metrics(tmp_path / "longer")[-1]["step"] == STEPS + 2
    assert str(tmp_path / "longer" / "model") in out


def test_finished_checkpoint_without_report_gets_its_report(
    inputs: Path, whole_run: Path, main_here: Main
) -> None:
    (whole_run / "report.html").unlink()
    code, out, err = main_here(flags(inputs, whole_run))
    assert code == 0, err
    assert (whole_run / "report.html").exists() and "held-out pass@1" in out


def break_line(inputs: Path, tmp_path: Path) -> Path:
    lines = (inputs / "sums.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-5]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(lines))
    return broken


def model_without_tokenizer(inputs: Path, tmp_path: Path) -> Path:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((inputs / "model" / name).read_bytes())
    return bare


def tokenizer_beyond_the_model(inputs: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "words"
    shutil.copytree(inputs / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(folder)
    return folder


def no_such_columns(inputs: Path, tmp_path: Path) -> Path:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"riddle": "1 + 1", "solution": "2"}) + "\n")
    return other


@pytest.mark.parametrize(
    ("flag", "make", "sentence"),
    [
        ("dataset", break_line, "broken.jsonl, line 7"),
        ("dataset", no_such_columns, "riddle"),
        ("dataset", lambda inputs, tmp: tmp / "none.jsonl", "no such file"),
        ("model", model_without_tokenizer, "expected a tokenizer in the folder"),
        ("model", tokenizer_beyond_the_model, "expected a tokenizer of at most 21 tokens"),
        ("model", lambda inputs, tmp: tmp / "nowhere", "expected an existing folder"),
        ("model", lambda inputs, tmp: inputs, "no config.json"),
        ("template", lambda inputs, tmp: "fancy", "--template: expected one of"),
        ("template", lambda inputs, tmp: "chat", "chat template"),
        ("backend", lambda inputs, tmp: "warp", "--backend: expected auto or one of"),
        ("eval_problems", lambda inputs, tmp: 100, "more than --eval-problems"),
        ("max_prompt_tokens", lambda inputs, tmp: 3, "--max-prompt-tokens"),
        ("learning_rate", lambda inputs, tmp: 1e38, "expected finite values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_input_ends_in_one_sentence_and_code_2(
    inputs: Path,
    tmp_path: Path,
    main_here: Main,
    flag: str,
    make: Callable[[Path, Path], object],
    sentence: str,
) -> None:
    changed = {flag: make(inputs, tmp_path)}
    code, _, err = main_here(flags(inputs, tmp_path / "run", **changed))
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("error: ") and sentence in err


def test_refused_start_does_not_claim_the_run_directory(
    inputs: Path, tmp_path: Path, main_here: Main
) -> None:
    code, _, err = main_here(flags(inputs, tmp_path / "run", backend="warp"))
    assert code == 2 and "--backend" in err
    code, _, err = main_here(flags(inputs, tmp_path / "run", steps=1))
    assert code == 0, err


def test_run_directory_of_another_config_is_refused_and_left_alone(
    inputs: Path, whole_run: Path, main_here: Main
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*") if path.is_file()}
    for changed, sentence in (
        ({"learning_rate": 1e-3, "seed": 5}, "differs in seed (0 there, 5 here), learning_rate"),
        ({"steps": 4}, "steps (8 there; they may only be raised)"),
        ({"resume": "never"}, "holds a run"),
    ):
        code, _, err = main_here(flags(inputs, whole_run, **changed))
        assert code == 2 and sentence in err and err.count("\n") == 1, err
    after = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} <= {".lock"}


def groups_of_step(run_dir: Path, step: int) -> list[list[float]]:
    lines = (run_dir / "rollouts" / f"step-{step:05d}.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    return [rewards[start : start + 4] for start in range(0, len(rewards), 4)]


def test_groups_without_spread_are_left_out_or_replaced(
    inputs: Path, tmp_path: Path, main_here: Main
) -> None:
    for mode in ("drop", "resample"):
        options = dict(zero_spread=mode, max_draws=3, steps=3, format_weight=0)
        code, _, err = main_here(flags(inputs, tmp_path / mode, **options))
        assert code == 0, err
        trained_on, sampled = [], []
        for record in read_metrics(tmp_path / mode)[1:]:
            groups = groups_of_step(tmp_path / mode, record["step"])
            with_spread = sum(len(set(group)) > 1 for group in groups)
            sampled.append(len(groups))
            trained_on.append(record["rollout/groups_trained_on"])
            assert trained_on[-1] == min(8, with_spread)
            # A further draw is made while groups are missing, and not once there are enough.
            first_draws = sum(len(set(group)) > 1 for group in groups[:-8])
            assert mode == "drop" or first_draws < 8
        assert any(0 < count < 8 for count in trained_on) or mode == "resample"
        assert set(sampled) == {8} if mode == "drop" else max(sampled) > 8
