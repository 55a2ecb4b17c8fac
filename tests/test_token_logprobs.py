"""Log-probs and entropy of every backend against float64 PyTorch, on ordinary and on hard rows."""

import math

import pytest
import torch
from torch import Tensor

import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def truth(
    logits_NV: Tensor, ids_N: Tensor, temperature: float | Tensor = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy in float64, differentiable."""
    z_NV = logits_NV.double()
    if softcap:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.double()[:, None]
    logp_NV = (z_NV / temperature).log_softmax(-1)
    p_NV = logp_NV.exp()
    # log p is -inf where p is 0; the product there is 0, and so is its gradient.
    entropy_N = -(p_NV * logp_NV.masked_fill(p_NV == 0, 0.0)).sum(-1)
    return logp_NV.gather(1, ids_N[:, None])[:, 0], entropy_N


def random_rows(
    num_rows: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (torch.randn(num_rows, width, generator=generator) * 3).to(dtype)
    ids_N = torch.randint(0, width, (num_rows,), generator=generator)
    return logits_NV.to(device), ids_N.to(device)


def rounding(*values: Tensor) -> float:
    """A few float32 roundings of numbers of this size."""
    size = max(1.0, *(float(value.detach().abs().max()) for value in values))
    return 8 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 31, 1000, 6001])
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
def test_logprobs_and_entropy_match_float64(
    backend: str, device: str, dtype: torch.dtype, width: int, softcap: float
) -> None:
    logits, ids = random_rows(5, width, dtype, device)
    temperature = torch.linspace(0.5, 2.0, 5, device=device)
    got = kernels.token_logprobs(
        logits, ids, temperature=temperature, softcap=softcap, with_entropy=True, backend=backend
    )
    want_logprobs, want_entropy = truth(logits, ids, temperature, softcap)
    # Logits reach 24 after division by the temperature; their float32 rounding is the error.
    tolerance = rounding(logits * 2)
    torch.testing.assert_close(got.logprobs.double(), want_logprobs, atol=tolerance, rtol=0)
    torch.testing.assert_close(got.entropy.double(), want_entropy, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
def test_gradient_error_is_at_most_one_rounding_to_the_dtype(
    backend: str, device: str, dtype: torch.dtype, softcap: float
) -> None:
    logits, ids = random_rows(6, 1003, dtype, device)
    weights_2N = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).to(device)
    arguments = dict(temperature=0.7, softcap=softcap)
    leaf = logits.clone().requires_grad_()
    got = kernels.token_logprobs(leaf, ids, with_entropy=True, backend=backend, **arguments)
    (weights_2N[0] * got.logprobs + weights_2N[1] * got.entropy).sum().backward()
    exact = logits.double().requires_grad_()
    logprobs, entropy = truth(exact, ids, **arguments)
    (weights_2N[0] * logprobs + weights_2N[1] * entropy).sum().backward()
    error = (leaf.grad.double() - exact.grad).abs()
    # float16 gradients below its smallest normal number are rounded absolutely.
    absolute = 1e-6 if dtype != torch.float16 else 1e-6 + torch.finfo(dtype).smallest_normal
    bound = torch.finfo(dtype).eps * exact.grad.abs() + absolute
    assert bool((error <= bound).all()), float((error - bound).max())


def hard_rows() -> dict[str, tuple[Tensor, int]]:
    """Rows that break public kernels (all far below zero, whole tiles at -inf, ...) and a
    target."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 5000, generator=generator)
    leading = torch.randn(2, 6000, generator=generator)
    leading[:, :4500] = -math.inf
    scattered = torch.randn(2, 3000, generator=generator)
    scattered[:, torch.randperm(3000, generator=generator)[:100]] = -math.inf
    scattered[:, 7] = 0.0
    one = torch.full((2, 6000), -math.inf)
    one[:, 5000] = 3.0
    confident = torch.randn(2, 3000, generator=generator)
    confident[:, 7] = 60.0
    return {
        "shifted by -200": (base - 200, 7),
        "shifted by 1e4": ((base * 4).round() / 4 + 1e4, 7),
        "shifted by -1e4": ((base * 4).round() / 4 - 1e4, 7),
        "leading -inf": (leading, 5999),
        "scattered -inf": (scattered, 7),
        "one finite logit": (one, 5000),
        "confident": (confident, 7),
        "large": (base * 1000, 7),
    }


@pytest.mark.parametrize("name", hard_rows())
def test_hard_rows_match_float64(backend: str, device: str, name: str) -> None:
    logits, target = hard_rows()[name]
    logits, ids = logits.to(device), torch.full((2,), target, device=device)
    leaf = logits.clone().requires_grad_()
    got = kernels.token_logprobs(leaf, ids, with_entropy=True, backend=backend)
    (got.logprobs.sum() + 0.1 * got.entropy.sum()).backward()
    exact = logits.double().requires_grad_()
    logprobs, entropy = truth(exact, ids)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    # A common offset must not cost anything: the bound follows the log-probs, not the logits.
    tolerance = rounding(logprobs, entropy)
    torch.testing.assert_close(got.logprobs.double(), logprobs, atol=tolerance, rtol=0)
    torch.testing.assert_close(got.entropy.double(), entropy, atol=tolerance, rtol=0)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)


