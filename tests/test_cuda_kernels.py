"""The CUDA kernels on CPU tensors, thread by thread: layouts, devices, and any order of threads."""

import math

import pytest
import torch
from cuda_emulation.emulator import DEVICES, Emulator
from torch import Tensor

import kernels
from kernels import cuda_backend, reference
from kernels.reference import IGNORED, NOT_OWNED
from kernels.testing import grpo_batch, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 127, 128, 129, 1000, 4097, 32003]
NUM_TOKENS = 5
SEEDS = range(4)
# Of float32 sums of up to 32003 columns, whose exponentials are wrong by 3 ulp at most.
STATS_TOLERANCE = 1e-6


def rows(width: int, dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [1, N, W] whose rows start `shift` elements into wider ones, and ids: an ignored row
    of NaN, a target of another shard, a row of -inf but for one column."""
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(NUM_TOKENS, width + 8, generator=generator).to(dtype)
    logits = wide[:, shift : shift + width]
    ids = torch.randint(0, width, (NUM_TOKENS,), generator=generator)
    logits[1], ids[1], ids[2] = math.nan, IGNORED, NOT_OWNED
    logits[3], logits[3, width // 2] = -math.inf, 1.0
    return logits[None], ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("width", WIDTHS)
def test_statistics_in_any_order_on_any_device(
    emulator: Emulator, width: int, shift: int, dtype: torch.dtype
) -> None:
    logits, ids = rows(width, dtype, shift)
    want = reference.row_stats(logits.double(), ids, 1.25, 0.0)
    first = None
    for emulator.device, seed in zip(DEVICES, SEEDS, strict=True):
        emulator.seed(seed)
        got = cuda_backend.row_stats(logits, ids, 1.25, 0.0)
        torch.testing.assert_close(
            got.double(), want, rtol=STATS_TOLERANCE, atol=width * STATS_TOLERANCE
        )
        first = got if first is None else first
        assert torch.equal(got, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("width", [2, 129, 4097, 40009])
def test_loss_and_gradient_in_any_order_on_any_device(
    emulator: Emulator, width: int, shift: int, dtype: torch.dtype
) -> None:
    """Against float64, and nothing is written beside the rows."""
    logits, ids = rows(width, dtype, shift)
    ids[2], ids[3] = 0, width // 2
    arguments = dict(
        token_ids=ids[None],
        old_logprobs=torch.linspace(-3, 0, NUM_TOKENS)[None],
        ref_logprobs=torch.linspace(-2, -1, NUM_TOKENS)[None],
        spec=kernels.LossSpec(kl="k3", kl_weight=0.04, entropy_weight=0.01),
        advantages=torch.tensor([1.0]),
    )
    exact = logits.double().requires_grad_()
    kernels.policy_loss(exact, backend="reference", **arguments).loss.backward()
    assert exact.grad is not None
    rounding = relative_error(exact.grad.to(dtype), exact.grad)
    results = []
    for emulator.device, seed in zip(DEVICES, SEEDS, strict=True):
        emulator.seed(seed)
        frame = torch.full((1, NUM_TOKENS, width + 8), 7.0, dtype=dtype)
        out = frame[..., shift : shift + width].copy_(logits).detach().requires_grad_()
        loss = kernels.policy_loss(out, backend="cuda", inplace_backward=True, **arguments).loss
        loss.backward()
        assert out.grad is not None
        assert relative_error(out.grad, exact.grad) <= 1.01 * rounding + 2e-6
        assert bool((out.grad[0, 1] == 0).all())
        assert bool((frame[..., :shift] == 7).all() and (frame[..., shift + width :] == 7).all())
        results.append(out.grad.clone())
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_row_has_the_same_bits_in_any_batch(emulator: Emulator) -> None:
    batch = grpo_batch(6, 5003, torch.bfloat16)
    whole = cuda_backend.row_stats(batch.logits_NV[None], batch.token_ids_N, 1.0, 0.0)
    for n in range(6):
        alone = batch.logits_NV[None, n : n + 1], batch.token_ids_N[n : n + 1]
        assert torch.equal(cuda_backend.row_stats(*alone, 1.0, 0.0)[:, 0], whole[:, n])


def test_the_largest_logit_is_no_gap_at_any_temperature(emulator: Emulator) -> None:
    """30 / 1e-8 is rounded by more than exp can bear."""
    logits = torch.linspace(-30.3, 30.1, 1003)[None, None]
    stats = cuda_backend.row_stats(logits, torch.tensor([3]), 1e8, 0.0)
    assert stats[1, 0] == 1.0 and stats[2, 0] == 0.0
