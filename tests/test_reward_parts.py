"""Parts of a reward and their sum; who grades what; what a completion that was cut off earns."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from trainer.config import (
    RewardOptions,
    UsageError,
)
from trainer.presets import PRESETS
from trainer.rewards import CodeGrader, FunctionTest, SandboxUnavailable, Scorer
from trainer.rewards.grading import STATUSES, Attempt
from trainer.rewards.scoring import Reward
from trainer.tasks import Problem
from trainer.templates import Template, template_by_name

R1, NONE = template_by_name("r1"), template_by_name("none")
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


def test_answers_go_through_the_math_grader() -> None:
    problem = replace(FIVE, answer="x + \\frac{1}{2}")
    answers = ["\\frac12 + x", "x + 0.5", "x", "9**9**9**9**9", "((((", "y" * 5000, None]
    texts = [GOOD.replace(" 5 ", f" {answer} ") if answer else "none" for answer in answers]
    rewards = score_group([attempt(text, problem) for text in texts], grader="strict")
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


def test_target_language_of_each_question_is_its_own() -> None:
    english = "<think> we add the two numbers and check </think> <answer> 5 </answer>"
    chinese = "<think> 首先我们计算这两个数的和 </think> <answer> 5 </answer>"
    expected = {"What is 2 + 3?": [1.0, 0.0], "二加三得多少？": [0.0, 1.0], "2 + 3": [None, None]}
    for question, values in expected.items():
        problem = replace(FIVE, question=question)
        rewards = score_group(
            [attempt(english, problem), attempt(chinese, problem)],
            language_weight=1.0,
            target_language="question",
        )
        assert [reward.parts["language"] for reward in rewards] == values
        # Accuracy and a fifth for the format, and the language where the question has one.
        assert [reward.total for reward in rewards] == [1.2 + (value or 0.0) for value in values]


def test_unknown_target_language_is_refused() -> None:
    with pytest.raises(UsageError, match="--target-language: expected one of af, .*'klingon'"):
        score_group([], target_language="klingon")


def test_presets_reward_as_their_papers_do() -> None:
    for name, weights in (("r1-zero", (1.0, 1.0)), ("dr-grpo-7b", (1.0, 0.0))):
        options = PRESETS[name][1].reward
        assert (options.accuracy_weight, options.format_weight) == weights
        assert options.truncated == "zero" and options.grader == "strict" and not options.reward
        assert not any((options.language_weight, options.overlong_weight, options.length_weight))
