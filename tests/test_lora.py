"""LoRA: gradients, merged weights and reference against independent computations, any sharding,
exact resume, and folders that peft and transformers load."""

import copy
import dataclasses
import importlib.util
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from ranks import spawn_ranks
from test_resume import assert_same_run, die, draw_kill, finish, inputs, lines_of, start  # noqa: F401
from test_resume import flags as resume_flags
from test_trainer_checkpoints import state_of, tiny_mixtral, unexpected
from test_trainer_memory import CONFIGS, kept_by_autograd, plan, real_model, size
from test_trainer_policy_update import SAMPLES, GradientRecorder, make_config, plain_gradient
from test_trainer_run import Main, main_here  # noqa: F401
from test_trainer_sharding import config as sharding_config
from test_trainer_sharding import samples as sharding_samples
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from trainer.checkpoints import CheckpointStore
from trainer.config import (
    LoraOptions,
    LossOptions,
    ShardingOptions,
    TrainConfig,
    UsageError,
)
from trainer.fsdp import World, full_tensors
from trainer.lora import Adapters
from trainer.policy import Policy
from trainer.policy_update import PolicyUpdate
from trainer.run_log import read_metrics
from trainer.stored_tensors import local_part, local_slices
from trainer.testing import bigram_model, bigram_tokenizer
from trainer.weight_update import make_optimizer

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
OPTIONS = LoraOptions(lora_rank=4, lora_alpha=6)
KL = LossOptions(loss="grpo", kl="k3", kl_weight=0.05)


def adapted(
    model: PreTrainedModel, options: LoraOptions = OPTIONS, *, trained: bool = True
) -> tuple[Policy, Adapters]:
    """A policy with new adapters, or such as training leaves, where B is not zero."""
    adapters = Adapters(model, options)
    adapters.initialise(seed=0)
    if trained:
        fill_b(adapters)
    return Policy(model, adapters), adapters


