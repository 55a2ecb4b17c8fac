"""The record of a run: metrics, every completion, TensorBoard files, and the live terminal.

A run directory holds `metrics.jsonl` (one object a step), `rollouts/step-00001.jsonl` (the
completions trained on), `rollouts/eval-00020.jsonl` (those of the held-out problems) and
`tensorboard/`. Files of completions appear whole or not at all; a metrics line that a killed run
left half written is dropped on resume.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TextIO

from trainer.durable import flush_to_disk, write_atomically
from trainer.rewards import Reward
from trainer.rewards.grading import GENERAL
from trainer.tasks import Problem
from trainer.terminal import Terminal, eval_text, progress_text, sample_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FOLDER = "rollouts"
TENSORBOARD_FOLDER = "tensorboard"

_ROLLOUT_NAME = re.compile(r"(?:step|eval)-(\d+)\.jsonl")
_RATE_WINDOW_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion as it is kept in a rollouts file."""

    problem_id: str
    question: str
    answer: str
    """The gold."""
    prompt: str
    """The text the completion was sampled after."""
    completion: str
    extracted: str | None
    """The answer that was graded."""
    status: str
    """How the grade came about: one of `trainer.rewards.grading.STATUSES`."""
    reward: float | None
    """The total, which the advantages are computed from; None: left out of the loss."""
    parts: dict[str, float | None]
    """What the total is the weighted sum of, by name; None: left out of this part."""
    correct: bool
    length: int
    """Tokens of the completion."""
    finish_reason: str
    """"stop" or "length"."""
    mean_logprob: float | None
    """Mean log-probability of the sampled tokens, in nats."""
    weights_step: int | None = None
    """Step that left the weights it was sampled by; None where nothing is trained."""

    @classmethod
    def of(
        cls,
        problem: Problem,
        reward: Reward,
        *,
        prompt: str,
        completion: str,
        length: int,
        finish_reason: str,
        mean_logprob: float | None = None,
        weights_step: int | None = None,
    ) -> Sample:
        """The record of a completion of `problem` that earned `reward`."""
        return cls(
            problem_id=problem.problem_id,
            question=problem.question,
            answer=problem.answer_text,
            prompt=prompt,
            completion=completion,
            extracted=reward.extracted,
            status=reward.status,
            reward=reward.total,
            parts=reward.parts,
            correct=reward.correct,
            length=length,
            finish_reason=finish_reason,
            mean_logprob=mean_logprob,
            weights_step=weights_step,
        )


