"""Triton's row passes and fused loss against the float64 reference, on a GPU or interpreted.

The public ops are tested on every backend elsewhere. Here are the promises of this backend alone:
layouts, memory it must not touch, bits of a row, and its own derivative of every token loss.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LossSpec, reference, token_loss, triton_backend
from kernels.loss_metrics import loss_metrics
from kernels.passes import finish_stats
from kernels.reference import IGNORED, NOT_OWNED
from kernels.token_loss import FusedLoss, TokenBatch

STATE = kernels.available_backends()["triton"]
pytestmark = pytest.mark.skipif(STATE != "available", reason=STATE)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative rounding error of a store; Triton's interpreter truncates to bfloat16 where a GPU rounds.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
if DEVICE == "cpu":
    ROUNDING[torch.bfloat16] *= 2


def random_logits(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 3.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * spread).to(DEVICE, dtype)


def random_ids(count: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, width, (count,), generator=generator).to(DEVICE)


def passes(
    backend: Any,
    logits_OIW: Tensor,
    ids_N: Tensor,
    inv_temperature: Tensor | float,
    softcap: float,
    coefs_2N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy and gradient by the two passes of a backend."""
    stats_4N = backend.row_stats(logits_OIW, ids_N, inv_temperature, softcap)
    logprobs_N, entropy_N, max_N, log_sum_N = finish_stats(stats_4N)
    out_OIW = torch.full_like(logits_OIW, math.nan)
    backend.grad_logits(
        logits_OIW,
        ids_N,
        inv_temperature,
        softcap,
        max_N,
        log_sum_N,
        entropy_N,
        *coefs_2N.to(max_N.dtype),
        out_OIW,
    )
    return logprobs_N, entropy_N, out_OIW


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 31, 1024, 4099])
@pytest.mark.parametrize(
    ("scaling", "softcap"), [(1.0, 0.0), (1 / 0.7, 5.0), ("per row", 0.0)], ids=str
)
def test_passes_match_the_float64_reference(
    dtype: torch.dtype, width: int, scaling: float | str, softcap: float
) -> None:
    logits_OIW = random_logits(2, 2, width, dtype=dtype)
    ids_N = random_ids(4, width)
    ids_N[1] = NOT_OWNED
    inv_temperature = (
        torch.tensor([1.0, 0.5, 3.0, 1 / 1.3], device=DEVICE) if scaling == "per row" else scaling
    )
    coefs_2N = random_logits(2, 4, seed=2)
    got = passes(triton_backend, logits_OIW, ids_N, inv_temperature, softcap, coefs_2N)
    want = passes(reference, logits_OIW.double(), ids_N, inv_temperature, softcap, coefs_2N)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=1e-6)
    smallest = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(got[2].double(), want[2], rtol=ROUNDING[dtype] + 1e-6, atol=smallest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_at_a_large_vocabulary_are_at_most_those_of_pytorch(dtype: torch.dtype) -> None:
    logits_OIW = random_logits(1, 6, 262144, dtype=dtype, spread=1.5)
    stats_4N = triton_backend.row_stats(logits_OIW, random_ids(6, 262144), 1.0, 0.0)
    x_NW = logits_OIW[0].double()
    exact_N = x_NW.logsumexp(1)
    exact_entropy_N = -(x_NW.log_softmax(1).exp() * x_NW.log_softmax(1)).sum(1)
    logprobs_NW = logits_OIW[0].float().log_softmax(1)
    eager_N = logits_OIW[0].float().logsumexp(1)
    eager_entropy_N = -(logprobs_NW.exp() * logprobs_NW).sum(1)
    max_N, others_N, _, target_N = stats_4N.double().unbind()
    lse_N = max_N + (others_N + (target_N - max_N).exp()).log()
    entropy_N = finish_stats(stats_4N)[1]
    assert (lse_N - exact_N).abs().max() <= (eager_N - exact_N).abs().max()
    assert (entropy_N - exact_entropy_N).norm() <= (eager_entropy_N - exact_entropy_N).norm()


def test_all_minus_infinite_row_has_the_statistics_of_an_empty_shard() -> None:
    logits_OIW = torch.full((1, 1, 300), -math.inf, device=DEVICE)
    stats_4N = triton_backend.row_stats(logits_OIW, torch.tensor([-1], device=DEVICE), 1.0, 0.0)
    assert stats_4N[:, 0].tolist() == [-math.inf, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_logits_of_an_active_row_give_nan(value: float) -> None:
    logits_OIW = random_logits(1, 2, 700)
    logits_OIW[0, 0, 650] = value
    ids_N = random_ids(2, 600)
    logprobs_N, entropy_N, _ = passes(
        triton_backend, logits_OIW, ids_N, 1.0, 0.0, torch.ones(2, 2, device=DEVICE)
    )
    assert logprobs_N.isnan().tolist() == entropy_N.isnan().tolist() == [True, False]


def test_ignored_and_coefficient_free_rows_are_exact_zeros() -> None:
    logits_OIW = torch.full((1, 2, 300), math.nan, device=DEVICE)
    ids_N = torch.tensor([IGNORED, 7], device=DEVICE)
    stats_4N = triton_backend.row_stats(logits_OIW, ids_N, 1.0, 0.0)
    assert stats_4N[:, 0].tolist() == [0.0, 0.0, 0.0, 0.0]
    coefs_2N = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=DEVICE)
    out_OIW = passes(triton_backend, logits_OIW, ids_N, 1.0, 0.0, coefs_2N)[2]
    assert bool((out_OIW == 0).all())


def strided_views(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Views [3, 4, width] of a larger NaN buffer, none of them contiguous."""
    buffer = torch.full((4, 6, 2 * width + 40), math.nan, dtype=dtype, device=DEVICE)
    return {
        "padded columns": buffer[:3, :4, :width],
        "transposed": buffer.transpose(0, 1)[1:4, :4, :width],
        "unaligned": buffer[1:, 1:5, 3 : 3 + width],
        "every other row": buffer.view(12, 2, -1)[:, 1].view(3, 4, -1)[..., :width],
    }


@pytest.mark.parametrize("layout", ["padded columns", "transposed", "unaligned", "every other row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_changes_no_bit_and_touches_nothing_else(layout: str, dtype: torch.dtype) -> None:
    width = 1111
    plain_OIW = random_logits(3, 4, width, dtype=dtype)
    ids_N, coefs_2N = random_ids(12, width), random_logits(2, 12, seed=3)
    want = passes(triton_backend, plain_OIW, ids_N, 1.0, 0.0, coefs_2N)
    view_OIW = strided_views(width, dtype)[layout]
    view_OIW.copy_(plain_OIW)
    stats_4N = triton_backend.row_stats(view_OIW, ids_N, 1.0, 0.0)
    logprobs_N, entropy_N, max_N, log_sum_N = finish_stats(stats_4N)
    out_OIW = strided_views(width, dtype)[layout]
    for target_OIW in (out_OIW, view_OIW):
        triton_backend.grad_logits(
            view_OIW, ids_N, 1.0, 0.0, max_N, log_sum_N, entropy_N, *coefs_2N, target_OIW
        )
        assert torch.equal(target_OIW, want[2])
        base = target_OIW._base
        assert base is not None and base.isnan().sum() == base.numel() - target_OIW.numel()
    assert torch.equal(logprobs_N, want[0]) and torch.equal(entropy_N, want[1])


def token_batch(*, on_policy: bool = False) -> TokenBatch:
    """Twelve tokens in four sequences, with every edge a token can sit on."""
    generator = torch.Generator().manual_seed(4)
    old_N, ref_N, sampler_N = (
        (torch.randn(12, generator=generator) * 0.5 - 3).to(DEVICE) for _ in range(3)
    )
    ids_N = random_ids(12, 37)
    ids_N[2] = IGNORED
    # Padding values that break naive code, and edges: no old probability, an overflowing ratio.
    old_N[2], ref_N[2], sampler_N[2] = -1e4, math.nan, math.nan
    old_N[4], old_N[5], sampler_N[6] = -math.inf, -2000.0, math.nan
    lengths_S = torch.tensor([3, 4, 1, 4])
    advantages_N = torch.tensor([1.0, 0.5, -1.0, -0.7]).repeat_interleave(lengths_S)
    return TokenBatch(
        token_ids_N=ids_N,
        offsets=torch.nn.functional.pad(lengths_S.cumsum(0), (1, 0)).to(DEVICE),
        old_logprobs_N=None if on_policy else old_N,
        ref_logprobs_N=ref_N,
        sampler_logprobs_N=sampler_N,
        advantages_N=advantages_N.to(DEVICE),
    )


def fused(batch: TokenBatch, spec: LossSpec, gradient: bool = True) -> tuple[FusedLoss, Tensor]:
    logits_OIW = random_logits(1, 12, 37, spread=1.0)
    logits_OIW[0, 2] = math.nan
    out_OIW = torch.full_like(logits_OIW, math.nan)
    result = triton_backend.policy_loss(
        logits_OIW, batch, spec, 1 / 0.9, 0.0, out_OIW if gradient else None
    )
    return result, out_OIW


SURROGATES: dict[str, dict[str, Any]] = {
    "clip": {},
    "bounded": {"dual_clip": 1.5, "ratio_cap": 1.4, "clip_low": 0.1},
    "cispo": {"surrogate": "cispo", "clip_low": 0.3, "clip_high": 0.5},
    "sapo": {"surrogate": "sapo"},
    "reinforce": {"surrogate": "reinforce"},
}
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "k1": {"kl": "k1", "kl_weight": 0.1, "kl_ratio_weighted": True},
    "k2 + entropy": {"kl": "k2", "kl_weight": 0.1, "entropy_weight": 0.2},
    "r k3": {"kl": "k3", "kl_weight": 0.1, "kl_ratio_weighted": True},
    "truncated": {"sampler_correction": "token_truncate", "sampler_high": 1.1},
    "masked": {"sampler_correction": "token_mask", "sampler_low": 0.7, "sampler_high": None},
}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_fused_loss_matches_autograd_of_the_reference(
    surrogate: str, terms: str, on_policy: bool
) -> None:
    spec = LossSpec(**SURROGATES[surrogate], **TERMS[terms])
    batch = token_batch(on_policy=on_policy)
    if spec.kl_ratio_weighted and not on_policy:
        # A ratio of e^1997 makes r KL infinite, as it should; it has no place in a comparison.
        batch.old_logprobs_N[5] = -3.0
    got, out_OIW = fused(batch, spec)
    logits_OIW = random_logits(1, 12, 37, spread=1.0).double()
    stats_4N = reference.row_stats(logits_OIW, batch.token_ids_N, 1 / 0.9, 0.0)
    logprobs_N, entropy_N, max_N, log_sum_N = finish_stats(stats_4N)
    resolved = token_loss.token_terms(batch, spec)
    loss, *coefs = token_loss.loss_and_derivatives(logprobs_N, entropy_N, resolved, spec)
    metrics = loss_metrics(logprobs_N, entropy_N, *coefs, batch, resolved, spec)
    want_OIW = torch.empty_like(logits_OIW)
    reference.grad_logits(
        logits_OIW, batch.token_ids_N, 1 / 0.9, 0.0, max_N, log_sum_N, entropy_N, *coefs, want_OIW
    )
    torch.testing.assert_close(out_OIW.double(), want_OIW, rtol=5e-6, atol=1e-9)
    torch.testing.assert_close(got.loss.double(), loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(got.logprobs_N.double(), logprobs_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy_N.double(), entropy_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.metrics, metrics, rtol=1e-4, atol=1e-6)


def test_fused_statistics_need_no_gradient_buffer() -> None:
    spec = LossSpec(kl="k3", kl_weight=0.1, entropy_weight=0.1)
    with_gradient, _ = fused(token_batch(), spec)
    without, untouched_OIW = fused(token_batch(), spec, gradient=False)
    assert bool(untouched_OIW.isnan().all())
    for name in ("loss", "logprobs_N", "entropy_N", "metrics"):
        assert torch.equal(getattr(with_gradient, name), getattr(without, name))


def test_fused_gradient_in_place_has_the_same_bits() -> None:
    batch, spec = token_batch(), LossSpec(entropy_weight=0.1)
    _, out_OIW = fused(batch, spec)
    logits_OIW = random_logits(1, 12, 37, spread=1.0)
    logits_OIW[0, 2] = math.nan
    triton_backend.policy_loss(logits_OIW, batch, spec, 1 / 0.9, 0.0, logits_OIW)
    assert torch.equal(logits_OIW, out_OIW)


def test_zero_advantage_with_infinite_sampler_weight_gives_zero() -> None:
    batch = token_batch()
    sampler_N = torch.full((12,), -math.inf, device=DEVICE)
    batch = replace(
        batch, sampler_logprobs_N=sampler_N, advantages_N=torch.zeros(12, device=DEVICE)
    )
    for on_policy in (False, True):
        if on_policy:
            batch = replace(batch, old_logprobs_N=None)
        spec = LossSpec(sampler_correction="token_truncate")
        assert bool((fused(batch, spec)[1] == 0).all())


def test_empty_batch_launches_nothing() -> None:
    empty_OIW = torch.empty(1, 0, 37, device=DEVICE)
    ids_N = torch.empty(0, dtype=torch.long, device=DEVICE)
    assert triton_backend.row_stats(empty_OIW, ids_N, 1.0, 0.0).shape == (4, 0)
    triton_backend.scale_(empty_OIW, torch.tensor(2.0, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_rounds_the_product_once(dtype: torch.dtype) -> None:
    view_OIW = strided_views(777, dtype)["unaligned"]
    grad_OIW = random_logits(3, 4, 777, dtype=dtype)
    view_OIW.copy_(grad_OIW)
    factor = torch.tensor(1 / 3, device=DEVICE)
    triton_backend.scale_(view_OIW, factor)
    product_OIW = grad_OIW.double() * factor.double()
    torch.testing.assert_close(
        view_OIW.double(), product_OIW, rtol=ROUNDING[dtype] + 1e-7, atol=1e-7
    )
    base = view_OIW._base
    assert base is not None and base.isnan().sum() == base.numel() - view_OIW.numel()


def test_scale_by_one_stores_nothing() -> None:
    # Multiplying a signalling NaN would quieten it.
    bits = torch.full((1, 2, 64), 0x7F800001, dtype=torch.int32, device=DEVICE)
    before = bits.clone()
    triton_backend.scale_(bits.view(torch.float32), torch.tensor(1.0, device=DEVICE))
    assert torch.equal(bits, before)
