"""Checkpoints: whole or passed over, and the same state back."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.attention import Packing
from trainer.checkpoints import (
    CheckpointStore,
    restore_optimizer,
    restore_reference,
)
from trainer.fsdp import World
from trainer.model_loading import load_model
from trainer.policy import Policy
from trainer.policy_update import make_optimizer
from trainer.presets import PRESETS
from trainer.testing import bigram_model, bigram_tokenizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
CONFIG = PRESETS["r1-zero-tiny"][1]
THREE = Packing.of_lengths([3], ALONE.device)


def trained_policy(steps: int = 3) -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(bigram_model(noise=0.1))
    optimizer = make_optimizer(policy, CONFIG)
    for step in range(steps):
        policy.model(
            torch.tensor([[1, 2, 3 + step]]), packing=THREE
        ).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy, optimizer


def save_steps(folder: Path, steps: list[int], keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(folder, keep=keep, world=ALONE)
    policy, optimizer = trained_policy()
    for step in steps:
        store.save(step, policy, optimizer, None, bigram_tokenizer())
    return store


def unexpected(sentence: str) -> None:
    raise AssertionError(sentence)


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    store = save_steps(tmp_path, [2, 4, 10])
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00004", "step-00010"]
    assert store.latest(unexpected) == store.path(10)


def test_restored_state_makes_the_same_next_update_bit_for_bit(tmp_path: Path) -> None:
    policy, optimizer = trained_policy()
    store = CheckpointStore(tmp_path, keep=1, world=ALONE)
    reference = Policy(bigram_model(noise=0.5)).requires_grad_(False)
    store.save(3, policy, optimizer, reference, bigram_tokenizer())
    restored = Policy(load_model(str(store.path(3) / "model")))
    restored_optimizer = make_optimizer(restored, CONFIG)
    restore_optimizer(store.path(3), restored, restored_optimizer)
    for each, using in ((policy, optimizer), (restored, restored_optimizer)):
        each.model(torch.tensor([[5, 6, 7]]), packing=THREE).logits.square().mean().backward()
        using.step()
    for ours, theirs in zip(policy.weights(), restored.weights(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    other_reference = Policy(bigram_model())
    restore_reference(store.path(3), other_reference)
    for ours, theirs in zip(reference.weights(), other_reference.weights(), strict=True):
        assert torch.equal(ours[1], theirs[1])


def test_checkpoint_holds_a_model_that_transformers_loads(tmp_path: Path) -> None:
    store = save_steps(tmp_path, [1])
    folder = store.path(1) / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    token_ids = AutoTokenizer.from_pretrained(folder)("User: 1", return_tensors="pt").input_ids
    packing = Packing.of_lengths([token_ids.shape[1]], ALONE.device)
    expected = trained_policy()[0].model(token_ids, packing=packing).logits
    assert torch.allclose(loaded(token_ids).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no_checksums", "empty"])
def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, damage: str
) -> None:
    store = save_steps(tmp_path, [2, 4])
    weights = store.path(4) / "model" / "model.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-100])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        (store.path(4) / "optimizer.safetensors").unlink()
    elif damage == "no_checksums":
        (store.path(4) / "checksums.json").unlink()
    else:
        (store.path(4) / "checksums.json").write_text("")
    warnings: list[str] = []
    assert store.latest(warnings.append) == store.path(2)
    assert len(warnings) == 1 and "step-00004" in warnings[0] and "damaged" in warnings[0]
    policy, optimizer = trained_policy()
    store.save(4, policy, optimizer, None, bigram_tokenizer())
    assert store.latest(unexpected) == store.path(4)


def test_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    store = save_steps(tmp_path, [2])
    store.path(2).rename(store.folder / ".step-00004.partial")
    assert store.latest(unexpected) is None
    policy, optimizer = trained_policy()
    store.save(4, policy, optimizer, None, bigram_tokenizer())
    assert [path.name for path in store.folder.iterdir()] == ["step-00004"]


def test_checksums_name_every_file(tmp_path: Path) -> None:
    folder = save_steps(tmp_path, [1]).path(1)
    named = set(json.loads((folder / "checksums.json").read_text()))
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert named == files - {"checksums.json"}
