"""Tasks of reasoning-gym, where the package is installed; its absence and bad names anywhere."""

import importlib.util
import pickle

import pytest

from trainer.config import DataOptions, UsageError
from trainer.gym_tasks import EXCLUDED, GymProblems, gym_problems
from trainer.problem_source import open_problems

CHAIN = "gym:chain_sum:max_terms=3,max_digits=1"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)


def test_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs a package, pip install 'onepass-rl\[reasoning"):
        gym_problems("gym:chain_sum", 1)


@needs_package
@pytest.mark.parametrize("task", sorted(EXCLUDED))
def test_excluded_task_is_refused_with_its_reason(task: str) -> None:
    with pytest.raises(UsageError, match=f"gym:{task}: this task is excluded, it"):
        gym_problems(f"gym:{task}", 1)


@needs_package
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gym:chainsum", "got 'chainsum'; did you mean .*chain_sum"),
        ("gym:chain_sum:terms=3", "options that the task refuses .*terms"),
        ("gym:chain_sum:max_terms", "expected option=value .* got 'max_terms'"),
        ("gym:chain_sum:min_terms=9,max_terms=3", "options that the task refuses"),
    ],
)
def test_unusable_name_is_one_sentence(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gym_problems(source, 1)


@needs_package
def test_problems_are_scored_by_their_own_verifier() -> None:
    problems = gym_problems(CHAIN, 20)
    assert len({problem.question for problem in problems}) == 20
    for problem in problems:
        verifier = pickle.loads(pickle.dumps(problem.verifier))
        assert isinstance(problem.answer, str)
        assert verifier(problem.answer) == 1.0
        # Written otherwise, which comparing texts would refuse.
        assert verifier(f"{problem.answer}.00") == 1.0
        assert verifier(str(int(problem.answer) + 1)) < 0.5
        assert verifier(None) == 0.0


@needs_package
def test_answer_that_the_verifier_cannot_read_scores_nothing() -> None:
    (problem,) = gym_problems("gym:prime_factorization", 1)
    assert problem.verifier is not None and problem.verifier("no number") == 0.0


@needs_package
def test_training_problems_depend_on_seed_and_place_and_leave_out_held_out_ones() -> None:
    source, held_out = open_problems(DataOptions(dataset=CHAIN, eval_problems=50), 3)
    assert isinstance(source, GymProblems)
    drawn = [source.problem(index) for index in range(100)]
    assert {one.question for one in held_out}.isdisjoint(one.question for one in drawn)
    assert len({one.question for one in drawn}) > 60
    again, _ = open_problems(DataOptions(dataset=CHAIN, eval_problems=50), 3)
    other, _ = open_problems(DataOptions(dataset=CHAIN, eval_problems=50), 4)
    assert again.problem(42) == drawn[42]
    assert other.problem(42) != drawn[42]


@needs_package
def test_task_without_enough_problems_is_refused() -> None:
    with pytest.raises(UsageError, match="expected 2000 different problems, got 200"):
        gym_problems("gym:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1", 2000)
