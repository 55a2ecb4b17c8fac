"""Checkpoints: whole or passed over, the same state back on any number of ranks, errors told."""

import copy
import multiprocessing
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from trainer import checkpoint_writing
from trainer.checkpoint_writing import CheckpointError, assign_owners
from trainer.checkpoints import CheckpointStore, RunState, restore_optimizer, restore_reference
from trainer.config import ShardingOptions
from trainer.fsdp import World, full_tensors, weights_checksum
from trainer.model_loading import load_model, open_model, read_weights, stored_files
from trainer.policy import Policy
from trainer.presets import PRESETS
from trainer.testing import bigram_model, bigram_tokenizer
from trainer.weight_update import make_optimizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
CONFIG = PRESETS["r1-zero-tiny"][1]


def state_of(step: int) -> RunState:
    return RunState(
        step=step, problems=8 * step, log_bytes=0, sampler_step=step, weights="", config=""
    )


def train(policy: Policy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Makes updates of each element by itself, whatever part of a tensor it is in."""
    for step in steps:
        for _, weight in policy.weights():
            weight.grad = weight.detach() * (step + 1)
        optimizer.step()


def trained_policy(steps: int = 3) -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(bigram_model(noise=0.1))
    optimizer = make_optimizer(policy, CONFIG.optimizer)
    train(policy, optimizer, range(steps))
    return policy, optimizer


def tiny_mixtral() -> MixtralForCausalLM:
    """Its files hold every expert's weights apart, its layers those of all experts together."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=22,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    made = CheckpointStore(tmp_path, keep=2, world=ALONE)
    yield made
    made.close(unexpected)


def save_steps(store: CheckpointStore, steps: list[int]) -> None:
    policy, optimizer = trained_policy()
    reference = Policy(bigram_model(noise=0.5))
    for step in steps:
        store.save(state_of(step), policy, optimizer, reference, bigram_tokenizer())
    store.wait()


def unexpected(sentence: str) -> None:
    raise AssertionError(sentence)


def test_newest_checkpoints_are_kept(store: CheckpointStore) -> None:
    save_steps(store, [2, 4, 10])
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00004", "step-00010"]
    assert store.latest(unexpected) == store.path(10)
    assert RunState.read(store.path(10)) == state_of(10)


def test_checkpoint_holds_a_model_that_transformers_loads(store: CheckpointStore) -> None:
    save_steps(store, [1])
    folder = store.path(1) / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    token_ids = AutoTokenizer.from_pretrained(folder)("User: 1", return_tensors="pt").input_ids
    expected = trained_policy()[0].model.state_dict()
    assert loaded.dtype == torch.float32
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert loaded(token_ids).logits.isfinite().all()


def test_model_with_regrouped_weights_is_saved_as_its_own_files_are(
    store: CheckpointStore, tmp_path: Path
) -> None:
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "expected")
    policy = Policy(model)
    store.save(
        state_of(1), policy, make_optimizer(policy, CONFIG.optimizer), None, bigram_tokenizer()
    )
    store.wait()
    ours = load_file(store.path(1) / "model" / "model.safetensors")
    theirs = load_file(tmp_path / "expected" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def damages(path: Path) -> Iterator[tuple[str, bytes]]:
    """Contents that a file must not have, and what was done to it."""
    content = path.read_bytes()
    draw = random.Random(path.name)
    for cut in {0, len(content) - 1, draw.randrange(len(content))}:
        yield f"{path.name} cut to {cut} bytes", content[:cut]
    for place in {0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(4))}:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        yield f"{path.name} with a bit of byte {place} flipped", bytes(flipped)


def test_every_damage_to_every_file_is_found(store: CheckpointStore) -> None:
    save_steps(store, [2, 4])
    files = [path for path in store.path(4).rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "optimizer.safetensors",
        "reference.safetensors",
        "state.json",
        "checksums.json",
    }
    for path in files:
        content = path.read_bytes()
        for damage, damaged in damages(path):
            path.write_bytes(damaged)
            warnings: list[str] = []
            assert store.latest(warnings.append) == store.path(2), damage
            assert len(warnings) == 1 and "step-00004 is damaged" in warnings[0]
        path.unlink()
        assert store.latest(warnings.append) == store.path(2), path
        path.write_bytes(content)
    assert store.latest(unexpected) == store.path(4)


def test_damaged_checkpoint_is_replaced_by_its_next_save(store: CheckpointStore) -> None:
    save_steps(store, [4])
    (store.path(4) / "optimizer.safetensors").unlink()
    assert store.latest(lambda sentence: None) is None
    save_steps(store, [4])
    assert store.latest(unexpected) == store.path(4)


def test_unfinished_checkpoint_does_not_count(store: CheckpointStore) -> None:
    save_steps(store, [2])
    store.path(2).rename(store.folder / ".step-00004.partial")
    assert store.latest(unexpected) is None
    save_steps(store, [4])
    assert [path.name for path in store.folder.iterdir()] == ["step-00004"]


