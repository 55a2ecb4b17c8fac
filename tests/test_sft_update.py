"""The update of supervised fine-tuning against plain transformers, and its split into parts."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from trainer.config import NonFiniteError, ShardingOptions
from trainer.fsdp import World, full_tensors
from trainer.packing import TokenSequence
from trainer.policy import Policy
from trainer.sft_config import SftConfig, SftOptimizerOptions
from trainer.sft_update import SupervisedUpdate
from trainer.testing import WORDS, bigram_model
from trainer.weight_update import make_optimizer

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
# Largest relative rounding of a float32 operation.
UNIT = 2.0**-24


def make_sequences(count: int = 11) -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    prompts = [[2, 11, 8, 12, 3], [3], [2, 2, 3]]
    return [
        TokenSequence(
            prompt_ids=prompts[index % 3],
            token_ids=generator.integers(0, len(WORDS), size=int(generator.integers(1, 17))),
        )
        for index in range(count)
    ]


SEQUENCES = make_sequences()


def make_config(**options: object) -> SftConfig:
    changed = {"learning_rate": 1.0, "max_grad_norm": 1e9, **options}
    return SftConfig(preset="test", optimizer=SftOptimizerOptions(**changed))


def make_update(
    model: LlamaForCausalLM,
    config: SftConfig,
    world: World = ALONE,
    sharding: ShardingOptions | None = None,
) -> SupervisedUpdate:
    policy = Policy(model)
    policy.shard(world, torch.float32, sharding or ShardingOptions())
    # The weights move by the gradient, which can so be read off them.
    optimizer = torch.optim.SGD(policy.parameters())
    return SupervisedUpdate(policy, optimizer, config, world, total_steps=1)


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].flatten().double() for name in sorted(named)])


def gradient_of(
    update: SupervisedUpdate, sequences: list[TokenSequence]
) -> tuple[Tensor, dict[str, float | None]]:
    seen: list[Tensor] = []

    def keep(*arguments: object, **keywords: object) -> None:
        named = update.policy.weights()
        gradients = ((name, weight.grad) for name, weight in named)
        seen.append(flat({name: each.clone() for name, each in full_tensors(gradients)}))

    update.optimizer.step = keep
    metrics = update(sequences, 1)
    return seen[0], metrics


def padded_cross_entropy(model: LlamaForCausalLM, sequences: list[TokenSequence]) -> Tensor:
    """The mean over completion tokens, of one padded batch with an attention mask and labels."""
    whole = [[*one.prompt_ids, *one.token_ids.tolist()] for one in sequences]
    longest = max(map(len, whole))
    ids = torch.tensor([each + [0] * (longest - len(each)) for each in whole])
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in whole])
    labels = torch.full_like(ids, -100)
    for row, one in enumerate(sequences):
        start = len(one.prompt_ids)
        labels[row, start : len(whole[row])] = torch.tensor(one.token_ids)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def plain_gradient(model: LlamaForCausalLM, dtype: torch.dtype) -> tuple[Tensor, float]:
    model = copy.deepcopy(model).to(dtype)
    loss = padded_cross_entropy(model, SEQUENCES)
    loss.backward()
    return flat({name: weight.grad for name, weight in model.named_parameters()}), loss.item()


@pytest.mark.parametrize("budget", [1, 40, 10**6], ids=["one_by_one", "some", "all_at_once"])
def test_gradient_is_that_of_padded_cross_entropy_for_any_micro_batch_size(budget: int) -> None:
    model = bigram_model(noise=0.1)
    expected, loss = plain_gradient(model, torch.float64)
    in_float32 = (plain_gradient(model, torch.float32)[0] - expected).norm()
    update = make_update(model, make_config(micro_batch_tokens=budget))
    gradient, metrics = gradient_of(update, SEQUENCES)
    # As far from float64 as plain PyTorch in float32, whose sums have another order.
    assert (gradient - expected).norm() <= 2 * in_float32 + UNIT * expected.norm()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)
    assert metrics["tokens"] == sum(len(one.token_ids) for one in SEQUENCES)


def test_held_out_loss_is_that_of_padded_cross_entropy_and_leaves_no_gradient() -> None:
    model = bigram_model(noise=0.1)
    _, loss = plain_gradient(model, torch.float64)
    update = make_update(model, make_config(micro_batch_tokens=40))
    assert update.mean_loss(SEQUENCES) == pytest.approx(loss, rel=1e-6)
    assert all(weight.grad is None for weight in update.policy.parameters())


def test_prompt_tokens_are_no_targets() -> None:
    # All attention and MLP weights are zero: what follows a token depends on that token alone. The
    # row of a word in the output layer can only gain where the word is a target.
    model = bigram_model(noise=0.0)
    wanted, prompt_only = WORDS.index("so"), WORDS.index("User:")
    sequence = TokenSequence(
        prompt_ids=[prompt_only, prompt_only, prompt_only], token_ids=np.array([wanted, wanted])
    )
    update = make_update(model, make_config())
    before = model.lm_head.weight.detach().clone()
    update([sequence], 1)
    moved = (model.lm_head.weight.detach() - before).sum(1)
    assert moved[wanted] > 0
    assert moved[prompt_only] < 0


def check_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    world = World(rank=rank, size=size, device=CPU)
    for name, sharding in SHARDINGS.items():
        update = make_update(
            bigram_model(noise=0.1), make_config(micro_batch_tokens=20), world, sharding
        )
        held_out = update.mean_loss(SEQUENCES)
        result = (*gradient_of(update, SEQUENCES), held_out)
        if rank == 0:
            torch.save(result, f"{folder}/{name}")
    dist.destroy_process_group()


SHARDINGS = {
    "fsdp": ShardingOptions(),
    "head": ShardingOptions(shard_head=True),
    "checkpointing": ShardingOptions(activation_checkpointing=True),
}


def test_two_ranks_give_the_gradient_of_one(tmp_path: Path) -> None:
    spawn_ranks(check_rank, 2, 2, str(tmp_path))
    model = bigram_model(noise=0.1)
    expected, loss = plain_gradient(model, torch.float64)
    in_float32 = (plain_gradient(model, torch.float32)[0] - expected).norm()
    for name in SHARDINGS:
        gradient, metrics, held_out = torch.load(tmp_path / name)
        assert (gradient - expected).norm() <= 2 * in_float32 + UNIT * expected.norm(), name
        assert (metrics["loss"], held_out) == pytest.approx((loss, loss), rel=1e-6), name


def test_learning_rate_rises_and_falls_to_a_tenth() -> None:
    config = make_config(learning_rate=0.5, warmup_updates=2)
    update = make_update(bigram_model(), config)
    update.total_steps = 6
    rates = [update(SEQUENCES, step)["learning_rate"] for step in range(1, 7)]
    cosine = 0.05 + 0.45 * (1 + np.cos(np.pi * np.array([0.25, 0.5, 0.75, 1.0]))) / 2
    assert rates == pytest.approx([0.25, 0.5, *cosine])


def test_loss_of_a_handful_of_rows_goes_to_zero() -> None:
    model = bigram_model(noise=0.1)
    # Distinct first prompts, or the same token would have two continuations to be certain of.
    rows = [
        TokenSequence(prompt_ids=[2, word, 3], token_ids=np.array([4, word, 5, 1]))
        for word in range(12, 16)
    ]
    config = make_config(learning_rate=1e-2, max_grad_norm=1.0, schedule="constant")
    update = make_update(model, config)
    update.optimizer = make_optimizer(update.policy, config.optimizer)
    losses = [update(rows, step)["loss"] for step in range(1, 201)]
    assert losses[0] > 0.5 and losses[-1] < 0.01


def test_non_finite_loss_stops_before_the_weights() -> None:
    model = bigram_model()
    model.lm_head.weight.data[0, 0] = float("nan")
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(NonFiniteError, match="step 1: .*the loss"):
        make_update(model, make_config())(SEQUENCES, 1)
    after = list(model.parameters())
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        for a, b in zip(before, after, strict=True)
    )
