"""The C++ row kernels against float64, on every instruction set of this machine.

The criterion for accuracy is plain PyTorch in the dtype of the logits: the kernels' error against
float64 may be at most ERROR_FACTOR times PyTorch's, plus one rounding of the output.
"""

import math
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels import native_backend, reference
from kernels.passes import finish_stats
from kernels.reference import IGNORED, NOT_OWNED

if native_backend.cpp_unavailable_reason() is not None:
    pytest.skip(f"{native_backend.cpp_unavailable_reason()}", allow_module_level=True)

from kernels import _native

ERROR_FACTOR = 1.5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11}
WIDTHS = (1, 2, 31, 1000, 2048, 6001)


@pytest.fixture(params=_native.supported_cpu_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, forced."""
    before = _native.cpu_level()
    _native.set_cpu_level(request.param)
    yield request.param
    _native.set_cpu_level(before)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random_logits(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * 3).to(dtype)


def gradient(
    logits_OIW: Tensor,
    ids_N: Tensor,
    coef_logprob_N: Tensor,
    coef_entropy_N: Tensor,
    *,
    inv_temperature: Tensor | float = 1.0,
    softcap: float = 0.0,
    out_OIW: Tensor | None = None,
) -> Tensor:
    """Both passes of the kernels, with the row values merged in between."""
    stats_4N = native_backend.row_stats(logits_OIW, ids_N, inv_temperature, softcap)
    _, entropy_N, row_max_N, log_sum_N = finish_stats(stats_4N)
    out_OIW = torch.full_like(logits_OIW, math.nan) if out_OIW is None else out_OIW
    native_backend.grad_logits(
        logits_OIW,
        ids_N,
        inv_temperature,
        softcap,
        row_max_N,
        log_sum_N,
        entropy_N,
        coef_logprob_N,
        coef_entropy_N,
        out_OIW,
    )
    return out_OIW


def plain_values(logits_NW: Tensor, ids_N: Tensor, inv_temperature: float, softcap: float):
    """Target log-prob and entropy as one writes them in PyTorch, in the dtype of the logits."""
    capped_NW = softcap * torch.tanh(logits_NW / softcap) if softcap else logits_NW
    logp_NW = (capped_NW * inv_temperature).log_softmax(-1)
    return logp_NW.gather(1, ids_N[:, None])[:, 0], -(logp_NW.exp() * logp_NW).sum(-1)


def plain_gradient(
    logits_NW: Tensor, ids_N: Tensor, coefs_2N: Tensor, inv_temperature: float, softcap: float
) -> Tensor:
    leaf_NW = logits_NW.clone().requires_grad_()
    logprobs_N, entropy_N = plain_values(leaf_NW, ids_N, inv_temperature, softcap)
    (coefs_2N[0] * logprobs_N + coefs_2N[1] * entropy_N).sum().backward()
    assert leaf_NW.grad is not None
    return leaf_NW.grad


@pytest.mark.parametrize(("inv_temperature", "softcap"), [(1.0, 0.0), (1.7, 0.0), (0.8, 20.0)])
@pytest.mark.parametrize("width", WIDTHS)
def test_row_values_are_as_exact_as_pytorch(
    level: str, dtype: torch.dtype, width: int, inv_temperature: float, softcap: float
) -> None:
    logits_NW = random_logits(5, width, dtype)
    ids_N = torch.arange(5) % width
    stats_4N = native_backend.row_stats(logits_NW[None], ids_N, inv_temperature, softcap)
    logprobs_N, entropy_N, *_ = finish_stats(stats_4N)
    want = plain_values(logits_NW.double(), ids_N, inv_temperature, softcap)
    plain = plain_values(logits_NW.float(), ids_N, inv_temperature, softcap)
    for got_N, plain_N, want_N in zip((logprobs_N, entropy_N), plain, want, strict=True):
        scale = max(want_N.abs().max().item(), 1.0)
        allowed = ERROR_FACTOR * (plain_N - want_N).abs().max().item() + 2.5e-7 * scale
        assert (got_N - want_N).abs().max().item() <= allowed


@pytest.mark.parametrize(("inv_temperature", "softcap"), [(1.0, 0.0), (1.7, 0.0), (0.8, 20.0)])
@pytest.mark.parametrize("entropy", [False, True], ids=["logprob", "logprob+entropy"])
@pytest.mark.parametrize("width", WIDTHS)
def test_gradient_is_as_exact_as_pytorch(
    level: str,
    dtype: torch.dtype,
    width: int,
    entropy: bool,
    inv_temperature: float,
    softcap: float,
) -> None:
    logits_NW = random_logits(5, width, dtype)
    ids_N = torch.arange(5) % width
    coefs_2N = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)) * 0.1
    coefs_2N[1] *= entropy
    got_NW = gradient(
        logits_NW[None], ids_N, *coefs_2N, inv_temperature=inv_temperature, softcap=softcap
    )[0]
    args = (ids_N, coefs_2N.double(), inv_temperature, softcap)
    want_NW = plain_gradient(logits_NW.double(), *args)
    plain_NW = plain_gradient(logits_NW.float(), *args).to(dtype)
    norm = want_NW.norm().item()
    allowed = ERROR_FACTOR * (plain_NW - want_NW).norm().item() + ROUNDING[dtype] * norm
    assert got_NW.dtype == dtype
    assert (got_NW - want_NW).norm().item() <= allowed + 1e-12


def test_exponential_is_within_its_bound(level: str) -> None:
    exponents_W = torch.cat([-torch.logspace(-8, 1.94, 20000), torch.tensor([0.0, -1.0, -87.0])])
    zero_N, one_N = torch.zeros(1), torch.ones(1)
    out_OIW = torch.empty(1, 1, len(exponents_W))
    # With row maximum and log sum 0 and no target, the gradient is -coef exp(z).
    native_backend.grad_logits(
        exponents_W[None, None],
        torch.tensor([NOT_OWNED]),
        1.0,
        0.0,
        zero_N,
        zero_N,
        zero_N,
        -one_N,
        zero_N,
        out_OIW,
    )
    want_W = exponents_W.double().exp()
    bound_W = 1.7e-7 + 1.4e-8 * exponents_W.abs().double()
    assert ((out_OIW[0, 0] - want_W).abs() <= bound_W * want_W + 1.2e-38).all()
    assert out_OIW[0, 0, -3] == 1.0


@pytest.mark.parametrize("offset", [-1e4, -200.0, 1e4])
def test_statistics_ignore_a_common_offset(level: str, offset: float) -> None:
    # Quarters stay exact under the offset, so the exponents are the same bits.
    logits_NW = (random_logits(3, 5000, torch.float32) * 4).round() / 4
    ids_N = torch.tensor([0, 17, 4999])
    at_zero = native_backend.row_stats(logits_NW[None], ids_N, 1.0, 0.0)
    shifted = native_backend.row_stats(logits_NW[None] + offset, ids_N, 1.0, 0.0)
    assert torch.equal(shifted[1:3], at_zero[1:3])
    assert torch.equal(shifted[[0, 3]], at_zero[[0, 3]] + offset)


def minus_infinity_rows() -> dict[str, Tensor]:
    rows = random_logits(5, 6000, torch.float32)
    rows[0, :4500] = -math.inf
    rows[1, torch.randperm(6000, generator=torch.Generator().manual_seed(2))[:300]] = -math.inf
    rows[2] = -math.inf
    rows[2, 5000] = 3.0
    rows[3, 10:] = -math.inf
    rows[4, ::2] = -math.inf
    names = ("leading", "scattered", "one finite", "trailing", "every other")
    return dict(zip(names, rows, strict=True))


@pytest.mark.parametrize("pattern", minus_infinity_rows())
def test_minus_infinity_columns_count_nothing(level: str, dtype: torch.dtype, pattern: str) -> None:
    row_W = minus_infinity_rows()[pattern].to(dtype)
    finite_W = row_W[row_W > -math.inf]
    target = int((row_W > -math.inf).nonzero()[0])
    ids_N, coefs_2N = torch.tensor([target]), torch.tensor([[0.3], [0.1]])
    got = native_backend.row_stats(row_W[None, None], ids_N, 1.0, 0.0)
    want = reference.row_stats(finite_W.double()[None, None], torch.tensor([0]), 1.0, 0.0)
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-6)
    got_W = gradient(row_W[None, None], ids_N, *coefs_2N)[0, 0]
    want_W = plain_gradient(
        finite_W.double()[None], torch.tensor([0]), coefs_2N.double(), 1.0, 0.0
    )[0]
    assert (got_W[row_W == -math.inf] == 0).all()
    tolerance = 1.01 * ROUNDING[dtype] + 1e-6
    assert torch.allclose(got_W[row_W > -math.inf].double(), want_W, rtol=tolerance, atol=1e-7)


def rows_of_uneven_blocks() -> dict[str, Tensor]:
    """Rows that leave the range of what was seen of them before, in the third of their blocks."""
    rows = random_logits(7, 10000, torch.float32, seed=4)
    rows[0, 5000] = 40.0
    rows[1, 5000:] += 60.0
    rows[2, 5000] = -300.0
    rows[3, 5000:5100] = -80.0
    rows[4] -= 50.0
    rows[5] = -rows[5].abs()
    rows[5, 5000] = -0.0
    rows[6, 5000:] -= 1000.0
    names = ("peak", "step up", "underflow", "tiny", "below zero", "largest is -0", "step down")
    return dict(zip(names, rows, strict=True))


@pytest.mark.parametrize("target", [0, 5000, NOT_OWNED])
@pytest.mark.parametrize("pattern", rows_of_uneven_blocks())
def test_blocks_of_other_magnitude_count_right(
    level: str, dtype: torch.dtype, pattern: str, target: int
) -> None:
    row_W = rows_of_uneven_blocks()[pattern].to(dtype)
    got_4N = native_backend.row_stats(row_W[None, None], torch.tensor([target]), 1.0, 0.0)
    want_4N = reference.row_stats(row_W.double()[None, None], torch.tensor([target]), 1.0, 0.0)
    assert got_4N[0] == want_4N[0]
    assert torch.allclose(got_4N.double(), want_4N, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sign", [0, 1])
def test_nan_of_either_sign_shows(level: str, dtype: torch.dtype, sign: int) -> None:
    logits_OIW = random_logits(1, 9000, dtype)[None]
    logits_OIW[0, 0, 5000] = math.copysign(math.nan, -sign)
    for target in (0, 5000):
        stats_4N = native_backend.row_stats(logits_OIW, torch.tensor([target]), 1.0, 0.0)
        assert stats_4N[:3].isnan().all()


def test_row_of_minus_infinity_has_no_mass(level: str, dtype: torch.dtype) -> None:
    logits_OIW = torch.full((1, 2, 1500), -math.inf, dtype=dtype)
    stats_4N = native_backend.row_stats(logits_OIW, torch.tensor([NOT_OWNED] * 2), 1.0, 0.0)
    assert stats_4N[0].tolist() == [-math.inf] * 2
    assert stats_4N[1:].abs().max() == 0


def test_nan_shows_in_active_rows_only(level: str, dtype: torch.dtype) -> None:
    logits_OIW = random_logits(3, 3000, dtype)[None]
    logits_OIW[0, 0] = math.nan
    logits_OIW[0, 1, 2500] = math.nan
    ids_N, ones_N = torch.tensor([IGNORED, 7, 7]), torch.ones(3)
    stats_4N = native_backend.row_stats(logits_OIW, ids_N, 1.0, 0.0)
    assert stats_4N[:, 0].tolist() == [0, 0, 0, 0]
    assert stats_4N[:3, 1].isnan().all()
    assert stats_4N[:, 2].isfinite().all()
    grad_NW = gradient(logits_OIW, ids_N, ones_N, ones_N)[0]
    assert (grad_NW[0] == 0).all()
    assert grad_NW[1].isnan().all()
    assert grad_NW[2].isfinite().all()


def test_rows_without_coefficients_are_not_read(level: str) -> None:
    logits_OIW = torch.full((1, 2, 700), math.nan)
    grad_OIW = gradient(logits_OIW, torch.tensor([3, 5]), torch.zeros(2), torch.zeros(2))
    assert torch.equal(grad_OIW, torch.zeros_like(grad_OIW))


@pytest.mark.parametrize("case", ["confident", "improbable"])
def test_target_gradient_keeps_relative_accuracy(level: str, case: str) -> None:
    logits_NW = torch.zeros(1, 3)
    logits_NW[0, 0] = 17.0 if case == "confident" else -60.0
    one_N = torch.ones(1)
    grad_OIW = gradient(logits_NW[None], torch.tensor([0]), one_N, 0 * one_N)
    want = 1 - logits_NW.double().softmax(-1)[0, 0]
    assert grad_OIW[0, 0, 0].item() == pytest.approx(want.item(), rel=1e-6)


def confident_rows(
    dtype: torch.dtype, width: int, rests: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose targets, anywhere in the row, have about 1 - p = rests; the targets; the exact
    sums of exp(z_j - z_y) over the other columns."""
    logits_NW = random_logits(len(rests), width, dtype, seed=3)
    ids_N = torch.linspace(0, width - 1, len(rests)).long()
    others_NW = logits_NW.double().scatter(1, ids_N[:, None], -math.inf)
    target_N1 = others_NW.logsumexp(1, keepdim=True) - torch.tensor(rests).double().log()[:, None]
    logits_NW.scatter_(1, ids_N[:, None], target_N1.to(dtype))
    others_N = (others_NW - logits_NW.gather(1, ids_N[:, None])).exp().sum(1)
    return logits_NW, ids_N, others_N


# A float32 exponent of 75 is known to 2^-18, and so is a term.
CONFIDENT_TOLERANCE = 5e-6
RESTS = [1e-7, 1e-8, 1e-10, 1e-12, 1e-15, 1e-20, 1e-25, 1e-30]


@pytest.mark.parametrize("width", [2, 31, 1024, 6001])
def test_confident_token_keeps_relative_accuracy(
    level: str, dtype: torch.dtype, width: int
) -> None:
    logits_NW, ids_N, others_N = confident_rows(dtype, width, RESTS)
    stats_4N = native_backend.row_stats(logits_NW[None], ids_N, 1.0, 0.0)
    logprobs_N, entropy_N, *_ = finish_stats(stats_4N)
    assert torch.allclose(logprobs_N.double(), -others_N.log1p(), rtol=CONFIDENT_TOLERANCE, atol=0)
    logp_NW = logits_NW.double().log_softmax(1)
    others_NW = logp_NW.scatter(1, ids_N[:, None], -math.inf)
    want_N = others_N.log1p() - (others_NW.exp() * logp_NW).sum(1)
    assert torch.allclose(entropy_N.double(), want_N, rtol=CONFIDENT_TOLERANCE, atol=0)
    # Coefficients bring every gradient to the order of 1, which each dtype can express.
    grad_NW = gradient(logits_NW[None], ids_N, (1 / others_N).float(), torch.zeros(len(RESTS)))[0]
    want_NW = -logp_NW.exp() / others_N[:, None]
    want_NW.scatter_(1, ids_N[:, None], (1 / (1 + others_N))[:, None])
    tolerance = CONFIDENT_TOLERANCE + ROUNDING[dtype]
    assert torch.allclose(grad_NW.double(), want_NW, rtol=2 * tolerance, atol=1e-7)
    target_NW = grad_NW.gather(1, ids_N[:, None])
    assert torch.allclose(target_NW.double()[:, 0], 1 / (1 + others_N), rtol=tolerance, atol=0)


def test_confident_token_keeps_relative_accuracy_under_a_softcap(level: str) -> None:
    logits_NW, ids_N, _ = confident_rows(torch.float32, 6001, [1e-8, 1e-12, 1e-15])
    z_NW = 50 * torch.tanh(logits_NW.double() / 50)
    others_NW = (z_NW - z_NW.gather(1, ids_N[:, None])).scatter(1, ids_N[:, None], -math.inf)
    stats_4N = native_backend.row_stats(logits_NW[None], ids_N, 1.0, 50.0)
    logprobs_N, *_ = finish_stats(stats_4N)
    # z of the target is 50 times a float32 tanh.
    want_N = -others_NW.exp().sum(1).log1p()
    assert torch.allclose(logprobs_N.double(), want_N, rtol=2e-5, atol=0)


def test_target_is_left_out_of_the_sums_alone(level: str, dtype: torch.dtype) -> None:
    logits_NW = random_logits(4, 3000, dtype)
    ids_N = torch.tensor([0, 2047, 2048, 2999])
    removed_NW = logits_NW.scatter(1, ids_N[:, None], -math.inf)
    maximum_NW = logits_NW.amax(1, keepdim=True)
    # With the maximum of each row at its end, both have the same exponents.
    logits_NW, removed_NW = (torch.cat([x, maximum_NW], 1) for x in (logits_NW, removed_NW))
    stats_4N = native_backend.row_stats(logits_NW[None], ids_N, 1.3, 0.0)
    elsewhere_N = torch.full((4,), NOT_OWNED)
    removed_4N = native_backend.row_stats(removed_NW[None], elsewhere_N, 1.3, 0.0)
    assert torch.allclose(stats_4N[:3], removed_4N[:3], rtol=1e-6)
    whole_4N = native_backend.row_stats(logits_NW[None], elsewhere_N, 1.3, 0.0)
    e_N = (stats_4N[3].double() - stats_4N[0]).exp()
    assert torch.allclose(whole_4N[1].double(), stats_4N[1] + e_N, rtol=1e-6)


def views_of(logits_NW: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same six rows in other memory layouts, [outer, inner, W]."""
    rows, width = logits_NW.shape

    def padded() -> Tensor:
        wide = torch.full((3, 2, width + 13), math.nan, dtype=logits_NW.dtype)
        wide[:, :, 5:-8] = logits_NW.view(3, 2, width)
        return wide[:, :, 5:-8]

    def transposed() -> Tensor:
        return logits_NW.view(3, 2, width).transpose(0, 1).contiguous().transpose(0, 1)

    def every_other_row() -> Tensor:
        wide = torch.full((1, 2 * rows, width), math.nan, dtype=logits_NW.dtype)
        wide[:, ::2] = logits_NW
        return wide[:, ::2]

    return {"padded": padded, "transposed": transposed, "every other row": every_other_row}


@pytest.mark.parametrize("layout", ["padded", "transposed", "every other row"])
def test_results_do_not_depend_on_layout(level: str, dtype: torch.dtype, layout: str) -> None:
    logits_NW = random_logits(6, 1203, dtype)
    ids_N = torch.tensor([1, 5, 1202, IGNORED, 0, NOT_OWNED])
    coefs_2N = torch.linspace(-0.2, 0.3, 12).view(2, 6)
    view_OIW = views_of(logits_NW)[layout]()
    got = native_backend.row_stats(view_OIW, ids_N, 0.9, 0.0)
    assert torch.equal(got, native_backend.row_stats(logits_NW[None], ids_N, 0.9, 0.0))
    want_NW = gradient(logits_NW[None], ids_N, *coefs_2N)[0]
    assert torch.equal(gradient(view_OIW, ids_N, *coefs_2N).reshape(6, -1), want_NW)
    gradient(view_OIW, ids_N, *coefs_2N, out_OIW=view_OIW)
    assert torch.equal(view_OIW.reshape(6, -1), want_NW)
    base = view_OIW._base
    if layout != "transposed":
        assert base is not None
        assert base.isnan().sum() == base.numel() - view_OIW.numel()


def test_results_do_not_depend_on_threads_or_batch(level: str, dtype: torch.dtype) -> None:
    logits_NW = random_logits(37, 5003, dtype)
    ids_N = torch.arange(37)
    inv_temperature_N = torch.linspace(0.5, 2, 37)
    coefs_2N = torch.linspace(-0.2, 0.3, 74).view(2, 37)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        part = (logits_NW[None, rows], ids_N[rows], inv_temperature_N[rows])
        stats_4N = native_backend.row_stats(*part, 0.0)
        coefs = coefs_2N[:, rows]
        return stats_4N, gradient(part[0], part[1], *coefs, inv_temperature=part[2])[0]

    whole_stats, whole_grad = run(slice(None))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            stats_4N, grad_NW = run(slice(None))
            assert torch.equal(stats_4N, whole_stats)
            assert torch.equal(grad_NW, whole_grad)
    finally:
        torch.set_num_threads(before)
    for n in (0, 20, 36):
        stats_4N, grad_NW = run(slice(n, n + 1))
        assert torch.equal(stats_4N[:, 0], whole_stats[:, n])
        assert torch.equal(grad_NW[0], whole_grad[n])


@pytest.mark.parametrize("width", WIDTHS)
def test_gradient_in_place_is_bitwise_the_same(level: str, dtype: torch.dtype, width: int) -> None:
    logits_OIW = random_logits(4, width, dtype)[None]
    ids_N = torch.arange(4) % width
    coefs_2N = torch.linspace(-0.2, 0.3, 8).view(2, 4)
    want_OIW = gradient(logits_OIW, ids_N, *coefs_2N)
    gradient(logits_OIW, ids_N, *coefs_2N, out_OIW=logits_OIW)
    assert torch.equal(logits_OIW, want_OIW)


def test_scale_multiplies_and_rounds_once(level: str, dtype: torch.dtype) -> None:
    grad_OIW = random_logits(3, 1001, dtype)[None]
    want_OIW = (grad_OIW.float() * 0.3).to(dtype)
    native_backend.scale_(grad_OIW, torch.tensor(0.3))
    assert torch.equal(grad_OIW, want_OIW)
    native_backend.scale_(grad_OIW, torch.tensor(1.0))
    assert torch.equal(grad_OIW, want_OIW)


@pytest.mark.parametrize("value", [65519.0, 65520.0, 6e-8, 3e-8, -1e-7, 1e-5, 3.3895e38, 1e38])
def test_sixteen_bit_rounding_matches_torch(level: str, value: float) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        one_OIW = torch.ones(1, 1, 70, dtype=dtype)
        native_backend.scale_(one_OIW, torch.tensor(value))
        assert (one_OIW == torch.tensor(value).to(dtype)).all()


def test_empty_batch_gives_empty_results(dtype: torch.dtype) -> None:
    logits_OIW, ids_N = torch.empty(1, 0, 11, dtype=dtype), torch.empty(0, dtype=torch.int64)
    assert native_backend.row_stats(logits_OIW, ids_N, 1.0, 0.0).shape == (4, 0)
    empty_N = torch.empty(0)
    assert gradient(logits_OIW, ids_N, empty_N, empty_N).shape == (1, 0, 11)


def test_concurrent_callers_get_their_own_results() -> None:
    batches = [random_logits(40, 9000, torch.float32, seed=seed)[None] for seed in range(6)]
    ids_N = torch.arange(40)
    want = [native_backend.row_stats(batch, ids_N, 1.0, 0.0) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            got = pool.map(lambda x: native_backend.row_stats(x, ids_N, 1.0, 0.0), batches)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _first_sum(queue: "multiprocessing.Queue[float]", logits_OIW: Tensor) -> None:
    ids_N = torch.zeros(logits_OIW.shape[1], dtype=torch.int64)
    queue.put(native_backend.row_stats(logits_OIW, ids_N, 1.0, 0.0)[1, 0].item())


def test_forked_child_computes() -> None:
    # The parent's worker threads do not exist in the child; it must start its own.
    logits_OIW = random_logits(40, 9000, torch.float32)[None]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        want = native_backend.row_stats(logits_OIW, torch.zeros(40, dtype=torch.int64), 1.0, 0.0)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_first_sum, args=(queue, logits_OIW))
        child.start()
        assert queue.get(timeout=30) == want[1, 0].item()
        child.join(timeout=30)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


FORK_BEFORE_FIRST_USE = """
import multiprocessing
import torch
from kernels import native_backend

def child(queue, logits_OIW):
    ids_N = torch.zeros(40, dtype=torch.int64)
    queue.put(native_backend.row_stats(logits_OIW, ids_N, 1.0, 0.0)[1, 0].item())

torch.set_num_threads(2)
logits_OIW = torch.randn(1, 40, 20000)
logits_OIW + logits_OIW  # starts the threads of OpenMP
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue, logits_OIW), daemon=True)
process.start()
print(queue.get(timeout=30))
"""


def test_forked_child_computes_where_only_pytorch_used_openmp_before() -> None:
    # OpenMP's library hangs in a child of a process that has used it.
    command = [sys.executable, "-c", FORK_BEFORE_FIRST_USE]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and float(run.stdout) > 0, run.stderr


def test_unknown_cpu_level_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*baseline, got 'sse9'"):
        _native.set_cpu_level("sse9")
