"""The memory plan: its parts against bytes counted of real models, its limits, its refusals."""

import copy
import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_run import Main, assert_same_bits, flags, inputs, main_here  # noqa: F401
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM, AutoModelForSequenceClassification

from trainer import memory_check
from trainer.config import (
    DataOptions,
    LossOptions,
    OptimizerOptions,
    RolloutOptions,
    ShardingOptions,
    TrainConfig,
)
from trainer.fsdp import World
from trainer.memory_check import host_bytes_free, is_out_of_memory, peak_bytes, plan_table
from trainer.memory_parts import PHASES, MemoryPlan
from trainer.memory_plan import plan_memory
from trainer.packing import UpdateSample, pack_tokens
from trainer.policy import Policy
from trainer.presets import PRESETS
from trainer.rollout.growing_cache import GrowingLayer
from trainer.weight_update import make_optimizer

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
SIZES: dict[str, Any] = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),
}
SAMPLES = [
    UpdateSample(
        prompt_ids=[1] * 20,
        token_ids=torch.ones(29, dtype=torch.long).numpy(),
        sampler_logprobs=torch.zeros(29).numpy(),
        advantage=1.0,
    )
] * 8
# Their prompt is there once.
TOKENS = 20 + 8 * 28


def config(**changed: Any) -> TrainConfig:
    made = TrainConfig(
        preset="test",
        rollout=RolloutOptions(num_prompts=4, group_size=8, max_new_tokens=29),
        optimizer=OptimizerOptions(micro_batch_tokens=TOKENS),
        data=DataOptions(eval_problems=4),
    )
    return dataclasses.replace(made, **changed)


def plan(name: str, *, ranks: int = 1, device: str = "cpu", **changed: Any) -> MemoryPlan:
    return plan_memory(
        CONFIGS[name], config(**changed), ranks=ranks, device=device, prompt_tokens=20
    )


def size(made: MemoryPlan, name: str) -> int:
    return next(part.bytes for part in made.parts if part.name == name)


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def real_model(name: str) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32)


def test_weights_gradients_and_optimizer_are_those_of_a_step(name: str) -> None:
    policy = Policy(real_model(name))
    optimizer = make_optimizer(policy, config().optimizer)
    policy(
        pack_tokens(SAMPLES, CPU), lambda hidden, weight, bias: hidden @ weight.T
    ).sum().backward()
    optimizer.step()
    made = plan(name)
    weights = list(policy.parameters())
    moments = [
        value for state in optimizer.state.values() for value in state.values() if value.dim() > 0
    ]
    assert size(made, "weights") == sum(weight.nbytes for weight in weights)
    assert size(made, "gradients") == sum(weight.grad.nbytes for weight in weights)
    assert size(made, "optimizer") == sum(value.nbytes for value in moments)
    assert size(made, "checkpoint being written") == 3 * size(made, "weights")
    assert size(made, "reference") == 0
    with_kl = plan(name, loss=LossOptions(loss="grpo", kl="k3", kl_weight=0.1))
    assert size(with_kl, "reference") == size(made, "weights")


def kept_by_autograd(policy: Policy) -> int:
    """Bytes that a forward pass leaves allocated: what it keeps, and little else."""
    tokens = pack_tokens(SAMPLES, CPU)
    policy(tokens, lambda hidden, weight, bias: hidden)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        out = policy(tokens, lambda hidden, weight, bias: hidden)
    assert out.grad_fn is not None
    events = measured.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_activations_are_what_autograd_keeps(name: str) -> None:
    planned = size(plan(name), "activations")
    assert planned == pytest.approx(kept_by_autograd(Policy(real_model(name))), rel=0.05)


def test_checkpointing_keeps_inputs_of_layers_and_one_layer(name: str) -> None:
    whole = size(plan(name), "activations")
    sharding = ShardingOptions(activation_checkpointing=True)
    policy = Policy(real_model(name))
    policy.shard(ALONE, torch.float32, sharding)
    less = size(plan(name, sharding=sharding), "activations")
    inputs_of_layers = 3 * TOKENS * 64 * 4
    outside = kept_by_autograd(policy)
    expected = outside + inputs_of_layers + (whole - outside) / 3
    assert less == pytest.approx(expected, rel=0.1)
    assert less < whole / 2


