"""Whole runs that sample with vLLM, as processes: their model and data, their start, what they
leave."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.testing import bigram_tokenizer, wide_bigram_model, write_sums

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Float32 on both sides: logits of up to about 10 with some thousand roundings of 6e-8 in each.
LOGPROB_TOLERANCE = 1e-4


def write_inputs(folder: Path) -> Path:
    """Saves a model of a width that vLLM has kernels for, its tokenizer, and problems."""
    wide_bigram_model(noise=0.02).save_pretrained(folder / "model")
    bigram_tokenizer().save_pretrained(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def start(inputs: Path, run_dir: Path, *, ranks: int = 2, **changed: Any) -> subprocess.Popen[str]:
    """A run on what `write_inputs` saved, with further or other flags."""
    options: dict[str, object] = {
        "model": inputs / "model",
        "dataset": inputs / "sums.jsonl",
        "run_dir": run_dir,
        "backend": "reference",
        "grader": "exact",
        "num_prompts": 8,
        "group_size": 4,
        "max_new_tokens": 16,
        "eval_problems": 8,
        "eval_samples": 2,
        "eval_every": 3,
        "save_every": 1,
        "learning_rate": 5e-3,
        "warmup_updates": 0,
        "loss": "grpo",
        **changed,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*launcher, "trainer/train.py", *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a run to end well; what it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def rollouts(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """What was trained on in a step, in order."""
    path = run_dir / "rollouts" / f"step-{step:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns once a run has made a step, or has ended."""
    while process.poll() is None and not (run_dir / "rollouts" / f"step-{step:05d}.jsonl").exists():
        time.sleep(0.01)
