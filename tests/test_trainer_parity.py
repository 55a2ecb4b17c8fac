"""The parity gate: it passes what is right, names what is wrong, and changes nothing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from test_trainer_policy_update import ALONE, SAMPLES, make_config, make_update
from torch import Tensor, nn

import kernels
from kernels import LossSpec
from kernels import reference as backend_under_test
from kernels.spec import PRESETS
from trainer.config import LossOptions, NonFiniteError, ShardingOptions, TrainConfig
from trainer.fsdp import World
from trainer.packing import UpdateSample
from trainer.parity import NAMES, HeadCheck, ParityError
from trainer.policy import Policy
from trainer.policy_update import PolicyUpdate
from trainer.testing import bigram_model

METRICS = [f"parity/{name}" for name in NAMES.values()]
# All terms of a loss at once.
ALL_TERMS: dict[str, Any] = dict(
    entropy_weight=0.01, kl="k3", kl_weight=0.05, sampler_correction="sequence_mask"
)
SAMPLES_WITH_ONE_MASKED = [
    dataclasses.replace(one, masked=index == 2) for index, one in enumerate(SAMPLES)
]


def config(loss: str = "grpo", backend: str = "reference", **options: Any) -> TrainConfig:
    made = make_config(LossOptions(loss=loss, **options), minibatches=2)
    return dataclasses.replace(made, backend=backend)


def update(options: TrainConfig, samples: list[UpdateSample] = SAMPLES) -> PolicyUpdate:
    reference = bigram_model(noise=0.3) if options.loss_spec.kl_weight else None
    return make_update(options, bigram_model(noise=0.1), reference)


@pytest.mark.parametrize("terms", [{}, ALL_TERMS], ids=["plain", "all_terms"])
@pytest.mark.parametrize("loss", PRESETS)
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_gate_passes_every_loss(name: str, loss: str, terms: dict[str, Any]) -> None:
    metrics = update(config(loss, name, **terms))(SAMPLES_WITH_ONE_MASKED, step=1)
    assert all(0 < metrics[name] < 0.5 for name in METRICS), metrics


def test_gate_passes_every_backend(backend: str, device: str) -> None:
    hidden, weight = (each.detach().to(device).requires_grad_() for each in problem(torch.float32))
    shares = check(hidden, weight, CISPO, backend=backend)
    assert all(0 < share < 0.5 for share in shares.values()), shares


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_gate_passes_tokens_that_are_all_but_certain(name: str) -> None:
    hidden, weight = problem(torch.float32)
    with torch.no_grad():
        hidden *= torch.logspace(-2, 2, len(hidden))[:, None]
    ids = (hidden @ weight.T).argmax(1)
    ids[::3] = arguments(weight)["token_ids_N"][::3]
    spec = LossSpec.preset("grpo", entropy_weight=0.05)
    shares = check(hidden, weight, spec, backend=name, token_ids_N=ids, old_logprobs_N=None)
    assert all(0 < share < 0.5 for share in shares.values()), shares


def test_gate_is_due_from_the_first_step_on_and_may_be_off() -> None:
    step = update(dataclasses.replace(config(), parity_every=3))
    due = [METRICS[0] in step(SAMPLES, number) for number in range(1, 8)]
    assert due == [True, False, False, True, False, False, True]
    assert METRICS[0] not in update(dataclasses.replace(config(), parity_every=0))(SAMPLES, 1)


@pytest.mark.parametrize("sharding", [{}, {"activation_checkpointing": True}], ids=["", "ckpt"])
def test_gate_changes_no_bit(sharding: dict[str, bool]) -> None:
    weights = []
    for every in (0, 1):
        options = dataclasses.replace(
            config(**ALL_TERMS),
            parity_every=every,
            sharding=ShardingOptions(**sharding),
        )
        step = update(options)
        step.policy.shard(ALONE, torch.float32, options.sharding)
        for number in (1, 2):
            step(SAMPLES, number)
        weights.append([weight.detach().clone() for weight in step.policy.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def problem(dtype: torch.dtype, *, depth: int = 48, width: int = 613) -> tuple[Tensor, Tensor]:
    """Hidden states and weight of peaked distributions."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(90, depth, generator=generator) * 3
    weight = torch.randn(width, depth, generator=generator) / depth**0.5
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def arguments(weight: Tensor, **changed: Any) -> dict[str, Any]:
    device, generator = weight.device, torch.Generator().manual_seed(1)
    ids = torch.randint(0, len(weight), (90,), generator=generator)
    ids[::11] = -100
    made = {
        "token_ids_N": ids,
        "old_logprobs_N": torch.full((90,), -9.0),
        "bias": None,
        "advantages": torch.tensor([1.0, -0.5, 0.0]),
        "cu_seqlens": torch.tensor([0, 20, 50, 90], dtype=torch.int32),
        "ref_logprobs": torch.full((90,), -9.5),
        "sampler_logprobs": torch.full((90,), -9.1),
        "temperature": 1.0,
        "softcap": 0.0,
        "denominator": 5,
        "backend": "auto",
        **changed,
    }
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in made.items()
    }


