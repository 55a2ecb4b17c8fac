"""The fused C++ loss against the specification in float64, from raw rewards to the gradient."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from kernels import advantages, native_backend, reference, token_loss
from kernels.loss_metrics import METRIC_NAMES, loss_metrics
from kernels.passes import finish_stats
from kernels.reference import IGNORED
from kernels.spec import LossSpec
from kernels.testing import eager_policy_loss, grpo_batch
from kernels.token_loss import FusedLoss, TokenBatch

if native_backend.cpp_unavailable_reason() is not None:
    pytest.skip(f"{native_backend.cpp_unavailable_reason()}", allow_module_level=True)

LENGTHS = (3, 0, 5, 1, 4, 2, 6, 3)
NUM_TOKENS, WIDTH = sum(LENGTHS), 1203
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SPECS = {
    "grpo": LossSpec(),
    "dual clip": LossSpec(clip_high=0.28, dual_clip=1.5, aggregation="token_mean"),
    "ratio cap": LossSpec(ratio_cap=1.4, aggregation="sequence_sum"),
    "cispo": LossSpec(surrogate="cispo", clip_low=0.4, clip_high=0.5, aggregation="token_mean"),
    "sapo": LossSpec(surrogate="sapo", sapo_temperature_pos=1.3, sapo_temperature_neg=2.0),
    "reinforce": LossSpec(surrogate="reinforce", advantage_scale="none"),
    "k1": LossSpec(kl="k1", kl_weight=0.1),
    "k2": LossSpec(kl="k2", kl_weight=0.1, aggregation="sum"),
    "k3": LossSpec(kl="k3", kl_weight=0.1, advantage_scale="batch", advantage_ddof=0),
    "ratio-weighted k1": LossSpec(kl="k1", kl_weight=0.1, kl_ratio_weighted=True),
    "ratio-weighted k3": LossSpec(kl="k3", kl_weight=0.1, kl_ratio_weighted=True),
    "entropy": LossSpec(entropy_weight=0.05, aggregation="constant", max_tokens=7),
    "token truncate": LossSpec(sampler_correction="token_truncate", sampler_high=1.1),
    "token mask": LossSpec(sampler_correction="token_mask", sampler_low=0.8, sampler_high=1.3),
    "sequence truncate": LossSpec(sampler_correction="sequence_truncate", sampler_high=1.05),
    "sequence mask": LossSpec(sampler_correction="sequence_mask", sampler_low=0.7),
    "open mask": LossSpec(sampler_correction="token_mask", sampler_high=None),
}


def random_batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, TokenBatch]:
    """Logits [1, N, W] and a batch with an empty sequence, ignored rows and NaN where allowed."""
    generator = torch.Generator().manual_seed(seed)
    logits_NW = torch.randn(NUM_TOKENS, WIDTH, generator=generator) * 2
    ids_N = torch.randint(0, WIDTH, (NUM_TOKENS,), generator=generator)
    logits_NW[torch.arange(NUM_TOKENS), ids_N] += 8 * torch.rand(NUM_TOKENS, generator=generator)
    logits_NW = logits_NW.to(dtype)
    logprobs_N = logits_NW.double().log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    noise_3N = torch.randn(3, NUM_TOKENS, generator=generator, dtype=torch.float64) * 0.3
    old_N, ref_N, sampler_N = logprobs_N + noise_3N
    sampler_N[4] = math.nan
    old_N[9] = -math.inf
    sampler_N[9] = -1.0
    ids_N[[3, 17]] = IGNORED
    logits_NW[3] = math.nan
    ref_N[17] = math.nan
    return logits_NW[None], TokenBatch(
        token_ids_N=ids_N,
        offsets=torch.tensor([0, *LENGTHS]).cumsum(0),
        old_logprobs_N=old_N,
        ref_logprobs_N=ref_N,
        sampler_logprobs_N=sampler_N,
        rewards_S=torch.tensor([1.0, 0.0, 0.5, math.nan, 2.0, 2.0, 2.0, 2.0]),
        group_size=4,
    )


def run(
    logits_OIW: Tensor,
    batch: TokenBatch,
    spec: LossSpec,
    inv_temperature: Tensor | float = 1.0,
    softcap: float = 0.0,
) -> tuple[FusedLoss, Tensor]:
    out_OIW = torch.full_like(logits_OIW, 7.0)
    return native_backend.policy_loss(
        logits_OIW, batch, spec, inv_temperature, softcap, out_OIW
    ), out_OIW


def specified(
    logits_OIW: Tensor,
    batch: TokenBatch,
    spec: LossSpec,
    inv_temperature: Tensor | float = 1.0,
    softcap: float = 0.0,
) -> tuple[FusedLoss, Tensor]:
    """The same in float64: log_softmax, `token_loss`, the gradient by `reference`."""
    logits_OIW, ids_N = logits_OIW.double(), batch.token_ids_N
    ids_N1 = ids_N.clamp(min=0)[:, None]
    active_N = ids_N != IGNORED
    z_NW = reference.scaled_logits(logits_OIW, inv_temperature, softcap)
    logp_NW = z_NW.log_softmax(-1)
    row_max_N = z_NW.amax(-1)
    log_sum_N = z_NW.logsumexp(-1) - row_max_N
    logprobs_N = torch.where(active_N, logp_NW.gather(1, ids_N1)[:, 0], 0.0)
    entropy_N = torch.where(active_N, -(logp_NW.exp() * logp_NW).sum(-1), 0.0)
    terms = token_loss.token_terms(batch, spec)
    loss, *coefs = token_loss.loss_and_derivatives(logprobs_N, entropy_N, terms, spec)
    metrics = loss_metrics(logprobs_N, entropy_N, *coefs, batch, terms, spec)
    out_OIW = torch.empty_like(logits_OIW)
    reference.grad_logits(
        logits_OIW,
        ids_N,
        inv_temperature,
        softcap,
        row_max_N,
        log_sum_N,
        entropy_N,
        *coefs,
        out_OIW,
    )
    fused = FusedLoss(loss=loss, logprobs_N=logprobs_N, entropy_N=entropy_N, metrics=metrics)
    return fused, out_OIW


def assert_matches(
    got: tuple[FusedLoss, Tensor], want: tuple[FusedLoss, Tensor], dtype: torch.dtype
) -> None:
    (fused, grad_OIW), (want_fused, want_grad_OIW) = got, want
    for name in ("loss", "logprobs_N", "entropy_N", "metrics"):
        got_values, want_values = getattr(fused, name), getattr(want_fused, name)
        assert got_values.dtype == torch.float32
        assert torch.allclose(got_values.double(), want_values.double(), rtol=5e-6, atol=2e-6), name
    rounding = (want_grad_OIW.to(dtype) - want_grad_OIW).norm().item()
    allowed = 1.01 * rounding + 2e-6 * want_grad_OIW.norm().item()
    assert (grad_OIW - want_grad_OIW).norm().item() <= allowed
    assert (grad_OIW[want_grad_OIW == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", SPECS)
def test_fused_loss_matches_specification(name: str, dtype: torch.dtype) -> None:
    logits_OIW, batch = random_batch(dtype)
    want = specified(logits_OIW, batch, SPECS[name])
    assert want[1].abs().max() > 0
    assert_matches(run(logits_OIW, batch, SPECS[name]), want, dtype)


@pytest.mark.parametrize("name", ["grpo", "cispo", "sapo", "ratio-weighted k3", "token truncate"])
def test_on_policy_loss_matches_specification(name: str) -> None:
    logits_OIW, batch = random_batch()
    batch = replace(batch, old_logprobs_N=None)
    want = specified(logits_OIW, batch, SPECS[name])
    assert_matches(run(logits_OIW, batch, SPECS[name]), want, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("name", ["k3", "entropy"])
def test_temperature_and_softcap_match_specification(
    name: str, softcap: float, dtype: torch.dtype
) -> None:
    logits_OIW, batch = random_batch(dtype)
    for inv_temperature in (1.6, torch.linspace(0.4, 1.8, NUM_TOKENS)):
        args = (logits_OIW, batch, SPECS[name], inv_temperature, softcap)
        assert_matches(run(*args), specified(*args), dtype)


def test_given_advantages_match_specification() -> None:
    logits_OIW, batch = random_batch()
    advantages_N = torch.linspace(-1, 1, NUM_TOKENS)
    given = replace(batch, rewards_S=None, group_size=None, advantages_N=advantages_N)
    args = (logits_OIW, given, SPECS["k3"])
    assert_matches(run(*args), specified(*args), torch.float32)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "sequence_sum", "sum"])
def test_denominator_matches_specification(aggregation: str) -> None:
    logits_OIW, batch = random_batch()
    args = (
        logits_OIW,
        replace(batch, denominator=torch.tensor(40.0)),
        LossSpec.preset("grpo", aggregation=aggregation),
    )
    assert_matches(run(*args), specified(*args), torch.float32)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    ("rewards", "group_size"),
    [
        ([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3], 4),
        ([1.0, math.nan, 0.0, math.nan, math.nan, 3.0], 3),
        ([0.1, 0.1, 0.1, 0.2], 2),
        ([3.0, 5.0], 1),
    ],
)
def test_raw_rewards_match_group_advantages(
    rewards: list[float], group_size: int, scale: str
) -> None:
    num_sequences = len(rewards)
    rewards_S = torch.tensor(rewards, dtype=torch.float64)
    spec = LossSpec(
        surrogate="reinforce", advantage_scale=scale, advantage_eps=0.0, aggregation="sum"
    )
    batch = TokenBatch(
        token_ids_N=torch.zeros(num_sequences, dtype=torch.int64),
        offsets=torch.arange(num_sequences + 1),
        rewards_S=rewards_S,
        group_size=group_size,
    )
    # Two equal logits: d loss / d logit of the target is -advantage / 2.
    grad_N = run(torch.zeros(1, num_sequences, 2), batch, spec)[1][0, :, 0]
    want_S = advantages.normalized_advantages(
        rewards_S,
        advantages.group_offsets(num_sequences, group_size, rewards_S.device),
        scale=scale,
        ddof=1,
        eps=0.0,
    )
    assert torch.allclose(-2 * grad_N.double(), want_S, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["k3", "entropy"])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_same_bits_in_place_repeated_and_on_any_threads(
    name: str, softcap: float, dtype: torch.dtype
) -> None:
    logits_OIW, batch = random_batch(dtype)
    fused, grad_OIW = run(logits_OIW, batch, SPECS[name], 1.3, softcap)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            in_place_OIW = logits_OIW.clone()
            again = native_backend.policy_loss(
                in_place_OIW, batch, SPECS[name], 1.3, softcap, in_place_OIW
            )
            assert torch.equal(in_place_OIW, grad_OIW)
            for field in ("loss", "logprobs_N", "entropy_N", "metrics"):
                assert torch.equal(getattr(again, field), getattr(fused, field))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_padded_layout_gives_the_same_bits(dtype: torch.dtype) -> None:
    logits_OIW, batch = random_batch(dtype)
    wide = torch.full((6, 4, WIDTH + 9), 5.0, dtype=dtype)
    view_OIW = wide[:, :, 3:-6]
    view_OIW.copy_(logits_OIW.view(6, 4, WIDTH))
    want, want_OIW = run(logits_OIW, batch, SPECS["k3"])
    got = native_backend.policy_loss(view_OIW, batch, SPECS["k3"], 1.0, 0.0, view_OIW)
    assert torch.equal(view_OIW.reshape(1, NUM_TOKENS, WIDTH), want_OIW)
    assert torch.equal(got.metrics, want.metrics)
    assert (wide[:, :, :3] == 5).all()
    assert (wide[:, :, -6:] == 5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_without_gradient_the_values_are_the_same(dtype: torch.dtype) -> None:
    logits_OIW, batch = random_batch(dtype)
    want, _ = run(logits_OIW, batch, SPECS["k3"])
    got = native_backend.policy_loss(logits_OIW, batch, SPECS["k3"], 1.0, 0.0, None)
    for field in ("loss", "logprobs_N", "entropy_N", "metrics"):
        assert torch.equal(getattr(got, field), getattr(want, field))


def test_overflowing_ratio_leaves_zero_gradient_where_clipped_or_without_advantage() -> None:
    logits_OIW = torch.zeros(1, 3, 4)
    batch = TokenBatch(
        token_ids_N=torch.zeros(3, dtype=torch.int64),
        offsets=torch.arange(4),
        old_logprobs_N=torch.full((3,), -2000.0),
        advantages_N=torch.tensor([0.0, 1.0, -1.0]),
    )
    fused, grad_OIW = run(logits_OIW, batch, LossSpec(dual_clip=3.0))
    assert torch.equal(grad_OIW, torch.zeros_like(grad_OIW))
    assert fused.loss.item() == pytest.approx((0.0 - 1.2 + 3.0) / 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("inv_temperature", "softcap"), [(1.0, 0.0), (1.3, 0.0), (0.9, 25.0)])
def test_logprobs_are_those_of_row_stats_to_the_bit(
    dtype: torch.dtype, inv_temperature: float, softcap: float
) -> None:
    logits_OIW, batch = random_batch(dtype)
    fused, _ = run(logits_OIW, batch, SPECS["k3"], inv_temperature, softcap)
    stats_4N = native_backend.row_stats(logits_OIW, batch.token_ids_N, inv_temperature, softcap)
    logprobs_N, entropy_N, *_ = finish_stats(stats_4N)
    active_N = batch.token_ids_N != IGNORED
    assert torch.equal(fused.logprobs_N[active_N], logprobs_N[active_N])
    assert torch.equal(fused.entropy_N[active_N], entropy_N[active_N])


@pytest.mark.parametrize("rest", [1e-7, 1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_confident_token_keeps_relative_accuracy(dtype: torch.dtype, rest: float) -> None:
    logits_OIW = torch.zeros(1, 1, 3000, dtype=dtype)
    logits_OIW[0, 0, 1700] = math.log(2999 / rest)
    others = 2999 * math.exp(-logits_OIW[0, 0, 1700].item())
    # The advantage brings the gradient to the order of 1, which each dtype can express.
    batch = TokenBatch(
        token_ids_N=torch.tensor([1700]),
        offsets=torch.tensor([0, 1]),
        advantages_N=torch.tensor([-1 / rest], dtype=torch.float64),
    )
    fused, grad_OIW = run(logits_OIW, batch, LossSpec(surrogate="reinforce"))
    assert fused.logprobs_N.item() == pytest.approx(-math.log1p(others), rel=2e-6)
    want = others / (1 + others) / rest
    rounding = torch.finfo(dtype).eps
    assert grad_OIW[0, 0, 1700].item() == pytest.approx(want, rel=2e-6 + rounding)
    assert grad_OIW[0, 0, 0].item() == pytest.approx(-want / 2999, rel=2e-5 + rounding)


def test_nothing_active_gives_zero() -> None:
    logits_OIW, batch = random_batch()
    batch = replace(batch, token_ids_N=torch.full((NUM_TOKENS,), IGNORED))
    fused, grad_OIW = run(logits_OIW, batch, SPECS["k3"])
    assert fused.loss == 0
    assert torch.equal(grad_OIW, torch.zeros_like(grad_OIW))
    assert fused.metrics[METRIC_NAMES.index("tokens")] == 0
    assert fused.metrics.isfinite().all()


def test_offsets_must_cover_the_rows() -> None:
    logits_OIW, batch = random_batch()
    batch = replace(batch, offsets=batch.offsets[:-1], rewards_S=None, advantages_N=torch.ones(7))
    with pytest.raises(ValueError, match=r"offsets\[-1\]: expected 24, got 21"):
        run(logits_OIW, batch, SPECS["grpo"])


@pytest.mark.parametrize("width", [49152, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_gradient_error_is_no_larger_than_eager(dtype: torch.dtype, width: int) -> None:
    case = grpo_batch(32, width, dtype)
    spec = LossSpec(kl="k3", kl_weight=0.04)

    def eager_gradient(logits_NV: Tensor) -> Tensor:
        leaf_NV = logits_NV.clone().requires_grad_()
        eager_policy_loss(leaf_NV, case).backward()
        assert leaf_NV.grad is not None
        return leaf_NV.grad

    truth_NV = eager_gradient(case.logits_NV.double())
    leaf_NV = case.logits_NV.clone().requires_grad_()
    kernels.policy_loss(
        leaf_NV,
        case.token_ids_N,
        case.old_logprobs_N,
        spec=spec,
        rewards=case.rewards_S,
        group_size=case.group_size,
        cu_seqlens=case.cu_seqlens,
        ref_logprobs=case.ref_logprobs_N,
        backend="cpp",
    ).loss.backward()
    assert leaf_NV.grad is not None
    error = (leaf_NV.grad - truth_NV).norm() / truth_NV.norm()
    eager_error = (eager_gradient(case.logits_NV) - truth_NV).norm() / truth_NV.norm()
    assert error.item() <= eager_error.item()
