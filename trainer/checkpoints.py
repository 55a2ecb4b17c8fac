"""Checkpoints of a run, whole or not at all.

`checkpoints/step-00020/` holds `model/` (a Hugging Face folder with the tokenizer, weights in
float32), `optimizer.safetensors`, `reference.safetensors` where there is a reference model,
`state.json` and `checksums.json`. Tensors are whole, so a run may go on with another number of
ranks. A checkpoint is written under another name, flushed to disk and renamed; one that does not
match its checksums is passed over. Random numbers derive from seed and step (`trainer.seeds`), so
no generator is saved.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.durable import flush_to_disk
from trainer.fsdp import World, from_main_rank, full_tensors, shard_like
from trainer.policy import Policy

FOLDER = "checkpoints"
MODEL = "model"
OPTIMIZER_FILE = "optimizer.safetensors"
REFERENCE_FILE = "reference.safetensors"
STATE_FILE = "state.json"
CHECKSUMS_FILE = "checksums.json"

_NAME = re.compile(r"step-(\d{5,})")


class CheckpointStore:
    """The checkpoints of one run directory.

    Args:
        run_folder: of the run.
        keep: newest checkpoints kept.
        world: all ranks take part in saving; the main rank writes.
    """

    def __init__(self, run_folder: Path, *, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = run_folder / FOLDER, keep, world

    def latest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that matches its checksums; `warn` gets a sentence for each that
        does not."""
        for path in reversed(self._paths()):
            damage = _damage(path)
            if damage is None:
                return path
            warn(f"{path} is damaged ({damage}); going on without it")
        return None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:05d}"

    def save(
        self,
        step: int,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        reference: Policy | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Writes the checkpoint of a completed step and drops the oldest ones.

        Collectives: one all-gather per sharded tensor, and one broadcast.
        """
        path = self.path(step)
        weights = self._collect(_distinct_state(policy))
        moments = self._collect(_optimizer_state(policy, optimizer))
        references = self._collect(reference.weights()) if reference is not None else {}

        def write() -> None:
            temporary = path.with_name(f".{path.name}.partial")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            policy.model.save_pretrained(temporary / MODEL, state_dict=weights)
            tokenizer.save_pretrained(temporary / MODEL)
            save_file(moments, temporary / OPTIMIZER_FILE)
            if reference is not None:
                save_file(references, temporary / REFERENCE_FILE)
            (temporary / STATE_FILE).write_text(json.dumps({"step": step}) + "\n")
            _publish(temporary, path)
            for old in self._paths()[: -self.keep]:
                shutil.rmtree(old)

        from_main_rank(self.world, write)

    def _collect(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors in host memory on the main rank; nothing on the others."""
        whole = {}
        for name, tensor in full_tensors(named):
            if self.world.is_main:
                whole[name] = tensor.cpu().contiguous()
        return whole

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def restore_optimizer(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer the state it had, each rank its part."""
    with safe_open(checkpoint / OPTIMIZER_FILE, framework="pt") as stored:
        names = set(stored.keys())
        for name, parameter in policy.weights():
            state = {}
            for entry in ("step", "exp_avg", "exp_avg_sq"):
                if f"{entry}/{name}" in names:
                    # Cloned out of the mapped file, for the alignment that fresh memory has.
                    value = stored.get_tensor(f"{entry}/{name}").clone()
                    state[entry] = value if entry == "step" else shard_like(value, parameter)
            if state:
                optimizer.state[parameter] = state


def restore_reference(checkpoint: Path, reference: Policy) -> None:
    """Gives the reference model the weights it had, each rank its part."""
    with safe_open(checkpoint / REFERENCE_FILE, framework="pt") as stored, torch.no_grad():
        for name, parameter in reference.weights():
            parameter.copy_(shard_like(stored.get_tensor(name), parameter))


def _distinct_state(policy: Policy) -> list[tuple[str, Tensor]]:
    """The model's state without the second names of tied weights."""
    every = {name for name, _ in policy.model.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in policy.weights()}
    state = policy.model.state_dict()
    return [(name, tensor) for name, tensor in state.items() if name not in tied]


def _optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        (f"{entry}/{name}", value)
        for name, parameter in policy.weights()
        for entry, value in optimizer.state[parameter].items()
    ]


def _publish(temporary: Path, path: Path) -> None:
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    checksums = {str(file.relative_to(temporary)): _checksum(file) for file in files}
    (temporary / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2) + "\n")
    for written in (*temporary.rglob("*"), temporary):
        flush_to_disk(written)
    # Only a checkpoint found damaged can stand in the way.
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    flush_to_disk(path.parent)


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        checksums = json.loads((path / CHECKSUMS_FILE).read_text())
    except (OSError, ValueError):
        return f"{CHECKSUMS_FILE} cannot be read"
    for name, expected in checksums.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _checksum(file) != expected:
            return f"{name} does not match its checksum"
    return None