def check(hidden: Tensor, weight: Tensor, spec: LossSpec, **given: Any) -> dict[str, float]:
    gate = HeadCheck(spec, None, ALONE, seed=0)
    gate(hidden, weight, **arguments(weight, **given)).loss.backward()
    return gate.compare(step=1)


CISPO = LossSpec.preset("cispo", kl="k3", kl_weight=0.1, entropy_weight=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_gate_knows_temperature_softcap_bias_and_dtype(dtype: torch.dtype, softcap: float) -> None:
    hidden, weight = problem(dtype)
    bias = torch.linspace(-3, 3, len(weight)).to(dtype)
    shares = check(hidden, weight, CISPO, bias=bias, softcap=softcap, temperature=0.7)
    # bfloat16 gradients are rounded, which uses up nearly all that is allowed for it.
    assert all(0 < share < 1 for share in shares.values()), shares
    assert shares[METRICS[0]] < 0.5 and shares[METRICS[1]] < 0.5


@pytest.mark.parametrize(
    ("name", "other"), [("bias", None), ("softcap", 9.0), ("temperature", 1.1)]
)
def test_gate_sees_an_argument_that_a_kernel_ignores(
    name: str, other: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = problem(torch.float32)
    original = kernels.linear_policy_loss
    monkeypatch.setattr(
        kernels,
        "linear_policy_loss",
        lambda *args, **options: original(*args, **{**options, name: other}),
    )
    with pytest.raises(ParityError, match="log-probabilities"):
        check(hidden, weight, CISPO, bias=torch.linspace(-1, 1, len(weight)))


def plain_policy_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, old: Tensor | None, **options: Any
) -> kernels.PolicyLoss:
    """REINFORCE with an entropy bonus, written as one would; sums over sequences of 1."""
    logp = (hidden.float() @ weight.float().T).log_softmax(-1)
    counts = ids != -100
    picked = torch.where(counts, logp.gather(1, ids.clamp(min=0)[:, None])[:, 0], 0.0)
    entropy = torch.where(counts, -(logp.exp() * logp).sum(-1), 0.0)
    advantages = options["advantages"].repeat_interleave(options["cu_seqlens"].diff())
    loss = -(advantages * picked + 0.05 * entropy).sum()
    return kernels.PolicyLoss(loss, picked.detach(), entropy.detach(), {})


@pytest.mark.parametrize("depth", [16, 64, 1024])
def test_bounds_are_a_small_multiple_of_the_error_of_plain_pytorch(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "linear_policy_loss", plain_policy_loss)
    spec = LossSpec(surrogate="reinforce", aggregation="sum", entropy_weight=0.05)
    hidden, weight = problem(torch.float32, depth=depth)
    shares = check(hidden, weight, spec, denominator=None)
    assert all(1e-4 < share < 0.5 for share in shares.values()), shares
    assert 5e-3 < shares[METRICS[0]]


Broken = Callable[[pytest.MonkeyPatch], None]


def wrap(module: Any, name: str, change: Callable[..., Any]) -> Broken:
    """Replaces a function by `change`, which gets the original first."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **named: change(original, *args, **named))

    return patch


def shifted_logprob(original: Callable[..., Tensor], *args: Any) -> Tensor:
    stats = original(*args)
    stats[3] += 1e-3
    return stats


def shifted_entropy(original: Callable[..., Tensor], *args: Any) -> Tensor:
    stats = original(*args)
    stats[2] += 1e-3 * stats[1]
    return stats


def shifted_token(original: Callable[..., Tensor], logits: Tensor, ids: Tensor, *rest: Any) -> Any:
    return original(logits, ids.roll(1), *rest)


def one_column(original: Callable[..., None], *args: Any) -> None:
    original(*args)
    args[-1][..., 14] *= 1.01


def one_nan(original: Callable[..., None], *args: Any) -> None:
    original(*args)
    args[-1][0, :, 14] = float("nan")


def no_entropy_gradient(original: Callable[..., None], *args: Any) -> None:
    original(*args[:8], torch.zeros_like(args[8]), *args[9:])


def weight_gradient_off(
    original: Callable[..., Any], hidden: Tensor, weight: Tensor, *args: Any, **options: Any
) -> kernels.PolicyLoss:
    weight = weight.clone()
    weight.register_hook(lambda gradient: gradient * 1.001)
    return original(hidden, weight, *args, **options)


def loss_off(original: Callable[..., Any], *args: Any, **options: Any) -> kernels.PolicyLoss:
    result = original(*args, **options)
    return result._replace(loss=result.loss * 1.0001)


WRONG = {
    "logprob_off_by_1e-3": (
        wrap(backend_under_test, "row_stats", shifted_logprob),
        "log-probabilities",
    ),
    "entropy_off_by_1e-3": (wrap(backend_under_test, "row_stats", shifted_entropy), "the entropy"),
    "token_shifted": (wrap(backend_under_test, "row_stats", shifted_token), "log-probabilities"),
    "loss_off": (wrap(kernels, "linear_policy_loss", loss_off), "the loss"),
    "column_off_by_1e-2": (
        wrap(backend_under_test, "grad_logits", one_column),
        "the gradient by the hidden states",
    ),
    "column_nan": (
        wrap(backend_under_test, "grad_logits", one_nan),
        "the gradient by the hidden states",
    ),
    "entropy_without_gradient": (
        wrap(backend_under_test, "grad_logits", no_entropy_gradient),
        "the gradient by the hidden states",
    ),
    "weight_gradient_off_by_1e-3": (
        wrap(kernels, "linear_policy_loss", weight_gradient_off),
        "the gradient by the LM head's weight",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_gate_names_the_tensor_of_a_wrong_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, tensor = WRONG[name]
    patch(monkeypatch)
    step = update(config(entropy_weight=0.01))
    before = [weight.clone() for weight in step.policy.parameters()]
    with pytest.raises(ParityError, match=f"step 21: expected {tensor} within .* before the"):
        step(SAMPLES, step=21)
    assert all(torch.equal(*pair) for pair in zip(before, step.policy.parameters(), strict=True))
    # A NaN stops the run anyhow, all others only here.
    if name != "column_nan":
        step(SAMPLES, step=22)


def test_model_that_is_not_finite_is_not_blamed_on_the_kernel() -> None:
    step = update(config())
    step.policy.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="step 1: .*the loss"):
        step(SAMPLES, step=1)


def untied(seed: int) -> Policy:
    return Policy(bigram_model(noise=0.1, seed=seed))


def check_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    world = World(rank=rank, size=size, device=torch.device("cpu"))
    for sharding in (ShardingOptions(shard_head=True), ShardingOptions()):
        options = dataclasses.replace(config(**ALL_TERMS), sharding=sharding)
        policy, reference = untied(0), untied(1).requires_grad_(False)
        for each in (policy, reference):
            each.shard(world, torch.float32, sharding)
        step = PolicyUpdate(policy, reference, torch.optim.SGD(policy.parameters()), options, world)
        # Fewer samples than ranks and minibatches: some micro-batches of a rank are empty.
        metrics = step(SAMPLES[:3], step=1)
        assert all(0 < metrics[name] < 0.5 for name in METRICS), metrics
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            wrap(backend_under_test, "grad_logits", one_column)(patch)
        # Every rank says so, not only the one whose kernel is wrong.
        with pytest.raises(ParityError, match="the gradient by the hidden states"):
            step(SAMPLES, step=1)
    dist.destroy_process_group()


def test_gate_holds_on_two_ranks_with_a_sharded_head_and_stops_both(tmp_path: Path) -> None:
    spawn_ranks(check_rank, 2, 2, str(tmp_path))


def test_gate_sees_the_head_s_part_of_a_tied_weight() -> None:
    model = bigram_model(noise=0.1)
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
    model.lm_head.weight = model.model.embed_tokens.weight
    metrics = make_update(config(), model)(SAMPLES, step=1)
    assert all(0 < metrics[name] < 0.5 for name in METRICS), metrics
