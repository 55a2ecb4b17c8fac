"""The record of a run: what is written, what a resume keeps and drops, what a person sees."""

import io
import json
import math
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import terminal
from trainer.durable import write_atomically
from trainer.rewards import Reward
from trainer.run_log import RunLog, Sample, read_metrics
from trainer.tasks import Problem


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)


def make_sample(completion: str = "5", *, reward: float = 1.0, correct: bool = True) -> Sample:
    return Sample.of(
        Problem(problem_id="sum/1", question="2 + 3 ?", answer="5"),
        Reward(
            total=reward,
            parts={"accuracy": 1.0, "format": 0.0},
            extracted="5",
            correct=correct,
            status="ok",
        ),
        prompt="User: 2 + 3 ? Assistant:",
        completion=completion,
        length=1,
        finish_reason="stop",
        mean_logprob=-0.5,
    )


def files_of(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "rollouts").iterdir()}


def run_steps(run_dir: Path, steps: range, *, resume_step: int | None = None) -> None:
    stream = io.StringIO()
    with RunLog(run_dir, total_steps=9, resume_step=resume_step, stream=stream) as log:
        for step in steps:
            evaluated = [make_sample()] if step % 2 == 0 else []
            metrics = {"reward/mean": step / 10}
            log.log_step(step, metrics, samples=[make_sample()], eval_samples=evaluated)


def test_step_is_on_disk_before_the_next_one(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=2, stream=io.StringIO()) as log:
        log.log_step(1, {"reward/mean": 0.25, "kl": torch.tensor(0.5)}, samples=[make_sample()])
        assert read_metrics(tmp_path) == [{"step": 1, "reward/mean": 0.25, "kl": 0.5}]
        (line,) = (tmp_path / "rollouts" / "step-00001.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "problem_id": "sum/1",
        "question": "2 + 3 ?",
        "answer": "5",
        "prompt": "User: 2 + 3 ? Assistant:",
        "completion": "5",
        "extracted": "5",
        "status": "ok",
        "reward": 1.0,
        "parts": {"accuracy": 1.0, "format": 0.0},
        "correct": True,
        "length": 1,
        "finish_reason": "stop",
        "mean_logprob": -0.5,
        "weights_step": None,
    }


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    metrics = {
        "loss": math.nan,
        "kl": -math.inf,
        "length/wrong": None,
        "entropy": torch.tensor(1.0),
    }
    with RunLog(tmp_path, total_steps=1, stream=io.StringIO()) as log:
        log.log_step(1, metrics, samples=[make_sample(reward=math.nan)])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    expected = {"step": 1, "loss": None, "kl": None, "length/wrong": None, "entropy": 1.0}
    assert json.loads(text) == expected
    rollouts = (tmp_path / "rollouts" / "step-00001.jsonl").read_text()
    assert json.loads(rollouts)["reward"] is None


def test_any_text_of_a_model_can_be_logged(tmp_path: Path) -> None:
    completion = "\x00\x1b[2J\ud83d \u202e </script> \u2028 é\n"
    with RunLog(tmp_path, total_steps=1, stream=FakeTerminal(), sample_every=1) as log:
        log.log_step(1, {}, samples=[make_sample(completion)])
    (line,) = (tmp_path / "rollouts" / "step-00001.jsonl").read_text().splitlines()
    assert json.loads(line)["completion"] == completion


def test_resume_drops_what_came_after_its_step(tmp_path: Path) -> None:
    run_steps(tmp_path, range(0, 6))
    run_steps(tmp_path, range(0), resume_step=3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]
    steps = {f"step-0000{n}.jsonl" for n in range(4)}
    assert files_of(tmp_path) == steps | {f"eval-0000{n}.jsonl" for n in (0, 2)}


def test_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_steps(whole, range(0, 6))
    run_steps(broken, range(0, 5))
    run_steps(broken, range(3, 6), resume_step=2)
    assert files_of(whole) == files_of(broken)
    for path in [whole / "metrics.jsonl", *(whole / "rollouts").iterdir()]:
        assert path.read_bytes() == (broken / path.relative_to(whole)).read_bytes()


def test_new_run_in_a_used_directory_starts_empty(tmp_path: Path) -> None:
    run_steps(tmp_path, range(0, 4))
    run_steps(tmp_path, range(0, 1))
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]
    assert files_of(tmp_path) == {"step-00000.jsonl", "eval-00000.jsonl"}


