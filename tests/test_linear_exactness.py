"""What holds about the bits, the errors, the work and the memory of the head from hidden states."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import LossSpec
from kernels.testing import grpo_batch, relative_error

DEPTH, WIDTH = 24, 211
SPEC = LossSpec(kl="k3", kl_weight=0.04)
PRODUCTS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.mm.out: (0, 1),
    torch.ops.aten.addmm_.default: (1, 2),
}


class ProductCounter(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in PRODUCTS:
            left, right = (args[position] for position in PRODUCTS[func])
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def problem(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict]:
    """Hidden states, a weight, and the other arguments of a policy loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, DEPTH, generator=generator).to(dtype)
    weight = (torch.randn(WIDTH, DEPTH, generator=generator) / 4).to(dtype)
    batch = grpo_batch(num_tokens, WIDTH, torch.float32)
    arguments = dict(
        token_ids=batch.token_ids_N,
        old_logprobs=torch.full((num_tokens,), -5.0),
        ref_logprobs=torch.full((num_tokens,), -5.1),
        rewards=batch.rewards_S,
        group_size=4,
        cu_seqlens=batch.cu_seqlens,
        spec=SPEC,
    )
    return hidden, weight, arguments


def gradients(hidden: Tensor, weight: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """Loss, log-probs, entropy and both gradients."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = kernels.linear_policy_loss(hidden, weight, **arguments)
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return out.loss.detach(), out.logprobs, out.entropy, hidden.grad, weight.grad


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def skip_unless_products_keep_rows(hidden: Tensor, weight: Tensor) -> None:
    """Our part ends where the matrix product of the library begins."""
    whole = hidden @ weight.T
    for rows in range(16, len(hidden), 16):
        if not torch.equal(hidden[:rows] @ weight.T, whole[:rows]):
            pytest.skip("the matrix product of this machine depends on the number of rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_input_twice_gives_the_same_bits(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    hidden, weight, arguments = problem(48, dtype)
    hidden, weight = hidden.to(device), weight.to(device)
    for name, value in arguments.items():
        arguments[name] = value.to(device) if isinstance(value, Tensor) else value
    first, second = (
        gradients(hidden, weight, chunk_tokens=20, backend=backend, **arguments) for _ in range(2)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_chunk(
    name: str, num_threads: int, dtype: torch.dtype
) -> None:
    hidden, weight, arguments = problem(48, dtype)
    ids = arguments["token_ids"]
    with threads(num_threads):
        skip_unless_products_keep_rows(hidden.float(), weight.float())
        whole = kernels.linear_token_logprobs(hidden, weight, ids, with_entropy=True, backend=name)
        for chunk_tokens in (1, 5, 7, 16, 30):
            chunked = kernels.linear_token_logprobs(
                hidden, weight, ids, with_entropy=True, chunk_tokens=chunk_tokens, backend=name
            )
            assert all(torch.equal(*pair) for pair in zip(chunked, whole, strict=True))
        tail = kernels.linear_token_logprobs(hidden[41:], weight, ids[41:], backend=name)
        assert torch.equal(tail.logprobs, whole.logprobs[41:])


def test_log_probs_are_those_of_the_materialised_logits(backend: str, device: str) -> None:
    hidden, weight, arguments = problem(48)
    hidden, weight, ids = (v.to(device) for v in (hidden, weight, arguments["token_ids"]))
    want = kernels.token_logprobs(hidden @ weight.T, ids, backend=backend)
    got = kernels.linear_token_logprobs(hidden, weight, ids, chunk_tokens=7, backend=backend)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_chunks_add_no_error_to_the_weight_gradient(dtype: torch.dtype) -> None:
    hidden, weight, arguments = problem(4096, dtype)
    exact = gradients(hidden.double(), weight.double(), **arguments)[-1]
    one, many = (
        gradients(hidden, weight, chunk_tokens=chunk_tokens, **arguments)[-1]
        for chunk_tokens in (4096, 64)
    )
    # One rounding to the dtype of the weight is all that either may differ by.
    bound = relative_error(exact.to(dtype), exact)
    assert relative_error(one, exact) < 1.01 * bound
    assert relative_error(many, exact) < 1.01 * bound


def test_loss_and_gradients_take_three_products_of_the_tokens_that_count() -> None:
    hidden, weight, arguments = problem(256)
    arguments = {**arguments, "spec": LossSpec(), "ref_logprobs": None}
    arguments["old_logprobs"] = kernels.linear_token_logprobs(
        hidden, weight, arguments["token_ids"]
    ).logprobs
    one_product = 256 * DEPTH * WIDTH
    with ProductCounter() as counter:
        gradients(hidden, weight, chunk_tokens=64, **arguments)
    assert counter.total == 3 * one_product

    # Groups of equal rewards have advantage zero: half of the tokens have no gradient.
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    with ProductCounter() as counter:
        gradients(hidden, weight, chunk_tokens=64, **{**arguments, "rewards": rewards})
    assert counter.total == 2 * one_product

    ignored = arguments["token_ids"].clone()
    ignored[128:] = -100
    with ProductCounter() as counter:
        gradients(hidden, weight, chunk_tokens=64, **{**arguments, "token_ids": ignored})
    assert counter.total == 1.5 * one_product


def test_zero_gradient_fraction_is_the_share_of_zero_rows(backend: str, device: str) -> None:
    hidden, weight, arguments = problem(48)
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    arguments["token_ids"][::7] = -100
    arguments["spec"] = LossSpec(clip_low=0.01, clip_high=0.01)
    hidden = hidden.to(device).requires_grad_()
    out = kernels.linear_policy_loss(hidden, weight.to(device), backend=backend, **arguments)
    out.loss.backward()
    assert hidden.grad is not None
    active = arguments["token_ids"] != -100
    share = (hidden.grad[active] == 0).all(1).float().mean()
    assert 0.2 < share < 0.9
    assert out.metrics["zero_gradient_fraction"].item() == pytest.approx(share.item(), rel=1e-6)


PEAK = """
import json, re, sys
import torch, kernels

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

num_tokens, dtype = 1364, getattr(torch, sys.argv[1])
hidden = torch.empty(num_tokens, 576, dtype=dtype).normal_().requires_grad_()
weight = torch.empty(49152, 576, dtype=dtype).normal_(0, 1 / 24).requires_grad_()
ids = torch.randint(0, 49152, (num_tokens,))
spec = kernels.LossSpec(clip_low=1e-3, clip_high=1e-3)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
out = kernels.linear_policy_loss(
    hidden, weight, ids, torch.full((num_tokens,), -11.0), spec=spec,
    advantages=torch.linspace(-1, 1, num_tokens),
)
out.loss.backward()
print(json.dumps([status("VmHWM") - before, out.metrics["zero_gradient_fraction"].item()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_bounded_by_the_chunk(dtype: str) -> None:
    """At the width of SmolLM2; two full chunks, so that more tokens could not add to it.

    Some tokens are clipped, so that rows move as well. Eager needs 1364 * 49152 * 4 bytes for one
    copy of the logits alone, and holds several.
    """
    command = [sys.executable, "-c", PEAK, dtype]
    peak, zero_fraction = json.loads(
        subprocess.run(command, check=True, capture_output=True).stdout
    )
    assert 0.2 < zero_fraction < 0.8
    assert peak < 350e6
