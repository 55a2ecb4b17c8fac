"""The reward loop: parts and their sum, who grades what, users' functions, grading in between."""

import json
import math
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import (
    LossOptions,
    OptimizerOptions,
    RewardOptions,
    TrainConfig,
    UsageError,
)
from trainer.fsdp import World
from trainer.policy_update import Policy, PolicyUpdate, UpdateSample, make_optimizer
from trainer.presets import PRESETS
from trainer.rewards import CodeGrader, FunctionTest, SandboxUnavailable, Scorer
from trainer.rewards.grading import STATUSES, Attempt
from trainer.rewards.scoring import Reward
from trainer.rollout import Completion
from trainer.run_log import read_metrics
from trainer.samples import Prompter, ScoredCompletion, Scoring, reward_metrics, rollout
from trainer.tasks import Problem
from trainer.templates import Template, template_by_name
from trainer.testing import bigram_model, bigram_tokenizer, write_bigram_model, write_sums
from trainer.train import main, with_advantages

R1, NONE, TINY = map(template_by_name, ("r1", "none", "tiny"))
GOOD = "<think> we add the two numbers 2 and 3 </think> <answer> 5 </answer>"
WRONG = GOOD.replace(" 5 ", " 6 ")
FIVE = Problem(problem_id="five", question="2 + 3", answer="5")
DOUBLE = Problem(
    problem_id="double",
    question="Double a number.",
    answer="",
    tests=tuple(FunctionTest(entry_point="f", arguments=(n,), expected=2 * n) for n in (1, 7)),
)


def attempt(
    text: str, problem: Problem = FIVE, *, length: int = 10, truncated: bool = False
) -> Attempt:
    return Attempt(
        problem=problem,
        prompt=problem.question,
        text=text,
        token_ids=np.arange(length),
        truncated=truncated,
    )


def score_group(
    attempts: Sequence[Attempt], template: Template = R1, **options: object
) -> list[Reward]:
    chosen = RewardOptions(**{"grader": "exact", **options})
    runs_code = any(one.problem.tests for one in attempts)
    with Scorer(chosen, template, max_new_tokens=100, runs_code=runs_code) as scorer:
        return scorer.score([attempts])[0]


def test_total_is_the_sum_of_the_weighted_parts() -> None:
    repeated = replace(attempt(WRONG), token_ids=np.zeros(100, dtype=np.int64))
    right, wrong = score_group(
        [attempt(GOOD), repeated],
        accuracy_weight=2.0,
        format_weight=0.25,
        language_weight=0.5,
        overlong_weight=1.0,
        length_weight=0.125,
        length_reward="linear",
        repetition_weight=3.0,
    )
    assert right.parts == {
        "accuracy": 1.0,
        "format": 1.0,
        "language": 1.0,
        "overlong": 0.0,
        "length": 0.5,
        "repetition": 0.0,
    }
    assert right.total == 2.0 + 0.25 + 0.5 + 0.125 * 0.5
    looped = 1 / 98 - 1
    assert wrong.parts == right.parts | {
        "accuracy": 0.0,
        "overlong": -1.0,
        "length": -0.5,
        "repetition": looped,
    }
    assert wrong.total == pytest.approx(0.25 + 0.5 - 1.0 - 0.125 * 0.5 + 3.0 * looped)
    assert (right.correct, right.extracted, right.status) == (True, "5", "ok")
    assert (wrong.correct, wrong.extracted, wrong.status) == (False, "6", "ok")


def test_part_without_weight_is_not_computed_but_accuracy_and_format_are() -> None:
    (reward,) = score_group([attempt(GOOD)], format_weight=0.0)
    assert reward.parts == {"accuracy": 1.0, "format": 1.0}
    assert reward.total == 1.0


@pytest.mark.parametrize(("buffer", "expected"), [(None, -0.5), (40, -0.75), (0, 0.0)])
def test_overlong_buffer_is_a_fifth_of_the_longest_completion(
    buffer: int | None, expected: float
) -> None:
    (reward,) = score_group([attempt(GOOD, length=90)], overlong_weight=1.0, overlong_buffer=buffer)
    assert reward.parts["overlong"] == expected