def test_checkpoint_holds_the_weights_of_its_step_though_they_change_while_it_is_written(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, save_file = threading.Event(), checkpoint_writing.save_file

    def slow_save_file(*arguments: object, **keywords: object) -> None:
        assert may_write.wait(60)
        save_file(*arguments, **keywords)

    monkeypatch.setattr(checkpoint_writing, "save_file", slow_save_file)
    policy, optimizer = trained_policy()
    expected = {name: weight.detach().clone() for name, weight in policy.weights()}
    assert store.save(state_of(1), policy, optimizer, None, bigram_tokenizer()) == 0
    train(policy, optimizer, range(2))
    assert not store.path(1).exists()
    threading.Timer(0.2, may_write.set).start()
    # The second write waits for the first.
    assert store.save(state_of(2), policy, optimizer, None, bigram_tokenizer()) > 0.1
    assert store.path(1).exists()
    saved = load_file(store.path(1) / "model" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    store.wait()


def test_last_checkpoint_is_the_same_and_takes_no_copies(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, optimizer = trained_policy()
    own = {tensor.data_ptr() for _, tensor in policy.weights()}
    own |= {tensor.data_ptr() for state in optimizer.state.values() for tensor in state.values()}
    save_file, foreign = checkpoint_writing.save_file, []

    def watched(tensors: dict[str, torch.Tensor], *arguments: Any, **keywords: Any) -> None:
        foreign.append([name for name, each in tensors.items() if each.data_ptr() not in own])
        save_file(tensors, *arguments, **keywords)

    monkeypatch.setattr(checkpoint_writing, "save_file", watched)
    for step, is_last in ((1, False), (2, True)):
        store.save(state_of(step), policy, optimizer, None, bigram_tokenizer(), is_last=is_last)
        store.wait()
    assert all(foreign[:2]) and not any(foreign[2:])
    for name in ("model/model.safetensors", "optimizer.safetensors"):
        copied, taken = (load_file(store.path(step) / name) for step in (1, 2))
        assert copied.keys() == taken.keys()
        assert all(torch.equal(copied[key], taken[key]) for key in copied)


@pytest.mark.parametrize("told_by", ["check", "wait", "save", "close"])
def test_failed_write_is_told_in_one_sentence(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writing, "save_file", full)
    policy, optimizer = trained_policy()
    store.save(state_of(1), policy, optimizer, None, bigram_tokenizer())
    sentence = f"{store.path(1)} could not be written (No space left on device)"
    if told_by == "close":
        told: list[str] = []
        store.close(told.append)
        assert told == [sentence]
        return
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        if told_by == "save":
            store.save(state_of(2), policy, optimizer, None, bigram_tokenizer())
        while told_by == "check":
            store.check()
        store.wait()
    assert not store.path(1).exists()


def test_owners_have_shares_of_like_size() -> None:
    draw = random.Random(0)
    sizes = {f"layer{index}": draw.randrange(1, 100) for index in range(40)} | {"embedding": 400}
    owners = assign_owners(sizes, 4)
    shares = [sum(sizes[name] for name in sizes if owners[name] == rank) for rank in range(4)]
    assert sum(shares) == sum(sizes.values())
    # No share can be under the largest tensor, nor differ from the mean by more than the next one.
    assert max(shares) <= max(400, sum(shares) / 4 + 100)


def filled_policy(source: Path, world: World, sharding: ShardingOptions) -> Policy:
    model, stored = open_model(str(source), report=unexpected)
    assert stored is not None
    policy = Policy(model)
    policy.shard(world, torch.float32, sharding)
    read_weights(policy, model, stored, world.device)
    return policy


def two_steps(inputs: Path, run: Path, world: World, sharding: ShardingOptions) -> None:
    """Goes on from the newest checkpoint, or starts; saves after each of two steps."""
    store = CheckpointStore(run, keep=5, world=world)
    newest = store.latest(unexpected)
    policy = filled_policy(newest / "model" if newest else inputs / "untied", world, sharding)
    reference = filled_policy(inputs / "other", world, sharding)
    # Fused, it rounds the elements at the end of a part in another way than those before.
    optimizer, done = torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=False), 0
    if newest is not None:
        restore_optimizer(newest, policy, optimizer)
        restore_reference(newest, reference)
        state = RunState.read(newest)
        assert weights_checksum(world, policy.weights()) == state.weights
        done = state.step
    for step in (done + 1, done + 2):
        train(policy, optimizer, range(step, step + 1))
        # It has to come back from the checkpoint: `other` is read again by a new start.
        train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), range(step, step + 1))
        state = replace(state_of(step), weights=weights_checksum(world, policy.weights()))
        store.save(state, policy, optimizer, reference, bigram_tokenizer())
    store.wait()
    store.close(unexpected)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in path.rglob("*.safetensors"):
        kind = file.name.partition("-")[0].partition(".")[0]
        tensors |= {f"{kind}/{name}": tensor for name, tensor in load_file(file).items()}
    return tensors


