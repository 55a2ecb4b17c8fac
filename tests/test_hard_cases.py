"""The hard cases that break public kernels, on every backend: groups 1 to 11, 14 and 15.

Each test carries the number of its group. Groups 16, 17 and 21 stand in
`test_hard_cases_gradient.py`, 12, 13, 19, 20 and the losses of 8 and 9 in
`test_hard_cases_loss.py`; 18, weights that are frozen, tied, sharded or under autocast, in
`test_linear.py` and `test_linear_in_modules.py`; 22, tracing and recompilation, in
`test_compile.py` and `test_triton_compile.py`.

The truth is plain PyTorch in float64. An error may be FACTOR times that of plain PyTorch in
float32, rounded to the dtype of the logits, plus the eps of that dtype (times the size of the
values where that is above 1).
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from torch import Tensor

import kernels
from kernels import LossSpec, VocabShard
from kernels.testing import backends_on, eager_token_values

FACTOR = 2.0
EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Values(NamedTuple):
    """Results of a row, and the gradient of a weighted sum of log-probs and entropies."""

    logprobs: Tensor
    entropy: Tensor
    gradient: Tensor


def upstream(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gradients by log-prob and entropy, of either sign."""
    steps_N = torch.arange(num_rows, device=device)
    return torch.cos(steps_N), 0.3 * torch.cos(steps_N + 1)


def weighted_gradient(leaf: Tensor, logprobs_N: Tensor, entropy_N: Tensor) -> Tensor:
    weights_2N = upstream(len(logprobs_N), leaf.device)
    total = (weights_2N[0] * logprobs_N + weights_2N[1] * entropy_N).sum()
    return torch.autograd.grad(total, leaf)[0]


def ours(
    logits_NV: Tensor, ids_N: Tensor, backend: str, temperature: float | Tensor = 1.0
) -> Values:
    leaf = logits_NV.clone().requires_grad_()
    out = kernels.token_logprobs(
        leaf, ids_N, temperature=temperature, with_entropy=True, backend=backend
    )
    assert out.entropy is not None
    gradient = weighted_gradient(leaf, out.logprobs, out.entropy)
    return Values(out.logprobs.detach(), out.entropy.detach(), gradient)


def pytorch(logits_NV: Tensor, ids_N: Tensor, temperature: float | Tensor = 1.0) -> Values:
    """The same in plain PyTorch: float64 for float64 logits, else upcast to float32."""
    leaf = logits_NV.clone().requires_grad_()
    z_NV = leaf if leaf.dtype == torch.float64 else leaf.float()
    logprobs_N, entropy_N = eager_token_values(z_NV, ids_N, temperature=temperature)
    gradient = weighted_gradient(leaf, logprobs_N, entropy_N)
    return Values(logprobs_N.detach(), entropy_N.detach(), gradient)


def assert_as_exact_as_pytorch(
    logits_NV: Tensor, ids_N: Tensor, backend: str, temperature: float | Tensor = 1.0
) -> None:
    got = ours(logits_NV, ids_N, backend, temperature)
    plain = pytorch(logits_NV, ids_N, temperature)
    exact = pytorch(logits_NV.double(), ids_N, temperature)
    for name, value, baseline, truth in zip(Values._fields, got, plain, exact, strict=True):
        error = (value.double() - truth).abs().max().item()
        plain_error = (baseline.double() - truth).abs().max().item()
        scale = max(1.0, truth.abs().max().item())
        bound = FACTOR * plain_error + torch.finfo(value.dtype).eps * scale
        assert error <= bound, f"{name}: error {error:.3g}, plain PyTorch {plain_error:.3g}"


