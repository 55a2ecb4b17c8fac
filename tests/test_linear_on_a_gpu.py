"""The head from hidden states as it runs on a GPU, tried without one.

There it never waits for the device: no token leaves, sequences are not cut where only the device
knows their ends, and products are those of the operands' dtype. CPU tensors go that way in the
first tests, tensors without values in the last, where any use of a value raises.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import LossSpec, checks, linear, linear_head, linear_library
from kernels.arguments import LossArguments
from kernels.linear_head import HeadSettings
from kernels.testing import grpo_batch, relative_error

NUM_TOKENS, DEPTH, WIDTH = 48, 16, 211
SPECS = {
    "dapo + entropy": LossSpec.preset("dapo", entropy_weight=0.01),
    "k3": LossSpec(kl="k3", kl_weight=0.04),
    "gspo": LossSpec.preset("gspo"),
    "gmpo": LossSpec.preset("gmpo"),
    "sequence tis": LossSpec(sampler_correction="sequence_truncate"),
    "off-policy": LossSpec(off_policy_threshold=0.1),
}


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`wide_product` by the operators of a CPU."""
    torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    total.addmm_(left.to(total.dtype), right.to(total.dtype))


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CPU tensors go the way of GPU tensors."""

    def head(*arguments: Any) -> HeadSettings:
        settings = checks.checked_head(*arguments)
        return replace(settings, compact=False, operand_dtype=arguments[-1])

    monkeypatch.setattr(linear_library, "checked_head", head)
    monkeypatch.setattr(linear_head, "wide_product", product)
    monkeypatch.setattr(linear_head, "add_wide_product", add_product)


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """Hidden states, weight and bias; the other arguments. Ignored tokens hold NaN."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, DEPTH, generator=generator)
    weight = torch.randn(WIDTH, DEPTH, generator=generator) / 4
    bias = torch.randn(WIDTH, generator=generator)
    batch = grpo_batch(NUM_TOKENS, WIDTH, torch.float32)
    ids = batch.token_ids_N.clone()
    ids[3:17], ids[40] = -100, -100
    hidden[ids == -100] = float("nan")
    noise = torch.randn(3, NUM_TOKENS, generator=generator) * 0.3 - 5
    arguments = dict(
        token_ids=ids,
        old_logprobs=noise[0],
        ref_logprobs=noise[1],
        sampler_logprobs=noise[2],
        rewards=batch.rewards_S,
        group_size=4,
        cu_seqlens=batch.cu_seqlens,
        temperature=torch.linspace(0.7, 1.4, NUM_TOKENS),
        softcap=20.0,
    )
    return [value.to(dtype) for value in (hidden, weight, bias)], arguments


def padded(inputs: list[Tensor], arguments: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """The same as eight sequences of six tokens."""
    shaped = {
        name: value.view(8, 6) if isinstance(value, Tensor) and len(value) == NUM_TOKENS else value
        for name, value in arguments.items()
    }
    return [inputs[0].view(8, 6, DEPTH), *inputs[1:]], {**shaped, "cu_seqlens": None}


def gradients(inputs: list[Tensor], **arguments: Any) -> list[Tensor]:
    """Loss, log-probs, entropy, metrics and the three gradients."""
    hidden, weight, bias = (value.clone().requires_grad_() for value in inputs)
    out = kernels.linear_policy_loss(hidden, weight, bias=bias, **arguments)
    out.loss.backward()
    metrics = torch.stack([*out.metrics.values()])
    grads = [leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None]
    return [out.loss.detach(), out.logprobs, out.entropy, metrics, *grads]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_policy_loss_is_that_of_the_cpu(
    request: pytest.FixtureRequest, name: str, layout: str, chunk_tokens: int
) -> None:
    inputs, arguments = problem()
    if layout == "padded":
        inputs, arguments = padded(inputs, arguments)
    arguments.update(spec=SPECS[name], chunk_tokens=chunk_tokens)
    want = gradients(inputs, **arguments)
    request.getfixturevalue("gpu_path")
    got = gradients(inputs, **arguments)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    ignored = arguments["token_ids"] == -100
    assert bool((got[4][ignored] == 0).all())


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_token_logprobs_are_those_of_the_cpu(
    request: pytest.FixtureRequest, chunk_tokens: int
) -> None:
    inputs, arguments = problem()

    def values_and_gradients() -> list[Tensor]:
        hidden, weight, bias = (value.clone().requires_grad_() for value in inputs)
        out = kernels.linear_token_logprobs(
            hidden,
            weight,
            arguments["token_ids"],
            bias=bias,
            with_entropy=True,
            chunk_tokens=chunk_tokens,
        )
        (out.logprobs.sin() + out.entropy.cos()).sum().backward()
        grads = [leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None]
        return [out.logprobs.detach(), out.entropy.detach(), *grads]

    want = values_and_gradients()
    request.getfixturevalue("gpu_path")
    for ours, theirs in zip(values_and_gradients(), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [4, 48])
@pytest.mark.parametrize("backend_between", ["reference", "cpp"])
def test_half_precision_gradients_are_as_exact_as_plain_ones(
    gpu_path: None, dtype: torch.dtype, chunk_tokens: int, backend_between: str
) -> None:
    """Plain PyTorch multiplies in the same dtype, with logits and their gradient rounded to it."""
    (hidden, weight, _), arguments = problem(dtype)
    hidden = hidden.nan_to_num(0.0)
    ids = arguments["token_ids"].clamp(min=0)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.to(dtype).clone().requires_grad_() for value in (hidden, weight)]
        logits = leaves[0] @ leaves[1].t()
        logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        (-logprobs.mean()).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    leaves = [value.clone().requires_grad_() for value in (hidden, weight)]
    kernels.linear_policy_loss(
        *leaves,
        ids,
        None,
        spec=LossSpec(surrogate="reinforce", aggregation="token_mean"),
        advantages=torch.ones(NUM_TOKENS),
        chunk_tokens=chunk_tokens,
        backend=backend_between,
    ).loss.backward()
    for leaf, theirs, exact in zip(leaves, plain(dtype), plain(torch.float64), strict=True):
        assert leaf.grad is not None
        assert relative_error(leaf.grad, exact) <= relative_error(theirs, exact)


