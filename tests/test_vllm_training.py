"""Whole runs on two ranks with FSDP2 and vLLM in the same processes, where vLLM is installed."""

import importlib.util
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import vllm_runs
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_runs import LOGPROB_TOLERANCE, finish, rollouts, wait_for_step, write_inputs

from trainer.run_log import read_metrics

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)

STEPS = 6
TIMES = ("seconds/", "tokens_per_second")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def start(inputs: Path, run_dir: Path, **changed: object) -> subprocess.Popen[str]:
    options = {"rollout": "vllm", "steps": STEPS, "keep_checkpoints": STEPS, **changed}
    return vllm_runs.start(inputs, run_dir, **options)


def results(run_dir: Path) -> list[dict[str, float | None]]:
    """The metrics, without those that measure time."""
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMES)}
        for record in read_metrics(run_dir)
    ]


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


@pytest.fixture(scope="module")
def bfloat16_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("bfloat16") / "run"
    finish(start(inputs, run_dir, ranks=1, dtype="bfloat16", steps=3))
    return run_dir


def completion_logprobs(
    folder: Path, run_dir: Path, step: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Of each completion of a step that a stop word ended, by transformers, from weights rounded to
    bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for one in rollouts(run_dir, step):
        if not one["completion"].endswith("</answer>"):
            continue
        before, after = tokenizer.encode(one["prompt"]), tokenizer.encode(one["completion"])
        with torch.no_grad():
            logits_TV = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        found.append(logits_TV.double().log_softmax(-1)[range(len(after)), after])
    return found


def largest_distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def test_in_bfloat16_each_sync_gives_vllm_the_logprobs_of_the_trainer(
    inputs: Path, bfloat16_run: Path
) -> None:
    for record in read_metrics(bfloat16_run)[1:]:
        step = record["step"]
        saved = bfloat16_run / "checkpoints" / f"step-{step - 1:05d}" / "model"
        folder = saved if step > 1 else inputs / "model"
        exact = completion_logprobs(folder, bfloat16_run, step, torch.float64)
        plain = completion_logprobs(folder, bfloat16_run, step, torch.bfloat16)
        # Both sides round as often as plain PyTorch, in another order: twice its error each.
        bound = 4 * largest_distance(plain, exact)
        assert 0 < record["sampler/logprob_gap_max"] < bound
    # The weights of the start would not have passed.
    start = completion_logprobs(inputs / "model", bfloat16_run, step, torch.float64)
    assert largest_distance(start, exact) > 4 * bound


def test_killed_run_goes_on_with_vllm_to_the_same_bits(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(inputs, run_dir)
    wait_for_step(run_dir, 3, process)
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