def test_half_written_last_line_is_dropped_on_resume(tmp_path: Path) -> None:
    run_steps(tmp_path, range(0, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    run_steps(tmp_path, range(3, 4), resume_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}'])
def test_damaged_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    run_steps(tmp_path, range(0, 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 3: "):
        RunLog(tmp_path, total_steps=9, resume_step=1, stream=io.StringIO())


def test_step_that_does_not_advance_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=9, resume_step=4, stream=io.StringIO()) as log:
        with pytest.raises(ValueError, match="step: expected more than 4, got 4"):
            log.log_step(4, {})


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", total_steps=9, rank=1) as log:
        log.log_step(1, {"reward/mean": 1.0}, samples=[make_sample()])
        log.phase("rollout")
        log.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_reader_never_sees_a_part_of_an_atomic_write(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", {letter * 200_000 for letter in "ab"}
    write_atomically(path, "a" * 200_000)
    seen: set[str] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        for content in sorted(contents):
            write_atomically(path, content)
    stop.set()
    reader.join()
    assert seen <= contents
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_tensorboard_holds_every_finite_value(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=2, stream=io.StringIO()) as log:
        log.log_step(1, {"reward/mean": 0.5, "kl": math.nan})
        log.log_step(2, {"reward/mean": 0.75, "kl": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [(2, 0.25)]


def test_tensorboard_forgets_steps_that_were_done_again(tmp_path: Path) -> None:
    run_steps(tmp_path, range(0, 6))
    run_steps(tmp_path, range(3, 5), resume_step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("reward/mean")] == [0, 1, 2, 3, 4]


METRICS = {
    "reward/mean": 0.91,
    "reward/accuracy": 0.78,
    "length/mean": 28.4,
    "reflection_rate": 0.12,
    "tokens_per_second": 5100.0,
}


def log_lines(tmp_path: Path, stream: io.StringIO, steps: int, **options: int) -> list[str]:
    seconds = iter(range(0, 10_000, 2))
    with RunLog(
        tmp_path, total_steps=20, stream=stream, clock=lambda: next(seconds), **options
    ) as log:
        for step in range(1, steps + 1):
            log.log_step(step, METRICS)
    return stream.getvalue().splitlines()


def test_progress_without_a_terminal_is_a_plain_line_every_few_steps(tmp_path: Path) -> None:
    lines = log_lines(tmp_path, io.StringIO(), 12, line_every=5)
    assert [line[:10] for line in lines] == ["step  1/20", "step  5/20", "step 10/20"]
    assert lines[1] == (
        "step  5/20  ETA 0:30  acc 78%  reward 0.91  len 28  reflect 12%  2.00 s/step  5.1k tok/s"
    )


@pytest.mark.parametrize("columns", [30, 60, 100])
def test_progress_on_a_terminal_stays_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = FakeTerminal()
    log_lines(tmp_path, stream, 12)
    states = stream.getvalue().split("\r\x1b[2K")[1:]
    assert len(states) == 12
    assert all(len(state.rstrip("\n")) < columns for state in states)
    assert stream.getvalue().count("\n") == 1
    assert states[-1].endswith("\n")


def test_message_does_not_tear_the_progress_line(tmp_path: Path) -> None:
    stream = FakeTerminal()
    with RunLog(tmp_path, total_steps=2, stream=stream) as log:
        log.log_step(1, METRICS)
        progress = stream.getvalue()
        log.message("saved")
        assert stream.getvalue() == progress + "\r\x1b[2Ksaved\n" + progress


def test_phase_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    live, plain = FakeTerminal(), io.StringIO()
    for name, stream in (("live", live), ("plain", plain)):
        with RunLog(tmp_path / name, total_steps=2, stream=stream) as log:
            log.phase("rollout")
    assert "rollout" in live.getvalue()
    assert plain.getvalue() == ""


def test_sample_is_shown_every_few_steps(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=9, stream=stream, sample_every=4, line_every=100) as log:
        for step in range(1, 10):
            log.log_step(step, {}, samples=[make_sample(f"thought {step}")])
    shown = stream.getvalue()
    assert [n for n in range(1, 10) if f"thought {n}" in shown] == [4, 8]
    assert "right: answer 5, gold 5, reward 1.00, 1 tokens" in shown


def test_evaluation_line_tells_the_change_since_the_first(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=9, stream=stream) as log:
        log.log_step(0, {"eval/pass@1": 0.25, "eval/cons@k": 0.5})
    with RunLog(tmp_path, total_steps=9, stream=stream, resume_step=0) as log:
        log.log_step(3, {"eval/pass@1": 0.75, "eval/cons@k": 0.5, "eval/length/mean": 31.2})
    assert "step 0: held-out pass@1 25.0 % · cons@k 50.0 %" in stream.getvalue()
    expected = "step 3: held-out pass@1 75.0 % (+50.0) · cons@k 50.0 % (+0.0) · 31 tokens"
    assert expected in stream.getvalue()


def test_completion_cannot_move_the_cursor(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=9, stream=stream, sample_every=1) as log:
        log.log_step(1, {}, samples=[make_sample("a\x1b[2Jb\rc\x07\u202ed")])
    assert not set("\x1b\r\x07\u202e") & set(stream.getvalue())


def test_long_completion_is_cut_in_the_middle(tmp_path: Path) -> None:
    stream = io.StringIO()
    text = "\n".join(f"line-{n}." for n in range(500))
    with RunLog(tmp_path, total_steps=9, stream=stream, sample_every=1) as log:
        log.log_step(1, {}, samples=[make_sample(text)])
    shown = stream.getvalue()
    assert "line-0." in shown and "line-499." in shown and "line-250." not in shown
    assert len(shown.splitlines()) < 25


def test_narrow_encoding_gets_ascii_frames(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    with RunLog(tmp_path, total_steps=9, stream=stream, sample_every=1) as log:
        log.log_step(1, METRICS, samples=[make_sample("größer")])
    assert b"gr??er" in raw.getvalue()
    assert b"+- step 1" in raw.getvalue()


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.Terminal(FakeTerminal()).colour("x", "\x1b[32m") == "\x1b[32mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.Terminal(FakeTerminal()).colour("x", "\x1b[32m") == "x"


def test_lines_of_an_earlier_start_are_at_hand_up_to_the_checkpoint(tmp_path: Path) -> None:
    run_steps(tmp_path, range(6))
    with RunLog(tmp_path, total_steps=9, resume_step=3, stream=io.StringIO()) as log:
        assert [record["step"] for record in log.kept] == [0, 1, 2, 3]
        assert log.kept[3]["reward/mean"] == 0.3
    with RunLog(tmp_path, total_steps=9, resume_step=3, rank=1) as other:
        assert other.kept == []
