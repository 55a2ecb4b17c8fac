"""Checkpoints of a run, whole or not at all, written while the run goes on.

`checkpoints/step-00020/` holds `model/` (a Hugging Face folder with the tokenizer, weights in
float32), `optimizer*.safetensors`, `reference*.safetensors` where there is a reference model,
`adapter/` (a folder of peft's) where adapters are trained, which `model/` then has merged into it,
`state.json` and `checksums.json`. Every tensor is whole in the file of one rank, so a run may go on
with another number of ranks, and transformers and vLLM load the model as it is. Each rank copies
and writes its share; the files appear under another name and are renamed once all are on the disk
(`trainer.checkpoint_writing`). A checkpoint that does not match its checksums is passed over.
Random numbers derive from seed and step (`trainer.seeds`), so no generator is saved.
"""

import copy
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from trainer.checkpoint_writing import BackgroundWriter, assign_owners, damage, numbered_name
from trainer.config import UsageError
from trainer.fsdp import World, from_main_rank, full_tensors, gather_in_order
from trainer.lora import ADAPTER_FILE, Adapters, base_weights
from trainer.model_loading import has_other_names_on_disk
from trainer.policy import Policy
from trainer.stored_tensors import StoredTensors

FOLDER = "checkpoints"
MODEL, OPTIMIZER, REFERENCE, ADAPTER = "model", "optimizer", "reference", "adapter"
STATE_FILE = "state.json"