def check_rank(rank: int, ranks: int, sharding: ShardingOptions, inputs: Path, run: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(run.with_suffix(f".{ranks}")), ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    world = World(rank=rank, size=ranks, device=torch.device("cpu"))
    # Only a head of its own can be sharded.
    for kind, options in (("tied", replace(sharding, shard_head=False)), ("untied", sharding)):
        policy = filled_policy(inputs / kind, world, options)
        check_same_model(policy, load_model(str(inputs / kind)))
    two_steps(inputs, run, world, sharding)
    dist.destroy_process_group()


def check_same_model(policy: Policy, expected: PreTrainedModel) -> None:
    """Bits of weights and buffers, and which names share a weight."""
    ours, theirs = dict(full_tensors(policy.weights())), dict(expected.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    buffers = dict(policy.model.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in expected.named_buffers())
    head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == expected.config.tie_word_embeddings


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose vocabulary, 21, divides by no number of ranks."""
    folder = tmp_path_factory.mktemp("inputs")
    untied = bigram_model(noise=0.1)
    untied.save_pretrained(folder / "untied")
    bigram_model(noise=0.3, seed=1).save_pretrained(folder / "other")
    config = copy.deepcopy(untied.config)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder / "tied")
    return folder


def test_run_goes_on_with_the_same_bits_on_other_numbers_of_ranks(
    inputs: Path, tmp_path: Path
) -> None:
    alone = ShardingOptions()
    two_steps(inputs, tmp_path / "alone", ALONE, alone)
    two_steps(inputs, tmp_path / "alone", ALONE, alone)
    two_steps(inputs, tmp_path / "alone", ALONE, alone)
    multiprocessing.set_forkserver_preload(["trainer.setup_run"])
    for ranks, sharding in (
        (2, ShardingOptions(shard_head=True)),
        (4, ShardingOptions(replicate=2)),
    ):
        mp.start_processes(
            check_rank,
            args=(ranks, sharding, inputs, tmp_path / "run"),
            nprocs=ranks,
            start_method="forkserver",
        )
    two_steps(inputs, tmp_path / "run", ALONE, alone)
    for step in range(1, 7):
        ours, theirs = (
            read_checkpoint(tmp_path / run / "checkpoints" / f"step-{step:05d}")
            for run in ("run", "alone")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), step
    shared = tmp_path / "run" / "checkpoints" / "step-00002"
    sizes = [file.stat().st_size for file in sorted(shared.glob("optimizer*"))]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)
    loaded = AutoModelForCausalLM.from_pretrained(shared / "model").state_dict()
    stored = read_checkpoint(shared)
    assert loaded.keys() == {name for name in loaded if f"model/{name}" in stored}
    assert all(torch.equal(loaded[name], stored[f"model/{name}"]) for name in loaded)


def test_model_filled_in_parts_is_the_model_transformers_loads(inputs: Path) -> None:
    for kind in ("tied", "untied"):
        model, stored = open_model(str(inputs / kind), report=unexpected)
        assert stored is not None and all(each.is_meta for each in model.parameters())
        read_weights(model, model, stored, ALONE.device)
        expected = load_model(str(inputs / kind))
        check_same_model(Policy(model), expected)
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_snapshot_of_the_hub_is_read_in_parts(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--name"
    load_model(str(inputs / "untied")).save_pretrained(
        repository / "snapshots" / "abc", max_shard_size="5KB"
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, stored = open_model("owner/name", report=unexpected)
    assert stored is not None and len(stored_files("owner/name")) > 1
    read_weights(model, model, stored, ALONE.device)
    check_same_model(Policy(model), load_model(str(inputs / "untied")))


@pytest.mark.parametrize("why", ["regrouped", "no_safetensors", "other_name"])
def test_files_that_do_not_hold_the_parameters_are_loaded_whole_and_it_is_said(
    tmp_path: Path, why: str
) -> None:
    folder = tmp_path / "model"
    if why == "regrouped":
        tiny_mixtral().save_pretrained(folder)
    else:
        bigram_model().save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if why == "no_safetensors":
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            # As a base model without its head is stored.
            names = {name: name.removeprefix("model.") for name in weights}
            save_file(
                {names[name]: weight for name, weight in weights.items()},
                folder / "model.safetensors",
                metadata={"format": "pt"},
            )
    reports: list[str] = []
    model, stored = open_model(str(folder), report=reports.append)
    assert stored is None and len(reports) == 1 and str(folder) in reports[0]
    expected = load_model(str(folder)).state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in model.state_dict().items())
