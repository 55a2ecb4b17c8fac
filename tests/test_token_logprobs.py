"""Log-probs and entropy of every backend against float64 PyTorch; ignored and wrong arguments."""

import math

import pytest
import torch
from torch import Tensor

import kernels
from kernels.testing import eager_token_values

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    want_logprobs, want_entropy = eager_token_values(
        logits.double(), ids, temperature=temperature, softcap=softcap
    )
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
    logprobs, entropy = eager_token_values(exact, ids, **arguments)
    (weights_2N[0] * logprobs + weights_2N[1] * entropy).sum().backward()
    error = (leaf.grad.double() - exact.grad).abs()
    # float16 gradients below its smallest normal number are rounded absolutely.
    absolute = 1e-6 if dtype != torch.float16 else 1e-6 + torch.finfo(dtype).smallest_normal
    bound = torch.finfo(dtype).eps * exact.grad.abs() + absolute
    assert bool((error <= bound).all()), float((error - bound).max())


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_ignored_rows_give_zero_whatever_they_hold(backend: str, device: str, fill: float) -> None:
    logits, ids = random_rows(4, 999, torch.float32, device)
    logits[2], ids[2] = fill, -100
    leaf = logits.clone().requires_grad_()
    got = kernels.token_logprobs(leaf, ids, with_entropy=True, backend=backend)
    (got.logprobs.sum() + got.entropy.sum()).backward()
    assert got.logprobs[2] == 0 and got.entropy[2] == 0
    assert bool((leaf.grad[2] == 0).all()) and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_logits_of_an_active_row_show(backend: str, device: str, value: float) -> None:
    logits, ids = random_rows(2, 999, torch.float32, device)
    logits[1, 500] = value
    got = kernels.token_logprobs(logits, ids, with_entropy=True, backend=backend)
    assert got.logprobs[0].isfinite() and got.logprobs[1].isnan() and got.entropy[1].isnan()


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