@torch.no_grad()
def fill_b(adapters: Adapters) -> None:
    """Gives B values that are not zero, the same however it is sharded."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapters.state():
        if "lora_B" in name:
            whole = torch.randn(weight.shape, generator=generator) * 0.1
            local_part(weight).copy_(whole[local_slices(weight)])


def merged_by_hand(model: LlamaForCausalLM, adapters: Adapters) -> LlamaForCausalLM:
    """A model of the merged weights, in float64, which knows no adapters."""
    model, scale = copy.deepcopy(model).double(), 6 / 4
    state = {name: weight.detach().double() for name, weight in adapters.state()}
    for name, weight in model.named_parameters():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in state:
            update = state[f"{prefix}.lora_B.weight"] @ state[f"{prefix}.lora_A.weight"]
            weight.data += scale * update
    return model


@pytest.mark.parametrize("budget", [40, 10**6], ids=["some", "all_at_once"])
def test_gradient_follows_from_that_of_the_merged_weights(budget: int) -> None:
    config = make_config(
        LossOptions(loss="grpo"), micro_batch_tokens=budget, max_grad_norm=1e9, weight_decay=0.1
    )
    base = bigram_model(noise=0.1)
    policy, adapters = adapted(copy.deepcopy(base))
    merged = merged_by_hand(base, adapters)
    flat = plain_gradient(merged, config.loss_spec, SAMPLES)
    sizes = [weight.numel() for weight in merged.parameters()]
    by_weight = dict(zip(dict(merged.named_parameters()), flat.split(sizes), strict=True))
    update = PolicyUpdate(policy, None, make_optimizer(policy, config.optimizer), config, ALONE)
    assert [len(group["params"]) for group in update.optimizer.param_groups] == [2 * 2 * 7]
    recorder = GradientRecorder(policy)
    recorder.param_groups = update.optimizer.param_groups
    update.optimizer = recorder
    metrics = update(SAMPLES, step=1)
    expected = []
    state = {name: weight.detach().double() for name, weight in adapters.state()}
    for name in adapters.layers:
        gradient_OI = by_weight[f"{name}.weight"]
        matrix_RI, matrix_OR = (
            state[f"base_model.model.{name}.{matrix}.weight"] for matrix in ("lora_A", "lora_B")
        )
        gradient_OI = gradient_OI.view(len(matrix_OR), -1)
        expected.append(1.5 * matrix_OR.T @ gradient_OI)
        expected.append(1.5 * gradient_OI @ matrix_RI.T)
    flat_expected = torch.cat([each.flatten() for each in expected])
    error = (recorder.gradients[0] - flat_expected).norm() / flat_expected.norm()
    # As for all weights: float32 sums of a few hundred terms.
    assert error < 1e-5
    assert metrics["grad_norm"] == pytest.approx(flat_expected.norm().item(), rel=1e-5)
    # Nothing learns of the head, so the gate has nothing to compare there.
    assert "parity/hidden_gradient" in metrics and "parity/weight_gradient" not in metrics


def test_update_changes_adapters_alone() -> None:
    policy, adapters = adapted(bigram_model(noise=0.1))
    config = make_config(KL, weight_decay=0.1)
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    PolicyUpdate(policy, None, make_optimizer(policy, config.optimizer), config, ALONE)(
        SAMPLES, step=1
    )
    trained = dict(policy.trained())
    assert len(trained) == len(dict(adapters.state()))
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, before[name]) != (name in trained), name
        assert (weight.grad is None) or name in trained


def test_new_adapters_change_nothing_and_follow_the_seed() -> None:
    base = bigram_model(noise=0.1)
    first, second, other = (copy.deepcopy(base) for _ in range(3))
    policy, adapters = adapted(first, trained=False)
    assert all(
        torch.equal(weight, expected)
        for (_, weight), expected in zip(policy.weights(), base.parameters(), strict=True)
    )
    again = dict(adapted(second, trained=False)[1].state())
    differently = Adapters(other, OPTIONS)
    differently.initialise(seed=1)
    for name, weight in adapters.state():
        assert torch.equal(weight, again[name])
        if "lora_A" in name:
            assert not torch.equal(weight, dict(differently.state())[name])
            # Uniform, with the variance of a layer that keeps that of its inputs to a third.
            assert weight.abs().max() <= weight.shape[1] ** -0.5
            assert weight.std().item() == pytest.approx((3 * weight.shape[1]) ** -0.5, rel=0.2)


def test_reference_is_the_base_bit_for_bit() -> None:
    base = bigram_model(noise=0.1)
    config = make_config(KL)
    policy, _ = adapted(copy.deepcopy(base))
    plain = Policy(base)
    of_adapted = PolicyUpdate(policy, None, make_optimizer(policy, config.optimizer), config, ALONE)
    of_base = PolicyUpdate(plain, None, make_optimizer(plain, config.optimizer), config, ALONE)
    expected = of_base._logprobs(plain, SAMPLES)
    moved = of_adapted._logprobs(policy, SAMPLES)
    reference = of_adapted._ref_logprobs(SAMPLES)
    assert reference is not None
    for ours, theirs, adapted_logprobs in zip(reference, expected, moved, strict=True):
        assert (ours == theirs).all() and (adapted_logprobs != theirs).any()
    # A loss with a reference model of its own says the same of the KL.
    own = PolicyUpdate(policy, plain, make_optimizer(policy, config.optimizer), config, ALONE)
    states = copy.deepcopy(policy.state_dict())
    metrics = own(SAMPLES, step=1)
    policy.load_state_dict(states)
    assert metrics == of_adapted(SAMPLES, step=1) and metrics["kl"]


def tied_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return real_model("llama")


MODELS = {"untied": lambda: bigram_model(noise=0.1), "tied": tied_model, "regrouped": tiny_mixtral}


@pytest.mark.parametrize("kind", MODELS)
def test_folders_load_in_transformers_and_peft(kind: str, tmp_path: Path) -> None:
    base = MODELS[kind]()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy, _ = adapted(copy.deepcopy(base))
    config = make_config(KL)
    store = CheckpointStore(tmp_path, keep=1, world=ALONE)
    store.save(
        state_of(1), policy, make_optimizer(policy, config.optimizer), None, bigram_tokenizer()
    )
    store.wait()
    store.close(unexpected)
    exported = AutoModelForCausalLM.from_pretrained(store.path(1) / "model")
    ours = exported.state_dict()
    with_adapter = PeftModel.from_pretrained(base, store.path(1) / "adapter")
    token_ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        apart, expected = with_adapter(token_ids).logits, exported(token_ids).logits
    assert torch.allclose(apart, expected, rtol=1e-4, atol=1e-4)
    merged = with_adapter.merge_and_unload().state_dict()
    assert ours.keys() == merged.keys()
    assert all(torch.equal(ours[name], merged[name]) for name in ours)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert not all(torch.equal(ours[name], start[name]) for name in ours)


def lora_config(sharding: ShardingOptions, micro_batch_tokens: int, rank: int) -> TrainConfig:
    made = sharding_config(sharding, micro_batch_tokens)
    optimizer = dataclasses.replace(made.optimizer, learning_rate=1e-2)
    lora = LoraOptions(lora_rank=rank, lora_alpha=rank)
    return dataclasses.replace(made, optimizer=optimizer, lora=lora)


def fresh(world: World, options: TrainConfig) -> tuple[Policy, Adapters]:
    model = bigram_model(noise=0.2)
    adapters = Adapters(model, options.lora)
    policy = Policy(model, adapters)
    policy.shard(world, torch.float32, options.sharding)
    adapters.initialise(seed=3)
    fill_b(adapters)
    return policy, adapters


def whole_state(policy: Policy, adapters: Adapters) -> dict[str, Tensor]:
    """Adapters and merged weights."""
    named = itertools.chain(adapters.state(), policy.weights())
    return {name: weight.clone() for name, weight in full_tensors(named)}


def update(world: World, options: TrainConfig) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`whole_state` after one step of two updates, and its metrics."""
    policy, adapters = fresh(world, options)
    # AdamW would turn the rounding of a gradient near zero into a step of full size.
    optimizer = torch.optim.SGD([weight for _, weight in policy.trained()])
    metrics = PolicyUpdate(policy, None, optimizer, options, world)(sharding_samples(), step=1)
    # What the parity gate measures is rounding, of tokens that each rank draws for itself.
    kept = {name: metrics[name] for name in metrics if not name.startswith("parity/")}
    return whole_state(policy, adapters), kept