class RunLog:
    """Writes a run directory and the terminal. On every rank but 0 all methods do nothing."""

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        rank: int = 0,
        resume_step: int | None = None,
        sample_every: int = 10,
        line_every: int = 5,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the log; what an earlier run wrote after `resume_step` is dropped first.

        Args:
            run_dir: made when it is not there. total_steps: for progress and the estimate of the
            time left. rank: of this process. resume_step: the step of the checkpoint the run goes
            on from; None: a new run, nothing is kept. sample_every: steps between framed samples;
            0: none. Evaluations show one always. line_every: steps between progress lines where
            the stream is not a terminal. stream: where the terminal output goes; None: standard
            output. clock: seconds, for the rate.

        Raises:
            ValueError: the metrics that are to be kept are damaged, with the line.
        """
        self._is_writer = rank == 0
        self.kept: list[dict[str, Any]] = []
        """What an earlier start logged up to `resume_step`, as `read_metrics` gives it; empty on
        other ranks."""
        if not self._is_writer:
            return
        self._run_dir = run_dir
        self._total_steps = total_steps
        self._sample_every = sample_every
        self._line_every = line_every
        self._clock = clock
        self._terminal = Terminal(sys.stdout if stream is None else stream)
        self._latest: dict[str, float | int | None] = {}
        self._first_eval: dict[str, float | int | None] | None = None
        self._step = -1 if resume_step is None else resume_step
        (run_dir / ROLLOUTS_FOLDER).mkdir(parents=True, exist_ok=True)
        self._drop_after(self._step)
        self._metrics_file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard = self._open_tensorboard(purge_step=self._step + 1)
        self._step_ends = deque([clock()], maxlen=_RATE_WINDOW_STEPS + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log_step(
        self,
        step: int,
        metrics: Mapping[str, SupportsFloat | None],
        *,
        samples: Sequence[Sample] = (),
        eval_samples: Sequence[Sample] = (),
    ) -> None:
        """Records a step once it is complete; step 0 is the evaluation before training.

        Args:
            step: larger than every step before. metrics: by name; numbers or scalar tensors; None
            and non-finite values become null. samples: the completions trained on. eval_samples:
            the completions of held-out problems, when the step ended with an evaluation.

        Raises:
            ValueError: the step is not larger than the last one.
        """
        if not self._is_writer:
            return
        if step <= self._step:
            raise ValueError(f"step: expected more than {self._step}, got {step}")
        self._step = step
        values = {name: _finite(value) for name, value in metrics.items()}
        # The metrics line is the mark that a step is complete, so it comes after the completions.
        self._write_rollouts("step", step, samples)
        self._write_rollouts("eval", step, eval_samples)
        self._metrics_file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._metrics_file.flush()
        for name, value in values.items():
            if value is not None:
                self._tensorboard.add_scalar(name, value, step)
        if step == 0:
            self._step_ends = deque([self._clock()], maxlen=_RATE_WINDOW_STEPS + 1)
        else:
            self._step_ends.append(self._clock())
        self._latest.update(values)
        self._show_step(step, values, samples, eval_samples)

    def sync(self) -> int:
        """Waits until all that was logged would survive a loss of power.

        Returns: bytes of `metrics.jsonl`; 0 on every rank but 0.
        """
        if not self._is_writer:
            return 0
        for path in (self._run_dir / METRICS_FILE, self._run_dir / ROLLOUTS_FOLDER, self._run_dir):
            flush_to_disk(path)
        return (self._run_dir / METRICS_FILE).stat().st_size

    def phase(self, name: str) -> None:
        """Shows on the live line what the run is doing; nothing where there is no live line."""
        if self._is_writer and self._terminal.is_live:
            self._terminal.show_line(self._progress(max(self._step, 0), phase=name))

    def message(self, text: str) -> None:
        """A permanent line on the terminal."""
        if self._is_writer:
            self._terminal.print(text)

    def close(self) -> None:
        """Closes the files and ends the live line; closing twice is harmless."""
        if self._is_writer:
            self._terminal.close()
            self._metrics_file.close()
            self._tensorboard.close()

    def _drop_after(self, step: int) -> None:
        metrics_path = self._run_dir / METRICS_FILE
        if metrics_path.exists():
            records = [record for record in read_metrics(self._run_dir) if record["step"] <= step]
            write_atomically(metrics_path, "".join(json.dumps(record) + "\n" for record in records))
            self.kept = records
            for record in records:
                self._latest.update(record)
                if self._first_eval is None and "eval/pass@1" in record:
                    self._first_eval = record
        for path in (self._run_dir / ROLLOUTS_FOLDER).iterdir():
            match = _ROLLOUT_NAME.fullmatch(path.name)
            if match is not None and int(match.group(1)) > step:
                path.unlink()

    def _open_tensorboard(self, purge_step: int) -> SummaryWriter:
        # Imported here because it takes seconds, on rank 0 only.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=str(self._run_dir / TENSORBOARD_FOLDER), purge_step=purge_step)

    def _write_rollouts(self, kind: str, step: int, samples: Iterable[Sample]) -> None:
        lines = [json.dumps(_jsonable(sample), allow_nan=False) + "\n" for sample in samples]
        if lines:
            path = self._run_dir / ROLLOUTS_FOLDER / f"{kind}-{step:05d}.jsonl"
            write_atomically(path, "".join(lines))

    def _show_step(
        self,
        step: int,
        values: dict[str, float | int | None],
        samples: Sequence[Sample],
        eval_samples: Sequence[Sample],
    ) -> None:
        is_evaluated = values.get("eval/pass@1") is not None
        is_sample_due = bool(self._sample_every) and step % self._sample_every == 0
        if eval_samples:
            # The same held-out problem every time, so that its completions can be compared.
            self._show_sample(step, "held-out", eval_samples[0])
        elif samples and is_sample_due:
            self._show_sample(step, "training", samples[step % len(samples)])
        if is_evaluated:
            first = values if self._first_eval is None else self._first_eval
            self._first_eval = first
            self._terminal.print(eval_text(self._terminal, step, values, first))
        is_due = step % self._line_every == 0 or step in (1, self._total_steps)
        if self._terminal.is_live or (is_due and step > 0):
            self._terminal.show_line(self._progress(step))

    def _show_sample(self, step: int, kind: str, sample: Sample) -> None:
        right = "general" if sample.status == GENERAL else ("wrong", "right")[sample.correct]
        gold = f", gold {sample.answer[:60]}" if sample.answer else ""
        given = "no answer" if sample.extracted is None else f"answer {sample.extracted[:60]}"
        earned = "no reward" if sample.reward is None else f"reward {sample.reward:.2f}"
        cut_off = ", cut off" if sample.finish_reason == "length" else ""
        self._terminal.print(
            sample_text(
                self._terminal,
                title=f"step {step}, {kind} problem {sample.problem_id[:40]}",
                question=sample.question,
                completion=sample.completion,
                correct=sample.correct,
                verdict=f"{right}: {given}{gold}, {earned}, {sample.length} tokens{cut_off}",
            )
        )

    def _progress(self, step: int, phase: str = "") -> str:
        elapsed = self._step_ends[-1] - self._step_ends[0]
        steps = len(self._step_ends) - 1
        return progress_text(
            self._terminal,
            step=step,
            total_steps=self._total_steps,
            metrics=self._latest,
            seconds_per_step=elapsed / steps if steps else None,
            phase=phase,
        )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order; a last line without its line break is left out.

    Returns:
        Per line `step` (an integer) and the metrics by name, None where a value was not finite.

    Raises:
        ValueError: a complete line is not an object with a step; the message names it.
    """
    path = run_dir / METRICS_FILE
    records = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f"{path}, line {number}: expected an object with a step")
            records.append(record)
    return records


def _jsonable(sample: Sample) -> dict[str, object]:
    fields = asdict(sample)
    return {
        name: _finite(value) if isinstance(value, float) else value
        for name, value in fields.items()
    }


def _finite(value: SupportsFloat | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