def test_gradient_at_a_confident_target_is_exact_to_one_rounding_of_its_probability(
    backend: str, device: str
) -> None:
    leaf = torch.tensor([[9.0, 0.0, 0.0]], device=device, requires_grad=True)
    ids = torch.zeros(1, dtype=torch.long, device=device)
    kernels.token_logprobs(leaf, ids, backend=backend).logprobs.sum().backward()
    others = 2 * math.exp(-9)
    want = others / (1 + others)
    assert leaf.grad[0, 0].item() == pytest.approx(want, abs=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_ignored_rows_give_zero_whatever_they_hold(backend: str, device: str, fill: float) -> None:
    logits, ids = random_rows(4, 999, torch.float32, device)
    logits[2], ids[2] = fill, -100
    leaf = logits.clone().requires_grad_()
    got = kernels.token_logprobs(leaf, ids, with_entropy=True, backend=backend)
    (got.logprobs.sum() + got.entropy.sum()).backward()
    assert got.logprobs[2] == 0 and got.entropy[2] == 0
    assert bool((leaf.grad[2] == 0).all()) and bool(leaf.grad.isfinite().all())


def test_nan_in_an_active_row_is_not_hidden(backend: str, device: str) -> None:
    logits, ids = random_rows(2, 999, torch.float32, device)
    logits[1, 500] = math.nan
    got = kernels.token_logprobs(logits, ids, with_entropy=True, backend=backend)
    assert got.logprobs[0].isfinite() and got.logprobs[1].isnan() and got.entropy[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [999, 40000])
def test_bits_of_a_row_depend_on_nothing_but_the_row(
    backend: str, device: str, dtype: torch.dtype, width: int
) -> None:
    logits, ids = random_rows(7, width, dtype, device)
    whole = kernels.token_logprobs(logits, ids, with_entropy=True, backend=backend)
    padded = torch.full((7, width + 3), math.nan, dtype=dtype, device=device)
    padded[:, :width] = logits
    for row in (0, 3, 6):
        alone = slice(row, row + 1)
        for part in (logits[alone], padded[alone, :width], padded[row:, :width]):
            got = kernels.token_logprobs(
                part, ids[row : row + len(part)], with_entropy=True, backend=backend
            )
            assert torch.equal(got.logprobs[:1], whole.logprobs[alone])
            assert torch.equal(got.entropy[:1], whole.entropy[alone])


def test_layouts_of_the_same_logits_agree(backend: str, device: str) -> None:
    logits, ids = random_rows(12, 501, torch.float32, device)
    want = kernels.token_logprobs(logits, ids, backend=backend).logprobs
    wide = torch.randn(3, 5, 600, device=device)
    wide[:, :4, :501] = logits.view(3, 4, 501)
    transposed = logits.t().contiguous().t()
    assert torch.equal(
        kernels.token_logprobs(wide[:, :4, :501], ids.view(3, 4), backend=backend).logprobs,
        want.view(3, 4),
    )
    assert torch.equal(kernels.token_logprobs(transposed, ids, backend=backend).logprobs, want)
    assert torch.equal(kernels.token_logprobs(logits, ids.int(), backend=backend).logprobs, want)


def test_gradient_of_a_padded_slice_lands_in_the_slice(backend: str, device: str) -> None:
    logits, ids = random_rows(12, 101, torch.float32, device)
    packed = logits.clone().requires_grad_()
    kernels.token_logprobs(packed, ids, backend=backend).logprobs.sum().backward()
    padded = torch.randn(3, 5, 101, device=device)
    padded[:, :4] = logits.view(3, 4, 101)
    leaf = padded.requires_grad_()
    out = kernels.token_logprobs(leaf[:, :4], ids.view(3, 4), backend=backend)
    out.logprobs.sum().backward()
    assert torch.equal(leaf.grad[:, :4], packed.grad.view(3, 4, 101))
    assert bool((leaf.grad[:, 4] == 0).all())


def test_empty_batch_gives_empty_results(backend: str, device: str) -> None:
    logits = torch.zeros(0, 10, device=device, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long, device=device)
    out = kernels.token_logprobs(logits, ids, backend=backend)
    out.logprobs.sum().backward()
    assert out.logprobs.shape == (0,) and logits.grad.shape == (0, 10)


def test_gradient_is_repeatable_to_the_bit(backend: str, device: str) -> None:
    logits, ids = random_rows(9, 2000, torch.bfloat16, device)

    def gradient() -> Tensor:
        leaf = logits.clone().requires_grad_()
        kernels.token_logprobs(leaf, ids, backend=backend).logprobs.sum().backward()
        return leaf.grad

    assert torch.equal(gradient(), gradient())


def test_inplace_backward_gives_the_same_gradient_in_the_same_memory(
    backend: str, device: str
) -> None:
    logits, ids = random_rows(5, 700, torch.float32, device)
    plain, reused = (logits.clone().requires_grad_() for _ in range(2))
    kernels.token_logprobs(plain, ids, backend=backend).logprobs.sum().backward()
    out = kernels.token_logprobs(reused, ids, inplace_backward=True, backend=backend)
    out.logprobs.sum().backward()
    assert torch.equal(reused.grad, plain.grad)
    assert reused.grad.data_ptr() == reused.data_ptr()


def test_inplace_backward_refuses_logits_needed_elsewhere(backend: str, device: str) -> None:
    logits, ids = random_rows(5, 700, torch.float32, device)
    leaf = logits.clone().requires_grad_()
    product = leaf * 1.0
    # Autograd runs the later op first: the square needs logits that were overwritten by then.
    squares = product.square().sum()
    out = kernels.token_logprobs(product, ids, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.logprobs.sum() + squares).backward()


def test_second_and_double_backward_raise(backend: str, device: str) -> None:
    logits, ids = random_rows(2, 50, torch.float32, device)
    out = kernels.token_logprobs(
        logits.clone().requires_grad_(), ids, inplace_backward=True, backend=backend
    )
    out.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprobs.sum().backward()
    leaf = logits.clone().requires_grad_()
    loss = kernels.token_logprobs(leaf, ids, backend=backend).logprobs.sum()
    with pytest.raises(RuntimeError, match="not differentiable a second time"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": torch.tensor([0, 10])}, r"expected ids in \[0, 10\) or -100, got 10 at to"),
        ({"token_ids": torch.tensor([-1, 0])}, "got -1 at token 0"),
        ({"token_ids": torch.zeros(3, dtype=torch.long)}, r"token_ids: expected shape \[2\]"),
        ({"logits": torch.zeros(10)}, "expected shape"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature: expected numbers > 0"),
        ({"softcap": -1.0}, "softcap: expected a number >= 0"),
        ({"backend": "cudnn"}, "backend: expected one of auto, reference, cpp, triton, cuda"),
        ({"logits": torch.zeros(2, 10, dtype=torch.long)}, "logits: expected dtype"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(2, 10), "token_ids": torch.tensor([0, 9]), **change}
    logits, token_ids = arguments.pop("logits"), arguments.pop("token_ids")
    with pytest.raises(ValueError, match=message):
        kernels.token_logprobs(logits, token_ids, **arguments)


def test_float_token_ids_are_refused() -> None:
    with pytest.raises(TypeError, match="expected dtype int64 or int32"):
        kernels.token_logprobs(torch.zeros(2, 10), torch.zeros(2))


def test_missing_backend_says_why() -> None:
    reasons = kernels.available_backends()
    assert set(reasons) == {"reference", "cpp", "triton", "cuda"}
    for name, reason in reasons.items():
        if reason != "available":
            with pytest.raises(RuntimeError, match="is not available"):
                kernels.token_logprobs(torch.zeros(1, 4), torch.tensor([0]), backend=name)