SHARDINGS = {
    "fsdp": ShardingOptions(),
    "hsdp": ShardingOptions(replicate=2),
    "head": ShardingOptions(shard_head=True),
    "checkpointing": ShardingOptions(activation_checkpointing=True),
}


def check_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    world = World(rank=rank, size=2, device=CPU)
    for name, sharding in SHARDINGS.items():
        # A of one row leaves the other rank nothing of it.
        for lora_rank in (1, 3):
            result = update(world, lora_config(sharding, 40, lora_rank))
            if rank == 0:
                torch.save(result, f"{folder}/{name}-{lora_rank}")
    dist.destroy_process_group()


def test_two_ranks_are_one_rank_up_to_rounding(tmp_path: Path) -> None:
    spawn_ranks(check_rank, 2, str(tmp_path))
    for lora_rank in (1, 3):
        options = lora_config(ShardingOptions(), 10**6, lora_rank)
        start, (alone, expected_metrics) = (
            whole_state(*fresh(ALONE, options)),
            update(ALONE, options),
        )
        assert not any(torch.equal(alone[name], start[name]) for name in start if "lora_" in name)
        for sharding in SHARDINGS:
            weights, metrics = torch.load(tmp_path / f"{sharding}-{lora_rank}")
            assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6), sharding
            for name, expected in alone.items():
                # Rounding of the weights themselves, and of sums of gradients in another order.
                bound = 1e-7 * expected.norm() + 1e-5 * (expected - start[name]).norm()
                assert (weights[name] - expected).norm() <= bound, (sharding, name)


