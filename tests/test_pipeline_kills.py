"""The R1 pipeline as processes: killed and started again, and on two ranks under torchrun."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import command_line, stages_here
from pytest import MonkeyPatch

from trainer import pipeline, sample
from trainer.stage_record import StageRecord, checksum
from trainer.stages import Stage
from trainer.testing import write_bigram_model, write_sums
from trainer.train import main

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
FLAGS = (
    f"rl: --steps {STEPS} --num-prompts 4 --group-size 4 --max-new-tokens 12 --eval-samples 1",
    "rl: --save-every 2 --eval-every 0 --backend cpp --learning-rate 1e-2",
    "samples: --max-new-tokens 12 --count 40 --samples 8 --problems-per-part 4",
    "sft: --batch-size 4 --max-tokens 64 --epochs 8 --save-every 10",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def flags(inputs: Path, run_dir: Path, *more: str) -> list[str]:
    return command_line(inputs, run_dir, {}, more, FLAGS)


@pytest.fixture(autouse=True)
def in_process() -> Iterator[None]:
    """Commands of stages run in this process, where it runs the pipeline."""
    with stages_here():
        yield


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a pipeline that was left alone, up to Dev1."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with stages_here():
        assert main(flags(inputs, run_dir, "--until=cold-start-sft")) == 0
    return run_dir


def launch(arguments: Sequence[str], ranks: int, output: Path) -> subprocess.Popen[bytes]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with output.open("wb") as text:
        return subprocess.Popen(
            [*launcher, "trainer/train.py", *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=text,
            stderr=subprocess.STDOUT,
        )


def outputs(run_dir: Path, name: str) -> Any:
    record = StageRecord.read(run_dir / "stages" / name / "done.json")
    assert record is not None
    return record.outputs


@pytest.mark.parametrize(
    ("folder", "begun", "given"),
    [
        ("02-r1-zero", "checkpoints/step-*", ()),
        ("04-cold-start-samples", ".samples.jsonl.parts/part-00000.jsonl", ("r1-zero/model",)),
        ("06-cold-start-sft", "checkpoints/step-*", ("cold-start-filter/rows.jsonl",)),
    ],
)
def test_job_killed_in_a_stage_goes_on_to_the_same_bits(
    inputs: Path, whole: Path, tmp_path: Path, folder: str, begun: str, given: tuple[str, ...]
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    more = [f"--only={folder[3:]}"]
    for path in given:
        name, file = path.split("/")
        (made,) = (whole / "stages").glob(f"??-{name}")
        more.append(f"--given={name}={made / file}")
    job = launch(flags(inputs, run_dir, *more), 1, output)
    stage, deadline = run_dir / "stages" / folder, time.monotonic() + 900
    while not list(stage.glob(begun)):
        assert job.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.002)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    _wait_until_alone(stage, deadline)
    wanted = outputs(whole, folder)
    assert not (stage / next(iter(wanted))).exists(), "the stage ended before it was killed"
    assert main(flags(inputs, run_dir, *more)) == 0
    assert outputs(run_dir, folder) == wanted


def _wait_until_alone(stage: Path, deadline: float) -> None:
    """Until the killed job's child, which does not outlive it, has let go of its folder."""
    if not (stage / ".lock").exists():
        return
    with (stage / ".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_pipeline_killed_at_the_end_of_every_stage_leaves_the_same_files(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    finish, killed = pipeline.finish_stage, []

    class Killed(BaseException):
        pass

    def die_once(stage: Stage, *arguments: Any, **keywords: Any) -> None:
        if stage.name not in killed:
            killed.append(stage.name)
            raise Killed
        finish(stage, *arguments, **keywords)

    monkeypatch.setattr(pipeline, "finish_stage", die_once)
    for _ in range(6):
        with pytest.raises(Killed):
            main(flags(inputs, tmp_path, "--until=cold-start-sft"))
    assert main(flags(inputs, tmp_path, "--until=cold-start-sft")) == 0
    folders = sorted(folder.name for folder in (whole / "stages").iterdir())
    assert [name.split("-", 1)[1] for name in folders] == killed
    for name in folders:
        assert outputs(tmp_path, name) == outputs(whole, name)


def test_samples_killed_between_two_parts_are_completed_to_the_same_bytes(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    folder = whole / "stages" / "04-cold-start-samples"
    record = StageRecord.read(folder / "done.json")
    assert record is not None
    arguments = record.recipe.replace("stages/02", str(whole / "stages/02")).split()[1:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "samples.jsonl")
    score, parts = sample.sample_and_score, []

    def counted(*values: Any, **keywords: Any) -> Any:
        parts.append(1)
        if len(parts) == 3:
            raise SystemExit(9)
        return score(*values, **keywords)

    monkeypatch.setattr(sample, "sample_and_score", counted)
    with pytest.raises(SystemExit):
        sample.main(arguments)
    assert not (tmp_path / "samples.jsonl").exists()
    assert sample.main(arguments) == 0
    # Of ten parts two were kept, and the third was begun twice.
    assert len(parts) == 11
    assert checksum(tmp_path / "samples.jsonl") == record.outputs["samples.jsonl"]
    assert sample.main([*arguments, "--top-p", "0.5"]) == 2


def test_two_ranks_go_through_stages_one_after_the_other(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    job = launch(flags(inputs, run_dir, "--until=r1-zero"), 2, output)
    assert job.wait(timeout=900) == 0, output.read_text()
    assert outputs(run_dir, "01-evaluate-base") == outputs(whole, "01-evaluate-base")
    lines = (run_dir / "stages" / "02-r1-zero" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS + 1))
    assert outputs(run_dir, "02-r1-zero")
