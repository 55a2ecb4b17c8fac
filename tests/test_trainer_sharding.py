"""The update on several ranks: the same gradient and weights as on one, however it is sharded."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from torch import Tensor, nn

from trainer.config import (
    LossOptions,
    OptimizerOptions,
    RolloutOptions,
    ShardingOptions,
    TrainConfig,
    UsageError,
)
from trainer.fsdp import World, full_tensors
from trainer.packing import UpdateSample, pack_tokens
from trainer.policy import Policy
from trainer.policy_update import PolicyUpdate
from trainer.testing import WORDS, bigram_model

CPU = torch.device("cpu")


def config(sharding: ShardingOptions, micro_batch_tokens: int) -> TrainConfig:
    return TrainConfig(
        preset="test",
        rollout=RolloutOptions(num_prompts=3, group_size=5, max_new_tokens=16),
        loss=LossOptions(loss="grpo", kl="k3", kl_weight=0.05, entropy_weight=0.01),
        optimizer=OptimizerOptions(
            learning_rate=0.1,
            max_grad_norm=1e9,
            minibatches=2,
            micro_batch_tokens=micro_batch_tokens,
        ),
        sharding=sharding,
    )


def samples() -> list[UpdateSample]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(15):
        length = int(torch.randint(1, 17, (), generator=generator))
        made.append(
            UpdateSample(
                prompt_ids=list(range(2, 3 + index % 4)),
                token_ids=torch.randint(0, len(WORDS), (length,), generator=generator).numpy(),
                sampler_logprobs=torch.full((length,), -2.0).numpy(),
                advantage=float(torch.randn((), generator=generator)),
                masked=index == 4,
            )
        )
    return made


def update(world: World, options: TrainConfig) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights after one step of two updates, whole, and its metrics."""
    policy, reference = Policy(bigram_model(noise=0.2)), Policy(bigram_model(noise=0.1, seed=1))
    reference.requires_grad_(False)
    for each in (policy, reference):
        each.shard(world, torch.float32, options.sharding)
    # AdamW would turn the rounding of a gradient near zero into a step of full size.
    optimizer = torch.optim.SGD(policy.parameters())
    step = PolicyUpdate(policy, reference, optimizer, options, world)
    metrics = step(samples(), step=1)
    weights = {name: weight.clone() for name, weight in full_tensors(policy.weights())}
    # What the parity gate measures is rounding, of tokens that each rank draws for itself.
    return weights, {name: metrics[name] for name in metrics if not name.startswith("parity/")}


SHARDINGS = {
    2: {
        "fsdp": ShardingOptions(),
        "head": ShardingOptions(shard_head=True),
        "checkpointing": ShardingOptions(activation_checkpointing=True),
    },
    4: {
        "fsdp": ShardingOptions(),
        "head": ShardingOptions(shard_head=True),
        "hsdp": ShardingOptions(replicate=2),
    },
}


def check_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    for name, sharding in SHARDINGS[size].items():
        # Small micro-batches leave some ranks without samples in the last of them.
        result = update(World(rank=rank, size=size, device=CPU), config(sharding, 40))
        if rank == 0:
            torch.save(result, f"{folder}/{name}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], dict[str, float]]:
    return update(World(rank=0, size=1, device=CPU), config(ShardingOptions(), 10**6))


@pytest.mark.parametrize("size", [2, 4])
def test_weights_and_metrics_are_those_of_one_rank(size: int, alone: tuple, tmp_path: Path) -> None:
    spawn_ranks(check_rank, size, size, str(tmp_path))
    start = dict(bigram_model(noise=0.2).named_parameters())
    for sharding in SHARDINGS[size]:
        weights, metrics = torch.load(tmp_path / sharding)
        assert metrics == pytest.approx(alone[1], rel=1e-5, abs=1e-6), sharding
        for name, expected in alone[0].items():
            moved = (expected - start[name]).norm()
            # Rounding of the weights themselves, and of sums of gradients in another order.
            bound = 1e-7 * expected.norm() + 1e-5 * moved
            assert (weights[name] - expected).norm() <= bound, (sharding, name)


def test_activation_checkpointing_changes_no_bit(alone: tuple) -> None:
    sharding = ShardingOptions(activation_checkpointing=True)
    weights, metrics = update(World(rank=0, size=1, device=CPU), config(sharding, 10**6))
    assert metrics == alone[1]
    assert all(torch.equal(weights[name], value) for name, value in alone[0].items())


def test_activation_checkpointing_keeps_less_memory_of_a_layer() -> None:
    kept = []
    for active in (False, True):
        policy = Policy(bigram_model())
        options = ShardingOptions(activation_checkpointing=active)
        policy.shard(World(rank=0, size=1, device=CPU), torch.float32, options)
        sizes: list[int] = []
        hooks = (lambda saved, to=sizes: to.append(saved.numel()) or saved, lambda saved: saved)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            policy(pack_tokens(samples(), CPU), lambda hidden, weight, bias: hidden.sum())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_ranks_that_do_not_divide_are_refused() -> None:
    policy = Policy(bigram_model())
    with pytest.raises(UsageError, match="--replicate: expected a divisor of .* 3, got 2"):
        policy.shard(World(rank=0, size=3, device=CPU), torch.float32, ShardingOptions(replicate=2))
    with pytest.raises(UsageError, match="--cpu-offload: expected a GPU"):
        policy.shard(
            World(rank=0, size=1, device=CPU), torch.float32, ShardingOptions(cpu_offload=True)
        )
    with pytest.raises(ValueError, match="--shard-head: expected --replicate 1"):
        ShardingOptions(shard_head=True, replicate=2)


def test_sharded_head_of_a_tied_model_is_refused() -> None:
    model = bigram_model()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight)
    model.model.embed_tokens.weight = model.lm_head.weight
    with pytest.raises(UsageError, match="--shard-head: .* shares the embedding"):
        Policy(model).shard(
            World(rank=0, size=1, device=CPU), torch.float32, ShardingOptions(shard_head=True)
        )