_NAME = re.compile(r"step-(\d{5,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run goes on from, besides tensors; `state.json`."""

    step: int
    """Completed steps: the version of the weights, and the place in the schedule."""
    problems: int
    """Problems drawn from the source: the place in the data."""
    log_bytes: int
    """Length of `metrics.jsonl`."""
    sampler_step: int
    """The step whose weights the sampler has."""
    weights: str
    """`trainer.fsdp.weights_checksum`."""
    config: str
    """`trainer.run_folder.config_fingerprint`."""

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """The state of a checkpoint.

        Raises:
            UsageError: another version of the program wrote it.
        """
        try:
            return cls(**json.loads((checkpoint / STATE_FILE).read_text()))
        except TypeError as error:
            raise UsageError(
                f"--run-dir: {checkpoint / STATE_FILE} is not of this version ({error})"
            ) from error


class CheckpointStore:
    """The checkpoints of one run directory, which every rank must see.

    All ranks call its methods together, but `path`, `steps` and `close`.

    Args:
        run_folder: of the run.
        keep: newest checkpoints kept.
        world: the ranks, which share the copies and the files.
    """

    def __init__(self, run_folder: Path, *, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = run_folder / FOLDER, keep, world
        self._writer = BackgroundWriter(world)
        # Kept from save to save, because copying into new memory takes several times as long.
        self._copies: dict[str, Tensor] = {}

    def latest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that matches its checksums, each rank having read its share of the
        files; `warn` gets a sentence, on the main rank, for each that does not.

        Collectives: one broadcast, and one all-gather for each checkpoint read.
        """
        for step in reversed(from_main_rank(self.world, self.steps)):
            path = self.path(step)
            damages = gather_in_order(self.world, [damage(path, self.world)])
            what = next(filter(None, damages), None)
            if what is None:
                return path
            if self.world.is_main:
                warn(f"{path} is damaged ({what}); going on without it")
        return None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:05d}"

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, in order."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(map(step_of, found))

    def needed_from(self) -> int:
        """The oldest step that a later start may have to go on from, should the newest checkpoint
        turn out damaged."""
        return ([0, 0, *self.steps()])[-2]

    def save(
        self,
        state: RunState,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        reference: Policy | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        is_last: bool = False,
    ) -> float:
        """Copies the state of a completed step; it is written in the background, and the oldest
        checkpoints are dropped after it.

        Args:
            is_last: nothing changes the state any more, so what is whole on the host is not copied.

        Returns: seconds it waited for the checkpoint before to be on the disk, 0 if it was.

        Raises:
            CheckpointError: that one could not be written.

        Collectives: one all-gather per sharded tensor, and a few small ones.
        """
        started, is_waiting = time.perf_counter(), not self._writer.is_idle
        self.wait()
        waited = time.perf_counter() - started if is_waiting else 0.0
        path = self.path(state.step)
        partial = path.with_name(f".{path.name}.partial")
        is_renamed = has_other_names_on_disk(policy.model)
        # Renaming may regroup weights, so it takes all of them.
        ranks = 1 if is_renamed else self.world.size
        sizes = _sizes((*base_weights(policy.model), *_buffers(policy)))
        owners = assign_owners(sizes, ranks)
        trained_owners = assign_owners(_sizes(policy.trained()), ranks)

        def prepare() -> None:
            for left in self.folder.glob(".*.partial"):
                shutil.rmtree(left)
            (partial / MODEL).mkdir(parents=True)
            (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
            # Here, because a tokenizer must not be used by two threads.
            tokenizer.save_pretrained(partial / MODEL)
            _write_model_files(partial / MODEL, policy, sum(sizes.values()), owners)
            if policy.adapters is not None:
                (partial / ADAPTER).mkdir()
                policy.adapters.write_config(partial / ADAPTER)

        from_main_rank(self.world, prepare)
        model = self._copy(MODEL, chain(policy.weights(), _buffers(policy)), owners, is_last)
        if is_renamed and model:
            restored = revert_weight_conversion(policy.model, model)
            model = {name: tensor.contiguous() for name, tensor in restored.items()}
        moments = _optimizer_state(policy, optimizer)
        moments_copy = self._copy(OPTIMIZER, moments, trained_owners, is_last)
        references = reference.weights() if reference else ()
        references_copy = self._copy(REFERENCE, references, owners, is_last)
        adapters = self._copy_adapters(policy.adapters, is_last)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        files = {
            _name_of_files(owned)(stem, self.world.rank): share
            for stem, share, owned in (
                (f"{MODEL}/{MODEL}", model, owners),
                (OPTIMIZER, moments_copy, trained_owners),
                (REFERENCE, references_copy, owners),
            )
            if share
        }
        if adapters:
            files[f"{ADAPTER}/{ADAPTER_FILE}"] = adapters
        self._writer.start(path, partial, files, self._drop_old)
        return waited

    def wait(self) -> None:
        """Waits until no checkpoint is being written.

        Raises:
            CheckpointError: it could not be written, on some rank.
        """
        self._writer.wait()

    def check(self) -> None:
        """Goes on at once, unless a checkpoint could not be written.

        Raises:
            CheckpointError: it could not, on some rank.
        """
        self._writer.check()

    def close(self, warn: Callable[[str], None]) -> None:
        """Waits on this rank until its part of the last checkpoint is written, also when the run
        ends with an error; `warn` gets a sentence if that fails."""
        self._writer.close(warn)

    def _copy(
        self,
        kind: str,
        named: Iterable[tuple[str, Tensor]],
        owners: Mapping[str, int],
        is_last: bool,
    ) -> dict[str, Tensor]:
        """This rank's share of whole tensors, as they are now, in host memory.

        Args:
            named: names that end, after a slash if there is one, in that of a weight.
            owners: rank of each weight.
            is_last: they stay as they are, so those on the host are taken themselves.
        """
        share = {}
        for name, tensor in full_tensors(named):
            if owners[name.rpartition("/")[2]] == self.world.rank:
                if is_last and tensor.device.type == "cpu" and tensor.is_contiguous():
                    share[name] = tensor
                    continue
                key = f"{kind}/{name}"
                if key not in self._copies:
                    self._copies[key] = torch.empty_like(
                        tensor, device="cpu", pin_memory=tensor.is_cuda
                    )
                share[name] = self._copies[key].copy_(tensor, non_blocking=True)
        return share

    def _copy_adapters(self, adapters: Adapters | None, is_last: bool) -> dict[str, Tensor]:
        """All of them on the main rank, since peft reads one file."""
        if adapters is None:
            return {}
        state = dict(adapters.state())
        return self._copy(ADAPTER, state.items(), dict.fromkeys(state, 0), is_last)

    def _drop_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            # Renamed first, so that one half removed does not count.
            doomed = self.folder / f".{self.path(step).name}.partial"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def restore_optimizer(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer the state it had, each rank reading its part."""
    stored = StoredTensors(checkpoint.glob(f"{OPTIMIZER}*.safetensors"))
    weights = dict(policy.trained())
    for key, shape in stored.shapes.items():
        entry, _, name = key.partition("/")
        weight = weights[name]
        value = torch.empty_like(weight) if shape else torch.empty((), device=weight.device)
        stored.read_into(key, value)
        optimizer.state[weights[name]][entry] = value


def restore_reference(checkpoint: Path, reference: Policy) -> None:
    """Gives the reference model the weights it had, each rank reading its part."""
    stored = StoredTensors(checkpoint.glob(f"{REFERENCE}*.safetensors"))
    for name, weight in reference.weights():
        stored.read_into(name, weight)


def restore_adapters(checkpoint: Path, adapters: Adapters) -> None:
    """Gives the adapters the weights they had, each rank reading its part."""
    adapters.restore(StoredTensors([checkpoint / ADAPTER / ADAPTER_FILE]))


def _write_model_files(
    folder: Path, policy: Policy, total_bytes: int, owners: Mapping[str, int]
) -> None:
    """What a Hugging Face folder holds besides tokenizer and tensors."""
    config = copy.deepcopy(policy.model.config)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    policy.model.generation_config.save_pretrained(folder)
    if len(set(owners.values())) > 1:
        name = _name_of_files(owners)
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {each: name(MODEL, owner) for each, owner in sorted(owners.items())},
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _name_of_files(owners: Mapping[str, int]) -> Callable[[str, int], str]:
    """Names of a rank's files; ranks that own nothing are not counted."""
    writers = sorted(set(owners.values()))
    return lambda stem, rank: numbered_name(stem, writers.index(rank), len(writers))


def _buffers(policy: Policy) -> list[tuple[str, Tensor]]:
    """What a file of the model holds besides weights."""
    saved = policy.model.state_dict().keys()
    return [(name, buffer) for name, buffer in policy.model.named_buffers() if name in saved]


def _sizes(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in named}


def _optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        (f"{entry}/{name}", value)
        for name, parameter in policy.trained()
        for entry, value in optimizer.state[parameter].items()
    ]
