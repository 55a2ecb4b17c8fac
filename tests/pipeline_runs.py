"""Pipelines on a model of a few words: their command line, and their stages in this process."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from pytest import MonkeyPatch

from trainer import pipeline
from trainer.stages import Stage


def command_line(
    inputs: Path,
    run_dir: Path,
    options: Mapping[str, object],
    more: Sequence[object],
    flags: Sequence[str],
) -> list[str]:
    """`r1-tiny` with the model and the sums of `inputs`, and none of its own rules and data.

    `options` come in addition or in place, then `more` as they stand, then the `flags` of stages.
    """
    values: dict[str, object] = {
        "model": inputs / "model",
        "small_model": None,
        "template": "tiny",
        "dataset": inputs / "sums.jsonl",
        "eval_problems": 6,
        "rewrite": None,
        "readable": None,
        "general_task": None,
        "helpful": None,
        "run_dir": run_dir,
        **options,
    }
    given = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return ["r1-tiny", *given, *map(str, more), "--flags", *flags]


@contextmanager
def stages_here() -> Iterator[list[str]]:
    """Runs commands of stages in this process, while entered; the names of those that ran."""
    ran: list[str] = []

    def run_here(stage: Stage, environment: dict[str, str]) -> None:
        ran.append(stage.name)
        script, *arguments = stage.command
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        assert module.main(arguments) == 0

    with MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_run_command", run_here)
        yield ran
    torch.use_deterministic_algorithms(False)