def random_logits(num_rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows + width)
    return (torch.randn(num_rows, width, generator=generator) * 3).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_01_all_logits_far_below_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    logits = random_logits(2, 5000, dtype, device) - 200
    assert_as_exact_as_pytorch(logits, torch.tensor([7, 4999], device=device), backend)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_02_a_common_offset_costs_nothing(backend: str, device: str, offset: float) -> None:
    # Quarters stay exact under the offset.
    centred = (random_logits(2, 5000, torch.float32, device) * 4).round() / 4
    ids = torch.tensor([7, 4999], device=device)
    assert_as_exact_as_pytorch(centred + offset, ids, backend)
    for got, want in zip(
        ours(centred + offset, ids, backend), ours(centred, ids, backend), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_02_logits_near_the_largest_number(backend: str, device: str, dtype: torch.dtype) -> None:
    logits = random_logits(2, 5000, dtype, device).sign() * 1.5e38
    assert_as_exact_as_pytorch(logits, logits.argmax(1), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_03_first_tiles_of_minus_infinity(backend: str, device: str, dtype: torch.dtype) -> None:
    logits = random_logits(2, 50300, dtype, device)
    logits[:, :50000] = -math.inf
    logits[1] = -math.inf
    logits[1, 50000] = 3.0
    assert_as_exact_as_pytorch(logits, torch.tensor([50299, 50000], device=device), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_04_scattered_minus_infinity(backend: str, device: str, dtype: torch.dtype) -> None:
    logits = random_logits(2, 3000, dtype, device)
    logits[0, 5::29] = -math.inf
    logits[1, ::2] = -math.inf
    assert_as_exact_as_pytorch(logits, torch.tensor([7, 7], device=device), backend)


def test_04_token_of_probability_zero(backend: str, device: str) -> None:
    logits = random_logits(1, 999, torch.float32, device)
    logits[0, 3] = -math.inf
    ids = torch.tensor([3], device=device)
    got, exact = ours(logits, ids, backend), pytorch(logits.double(), ids)
    assert got.logprobs.item() == -math.inf
    torch.testing.assert_close(got.entropy.double(), exact.entropy, rtol=2 * EPS, atol=0)
    torch.testing.assert_close(got.gradient.double(), exact.gradient, rtol=1e-5, atol=EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "width", [1, 2, 31, 32000, 50257, 129920, 151936, 248320, 262144], ids="V={}".format
)
def test_05_vocabularies_of_any_width(
    backend: str, device: str, dtype: torch.dtype, width: int
) -> None:
    logits = random_logits(2, width, dtype, device)
    # A column too few or too many would show in both rows.
    logits[0, -1], logits[1, 0] = 12.0, 11.0
    assert_as_exact_as_pytorch(logits, torch.tensor([width - 1, 0], device=device), backend)


def untouched_zeros(*shape: int, device: str) -> Tensor:
    """bfloat16 zeros that take no memory on a CPU before they are written to."""
    if device == "cuda":
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(numpy.zeros(shape, numpy.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("far_axis", [0, 1])
def test_06_rows_more_than_2_to_the_31_elements_apart(
    backend: str, device: str, far_axis: int
) -> None:
    near = random_logits(4, 1003, torch.bfloat16, device).view(2, 2, 1003)
    strides = (2**31 + 8, 1003, 1) if far_axis == 0 else (1003, 2**31 + 8, 1)
    memory = untouched_zeros(2**31 + 4 * 1003, device=device)
    far = memory.as_strided(near.shape, strides)
    far.copy_(near)
    ids = torch.tensor([[5, 1002], [0, 1000]], device=device)
    arguments = dict(
        spec=LossSpec(entropy_weight=0.1),
        advantages=torch.tensor([1.0, -1.0], device=device),
        backend=backend,
    )
    near.requires_grad_()
    want = kernels.policy_loss(near, ids, None, **arguments)
    want.loss.backward()
    leaf = far.detach().requires_grad_()
    stats = kernels.token_logprobs(leaf, ids, backend=backend)
    assert torch.equal(stats.logprobs, want.logprobs)
    got = kernels.policy_loss(leaf, ids, None, inplace_backward=True, **arguments)
    got.loss.backward()
    assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.entropy, want.entropy)
    assert torch.equal(far, near.grad)


def test_06_more_than_2_to_the_31_logits(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("the reference would hold the logits in float32, several times over")
    num_rows, width = 2100, 2**20
    logits = untouched_zeros(num_rows, width, device=device)
    logits[-2:] = random_logits(2, width, torch.bfloat16, device)
    ids = torch.full((num_rows,), -100, device=device)
    ids[-2:] = torch.tensor([0, width - 1], device=device)
    got = kernels.token_logprobs(logits, ids, with_entropy=True, backend=backend)
    want = kernels.token_logprobs(logits[-2:], ids[-2:], with_entropy=True, backend=backend)
    assert torch.equal(got.logprobs[-2:], want.logprobs)
    assert torch.equal(got.entropy[-2:], want.entropy)
    assert bool((got.logprobs[:-2] == 0).all())


def test_07_more_than_65535_tokens(backend: str, device: str) -> None:
    if backend == "triton" and device == "cpu":
        pytest.skip("minutes in the interpreter; test_triton_compile.py looks at the launch grid")
    if backend == "cuda" and device == "cpu":
        pytest.skip("minutes in the emulation, which gives each block a thread")
    logits = random_logits(70001, 3, torch.float32, device)
    ids = torch.arange(70001, device=device) % 3
    assert_as_exact_as_pytorch(logits, ids, backend)
    for shape in ((1, 70001), (70001, 1)):
        out = kernels.token_logprobs(logits.view(*shape, 3), ids.view(shape), backend=backend)
        assert torch.equal(out.logprobs.flatten(), ours(logits, ids, backend).logprobs)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
def test_08_no_tokens(backend: str, device: str, shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    for inplace in (False, True):
        leaf = torch.zeros(*shape, 10, device=device, requires_grad=True)
        out = kernels.token_logprobs(leaf, ids, inplace_backward=inplace, backend=backend)
        out.logprobs.sum().backward()
        assert out.logprobs.shape == shape and leaf.grad.shape == (*shape, 10)
        leaf = torch.zeros(*shape, 10, device=device, requires_grad=True)
        loss = kernels.policy_loss(
            leaf,
            ids,
            None,
            spec=LossSpec(),
            advantages=torch.zeros(shape[0] if len(shape) == 2 else 1, device=device),
            inplace_backward=inplace,
            backend=backend,
        )
        loss.loss.backward()
        assert loss.loss.item() == 0 and leaf.grad.shape == (*shape, 10)
        assert all(bool(value.isfinite()) for value in loss.metrics.values())


@pytest.mark.parametrize("width", [1, 1003])
def test_08_one_row(backend: str, device: str, width: int) -> None:
    logits = random_logits(1, width, torch.float32, device)
    assert_as_exact_as_pytorch(logits, torch.tensor([width // 2], device=device), backend)


SHARDS = [0, 3, 301]
IDS = [250, 2, -100, 1, 1, 300]


def shard_rows() -> Tensor:
    """Six rows: first shard all -inf; offset 1e4; ignored NaN; p = 1 - 1e-10; -200; ordinary."""
    logits_NV = random_logits(6, SHARDS[-1], torch.float32, "cpu")
    logits_NV[0, : SHARDS[1]] = -math.inf
    logits_NV[1] += 1e4
    logits_NV[2] = math.nan
    logits_NV[3, 1] = logits_NV[3, 2:].logsumexp(0) + 10 * math.log(10)
    logits_NV[4] -= 200
    return logits_NV


def check_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for backend in backends_on("cpu"):
        check_shard(rank, backend)
    dist.destroy_process_group()


def check_shard(rank: int, backend: str) -> None:
    """A rank's values and gradients against those of whole rows in float64."""
    columns = slice(*SHARDS[rank : rank + 2])
    logits, ids = shard_rows(), torch.tensor(IDS)
    part = torch.full((len(ids), columns.stop - columns.start + 5), math.nan)
    part[:, :-5] = logits[:, columns]
    leaf = part.clone().requires_grad_()
    vocab = VocabShard(dist.group.WORLD, columns.start, columns.stop)
    out = kernels.token_logprobs(leaf, ids, with_entropy=True, vocab=vocab, backend=backend)
    gradient = weighted_gradient(leaf, out.logprobs, out.entropy)
    # Plain PyTorch cannot ignore a row; any other target does, without the weight of the row.
    whole = logits.double().nan_to_num(nan=0.0).requires_grad_()
    logprobs, entropy = (
        values.where(ids != -100, 0.0) for values in eager_token_values(whole, ids.clamp(min=0))
    )
    tolerance = 4 * EPS * max(1.0, logprobs.abs().max().item())
    for got, want in (
        (out.logprobs, logprobs),
        (out.entropy, entropy),
        (gradient[:, :-5], weighted_gradient(whole, logprobs, entropy)[:, columns]),
    ):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    # Of a log-prob of -1e-10 float64's log_softmax itself has no more than four digits.
    assert out.logprobs[3].item() == pytest.approx(logprobs[3].item(), rel=1e-4, abs=0)
    assert bool((gradient[:, -5:] == 0).all()) and bool((gradient[2] == 0).all())


def test_09_targets_padding_and_ignored_rows_on_shards(tmp_path: Path) -> None:
    """Two uneven shards padded with NaN; every row is hard in another way; every backend."""
    spawn_ranks(check_rank, 2, str(tmp_path / "store"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_10_token_ids_of_any_alignment_and_stride(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    logits = random_logits(8, 501, torch.float32, device)
    ids = torch.arange(8, device=device) * 71
    want = ours(logits, ids, backend)
    odd = torch.zeros(9, dtype=dtype, device=device)[1:]
    odd.copy_(ids)
    strided = torch.zeros(16, dtype=dtype, device=device)[::2]
    strided.copy_(ids)
    assert odd.data_ptr() % 16 != 0 and strided.stride() == (2,)
    for other in (odd, strided):
        for got, value in zip(ours(logits, other, backend), want, strict=True):
            assert torch.equal(got, value)


@pytest.mark.parametrize("doubt", [1e-7, 1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_11_confident_targets_keep_relative_accuracy(
    backend: str, device: str, doubt: float, offset: float
) -> None:
    """log p, entropy and gradient at p = 1 - doubt, where p itself rounds to 1."""
    logits = random_logits(1, 3000, torch.float32, device) + offset
    others_V = logits[0, torch.arange(3000, device=device) != 7].double()
    logits[0, 7] = others_V.logsumexp(0) - math.log(doubt)
    shift_V = others_V - logits[0, 7].double()
    odds = shift_V.exp().sum()
    logprob, miss = -torch.log1p(odds), odds / (1 + odds)
    log_p_V = shift_V + logprob
    p_V = log_p_V.exp()
    entropy = -(p_V * log_p_V).sum() - (1 - miss) * logprob
    # An exponent E, in float32, is off by E * EPS / 2; so, relatively, is its exponential.
    rtol = EPS * (1 + shift_V.abs().max().item())
    leaf, ids = logits.requires_grad_(), torch.tensor([7], device=device)
    out = kernels.token_logprobs(leaf, ids, with_entropy=True, backend=backend)
    # With these weights the losses are the log-prob and the entropy themselves.
    as_logprob, as_entropy = (
        kernels.policy_loss(
            leaf,
            ids,
            None,
            spec=LossSpec(surrogate="reinforce", entropy_weight=entropy_weight),
            advantages=torch.tensor([advantage], device=device),
            backend=backend,
        ).loss
        for advantage, entropy_weight in ((-1.0, 0.0), (0.0, -1.0))
    )
    for value, want, at_target, at_others_V in (
        (out.logprobs, logprob, miss, -p_V),
        (as_logprob, logprob, miss, -p_V),
        (out.entropy, entropy, -(1 - miss) * (logprob + entropy), -p_V * (log_p_V + entropy)),
        (as_entropy, entropy, -(1 - miss) * (logprob + entropy), -p_V * (log_p_V + entropy)),
    ):
        assert value.item() == pytest.approx(want.item(), rel=rtol, abs=0)
        gradient_V = torch.autograd.grad(value, leaf, retain_graph=True)[0][0].double()
        assert gradient_V[7].item() == pytest.approx(at_target.item(), rel=rtol, abs=0)
        got_V = torch.cat([gradient_V[:7], gradient_V[8:]])
        # A p below TINY may be flushed to 0; the entropy's gradient is p times up to 90.
        torch.testing.assert_close(got_V, at_others_V, rtol=rtol, atol=100 * TINY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 1e-8, 100.0, "one a token"], ids=str)
def test_14_temperatures(
    backend: str, device: str, dtype: torch.dtype, temperature: float | str
) -> None:
    logits = random_logits(4, 1003, dtype, device)
    ids = logits.argmax(1)
    ids[2:] = 5
    value: float | Tensor = (
        torch.tensor([1e-8, 0.01, 1.0, 1000.0], device=device)
        if isinstance(temperature, str)
        else temperature
    )
    assert_as_exact_as_pytorch(logits, ids, backend, value)


def test_15_bfloat16_logits_of_magnitude_30(backend: str, device: str) -> None:
    """Where neighbours are 0.125 to 0.25 apart: statistics of the rounded logits are exact."""
    logits = (random_logits(4, 5003, torch.float32, device).sign() * 30).bfloat16()
    logits += random_logits(4, 5003, torch.bfloat16, device)
    assert_as_exact_as_pytorch(logits, torch.arange(4, device=device), backend)