def test_key_value_cache_has_the_room_that_the_sampler_takes(name: str) -> None:
    layer = GrowingLayer()
    width = getattr(CONFIGS[name], "head_dim", None) or 16
    for positions in (20, *[1] * 29):
        states = torch.zeros(32, 2, positions, width)
        layer.update(states, states)
    of_layers = 3 * sum(stored.nbytes for stored in layer.stored)
    planned = size(plan(name), "key-value cache")
    # One layer is there twice while it grows, and once more for grouped heads.
    assert of_layers < planned < of_layers * 2.3


def test_reward_models_are_whole_in_float32_on_every_rank(name: str) -> None:
    one_output = copy.deepcopy(CONFIGS[name])
    one_output.num_labels = 1
    real = AutoModelForSequenceClassification.from_config(one_output, dtype=torch.float32)
    held = sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers()))
    made = plan_memory(
        CONFIGS[name],
        config(dtype="bfloat16"),
        ranks=4,
        device="cuda",
        prompt_tokens=20,
        reward_models={"helpful": one_output, "harmless": CONFIGS[name]},
    )
    for kind in ("helpful", "harmless"):
        assert size(made, f"{kind} reward model") == held
    without = plan(name, ranks=4, device="cuda", dtype="bfloat16")
    for phase in PHASES:
        more = made.in_phase(phase, on_host=False) - without.in_phase(phase, on_host=False)
        assert more == 2 * held


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_share_weights_and_gather_layers(name: str, ranks: int) -> None:
    alone, shared = plan(name), plan(name, ranks=ranks)
    for part in ("weights", "gradients", "optimizer"):
        assert size(shared, part) == pytest.approx(size(alone, part) / ranks, rel=1e-3)
    model = real_model(name)
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    rest = sum(weight.numel() for weight in model.parameters()) - 3 * layer
    assert size(shared, "gathered weights") == 4 * (rest + 2 * layer)
    groups = plan(name, ranks=ranks, sharding=ShardingOptions(replicate=2))
    assert size(groups, "weights") == pytest.approx(2 * size(shared, "weights"), rel=1e-3)


def test_offloaded_weights_are_counted_for_the_host() -> None:
    here = plan("qwen2", device="cuda", dtype="bfloat16")
    there = plan(
        "qwen2", device="cuda", dtype="bfloat16", sharding=ShardingOptions(cpu_offload=True)
    )
    moved = sum(size(here, part) for part in ("weights", "gradients", "optimizer"))
    forward = "forward"
    saved = size(here, "checkpoint being written")
    assert here.in_phase(forward, on_host=True) == saved
    assert there.in_phase(forward, on_host=True) == saved + moved
    assert there.in_phase(forward, on_host=False) == here.in_phase(forward, on_host=False) - moved