def test_gradients_below_the_range_of_float16_survive(gpu_path: None) -> None:
    """A mean over many tokens; a loss scaler multiplies the loss afterwards."""
    (hidden, weight, _), arguments = problem(torch.float16)
    hidden = hidden.nan_to_num(0.0)
    ids = arguments["token_ids"].clamp(min=0)
    scale = 2.0**24
    grads = []
    for dtype in (torch.float16, torch.float64):
        leaves = [value.to(dtype).clone().requires_grad_() for value in (hidden, weight)]
        loss = kernels.linear_policy_loss(
            *leaves,
            ids,
            None,
            spec=LossSpec(surrogate="reinforce", aggregation="token_mean"),
            advantages=torch.ones(NUM_TOKENS),
            denominator=scale,
            backend="reference",
        ).loss
        (loss * scale).backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, want in zip(*grads, strict=True):
        assert got is not None and want is not None
        assert relative_error(got, want) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("name", "layout", "chunk_tokens", "number"),
    [
        ("k3", "packed", 12, 3),
        ("gspo", "padded", 12, 3),
        ("gspo", "packed", 48, 3),
        # The logits are computed twice: only the device knows where a chunk may end.
        ("gspo", "packed", 12, 4),
    ],
)
def test_number_of_products(
    gpu_path: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    layout: str,
    chunk_tokens: int,
    number: int,
) -> None:
    work = []

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def multiply(*operands: Tensor) -> None:
            left, right = operands[:2]
            work.append(left.shape[0] * left.shape[1] * right.shape[1])
            call(*operands)

        return multiply

    monkeypatch.setattr(linear_head, "wide_product", counted(product))
    monkeypatch.setattr(linear_head, "add_wide_product", counted(add_product))
    inputs, arguments = problem(torch.bfloat16)
    if layout == "padded":
        inputs, arguments = padded(inputs, arguments)
    arguments.update(spec=SPECS[name], chunk_tokens=chunk_tokens, backend="reference")
    gradients(inputs, **arguments)
    assert sum(work) == number * NUM_TOKENS * DEPTH * WIDTH


class WaitForDevice(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, and copies between the two."""

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.item.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in self.WAITING:
            raise WaitForDevice(str(func))
        out = func(*args, **(kwargs or {}))
        devices = {value.device.type for value in args if isinstance(value, Tensor) and value.dim()}
        if isinstance(out, Tensor) and devices and out.device.type not in devices:
            raise WaitForDevice(f"{func} copies from {devices} to {out.device}")
        return out


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """From checks to gradients."""
    monkeypatch.setattr(linear_head, "wide_product", product)
    monkeypatch.setattr(linear_head, "add_wide_product", add_product)
    spec = SPECS[name]
    settings = HeadSettings(
        inv_temperature=1.0,
        softcap=0.0,
        vocab=None,
        backend="reference",
        compute_dtype=torch.float32,
        operand_dtype=dtype,
        compact=False,
    )
    with NoWaiting():
        hidden = torch.empty(NUM_TOKENS, DEPTH, dtype=dtype, device="meta")
        weight = torch.empty(WIDTH, DEPTH, dtype=dtype, device="meta")
        ids = torch.empty(NUM_TOKENS, dtype=torch.int64, device="meta")
        numbers = torch.empty(NUM_TOKENS, device="meta")
        rows = checks.checked_rows(hidden, ids, None, None, WIDTH)
        call = LossArguments(
            old_logprobs=numbers,
            ref_logprobs=numbers,
            sampler_logprobs=numbers,
            advantages=None,
            rewards=torch.empty(8, device="meta"),
            group_size=4,
            cu_seqlens=torch.empty(9, dtype=torch.int32, device="meta"),
            mask=None,
            denominator=None,
            spec_choices=spec.choices,
            spec_numbers=spec.numbers,
        )
        batch = checks.checked_batch(rows, spec, None, call)
        inputs = hidden, weight, None
        results, outputs = linear.policy_loss_and_gradients(
            inputs, settings, batch, spec, 20, (True, True, False)
        )
        rows_4N = linear.token_logprobs_rows(inputs, settings, ids, 20)
        slopes = torch.empty_like(numbers), torch.empty_like(numbers)
        again = linear.token_logprobs_gradients(
            inputs, settings, ids, 20, list(rows_4N), slopes, (True, True, False)
        )
    for tensor in (*results[:2], *outputs, *rows_4N, *again[:2]):
        assert tensor is not None and tensor.device.type == "meta"


def test_what_refuses_waiting_sees_it() -> None:
    with NoWaiting():
        on_device = torch.empty(3, device="meta")
        for waits in (
            lambda: on_device.cpu(),
            lambda: on_device.nonzero(),
            lambda: on_device[on_device > 0],
            lambda: bool(on_device.sum() > 0),
            lambda: torch.tensor([0, 1]).to("meta"),
        ):
            with pytest.raises((WaitForDevice, RuntimeError)):
                waits()