def test_truncated_completion_earns_nothing_but_its_penalties() -> None:
    options = {"language_weight": 1.0, "overlong_weight": 1.0, "length_weight": 1.0}
    finished, cut = score_group(
        [attempt(GOOD, length=100), attempt(GOOD, length=100, truncated=True)], **options
    )
    assert finished.parts["accuracy"] == finished.parts["format"] == 1.0
    # Right answers of that length earn 0.5, wrong ones lose 0.5.
    assert (finished.parts["length"], cut.parts["length"]) == (0.5, -0.5)
    assert cut.parts == {
        "accuracy": 0.0,
        "format": 0.0,
        "language": 0.0,
        "overlong": -1.0,
        "length": -0.5,
    }
    assert cut.total == -1.5
    assert (cut.correct, cut.extracted, cut.status) == (False, None, "truncated")


def test_truncation_takes_away_what_would_add_whatever_the_sign_of_the_weight() -> None:
    (cut,) = score_group([attempt(GOOD, truncated=True)], format_weight=-0.5)
    assert cut.parts["format"] == 1.0 and cut.total == -0.5


def test_masked_truncated_completion_has_no_reward() -> None:
    finished, cut = score_group([attempt(GOOD), attempt(GOOD, truncated=True)], truncated="mask")
    assert finished.total == 1.2
    assert cut.total is None and not cut.correct


def test_problem_decides_who_grades() -> None:
    def verifier(answer: str | None) -> float:
        return {"6": 1.0, "7": 0.5, "8": 99.0}.get(answer or "", 0.0)

    verified = replace(FIVE, answer="", verifier=verifier)
    several = replace(FIVE, answer=["6", "5"])
    texts = [GOOD.replace(" 5 ", f" {answer} ") for answer in (5, 6, 7, 8)]
    of_verifier = score_group([attempt(text, verified) for text in texts])
    assert [reward.parts["accuracy"] for reward in of_verifier] == [0.0, 1.0, 0.5, 1.0]
    assert [reward.correct for reward in of_verifier] == [False, True, False, True]
    of_golds = score_group([attempt(text, several) for text in texts])
    assert [reward.correct for reward in of_golds] == [True, True, False, False]
    (unanswered,) = score_group([attempt("no idea", verified)])
    assert (unanswered.parts["accuracy"], unanswered.status) == (0.0, "no_answer")


@pytest.fixture(scope="module")
def strict() -> Iterator[Scorer]:
    """Shared, since its worker processes take seconds to start."""
    options = RewardOptions(length_weight=1.0, length_reward="linear", repetition_weight=1.0)
    with Scorer(options, TINY, max_new_tokens=16) as scorer:
        yield scorer


def test_answers_go_through_the_math_grader(strict: Scorer) -> None:
    problem = replace(FIVE, answer="x + \\frac{1}{2}")
    answers = ["\\frac12 + x", "x + 0.5", "x", "9**9**9**9**9", "((((", "y" * 5000, None]
    texts = [GOOD.replace(" 5 ", f" {answer} ") if answer else "none" for answer in answers]
    (rewards,) = strict.score([[attempt(text, problem) for text in texts]])
    assert [reward.correct for reward in rewards] == [True, True, *[False] * 5]
    assert rewards[0].status == "ok" and rewards[5].status == "too_long"
    assert {reward.status for reward in rewards} <= set(STATUSES["accuracy"])
    assert rewards[-1].status == "no_answer"
    # As text and fraction alone, none of them is equal.
    exact = score_group([attempt(text, problem) for text in texts])
    assert not any(reward.correct for reward in exact)


def test_programs_are_run_against_their_tests() -> None:
    try:
        CodeGrader().close()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    programs = ["def f(n): return 2 * n", "def f(n): return n + 1", "def f(n): return 1 / 0"]
    texts = [f"so\n```python\n{program}\n```" for program in programs] + ["\\boxed{2 n}"]
    attempts = [attempt(text, DOUBLE) for text in texts]
    attempts.append(replace(attempts[0], truncated=True))
    rewards = score_group(attempts, NONE, code_weight=3.0)
    assert [reward.parts for reward in rewards] == [
        {"code": 1.0, "format": 1.0},
        {"code": 0.0, "format": 1.0},
        {"code": 0.0, "format": 1.0},
        {"code": 0.0, "format": 0.0},
        {"code": 0.0, "format": 0.0},
    ]
    assert [reward.total for reward in rewards] == [3.2, 0.2, 0.2, 0.0, 0.0]
    statuses = [reward.status for reward in rewards]
    assert statuses == ["passed", "wrong", "crash", "no_answer", "truncated"]
    assert set(statuses) <= set(STATUSES["code"])
    assert rewards[0].extracted == programs[0] and rewards[0].correct


