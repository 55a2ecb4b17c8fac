"""Whole runs on two ranks with FSDP2 and vLLM in the same processes, where vLLM is installed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.run_log import read_metrics
from trainer.testing import bigram_tokenizer, wide_bigram_model, write_sums

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
TIMES = ("seconds/", "tokens_per_second")
# Float32 on both sides: logits of up to about 10 with some thousand roundings of 6e-8 in each.
LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    wide_bigram_model(noise=0.02).save_pretrained(folder / "model")
    bigram_tokenizer().save_pretrained(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def start(inputs: Path, run_dir: Path, **changed: object) -> subprocess.Popen[str]:
    options: dict[str, object] = {
        "rollout": "vllm",
        "model": inputs / "model",
        "dataset": inputs / "sums.jsonl",
        "run_dir": run_dir,
        "backend": "reference",
        "grader": "exact",
        "steps": STEPS,
        "num_prompts": 8,
        "group_size": 4,
        "max_new_tokens": 16,
        "eval_problems": 8,
        "eval_samples": 2,
        "eval_every": 3,
        "save_every": 1,
        "keep_checkpoints": STEPS,
        "learning_rate": 5e-3,
        "warmup_updates": 0,
        "loss": "grpo",
        **changed,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launcher, "trainer/train.py", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def results(run_dir: Path) -> list[dict[str, float | None]]:
    """The metrics, without those that measure time."""
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMES)}
        for record in read_metrics(run_dir)
    ]


def rollouts(run_dir: Path, step: int) -> list[dict[str, object]]:
    path = run_dir / "rollouts" / f"step-{step:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(start(inputs, run_dir))
    return run_dir


def mean_logprob(weights: Path, prompt: str, completion: str) -> float:
    """Of the completion's tokens after the prompt, by transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    before, after = tokenizer.encode(prompt), tokenizer.encode(completion)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    positions = torch.arange(len(before) - 1, len(before) + len(after) - 1)
    return logprobs_TV[positions, after].mean().item()


def test_each_sync_gives_vllm_the_weights_that_the_update_left(
    inputs: Path, whole_run: Path
) -> None:
    moved = []
    for step in range(2, STEPS + 1):
        # Those that end with a stop word, which is part of the text, as an end token is not.
        sample = next(one for one in rollouts(whole_run, step) if "</answer>" in one["completion"])
        text = (sample["prompt"], sample["completion"])
        before = mean_logprob(whole_run / "checkpoints" / f"step-{step - 1:05d}" / "model", *text)
        assert abs(sample["mean_logprob"] - before) < LOGPROB_TOLERANCE
        moved.append(abs(sample["mean_logprob"] - mean_logprob(inputs / "model", *text)))
    # The weights of the start would not have passed.
    assert max(moved) > 100 * LOGPROB_TOLERANCE


def test_gap_between_sampler_and_trainer_is_rounding(whole_run: Path) -> None:
    for record in read_metrics(whole_run)[1:]:
        assert record["sampler/logprob_gap_mean"] < LOGPROB_TOLERANCE


def test_killed_run_goes_on_with_vllm_to_the_same_bits(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(inputs, run_dir)
    while process.poll() is None and not (run_dir / "rollouts" / "step-00003.jsonl").exists():
        time.sleep(0.01)
    for rank in subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split():
        os.kill(int(rank), signal.SIGKILL)
    process.communicate(timeout=60)
    finish(start(inputs, run_dir))
    assert results(run_dir) == results(whole_run)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
        for run in (run_dir, whole_run)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_engine_over_two_ranks_samples_what_two_engines_sample(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    finish(start(inputs, tmp_path / "run", steps=2, vllm_tensor_parallel=2))
    for step in (1, 2):
        ours, theirs = rollouts(tmp_path / "run", step), rollouts(whole_run, step)
        for name in ("prompt", "completion", "reward"):
            assert [one[name] for one in ours] == [one[name] for one in theirs]
