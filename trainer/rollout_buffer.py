"""Scored completions of the steps since the last checkpoints, kept on disk until a checkpoint holds
what was learned from them: a run killed in between does not sample them again.

`buffer/step-00013.jsonl` has a line that says what it belongs to, with the checksum of the second
line, the completions. It is used for the very weights it was sampled from, or not at all.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from trainer.durable import write_atomically
from trainer.fsdp import World, from_main_rank
from trainer.rewards import Reward
from trainer.rollout import Completion
from trainer.samples import ScoredCompletion
from trainer.tasks import Problem

FOLDER = "buffer"

_NAME = re.compile(r"step-(\d{5,})\.jsonl")


class RolloutBuffer:
    """The buffer of one run directory; the main rank reads and writes.

    Args:
        run_folder: of the run.
        world: the ranks that read together.
        warn: gets a sentence, on the main rank, when something is dropped.
    """

    def __init__(self, run_folder: Path, world: World, *, warn: Callable[[str], None]) -> None:
        self.folder, self.world, self.warn = run_folder / FOLDER, world, warn

    def write(
        self, step: int, weights: str, scored_PG: Sequence[Sequence[ScoredCompletion]]
    ) -> None:
        """Keeps the completions of a step before it is trained on them.

        Args:
            weights: checksum of the policy's weights before the step's update.
        """
        if not self.world.is_main:
            return
        groups = [[_encode(one) for one in group] for group in scored_PG]
        problem_ids = [group[0].problem.problem_id for group in scored_PG]
        body = json.dumps({"problem_ids": problem_ids, "groups": groups})
        header = json.dumps({"step": step, "weights": weights, "sha256": _sha256(body)})
        self.folder.mkdir(exist_ok=True)
        write_atomically(self._path(step), f"{header}\n{body}")

    def read(
        self, step: int, weights: str, problems: Callable[[int], Sequence[Problem]]
    ) -> list[list[ScoredCompletion]] | None:
        """The completions an earlier start kept for a step, on every rank; None if there are none.

        Those that are damaged, or of other weights or problems, are dropped with a warning.

        Args:
            weights: checksum of the policy's weights now.
            problems: makes so many problems of the step, in order.

        Collectives: one broadcast.
        """

        def read() -> list[list[ScoredCompletion]] | None:
            path = self._path(step)
            if not path.exists():
                return None
            content = _verified(path)
            if content is None:
                self._drop(path, "does not match its checksum")
                return None
            header, body = content
            if header["step"] != step or header["weights"] != weights:
                # What was sampled later comes from weights that this run will not have either.
                for later in self._steps(at_least=step):
                    self._drop(self._path(later), "was sampled from other weights")
            else:
                at_hand = problems(len(body["problem_ids"]))
                if body["problem_ids"] == [problem.problem_id for problem in at_hand]:
                    return _decode(at_hand, body["groups"])
                self._drop(path, "has other problems")
            return None

        return from_main_rank(self.world, read)

    def drop_up_to(self, step: int) -> None:
        """Removes what no checkpoint needs that was made after this step."""
        if self.world.is_main:
            for earlier in self._steps():
                if earlier <= step:
                    self._path(earlier).unlink()

    def _drop(self, path: Path, why: str) -> None:
        self.warn(f"{path} {why}; its step is sampled again")
        path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:05d}.jsonl"

    def _steps(self, at_least: int = 0) -> list[int]:
        if not self.folder.is_dir():
            return []
        found = filter(None, (_NAME.fullmatch(path.name) for path in self.folder.iterdir()))
        return sorted(step for match in found if (step := int(match.group(1))) >= at_least)


def _verified(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Header and body; None where the checksum does not match."""
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
        header = json.loads(first)
        is_whole = header.keys() >= {"step", "weights"} and header["sha256"] == _sha256(body)
        return (header, json.loads(body)) if is_whole else None
    except (ValueError, KeyError, AttributeError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _encode(one: ScoredCompletion) -> dict[str, Any]:
    return {
        "prompt_ids": list(one.prompt_ids),
        "text": one.text,
        "completion": _plain(one.completion),
        "reward": _plain(one.reward),
    }


def _decode(
    problems: Sequence[Problem], groups: Sequence[Sequence[dict[str, Any]]]
) -> list[list[ScoredCompletion]]:
    return [
        [
            ScoredCompletion(
                problem=problem,
                prompt_ids=one["prompt_ids"],
                completion=Completion(**_restored(one["completion"])),
                text=one["text"],
                reward=Reward(**one["reward"]),
            )
            for one in group
        ]
        for problem, group in zip(problems, groups, strict=True)
    ]


def _plain(record: Completion | Reward) -> dict[str, Any]:
    """The fields, arrays as [type, base64 of their bytes]."""
    plain = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if isinstance(value, np.ndarray):
            value = [value.dtype.str, base64.b64encode(value.tobytes()).decode()]
        plain[each.name] = value
    return plain


def _restored(values: dict[str, Any]) -> dict[str, Any]:
    def array(dtype: str, encoded: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(encoded), dtype=dtype).copy()

    return {
        name: array(*value) if isinstance(value, list) else value for name, value in values.items()
    }
