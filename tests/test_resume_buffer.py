"""Scored completions kept for a resumed run: the same back, or nothing and a warning."""

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.fsdp import World
from trainer.rewards import Reward
from trainer.rollout import Completion
from trainer.rollout_buffer import RolloutBuffer
from trainer.samples import ScoredCompletion
from trainer.tasks import Problem

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
PROBLEMS = [Problem(problem_id=f"sum{i}", question=f"{i} + 1", answer=str(i + 1)) for i in range(3)]


def scored(problem: Problem, sample: int) -> ScoredCompletion:
    draw = np.random.default_rng([len(problem.problem_id), sample])
    length = 5 + sample
    return ScoredCompletion(
        problem=problem,
        prompt_ids=[1, 2, 3],
        completion=Completion(
            token_ids=draw.integers(0, 1 << 40, length),
            logprobs=draw.normal(size=length).astype(np.float32),
            finish_reason="stop",
            weights_step=6,
        ),
        text='half a pair \ud83d, a "quote"\nand a line',
        reward=Reward(
            total=[None, 0.1 + 0.2][sample % 2],
            parts={"accuracy": 1 / 3, "format": None},
            extracted=None,
            correct=bool(sample % 2),
            status="ok",
        ),
    )


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def buffer(tmp_path: Path, warnings: list[str]) -> RolloutBuffer:
    made = RolloutBuffer(tmp_path, ALONE, warn=warnings.append)
    for step in (7, 8):
        made.write(step, f"weights{step}", [[scored(p, g) for g in range(2)] for p in PROBLEMS])
    return made


def files(buffer: RolloutBuffer) -> list[str]:
    return sorted(path.name for path in buffer.folder.iterdir())


def test_buffer_gives_the_same_completions_back(buffer: RolloutBuffer, warnings: list[str]) -> None:
    read = buffer.read(7, "weights7", lambda count: PROBLEMS[:count])
    assert read is not None and not warnings
    for problem, group in zip(PROBLEMS, read, strict=True):
        for sample, ours in enumerate(group):
            theirs = scored(problem, sample)
            assert ours.problem is problem and ours.text == theirs.text
            assert ours.reward == theirs.reward and ours.prompt_ids == theirs.prompt_ids
            for one, other in zip(
                astuple(ours.completion), astuple(theirs.completion), strict=True
            ):
                assert np.array_equal(one, other)
                assert getattr(one, "dtype", None) == getattr(other, "dtype", None)


def test_every_damage_to_a_buffer_is_found(buffer: RolloutBuffer, warnings: list[str]) -> None:
    path = buffer.folder / "step-00007.jsonl"
    content = path.read_bytes()
    # Every byte of the line that says what the rest is, and some of the rest.
    header = content.index(b"\n") + 1
    for place in (*range(header), *range(header, len(content), 97)):
        for damaged in (
            content[:place],
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        ):
            path.write_bytes(damaged)
            warnings.clear()
            assert buffer.read(7, "weights7", lambda count: PROBLEMS[:count]) is None, place
            assert warnings and "step-00007" in warnings[0] and not path.exists()


def test_buffer_of_other_weights_is_dropped_with_all_after_it(
    buffer: RolloutBuffer, warnings: list[str]
) -> None:
    assert buffer.read(7, "others", lambda count: PROBLEMS[:count]) is None
    assert len(warnings) == 2 and "other weights" in warnings[0] and files(buffer) == []


def test_buffer_of_other_problems_is_dropped(buffer: RolloutBuffer, warnings: list[str]) -> None:
    assert buffer.read(7, "weights7", lambda count: PROBLEMS[::-1]) is None
    assert len(warnings) == 1 and "other problems" in warnings[0]
    assert files(buffer) == ["step-00008.jsonl"]


def test_buffer_is_empty_where_nothing_was_kept_or_needed(buffer: RolloutBuffer) -> None:
    assert buffer.read(9, "weights9", lambda count: PROBLEMS[:count]) is None
    buffer.drop_up_to(7)
    assert files(buffer) == ["step-00008.jsonl"]