def test_problem_with_tests_needs_the_sandbox_from_the_start() -> None:
    program = attempt("```python\nf = abs\n```", DOUBLE)
    with (
        Scorer(RewardOptions(grader="exact"), NONE, max_new_tokens=9) as scorer,
        pytest.raises(ValueError, match="runs_code: expected True for problems with tests"),
    ):
        scorer.score([[program]])


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module of rewards in the current directory."""
    (tmp_path / "my_rewards.py").write_text(
        """
def by_level(prompts, completions, level, answer, completion_ids, **columns):
    assert len(prompts) == len(completions) == len(answer) == len(columns["question"])
    assert "problem_id" in columns and set(columns) <= {"question", "problem_id", "hint"}
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
    rewards = score_group(
        [attempt(GOOD, problems[0]), attempt(WRONG, problems[0]), attempt(GOOD, problems[1])],
        reward=(f"{user_module}:by_level=0.5", f"{user_module}:Holder.nested"),
    )
    assert [reward.parts["by_level"] for reward in rewards] == [3.1, 3.1, None]
    assert [reward.parts["Holder.nested"] for reward in rewards] == [1.0, None, 1.0]
    assert [reward.total for reward in rewards] == pytest.approx([1.2 + 1.55 + 1, 0.2 + 1.55, 2.2])


