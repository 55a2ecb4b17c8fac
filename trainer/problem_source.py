"""Which problems a step trains on, and which are held out."""

import math
from typing import Protocol

from trainer.config import DataOptions, UsageError
from trainer.data_records import DataError
from trainer.gym_tasks import PREFIX, GymProblems
from trainer.seeds import derive_shuffle
from trainer.suites import EMBEDDED_TASKS, load_source
from trainer.tasks import Problem, load_problems


class ProblemSource(Protocol):
    """An endless sequence of training problems, the same for the same seed."""

    def problem(self, index: int) -> Problem:
        """The problem at a place of the sequence."""


class GeneratedProblems:
    """An embedded task, by the name of its data set: every problem is new."""

    def __init__(self, dataset: str, seed: int) -> None:
        self.task, self.seed = EMBEDDED_TASKS[dataset], seed

    def problem(self, index: int) -> Problem:
        """The problem at a place of the sequence."""
        return self.task.training_problem(self.seed, index)


class ListedProblems:
    """Passes over a list, each in another random order."""

    def __init__(self, problems: list[Problem], seed: int) -> None:
        self.problems, self.seed = problems, seed
        self._epoch, self._order = -1, list[int]()

    def problem(self, index: int) -> Problem:
        """The problem at a place of the sequence."""
        epoch, place = divmod(index, len(self.problems))
        if epoch != self._epoch:
            self._order = derive_shuffle(len(self.problems), self.seed, "problems", epoch)
            self._epoch = epoch
        return self.problems[self._order[place]]


class MixedProblems:
    """Verifiable problems with general prompts among them, always the same share of any stretch.

    Args:
        problems, general: what is mixed, each in its own order.
        share: of general prompts, from 0 to 1.
    """

    def __init__(self, problems: ProblemSource, general: ProblemSource, share: float) -> None:
        self.problems, self.general, self.share = problems, general, share

    def problem(self, index: int) -> Problem:
        """The problem at a place of the sequence."""
        before, after = (math.floor(place * self.share) for place in (index, index + 1))
        if after > before:
            return self.general.problem(before)
        return self.problems.problem(index - before)


def listed_problems(source: ProblemSource) -> list[Problem]:
    """The problems of a source that is a list; none of one that makes them up."""
    if isinstance(source, MixedProblems):
        return listed_problems(source.problems)
    return source.problems if isinstance(source, ListedProblems) else []


def open_problems(options: DataOptions, seed: int) -> tuple[ProblemSource, list[Problem]]:
    """The training problems and the held-out ones, which never occur among them.

    With --general-dataset its prompts are among the training problems, and none is held out here.

    Raises:
        UsageError: a data set that cannot be used, or one too small to hold problems out.
    """
    try:
        source, held_out = _open_problems(options, seed)
        if options.general_dataset is not None:
            general, _ = _open_general(options, options.general_dataset, seed)
            source = MixedProblems(source, general, options.general_share)
        return source, held_out
    except DataError as error:
        raise UsageError(str(error)) from error


def held_out_general(options: DataOptions) -> list[Problem]:
    """The general prompts that no training sees; none without --general-dataset.

    Raises:
        UsageError: as `open_problems`.
    """
    if options.general_dataset is None:
        return []
    try:
        return _open_general(options, options.general_dataset, 0)[1]
    except DataError as error:
        raise UsageError(str(error)) from error


def _open_general(
    options: DataOptions, dataset: str, seed: int
) -> tuple[ProblemSource, list[Problem]]:
    prompts = load_problems(dataset, split=options.split, kind="prompt")
    return _withhold(prompts, options.eval_general, seed, "general", dataset)


def _open_problems(options: DataOptions, seed: int) -> tuple[ProblemSource, list[Problem]]:
    def load(
        source: str, split: str, *, levels: tuple[int, ...] = (), limit: int | None = None
    ) -> list[Problem]:
        return load_source(
            source,
            split=split,
            data_dir=options.data_dir,
            question_column=options.question_column,
            answer_column=options.answer_column,
            levels=levels,
            limit=limit,
        )

    is_generated = options.dataset in EMBEDDED_TASKS or options.dataset.startswith(PREFIX)
    eval_source = options.eval_dataset or (options.dataset if is_generated else None)
    held_out = None
    if eval_source is not None:
        held_out = load(eval_source, options.eval_split, limit=options.eval_problems)
    if is_generated:
        if options.levels:
            raise UsageError(f"--levels: expected none for {options.dataset}, which has no levels")
        assert held_out is not None
        if options.dataset in EMBEDDED_TASKS:
            return GeneratedProblems(options.dataset, seed), held_out
        return GymProblems(options.dataset, seed, {one.question for one in held_out}), held_out
    problems = load(options.dataset, options.split, levels=options.levels)
    if held_out is None:
        return _withhold(problems, options.eval_problems, seed, "problems", options.dataset)
    questions = {problem.question for problem in held_out}
    training = [problem for problem in problems if problem.question not in questions]
    if not training:
        raise UsageError(f"--eval-dataset: holds every problem of {options.dataset}")
    return ListedProblems(training, seed), held_out


def _withhold(
    problems: list[Problem], count: int, seed: int, what: str, dataset: str
) -> tuple[ProblemSource, list[Problem]]:
    """The same problems are held out for every seed, so that runs can be compared."""
    questions = sorted({problem.question for problem in problems})
    if len(questions) <= count:
        flag = "--general-dataset" if what == "general" else "--dataset"
        raise UsageError(
            f"{flag}: expected more than --eval-{what} = {count} different problems in {dataset}, "
            f"got {len(questions)}"
        )
    order = derive_shuffle(len(questions), 0, "held-out")
    chosen = {questions[place] for place in order[:count]}
    held_out = {problem.question: problem for problem in problems if problem.question in chosen}
    training = [problem for problem in problems if problem.question not in chosen]
    return ListedProblems(training, seed), list(held_out.values())