def flags(inputs: Path, run_dir: Path, **changed: Any) -> list[str]:  # noqa: F811
    """A run with adapters, a reference, minibatches, evaluation."""
    kept = [flag for flag in resume_flags(inputs, run_dir) if "reference-reset" not in flag]
    added = {"lora_rank": 4, **changed}
    return [*kept, *(f"--{name.replace('_', '-')}={value}" for name, value in added.items())]


def test_two_ranks_killed_in_an_update_end_with_the_same_bits(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(flags(inputs, whole), tmp_path / "of-whole", ranks=2), tmp_path / "of-whole")
    lines, draw = lines_of(tmp_path / "of-whole", 1), random.Random(0)
    record = tmp_path / "of-run"
    # After step 4 began to be saved, for which step 2 had to be on the disk.
    kill = draw_kill(draw, "update", 5, lines)
    die(start(flags(inputs, run), record, kill, ranks=2), record)
    assert list((run / "checkpoints").glob("step-*/adapter/adapter_model.safetensors"))
    finish(start(flags(inputs, run), record, ranks=2), record)
    assert_same_run(run, whole)
    assert (run / "adapter" / "adapter_config.json").exists()
    # Merged weights round in another way there; what is saved to go on from does not.
    alone = tmp_path / "alone"
    finish(start(flags(inputs, run, steps=7), alone), alone)
    records = read_metrics(run)
    assert records[-1]["step"] == 7
    # The sampler has the adapters: it agrees with the trainer, which has left the reference.
    assert all(each["sampler/logprob_gap_mean"] < 1e-5 for each in records[1:])
    assert records[-1]["kl"] > 1e-4


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"lora_rank": -1}, "--lora-rank: expected a number >= 0, got -1"),
        ({"lora_alpha": 0}, "--lora-alpha: expected a number >= 1, got 0"),
        (
            {"lora_rank": 0, "lora_targets": "q_proj"},
            "--lora-targets: expected --lora-rank above 0 with it, got 0",
        ),
        (
            {"lora_targets": "lm_head"},
            "--lora-targets: expected linear layers of the decoder (down_proj, gate_proj, k_proj, "
            "o_proj, q_proj, up_proj, v_proj), got lm_head",
        ),
        (
            {"reference_reset_every": 2},
            "--reference-reset-every: expected None with --lora-rank, whose reference is the "
            "model without adapters, got 2",
        ),
    ],
    ids=["rank", "alpha", "no_rank", "targets", "reset"],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    changed: dict[str, object],
    sentence: str,
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    main_here: Main,  # noqa: F811
) -> None:
    code, _, err = main_here(flags(inputs, tmp_path / "run", **changed))
    assert (code, err) == (2, f"error: {sentence}\n")


def test_missing_peft_is_told(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    main_here: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name)
    )
    code, _, err = main_here(flags(inputs, tmp_path / "run"))
    assert code == 2
    assert err == "error: --lora-rank: needs the package peft, pip install 'onepass-rl[lora]'\n"


def test_targets_are_those_named() -> None:
    options = LoraOptions(lora_rank=2, lora_targets=("q_proj", "v_proj"))
    _, adapters = adapted(bigram_model(), options)
    layers = [
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")
    ]
    assert list(adapters.layers) == layers
    with pytest.raises(UsageError, match="got router"):
        Adapters(bigram_model(), LoraOptions(lora_rank=2, lora_targets=("router",)))


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_plan_counts_adapters(name: str) -> None:
    policy, adapters = adapted(real_model(name))
    made = plan(name, lora=OPTIONS, loss=KL)
    trained = sum(weight.nbytes for _, weight in adapters.state())
    weights = sum(weight.nbytes for weight in policy.parameters())
    merged = sum(layer.base_layer.weight.nbytes for layer in adapters.layers.values())
    assert size(made, "gradients") == trained
    assert size(made, "optimizer") == 2 * trained
    assert size(made, "weights") == weights
    assert size(made, "reference") == size(made, "whole gradients") == 0
    assert size(made, "checkpoint being written") == weights + 2 * trained
    # The sampler's others are the policy's own.
    assert size(made, "sampler's weights") == merged
    assert size(made, "activations") == pytest.approx(kept_by_autograd(policy), rel=0.05)
