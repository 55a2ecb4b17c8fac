"""What is stated about graded completions, on cases that can be counted by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from trainer.config import UsageError
from trainer.evaluation import pass_at_1_by_level, suite_estimates
from trainer.evaluation_report import SuiteResult, averages, comparison, table
from trainer.monitors import CATEGORIES
from trainer.rewards import Reward
from trainer.rollout import Completion
from trainer.samples import ScoredCompletion, sample_metrics
from trainer.tasks import Problem


def scored(
    problem: Problem,
    answer: str | None,
    *,
    correct: bool = False,
    text: str = "",
    length: int = 8,
    truncated: bool = False,
    status: str = "ok",
) -> ScoredCompletion:
    return ScoredCompletion(
        problem=problem,
        prompt_ids=[1],
        completion=Completion(
            token_ids=np.arange(length),
            logprobs=np.zeros(length, dtype=np.float32),
            finish_reason="length" if truncated else "stop",
        ),
        text=text,
        reward=Reward(
            total=float(correct),
            parts={"accuracy": float(correct), "format": float(answer is not None)},
            extracted=answer,
            correct=correct,
            status=status,
        ),
    )


def problem(name: str, level: int | None = None) -> Problem:
    return Problem(problem_id=name, question=f"{name}?", answer="4", level=level)


def same_first_letter(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    return [one[0] == other[0] for one, other in pairs]


EASY, HARD = problem("easy", 1), problem("hard", 5)
SCORED = [
    [
        scored(EASY, "4", correct=True, text="wait, I check it", length=10),
        scored(EASY, "5", text="so it is five", length=20),
        scored(EASY, "4", correct=True, text="easy", length=30),
        scored(EASY, None, truncated=True, length=100, status="truncated"),
    ],
    [
        scored(HARD, "axe", text="let me recheck it, and check again", length=40),
        scored(HARD, "4", correct=True, text="four", length=50),
        scored(HARD, "ant", text="an ant it is", length=60),
        scored(HARD, None, text="I do not know", length=2, status="no_answer"),
    ],
]


def value(name: str) -> float:
    estimate = suite_estimates(SCORED, same_first_letter)[name]
    assert estimate is not None and estimate.low is not None and estimate.high is not None
    assert estimate.low <= estimate.value <= estimate.high
    return estimate.value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pass@1", 3 / 8),
        # Two right of four: one of six pairs has none. One of four: three of six.
        ("pass@2", (5 / 6 + 3 / 6) / 2),
        ("pass@4", 1.0),
        # "axe" and "ant" agree, and outvote the right answer.
        ("cons@4", 0.5),
        ("category/correct", 3 / 8),
        ("category/incorrect", 3 / 8),
        ("category/unformatted", 1 / 8),
        ("category/truncated", 1 / 8),
        ("format", 6 / 8),
        ("reflection/r1", 2 / 8),
        ("reflection/r1_words", 3 / 8),
        ("reflection/dr_grpo", 1 / 8),
        ("reflection/dr_grpo_words", 2 / 8),
        ("reflection/dr_grpo_problems", 1 / 2),
        ("length/mean", 312 / 8),
        ("length/correct", 30.0),
        ("length/wrong", 222 / 5),
        ("length/wrong_ended", 122 / 4),
        ("repetition", 0.0),
        ("language", 1.0),
    ],
)
def test_estimate_is_what_counting_gives(name: str, expected: float) -> None:
    assert value(name) == pytest.approx(expected)


def test_estimates_of_nothing_are_none() -> None:
    estimates = suite_estimates([[scored(EASY, None)]], same_first_letter)
    assert estimates["length/correct"] is None
    assert estimates["language"] is None
    assert "cons@1" not in estimates and "pass@2" not in estimates


def test_accuracy_is_split_by_level() -> None:
    unknown = problem("unknown")
    by_level = pass_at_1_by_level([*SCORED, [scored(unknown, "4", correct=True)]])
    assert [(level, each and each.value) for level, each in by_level.items()] == [
        (1, 0.5),
        (5, 0.25),
    ]


def test_training_logs_the_same_shares() -> None:
    metrics = sample_metrics(SCORED)
    for name in CATEGORIES:
        assert metrics[f"category/{name}"] == value(f"category/{name}")
    assert metrics["reflection_rate"] == value("reflection/r1")
    assert metrics["reflection/words"] == value("reflection/r1_words")
    assert metrics["reflection/dr_grpo_rate"] == value("reflection/dr_grpo")
    assert metrics["language_share"] == value("language")
    assert (metrics["groups/all_correct"], metrics["groups/all_wrong"]) == (0.0, 0.0)


def result(scored_PK: Sequence[Sequence[ScoredCompletion]] = SCORED) -> SuiteResult:
    return SuiteResult.of(scored_PK, same_first_letter, sampling={"samples": 4}, seconds=1.0)


def test_result_counts_statuses_and_keeps_each_problems_score() -> None:
    assert result().statuses == {"ok": 6, "truncated": 1, "no_answer": 1}
    assert result().scores == {"easy": 0.5, "hard": 0.25}


def test_table_has_a_column_for_each_data_set_and_their_average() -> None:
    solved = [[scored(EASY, "4", correct=True)] * 4]
    results = {"one": result(), "two": result(solved)}
    whole = averages(results)["pass@1"]
    assert whole is not None and whole.value == pytest.approx((3 / 8 + 1) / 2)
    # A mean over data sets one of which has no such completion would be of another set.
    assert "length/wrong" not in averages(results)
    lines = table(results).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["one", "two", "average"]
    assert len({len(line) for line in lines}) == 1
    pass_at_1 = next(line for line in lines if line.startswith("| pass@1 "))
    assert "37.5 %" in pass_at_1 and "100.0 %" in pass_at_1 and "68.8 %" in pass_at_1


def test_comparison_is_paired_by_problem() -> None:
    better = [SCORED[0], [scored(HARD, "4", correct=True)] * 4]
    compared = comparison({"set": result(better)}, {"set": result(), "other": result()})["set"]
    assert compared.difference.value == pytest.approx((0.0 + 0.75) / 2)
    assert (compared.better, compared.worse) == (1, 0)


def test_comparison_refuses_other_problems_and_other_sets() -> None:
    other = [[scored(problem("other"), "4", correct=True)]] * 2
    with pytest.raises(UsageError, match="--compare: expected the same problems in set, got other"):
        comparison({"set": result()}, {"set": result(other)})
    with pytest.raises(UsageError, match="--compare: expected one of set there, got another"):
        comparison({"set": result()}, {"another": result()})
