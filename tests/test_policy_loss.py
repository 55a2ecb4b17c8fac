"""The policy loss of every backend: published values, float64 truth, gradients, metrics,
refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LossSpec
from kernels.testing import eager_policy_loss, grpo_batch, logits_with_logprobs, relative_error

# Values worked out by hand for this batch, independently of any code here.
LENGTHS = [2, 3, 1, 4]
REWARDS = [1.0, 0.0, 0.0, 1.0]
OLD = [-0.5, -1.0, -0.2, -2.0, -0.7, -1.5, -0.1, -0.4, -3.0, -0.9]
LOG_RATIO = [0.1, 0.4, -0.5, 0.05, -0.02, 0.3, -0.1, 0.0, 1.2, -0.3]
REF = [-0.6, -0.9, -0.3, -1.8, -0.7, -1.2, -0.1, -0.5, -2.5, -1.0]
SAMPLER = [-0.55, -1.0, -0.2, -1.1, -0.7, -1.5, -0.1, -0.4, -3.9, -0.9]
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "grpo": ({}, 0.038896),
    "grpo k3": ({"kl": "k3", "kl_weight": 0.04}, 0.040110),
    "r1 without kl": ({"clip_low": 10.0, "clip_high": 10.0}, -0.121385),
    "dr_grpo": (
        {"aggregation": "constant", "max_tokens": 8, "advantage_scale": "none"},
        -0.030773,
    ),
    "dapo": ({"clip_high": 0.28, "aggregation": "token_mean"}, -0.184388),
    "dual clip": ({"dual_clip": 3.0, "aggregation": "token_mean"}, -0.170534),
    "two-sided": ({"ratio_cap": 4.0}, 0.038896),
    "gspo": ({"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}, 0.075495),
    "luspo": (
        {
            "ratio_level": "sequence",
            "clip_low": 2e-3,
            "clip_high": 2.5e-3,
            "aggregation": "sequence_sum",
        },
        -0.361750,
    ),
    "cispo": (
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"},
        0.344895,
    ),
    "cispo two-sided": ({"surrogate": "cispo", "aggregation": "token_mean"}, 0.009292),
    "sapo": ({"surrogate": "sapo"}, -0.125393),
    "gmpo": ({"surrogate": "gmpo", "clip_low": 0.4, "clip_high": 0.4}, -0.010866),
    "vespo": ({"surrogate": "vespo", "aggregation": "token_mean"}, -0.205072),
    "token tis": ({"sampler_correction": "token_truncate"}, -0.077193),
    "token mis": ({"sampler_correction": "token_mask", "sampler_low": 0.5}, 0.021848),
    "sequence tis": ({"sampler_correction": "sequence_truncate"}, -0.303255),
    "sequence mis": ({"sampler_correction": "sequence_mask", "sampler_high": 3.0}, -0.398906),
    "off-policy mask": ({"off_policy_threshold": 0.1, "advantage_scale": "none"}, -0.095518),
}


def published_batch(backend: str, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    dtype = torch.float64 if backend == "reference" else torch.float32
    new = [old + log_ratio for old, log_ratio in zip(OLD, LOG_RATIO, strict=True)]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    arguments = {
        "old_logprobs": torch.tensor(OLD, dtype=dtype),
        "ref_logprobs": torch.tensor(REF, dtype=dtype),
        "sampler_logprobs": torch.tensor(SAMPLER, dtype=dtype),
        "rewards": torch.tensor(REWARDS),
        "cu_seqlens": bounds,
    }
    arguments = {name: value.to(device) for name, value in arguments.items()}
    arguments["token_ids"] = torch.zeros(10, dtype=torch.long, device=device)
    return logits_with_logprobs(new, 37, dtype).to(device), arguments


@pytest.mark.parametrize("name", PUBLISHED)
def test_losses_match_values_worked_out_by_hand(backend: str, device: str, name: str) -> None:
    fields, want = PUBLISHED[name]
    logits, arguments = published_batch(backend, device)
    out = kernels.policy_loss(
        logits, spec=LossSpec(**fields), group_size=4, backend=backend, **arguments
    )
    assert out.loss.item() == pytest.approx(want, abs=1.5e-6)


# One token: surrogate options, ratio, advantage -> loss and d loss / d logprob, by hand.
SCALAR = [
    ({}, 1.5, 1.0, -1.2, 0.0),
    ({}, 1.5, -1.0, 1.5, 1.5),
    ({}, 0.5, 1.0, -0.5, -0.5),
    ({}, 0.5, -1.0, 0.8, 0.0),
    ({}, 5.0, -1.0, 5.0, 5.0),
    ({"dual_clip": 3.0}, 5.0, -1.0, 3.0, 0.0),
    ({"ratio_cap": 4.0}, 5.0, -1.0, 4.0, 0.0),
    ({"clip_low": 10.0, "clip_high": 10.0}, 5.0, -1.0, 5.0, 5.0),
    ({"clip_low": 10.0, "clip_high": 10.0}, 12.0, 1.0, -11.0, 0.0),
    ({"surrogate": "sapo"}, 1.0, 1.0, -2.0, -1.0),
    # The gradient only; the value is -5 log p.
    ({"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0}, 6.0, 1.0, None, -5.0),
    ({}, 1.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("fields", "ratio", "advantage", "loss", "slope"), SCALAR)
def test_single_token_loss_and_slope_match_the_hand_calculation(
    backend: str,
    device: str,
    fields: dict,
    ratio: float,
    advantage: float,
    loss: float | None,
    slope: float,
) -> None:
    logprob = -1.3
    leaf = logits_with_logprobs([logprob], 11, torch.float32).to(device).requires_grad_()
    out = kernels.policy_loss(
        leaf,
        torch.zeros(1, dtype=torch.long, device=device),
        torch.tensor([logprob - math.log(ratio)], device=device),
        spec=LossSpec(**fields),
        advantages=torch.tensor([advantage], device=device),
        backend=backend,
    )
    out.loss.backward()
    if loss is not None:
        assert out.loss.item() == pytest.approx(loss, abs=1e-5)
    assert leaf.grad[0, 0].item() == pytest.approx(slope * -math.expm1(logprob), abs=1e-5)
    if slope == 0:
        assert bool((leaf.grad == 0).all())


def test_ratio_weighted_kl_matches_the_hand_calculation(backend: str, device: str) -> None:
    # pi = 0.1, reference 0.4, ratio 1: value 1.613706, slope r * log(pi / ref) = -1.386294.
    leaf = logits_with_logprobs([math.log(0.1)], 5, torch.float32).to(device).requires_grad_()
    logprob = torch.tensor([math.log(0.1)], device=device)
    out = kernels.policy_loss(
        leaf,
        torch.zeros(1, dtype=torch.long, device=device),
        logprob,
        spec=LossSpec(kl="k3", kl_weight=1.0, kl_ratio_weighted=True),
        advantages=torch.zeros(1, device=device),
        ref_logprobs=logprob + math.log(4),
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(1.613706, abs=1e-5)
    assert leaf.grad[0, 0].item() == pytest.approx(-1.386294 * 0.9, abs=1e-5)


ALL_OPTIONS: dict[str, dict[str, Any]] = {
    "clip + k1 + entropy": {"kl": "k1", "kl_weight": 0.1, "entropy_weight": 0.01},
    "clip + k2, token mean": {"kl": "k2", "kl_weight": 0.1, "aggregation": "token_mean"},
    "r k3": {"kl": "k3", "kl_weight": 0.1, "kl_ratio_weighted": True, "aggregation": "sum"},
    "sapo + tis": {"surrogate": "sapo", "sampler_correction": "token_truncate"},
    "reinforce + entropy": {"surrogate": "reinforce", "entropy_weight": 0.1},
    "gspo + k3": {"ratio_level": "sequence", "kl": "k3", "kl_weight": 0.1},
    "sequence sapo": {"surrogate": "sapo", "ratio_level": "sequence"},
    "gmpo": {"surrogate": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
    "vespo": {"surrogate": "vespo", "aggregation": "token_mean"},
    "sequence mask": {"sampler_correction": "sequence_mask", "sampler_high": 3.0},
    "off-policy": {"off_policy_threshold": 0.1, "kl": "k3", "kl_weight": 0.05},
}


def loss_of(batch: Any, logits: Tensor, spec: LossSpec, backend: str, **changes: Any) -> Any:
    arguments = {
        "rewards": batch.rewards_S,
        "group_size": batch.group_size,
        "cu_seqlens": batch.cu_seqlens,
        "ref_logprobs": batch.ref_logprobs_N,
        "sampler_logprobs": batch.old_logprobs_N + 0.3 * (batch.ref_logprobs_N + 1).sin(),
        "temperature": 1.3,
        **changes,
    }
    return kernels.policy_loss(
        logits, batch.token_ids_N, batch.old_logprobs_N, spec=spec, backend=backend, **arguments
    )


# VESPO is left out: its weight is a detached function of the log-probs by definition.
@pytest.mark.parametrize("name", [name for name in ALL_OPTIONS if name != "vespo"])
def test_gradient_matches_finite_differences(name: str) -> None:
    batch = grpo_batch(16, 7, torch.float64)
    spec = LossSpec(**ALL_OPTIONS[name])
    leaf = batch.logits_NV.double().requires_grad_()
    loss_of(batch, leaf, spec, "reference").loss.backward()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction
        above, below = (
            loss_of(batch, leaf.detach() + sign * step, spec, "reference").loss for sign in (1, -1)
        )
        want = (leaf.grad * direction).sum()
        assert ((above - below) / 2e-6).item() == pytest.approx(want.item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ALL_OPTIONS)
def test_every_option_matches_the_float64_reference(backend: str, device: str, name: str) -> None:
    batch = grpo_batch(24, 513, torch.float32, device=device)
    spec = LossSpec(**ALL_OPTIONS[name])
    leaf = batch.logits_NV.clone().requires_grad_()
    got = loss_of(batch, leaf, spec, backend)
    got.loss.backward()
    exact = batch.logits_NV.double().requires_grad_()
    want = loss_of(batch, exact, spec, "reference")
    want.loss.backward()
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-6)
    assert relative_error(leaf.grad, exact.grad) < 1e-5
    for metric, value in want.metrics.items():
        assert got.metrics[metric].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1003, 32000])
def test_gradient_error_is_at_most_that_of_eager_pytorch(
    backend: str, device: str, dtype: torch.dtype, width: int
) -> None:
    batch = grpo_batch(24, width, dtype, device=device)
    exact = batch.logits_NV.double().requires_grad_()
    eager_policy_loss(exact, batch).backward()
    eager = batch.logits_NV.clone().requires_grad_()
    eager_policy_loss(eager, batch).backward()
    ours = batch.logits_NV.clone().requires_grad_()
    spec = LossSpec(kl="k3", kl_weight=0.04)
    loss_of(batch, ours, spec, backend, temperature=1.0).loss.backward()
    # float32 and Triton's interpreter round in other places than eager; one part in 1e7 of the norm
    # is a fraction of a single float32 rounding.
    assert relative_error(ours.grad, exact.grad) <= relative_error(eager.grad, exact.grad) + 1e-7


def test_on_policy_loss_equals_the_loss_with_its_own_logprobs(backend: str, device: str) -> None:
    batch = grpo_batch(24, 301, torch.float32, device=device)
    spec = LossSpec(kl="k3", kl_weight=0.1)
    shared = dict(
        rewards=batch.rewards_S,
        group_size=4,
        cu_seqlens=batch.cu_seqlens,
        ref_logprobs=batch.ref_logprobs_N,
        spec=spec,
        backend=backend,
    )
    gradients = []
    own = kernels.token_logprobs(batch.logits_NV, batch.token_ids_N, backend=backend).logprobs
    for old in (None, own):
        leaf = batch.logits_NV.clone().requires_grad_()
        out = kernels.policy_loss(leaf, batch.token_ids_N, old, **shared)
        out.loss.backward()
        gradients.append(leaf.grad)
        assert out.metrics["ratio/mean"].item() == 1.0
    assert torch.equal(*gradients)


def test_parts_of_a_batch_add_up_to_the_whole(backend: str, device: str) -> None:
    batch = grpo_batch(48, 101, torch.float32, device=device)
    for spec in (LossSpec(), LossSpec.preset("dapo"), LossSpec.preset("dr_grpo", max_tokens=9)):
        whole = batch.logits_NV.clone().requires_grad_()
        loss_of(batch, whole, spec, backend).loss.backward()
        parts = batch.logits_NV.clone().requires_grad_()
        bounds = batch.cu_seqlens.tolist()
        middle = bounds[4]
        count = 48 if spec.aggregation == "token_mean" else 8
        for tokens, sequences in (
            (slice(0, middle), slice(0, 4)),
            (slice(middle, 48), slice(4, 8)),
        ):
            cu_seqlens = batch.cu_seqlens[sequences.start : sequences.stop + 1] - tokens.start
            kernels.policy_loss(
                parts[tokens],
                batch.token_ids_N[tokens],
                batch.old_logprobs_N[tokens],
                spec=spec,
                rewards=batch.rewards_S[sequences],
                group_size=4,
                cu_seqlens=cu_seqlens,
                temperature=1.3,
                denominator=count,
                backend=backend,
            ).loss.backward()
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-8)


def test_metrics_count_clipped_and_zero_gradient_tokens(backend: str, device: str) -> None:
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0])
    logprobs = torch.full((8,), -1.0)
    out = kernels.policy_loss(
        logits_with_logprobs(logprobs.tolist(), 9, torch.float32).to(device),
        torch.zeros(8, dtype=torch.long, device=device),
        (logprobs - ratios.log()).to(device),
        spec=LossSpec(),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 1.0, 1.0, 1.0], device=device),
        mask=torch.tensor([1, 1, 1, 1, 1, 1, 1, 0], device=device),
        backend=backend,
    )
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["tokens"] == 7
    assert metrics["clip_fraction/high"] == pytest.approx(1 / 7)
    assert metrics["clip_fraction/low"] == pytest.approx(1 / 7)
    assert metrics["clip_fraction"] == pytest.approx(2 / 7)
    assert metrics["zero_gradient_fraction"] == pytest.approx(3 / 7)
    assert metrics["ratio/max"] == pytest.approx(1.5, rel=1e-5)
    assert metrics["ratio/min"] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_inplace_gradient_equals_the_other_and_reuses_the_logits(
    backend: str, device: str, preset: str
) -> None:
    batch = grpo_batch(24, 1001, torch.bfloat16, device=device)
    spec = LossSpec.preset(preset)
    plain, reused = (batch.logits_NV.clone().requires_grad_() for _ in range(2))
    loss_of(batch, plain, spec, backend).loss.backward()
    loss_of(batch, reused, spec, backend, inplace_backward=True).loss.backward()
    assert torch.equal(plain.grad, reused.grad)
    assert reused.grad.data_ptr() == reused.data_ptr()


def test_inplace_leaves_logits_alone_without_gradient(backend: str, device: str) -> None:
    batch = grpo_batch(24, 101, torch.float32, device=device)
    before = batch.logits_NV.clone()
    loss_of(batch, batch.logits_NV, LossSpec(), backend, inplace_backward=True)
    with torch.no_grad():
        leaf = batch.logits_NV.requires_grad_()
        loss_of(batch, leaf, LossSpec(), backend, inplace_backward=True)
    assert torch.equal(batch.logits_NV.detach(), before)


def test_upstream_gradient_scales_the_result(backend: str, device: str) -> None:
    batch = grpo_batch(24, 101, torch.float32, device=device)
    one, three = (batch.logits_NV.clone().requires_grad_() for _ in range(2))
    loss_of(batch, one, LossSpec(), backend).loss.backward()
    (3 * loss_of(batch, three, LossSpec(), backend).loss).backward()
    torch.testing.assert_close(three.grad, 3 * one.grad, rtol=1e-6, atol=0)


def test_advantages_belong_to_sequences_even_where_tokens_are_as_many(
    backend: str, device: str
) -> None:
    # Two sequences, none and two tokens long: both tokens belong to the second.
    logprobs = [-1.0, -2.0]
    out = kernels.policy_loss(
        logits_with_logprobs(logprobs, 9, torch.float32).to(device),
        torch.zeros(2, dtype=torch.long, device=device),
        None,
        spec=LossSpec(surrogate="reinforce", aggregation="sum"),
        advantages=torch.tensor([7.0, 3.0], device=device),
        cu_seqlens=torch.tensor([0, 0, 2], device=device),
        backend=backend,
    )
    assert out.loss.item() == pytest.approx(9.0, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "advantages, rewards: expected exactly one"),
        ({"rewards": torch.zeros(7)}, r"rewards: expected shape \[8\], one a sequence, got \[7\]"),
        ({"rewards": torch.zeros(8, device="meta")}, "rewards: expected device cpu, got meta"),
        ({"group_size": 3}, "group_size: expected a divisor of the 8 rewards, got 3"),
        ({"group_size": None}, "group_size: expected the size"),
        ({"ref_logprobs": None}, "ref_logprobs: expected a tensor with spec.kl='k3', got None"),
        ({"ref_logprobs": torch.zeros(3)}, r"ref_logprobs: expected shape \[24\], got \[3\]"),
        ({"cu_seqlens": torch.tensor([0, 30])}, "cu_seqlens: expected offsets rising from 0 to 24"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 24])}, "cu_seqlens: expected offsets rising"),
        ({"mask": torch.ones(3)}, r"mask: expected shape \[24\]"),
        ({"denominator": 0}, "denominator: expected a count > 0, got 0"),
        ({"spec": LossSpec.preset("dr_grpo")}, "spec.max_tokens: expected a count"),
        (
            {"spec": LossSpec(sampler_correction="token_mask"), "sampler_logprobs": None},
            "sampler_logprobs: expected a tensor",
        ),
        ({"spec": LossSpec(aggregation="sum"), "denominator": 8}, "denominator: expected None"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    batch = grpo_batch(24, 101, torch.float32)
    spec = change.pop("spec", LossSpec(kl="k3", kl_weight=0.1))
    with pytest.raises(ValueError, match=message):
        loss_of(batch, batch.logits_NV, spec, "reference", **change)