def test_plan_of_a_large_recipe_needs_neither_weights_nor_gpu() -> None:
    """Qwen2.5-Math-7B on eight GPUs of 80 GB, as the paper has it."""
    model = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    recipe = dataclasses.replace(PRESETS["dr-grpo-7b"][1], sharding=ShardingOptions())
    made = plan_memory(model, recipe, ranks=8, device="cuda", device_bytes=80 << 30)
    # 7.62e9 parameters: 4 bytes each for weights, 8 for AdamW.
    assert size(made, "weights") == pytest.approx(7.62e9 * 4 / 8, rel=0.01)
    assert size(made, "optimizer") == pytest.approx(7.62e9 * 8 / 8, rel=0.01)
    # In bfloat16 the gated MLP keeps four of its widths a token; attention its query, keys, values
    # (of all heads) and output, for each completion with its prompt, and the output once more; each
    # of two norms its input in float32 and two results.
    shared = 8 * (1024 + 3000) / (1024 + 8 * 3000)
    expected = 2 * 4 * 18944 / 3584 + 2 * (4 * shared + 1) + 2 * (4 + 2 + 2)
    kept = size(made, "activations") / (16384 * 28 * 3584)
    assert kept == pytest.approx(expected, rel=0.05)
    table = plan_table(made)
    assert "memory of each of 8 ranks" in table and "peak" in table


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"optimizer": OptimizerOptions(micro_batch_tokens=100)}, "activations"),
        ({"sharding": ShardingOptions(activation_checkpointing=True)}, "activations"),
        (
            {"rollout": RolloutOptions(num_prompts=8, group_size=4, rows_per_batch=4)},
            "key-value cache",
        ),
    ],
)
def test_knob_of_a_part_makes_it_smaller(changed: dict[str, Any], part: str) -> None:
    before = config(rollout=RolloutOptions(num_prompts=8, group_size=4))
    after = dataclasses.replace(before, **changed)
    sizes = [
        size(plan_memory(CONFIGS["llama"], each, ranks=1, device="cpu", prompt_tokens=20), part)
        for each in (before, after)
    ]
    assert sizes[1] < sizes[0] / 1.5


def test_free_memory_is_less_than_the_machine_has() -> None:
    free = host_bytes_free()
    assert free is not None and 0 < free < 1 << 50
    big = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_bytes(CPU, 0) >= big.nbytes


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("DefaultCPUAllocator: no"), False),
    ],
    ids=str,
)
def test_failed_allocation_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    # The real one, of a CPU.
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_run_that_cannot_fit_is_refused_before_its_weights_are_read(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    main_here: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_check, "host_bytes_free", lambda: 100_000)
    code, _, err = main_here(flags(inputs, tmp_path / "run", steps=1))
    assert code == 2 and err.count("\n") == 1
    assert "the largest part" in err and "for activations; give --activation-checkpointing" in err
    assert json.loads((tmp_path / "run" / "memory_plan.json").read_text())["parts"]
    code, out, err = main_here(
        flags(inputs, tmp_path / "run", steps=1, memory_check="warn", eval_problems=2)
    )
    assert code == 0 and "warning: memory: expected at most" in out, err
    written = json.loads((tmp_path / "run" / "memory_plan.json").read_text())
    assert len(written["peak_bytes"]["measured"]) == 1
    assert "memory of a rank at its peak" in out


FAILURES: dict[str, tuple[str, str, Callable[[], BaseException]]] = {
    "gpu_in_update": (
        "trainer.train.with_advantages",
        "in the update phase of rank 0.* activations .*--activation-checkpointing",
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ),
    "cpu_in_rollout": (
        "trainer.train.sample_step",
        "in the rollout phase of rank 0.* key-value cache .*--rows-per-batch",
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ),
    "numpy_in_evaluation": (
        "trainer.train.evaluate",
        "in the eval phase of rank 0.* key-value cache .*--rows-per-batch",
        MemoryError,
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_allocation_ends_in_one_sentence_and_the_run_goes_on_from_its_checkpoint(
    failure: str,
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    main_here: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, sentence, make_error = FAILURES[failure]
    module, function = target.rsplit(".", 1)
    original = getattr(importlib.import_module(module), function)
    calls = 0

    def fails_the_third_time(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise make_error()
        return original(*args, **kwargs)

    options: dict[str, Any] = dict(steps=4, save_every=2, eval_every=1, eval_problems=2)
    with monkeypatch.context() as patch:
        patch.setattr(target, fails_the_third_time)
        code, _, err = main_here(flags(inputs, tmp_path / "run", **options))
    assert code == 2 and err.count("\n") == 1, err
    assert re.search(sentence, err), err
    code, _, err = main_here(flags(inputs, tmp_path / "run", **options))
    assert code == 0, err
    assert main_here(flags(inputs, tmp_path / "whole", **options))[0] == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
