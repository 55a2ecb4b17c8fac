"""Users' reward functions, and whole runs with all rewards at once."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import (
    RewardOptions,
    TrainConfig,
    UsageError,
)
from trainer.rewards import Scorer
from trainer.rewards.grading import Attempt
from trainer.rewards.scoring import Reward
from trainer.rollout import Completion
from trainer.run_log import read_metrics
from trainer.samples import Prompter, Scoring, reward_metrics
from trainer.tasks import Problem
from trainer.templates import template_by_name
from trainer.testing import bigram_tokenizer, write_bigram_model, write_sums
from trainer.train import main

R1 = template_by_name("r1")
GOOD = "<think> we add the two numbers 2 and 3 </think> <answer> 5 </answer>"
WRONG = GOOD.replace(" 5 ", " 6 ")
FIVE = Problem(problem_id="five", question="2 + 3", answer="5")


def score_texts(
    *texts: str, problems: Sequence[Problem] = (), truncated: Sequence[int] = (), **options: object
) -> list[Reward]:
    """Rewards of a group, of the problem FIVE where none are given; some are cut off."""
    attempts = [
        Attempt(
            problem=problems[place] if problems else FIVE,
            prompt="2 + 3",
            text=text,
            token_ids=np.arange(10),
            truncated=place in truncated,
        )
        for place, text in enumerate(texts)
    ]
    chosen = RewardOptions(**{"grader": "exact", **options})
    with Scorer(chosen, R1, max_new_tokens=100) as scorer:
        return scorer.score([attempts])[0]


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module of rewards in the current directory."""
    (tmp_path / "my_rewards.py").write_text(
        """
def by_level(prompts, completions, level, answer, completion_ids, **columns):
    assert len(prompts) == len(completions) == len(answer) == len(columns["question"])
    assert "problem_id" in columns
    assert set(columns) <= {"question", "problem_id", "is_general", "hint"}
    return [None if each is None else each + len(ids) / 100
            for each, ids in zip(level, completion_ids)]

class Holder:
    @staticmethod
    def nested(prompts, completions, **columns):
        return (float("nan") if "6" in text else 1 for text in completions)

def in_thread(prompts, completions, **columns):
    import threading
    return [threading.current_thread() is threading.main_thread() for _ in prompts]

def short(prompts, completions, **columns): return [1.0]
def texts(prompts, completions, **columns): return ["1.0" for _ in prompts]
def endless(prompts, completions, **columns): return [float("inf") for _ in prompts]
def nothing(prompts, completions, **columns): return None
def no_columns(prompts, completions): return [0.0 for _ in prompts]
def format(prompts, completions, **columns): return [0.0 for _ in prompts]
not_a_function = 3
"""
    )
    (tmp_path / "broken_rewards.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


def test_users_functions_get_the_columns_and_add_up(user_module: str) -> None:
    problems = [replace(FIVE, columns={"level": 3, "hint": "add"}), FIVE]
    rewards = score_texts(
        *(GOOD, WRONG, GOOD),
        problems=[problems[0], problems[0], problems[1]],
        reward=(f"{user_module}:by_level=0.5", f"{user_module}:Holder.nested"),
    )
    assert [reward.parts["by_level"] for reward in rewards] == [3.1, 3.1, None]
    assert [reward.parts["Holder.nested"] for reward in rewards] == [1.0, None, 1.0]
    assert [reward.total for reward in rewards] == pytest.approx([1.2 + 1.55 + 1, 0.2 + 1.55, 2.2])


def test_completion_left_out_of_every_weighted_part_has_no_reward(user_module: str) -> None:
    right, wrong = score_texts(
        *(GOOD, WRONG),
        reward=(f"{user_module}:Holder.nested",),
        accuracy_weight=0.0,
        format_weight=0.0,
    )
    assert (right.total, wrong.total) == (1.0, None)
    assert wrong.parts == {"accuracy": 0.0, "format": 1.0, "Holder.nested": None}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "expected a list of 2 numbers or None, got 1"),
        ("texts", "got '1.0' among them"),
        ("endless", "got inf among them"),
        ("nothing", "got NoneType"),
    ],
)
def test_wrong_values_of_a_users_function_are_refused(
    user_module: str, function: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        score_texts(GOOD, WRONG, reward=(f"{user_module}:{function}",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_rewards", "expected package.module:function"),
        ("my_rewards:short=much", "expected a finite weight after =, got 'much'"),
        ("my_rewards:short=inf", "expected a finite weight after =, got 'inf'"),
        ("no_such_module:f", "no_such_module cannot be imported"),
        ("broken_rewards:f", "broken_rewards cannot be imported .*a_module_that_is_not_there"),
        ("my_rewards:long", "my_rewards has no long"),
        ("my_rewards:not_a_function", "to be a function of prompts"),
        ("my_rewards:no_columns", "without \\*\\*columns"),
        ("my_rewards:format", "expected different names, got 'format' again"),
    ],
)
def test_unusable_users_function_is_refused(user_module: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        score_texts(reward=(text,))


def test_metrics_hold_each_part_apart(user_module: str) -> None:
    rewards = score_texts(
        *(GOOD, GOOD, WRONG, GOOD),
        truncated=[3],
        reward=(f"{user_module}:Holder.nested=2",),
    )
    metrics = reward_metrics(rewards)
    assert metrics["reward/accuracy"] == 0.5 and metrics["reward/accuracy/std"] == 0.5
    assert metrics["reward/format"] == 0.75
    assert metrics["reward/format/std"] == pytest.approx(math.sqrt(3) / 4)
    assert metrics["reward/Holder.nested/left_out"] == 0.25
    assert metrics["reward/Holder.nested"] == pytest.approx(2 / 3)
    assert metrics["reward/accuracy/left_out"] == 0.0
    assert metrics["reward/mean"] == pytest.approx((3.2 + 3.2 + 0.2 + 0.0) / 4)
    shares = {name: value for name, value in metrics.items() if name.startswith("grade/")}
    assert shares.pop("grade/accuracy/ok") == 0.75
    assert shares.pop("grade/accuracy/truncated") == 0.25
    assert set(shares.values()) == {0.0} and "grade/accuracy/timeout" in shares


def test_users_functions_run_in_the_main_thread(user_module: str) -> None:
    options = RewardOptions(grader="exact", reward=(f"{user_module}:in_thread",))
    ids = np.array(bigram_tokenizer().encode("<answer> 5 </answer>"))
    one = Completion(token_ids=ids, logprobs=np.zeros(3, dtype=np.float32), finish_reason="stop")
    with Scorer(options, R1, max_new_tokens=16) as scorer:
        prompter = Prompter(bigram_tokenizer(), R1, scorer, max_prompt_tokens=200, limit="none")
        scoring = Scoring(prompter, [FIVE])
        scoring.add(0, [one])
        ((scored,),) = scoring.finish([[one]])
    assert scored.reward.parts["in_thread"] == 1.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def run_flags(folder: Path, run_dir: Path, **changed: object) -> list[str]:
    options: dict[str, object] = {
        "model": folder / "model",
        "dataset": folder / "sums.jsonl",
        "run_dir": run_dir,
        "backend": "reference",
        "steps": 2,
        "num_prompts": 6,
        "group_size": 4,
        "rows_per_batch": 8,
        "max_new_tokens": 8,
        "eval_problems": 2,
        "eval_samples": 1,
        "eval_every": 0,
        "grader": "exact",
        "grader_workers": 1,
        "language_weight": 0.5,
        "overlong_weight": 1.0,
        "length_weight": 0.1,
        "repetition_weight": 0.2,
        "reward": "my_rewards:Holder.nested=0.3",
        **changed,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@pytest.mark.parametrize(("truncated", "grader"), [("zero", "exact"), ("mask", "strict")])
def test_run_explains_every_reward_and_repeats_itself(
    inputs: Path, tmp_path: Path, user_module: str, truncated: str, grader: str
) -> None:
    weights = {"accuracy": 1.0, "format": 0.2, "language": 0.5, "overlong": 1.0, "length": 0.1}
    weights |= {"repetition": 0.2, "Holder.nested": 0.3}
    records = []
    try:
        for name in ("once", "again"):
            run_dir = tmp_path / name
            assert main(run_flags(inputs, run_dir, truncated=truncated, grader=grader)) == 0
            files = sorted((run_dir / "rollouts").glob("*.jsonl"))
            records.append([line for file in files for line in file.read_text().splitlines()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert records[0] == records[1]
    samples = [json.loads(line) for line in records[0]]
    for sample in samples:
        parts = sample["parts"]
        assert parts.keys() == weights.keys()
        if sample["finish_reason"] == "length" and truncated == "mask":
            assert sample["reward"] is None and sample["status"] == "truncated"
        else:
            present = [weights[name] * value for name, value in parts.items() if value is not None]
            assert sample["reward"] == pytest.approx(sum(present))
            assert (parts["accuracy"] == 1.0) == sample["correct"]
    assert {sample["status"] for sample in samples} >= {"ok", "truncated"}
    last = read_metrics(tmp_path / "once")[-1]
    for name in weights:
        assert {f"reward/{name}", f"reward/{name}/std", f"reward/{name}/left_out"} <= last.keys()
    assert (last["reward/Holder.nested/left_out"] or 0) >= 0


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"reward": "my_rewards:long"}, "--reward: my_rewards has no long"),
        ({"reward": "my_rewards:short"}, "--reward short: expected a list of"),
        ({"target_language": "xx"}, "--target-language: expected one of"),
        ({"overlong_buffer": 9}, "--overlong-buffer: expected at most --max-new-tokens = 8, got 9"),
        ({"length_weight": "nan"}, "--length-weight: expected a finite number, got nan"),
        ({"grader_timeout": 0}, "--grader-timeout: expected a number > 0, got 0"),
        ({"grader": "kind"}, "--grader"),
        ({"truncated": "drop"}, "--truncated"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistake_about_rewards_is_one_sentence(
    inputs: Path,
    tmp_path: Path,
    user_module: str,
    changed: dict[str, object],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    try:
        assert main(run_flags(inputs, tmp_path / "run", **changed)) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("error: ")


def test_options_come_back_from_a_runs_config() -> None:
    options = RewardOptions(reward=("a.b:c=2", "d:e"), truncated="mask", overlong_buffer=3)
    config = TrainConfig(preset="test", reward=options)
    assert TrainConfig.from_json(config.to_json()) == config
