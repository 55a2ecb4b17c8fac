"""What is written down about a stage of the R1 pipeline: what it was made from, and what came of
it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from trainer.config import UsageError
from trainer.durable import write_atomically
from trainer.stages import Stage

STARTED_FILE, DONE_FILE = "started.json", "done.json"
State = Literal["open", "done", "other"]
# Weights are not edited by hand; a large file of them is known by its size, its beginning and its
# end.
_WEIGHTS = (".safetensors", ".bin")
_WHOLE_BYTES = 64 << 20
_END_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """The content of a stage's files."""

    recipe: str
    """Command or step, with paths in the run directory relative to it."""
    inputs: Mapping[str, str]
    """Checksum of each input by its path, relative to the run directory where it is in it."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    """Checksum of each output by its name."""
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    """Of the last start."""

    @classmethod
    def read(cls, path: Path) -> StageRecord | None:
        """The record of a file; None where there is none.

        Raises:
            UsageError: it is one of another version.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path}: not a record of this version ({error})") from error

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")


def record_of(stage: Stage, run_folder: Path) -> StageRecord:
    """What the stage would be made from now; its inputs are there."""
    return StageRecord(
        recipe=stage.recipe.replace(f"{run_folder}/", ""),
        inputs={_name(path, run_folder): checksum(path) for path in stage.inputs},
    )


def start_stage(stage: Stage, run_folder: Path) -> None:
    """Notes what the stage is made from."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    record_of(stage, run_folder).write(stage.folder / STARTED_FILE)


def finish_stage(
    stage: Stage, run_folder: Path, *, counts: Mapping[str, int], seconds: float
) -> None:
    """Notes that the stage is done."""
    made_from = StageRecord.read(stage.folder / STARTED_FILE)
    assert made_from is not None
    outputs = {name: checksum(stage.folder / name) for name in stage.outputs}
    StageRecord(
        recipe=made_from.recipe,
        inputs=made_from.inputs,
        outputs=outputs,
        counts=counts,
        seconds=round(seconds, 1),
    ).write(stage.folder / DONE_FILE)


def state_of(stage: Stage, run_folder: Path) -> tuple[State, str]:
    """Whether a stage whose inputs are there is done, or to be made or continued; "other": it was
    made, or begun, from something else, which the text names."""
    done = StageRecord.read(stage.folder / DONE_FILE)
    record = done or StageRecord.read(stage.folder / STARTED_FILE)
    if record is None:
        return "open", ""
    now = record_of(stage, run_folder)
    differing = [name for name in now.inputs if record.inputs.get(name) != now.inputs[name]]
    if differing:
        return "other", f"another {differing[0]} than is there now"
    if record.recipe != now.recipe:
        return "other", "other options than are given now"
    if done is None or not all((stage.folder / name).exists() for name in stage.outputs):
        return "open", ""
    return "done", ""


def checksum(path: Path) -> str:
    """Of a file, or of all files in a folder with their names."""
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            if file.suffix not in _WEIGHTS or file.stat().st_size <= _WHOLE_BYTES:
                while block := content.read(_END_BYTES):
                    digest.update(block)
            else:
                digest.update(content.read(_END_BYTES))
                content.seek(-_END_BYTES, 2)
                digest.update(content.read())
    return digest.hexdigest()[:32]


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def _name(path: Path, run_folder: Path) -> str:
    return str(path.relative_to(run_folder) if path.is_relative_to(run_folder) else path)