def test_completion_left_out_of_every_weighted_part_has_no_reward(user_module: str) -> None:
    right, wrong = score_group(
        [attempt(GOOD), attempt(WRONG)],
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
        score_group([attempt(GOOD), attempt(WRONG)], reward=(f"{user_module}:{function}",))


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
        score_group([], reward=(text,))


def test_unknown_target_language_is_refused() -> None:
    with pytest.raises(UsageError, match="--target-language: expected one of af, .*'klingon'"):
        score_group([], target_language="klingon")


def test_metrics_hold_each_part_apart(user_module: str) -> None:
    cut = attempt(GOOD, truncated=True)
    rewards = score_group(
        [attempt(GOOD), attempt(GOOD), attempt(WRONG), cut],
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


def completion(text: str, finish_reason: str = "stop") -> Completion:
    ids = bigram_tokenizer().encode(text)
    return Completion(
        token_ids=np.array(ids),
        logprobs=np.full(len(ids), -1.0, dtype=np.float32),
        finish_reason=finish_reason,  # type: ignore[arg-type]
    )


def make_prompter(scorer: Scorer) -> Prompter:
    return Prompter(bigram_tokenizer(), TINY, scorer, max_prompt_tokens=20)


def test_rewards_are_the_same_whatever_was_graded_before(strict: Scorer) -> None:
    generator = random.Random(0)
    problems = [
        Problem(problem_id=str(n), question=f"{n} + 1", answer=str(n + 1)) for n in range(8)
    ]
    completions_PG = [
        [
            completion(
                f"<think> {'so ' * generator.randrange(4)}</think> <answer> {answer} </answer>",
                generator.choice(["stop", "stop", "length"]),
            )
            for answer in (n, n + 1, "1 0", n + 1)
        ]
        for n in range(8)
    ]
    prompter = make_prompter(strict)
    expected = [[one.reward for one in group] for group in prompter.score(problems, completions_PG)]
    for _ in range(5):
        scoring = Scoring(prompter, problems)
        for place in generator.sample(range(8), generator.randrange(9)):
            scoring.add(place, completions_PG[place])
        scored = scoring.finish(completions_PG)
        assert [[one.reward for one in group] for group in scored] == expected
    assert len({reward.total for group in expected for reward in group}) > 3


def test_groups_are_graded_while_others_are_sampled() -> None:
    graded = threading.Event()

    def verifier(answer: str | None) -> float:
        graded.set()
        return 1.0

    class HandsOver:
        """Goes on sampling until the group that it handed over is graded."""

        def generate(
            self, prompts: Sequence[Sequence[int]], keys_PG: np.ndarray, **options: object
        ) -> list[list[Completion]]:
            answer = [completion("<think> so </think> <answer> 5 </answer>")]
            on_group = options["on_group"]
            assert callable(on_group)
            on_group(1, answer)
            assert graded.wait(timeout=60)
            return [answer for _ in prompts]

    problems = [FIVE, replace(FIVE, answer="", verifier=verifier), FIVE]
    with Scorer(RewardOptions(grader="exact"), TINY, max_new_tokens=16) as scorer:
        prompter = make_prompter(scorer)
        scoring = Scoring(prompter, problems)
        completions_PG = rollout(
            HandsOver(),  # type: ignore[arg-type]
            prompter,
            problems,
            num_samples=1,
            max_new_tokens=16,
            temperature=1.0,
            stream=(0, "test", 1),
            first_prompt=0,
            on_group=scoring.add,
        )
        assert list(scoring.started) == [1]
        scored = scoring.finish(completions_PG)
    assert [one.reward.total for (one,) in scored] == [1.2] * 3


def test_users_functions_run_in_the_main_thread(user_module: str) -> None:
    options = RewardOptions(grader="exact", reward=(f"{user_module}:in_thread",))
    with Scorer(options, TINY, max_new_tokens=16) as scorer:
        scoring = Scoring(make_prompter(scorer), [FIVE])
        completions_PG = [[completion("<answer> 5 </answer>")]]
        scoring.add(0, completions_PG[0])
        ((scored,),) = scoring.finish(completions_PG)
    assert scored.reward.parts["in_thread"] == 1.0


def test_error_while_grading_in_the_background_is_raised() -> None:
    def broken(answer: str | None) -> float:
        raise KeyError("verifier")

    with Scorer(RewardOptions(grader="exact"), TINY, max_new_tokens=16) as scorer:
        scoring = Scoring(make_prompter(scorer), [replace(FIVE, verifier=broken)])
        completions_PG = [[completion("<think> so </think> <answer> 5 </answer>")]]
        scoring.add(0, completions_PG[0])
        with pytest.raises(KeyError, match="verifier"):
            scoring.finish(completions_PG)


def scored(total: float | None) -> ScoredCompletion:
    return ScoredCompletion(
        problem=FIVE,
        prompt_ids=[3],
        completion=completion("so 5"),
        text="so 5",
        reward=Reward(total=total, parts={}, extracted=None, correct=False, status="no_answer"),
    )


def test_completion_without_reward_leaves_its_group_and_the_loss() -> None:
    config = TrainConfig(preset="test", loss=LossOptions(loss="grpo", advantage_scale="none"))
    config = replace(config, rollout=replace(config.rollout, group_size=4, num_prompts=2))
    groups = [[scored(total) for total in totals] for totals in ((1.0, 0.0, None, 0.5), [None] * 4)]
    samples = with_advantages(groups, config)
    assert [one.advantage for one in samples] == [0.5, -0.5, 0.0, 0.0, *[0.0] * 4]
    assert [one.masked for one in samples] == [False, False, True, False, *[True] * 4]


@pytest.mark.parametrize("aggregation", ["token_mean", "constant", "sequence_mean"])
def test_masked_sample_has_no_part_in_the_update(aggregation: str) -> None:
    def weights_after(masked_ids: list[int]) -> list[torch.Tensor]:
        loss = LossOptions(
            loss="grpo", aggregation=aggregation, kl="k3", kl_weight=0.5, entropy_weight=0.1
        )
        optimizer = OptimizerOptions(learning_rate=1e-2, minibatches=2)
        config = TrainConfig(preset="test", backend="reference", loss=loss, optimizer=optimizer)
        policy, reference = Policy(bigram_model()), Policy(bigram_model(seed=1))
        samples = [
            UpdateSample(
                prompt_ids=[3],
                token_ids=np.array(ids),
                sampler_logprobs=np.full(len(ids), -1.0, dtype=np.float32),
                advantage=advantage,
                masked=masked,
            )
            for ids, advantage, masked in (
                ([4, 5], 1.0, False),
                (masked_ids, 0.0, True),
                ([6, 11, 7], -1.0, False),
                (masked_ids, 0.0, True),
            )
        ]
        world = World(rank=0, size=1, device=torch.device("cpu"))
        update = PolicyUpdate(policy, reference, make_optimizer(policy, config), config, world)
        metrics = update(samples, 1)
        assert math.isfinite(metrics["loss"] or 0.0)
        return [weight.detach() for _, weight in policy.weights()]

    start = [weight.detach() for _, weight in Policy(bigram_model()).weights()]
    one, other = weights_after([4, 10, 10]), weights_after([12, 13, 14])
    for before, first, second in zip(start, one, other, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert not torch.equal(before, first)


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


def test_presets_reward_as_their_papers_do() -> None:
    for name, weights in (("r1-zero", (1.0, 1.0)), ("dr-grpo-7b", (1.0, 0.0))):
        options = PRESETS[name][1].reward
        assert (options.accuracy_weight, options.format_weight) == weights
        assert options.truncated == "zero" and options.grader == "strict" and not options.reward
        assert not any((options.language_weight, options.overlong_weight, options.length_weight))
