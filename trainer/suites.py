"""Data sets by name: where each is found, what its columns hold, and how published evaluations
sample from it."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from trainer import bilingual_task, tiny_task
from trainer.config import UsageError
from trainer.data_records import FILE_SUFFIXES, DataError
from trainer.gym_tasks import PREFIX, gym_problems
from trainer.problem_kinds import Kind
from trainer.tasks import Problem, load_problems

EMBEDDED_TASKS = {"tiny": tiny_task, "tiny-bilingual": bilingual_task}
"""Tasks whose problems are made up as a run goes, by the name of their data set and template."""
TASK_OF_MODEL = {
    "tiny": "tiny",
    "tiny-bilingual": "tiny-bilingual",
    "tiny-bilingual-small": "tiny-bilingual",
}
"""The embedded task that an embedded base model is made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A data set that has a name."""

    hub: str | None
    """On the Hugging Face hub, as `owner/name` or `owner/name:configuration`; None: it may not be
    passed on, and comes from a file of the user's."""
    split: str = "test"
    columns: tuple[str | None, str | None] = (None, None)
    """Of question and answer on the hub; a file's are found by their usual names."""
    kind: Kind = "answer"
    file: str | None = None
    """Another name, without suffix, that the file in `--data-dir` may have."""
    r1_samples: int | None = None
    """Samples per problem in DeepSeek-R1's evaluation (arXiv 2501.12948 v2, D.1); None: not part of
    it."""


SUITES: dict[str, Suite] = {
    "gsm8k": Suite(hub="openai/gsm8k:main", columns=("question", "answer"), file="gsm8k_test"),
    "gsm8k-train": Suite(
        hub="openai/gsm8k:main",
        split="train",
        columns=("question", "answer"),
        file="gsm8k_train",
    ),
    "math-train": Suite(
        hub="DigitalLearningGmbH/MATH-lighteval",
        split="train",
        columns=("problem", "solution"),
        file="math_train",
    ),
    "math500": Suite(
        hub="HuggingFaceH4/MATH-500",
        columns=("problem", "answer"),
        r1_samples=16,
    ),
    "aime24": Suite(
        hub="HuggingFaceH4/aime_2024",
        split="train",
        columns=("problem", "answer"),
        file="drgrpo_aime",
        r1_samples=64,
    ),
    "aime25": Suite(hub="math-ai/aime25", columns=("problem", "answer")),
    "amc": Suite(
        hub="AI-MO/aimo-validation-amc",
        split="train",
        columns=("problem", "answer"),
        file="drgrpo_amc",
    ),
    "minerva": Suite(
        hub="math-ai/minervamath", columns=("question", "answer"), file="drgrpo_minerva"
    ),
    "olympiadbench": Suite(
        hub="Hothan/OlympiadBench:OE_TO_maths_en_COMP",
        split="train",
        columns=("question", "final_answer"),
        file="drgrpo_olympiad_bench",
    ),
    "gpqa": Suite(hub=None, kind="choice", file="gpqa_diamond", r1_samples=64),
    "livecodebench": Suite(hub=None, kind="live-code-bench", r1_samples=8),
    "humaneval": Suite(hub="openai/openai_humaneval", kind="human-eval", file="code_humaneval"),
    "codeforces": Suite(hub=None, kind="tests", file="code_codeforces_test", r1_samples=16),
}
"""Hub names, splits and columns as other evaluations load them; the hub was out of reach where this
was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How a published evaluation samples."""

    suites: tuple[str, ...]
    temperature: float
    top_p: float
    max_new_tokens: int
    samples: int | None
    """Per problem; None: `Suite.r1_samples`."""


PROTOCOLS: dict[str, Protocol] = {
    # Liu et al. 2025, arXiv 2503.20783, table 1 and evaluate_model.py.
    "dr-grpo": Protocol(
        suites=("aime24", "amc", "math500", "minerva", "olympiadbench"),
        temperature=0.0,
        top_p=1.0,
        max_new_tokens=3000,
        samples=1,
    ),
    # DeepSeek-R1, arXiv 2501.12948 v2, D.1; GPQA and code come from files of the user's.
    "r1": Protocol(
        suites=("aime24", "math500"),
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=32768,
        samples=None,
    ),
}


def load_source(
    source: str,
    *,
    split: str,
    data_dir: Path | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    levels: Collection[int] = (),
    limit: int | None = None,
) -> list[Problem]:
    """Problems of whatever has a name: a suite, a task of EMBEDDED_TASKS, `gym:TASK`, a file or a
    hub data set.

    Args:
        source: the name. Embedded tasks and `gym:TASK` give their held-out problems, of which there
            is no end: 100 where there is no `limit`.
        split: of a hub data set; a suite has its own.
        data_dir: where the files of suites are; None: suites come from the hub.
        question_column, answer_column, levels, limit: see `load_problems`.

    Raises:
        DataError, UsageError: it cannot be used, in one sentence.
    """
    if source in EMBEDDED_TASKS or source.startswith(PREFIX):
        if levels:
            raise UsageError(f"--levels: expected none for {source}, which has no levels")
        count = 100 if limit is None else limit
        task = EMBEDDED_TASKS.get(source)
        return gym_problems(source, count) if task is None else task.held_out_problems(count)
    suite = SUITES.get(source)
    if suite is None and "/" not in source and Path(source).suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{source}: expected a file, a hub data set (owner/name), gym:TASK or one of "
            f"{', '.join((*EMBEDDED_TASKS, *SUITES))}"
        )
    if suite is None:
        return load_problems(
            source,
            split=split,
            question_column=question_column,
            answer_column=answer_column,
            levels=levels,
            limit=limit,
        )
    question, answer = (None, None) if data_dir else suite.columns
    return load_problems(
        _place_of(source, suite, data_dir),
        split=suite.split,
        kind=suite.kind,
        question_column=question_column or question,
        answer_column=answer_column or answer,
        levels=levels,
        limit=limit,
    )


def _place_of(name: str, suite: Suite, data_dir: Path | None) -> str:
    """The suite's file, or its name on the hub."""
    if data_dir is not None:
        stems = [name] if suite.file is None else [name, suite.file]
        names = [f"{stem}{suffix}" for stem in stems for suffix in FILE_SUFFIXES]
        found = [file for file in names if (data_dir.expanduser() / file).is_file()]
        if not found:
            raise DataError(f"--data-dir: expected {' or '.join(names)} in {data_dir}, got none")
        return str(data_dir.expanduser() / found[0])
    if suite.hub is None:
        raise DataError(
            f"{name}: comes from a file of your own; put {name}.jsonl into a folder and name that "
            f"with --data-dir"
        )
    return suite.hub
