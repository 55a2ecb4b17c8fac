"""The hard cases of gradients, on every backend: groups 16, 17 and 21.

`test_hard_cases.py` says what the numbers are.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LossSpec
from kernels.testing import eager_token_values, grpo_batch, relative_error

EPS = torch.finfo(torch.float32).eps


def random_rows(num_rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    logits_NV = (torch.randn(num_rows, 501, generator=generator) * 3).to(device, dtype)
    return logits_NV, torch.arange(num_rows, device=device) * 41


def values_and_gradient(
    leaf: Tensor, logits: Tensor, ids: Tensor, backend: str, **options: Any
) -> tuple[kernels.TokenLogprobs, Tensor]:
    """Log-probs and entropy of `logits`, and the gradient of a sum of both by `leaf`."""
    out = kernels.token_logprobs(logits, ids, with_entropy=True, backend=backend, **options)
    total = (out.logprobs + 0.3 * out.entropy).sum()
    return out, torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("inplace", [False, True], ids=["new memory", "in place"])
def test_16_logits_without_their_last_position(backend: str, device: str, inplace: bool) -> None:
    logits, ids = random_rows(12, torch.float32, device)
    packed = logits.clone().requires_grad_()
    want, want_gradient = values_and_gradient(packed, packed, ids, backend)
    padded = torch.full((3, 5, 501), math.nan, device=device)
    padded[:, :-1] = logits.view(3, 4, 501)
    leaf = padded.requires_grad_()
    got, gradient = values_and_gradient(
        leaf, (leaf * 1)[:, :-1], ids.view(3, 4), backend, inplace_backward=inplace
    )
    assert torch.equal(got.logprobs.flatten(), want.logprobs)
    assert torch.equal(gradient[:, :-1].reshape(12, 501), want_gradient)
    assert bool((gradient[:, -1] == 0).all())


def test_16_any_layout_of_the_logits(backend: str, device: str) -> None:
    logits, ids = random_rows(12, torch.float32, device)
    want = kernels.token_logprobs(logits, ids, backend=backend).logprobs.view(3, 4)
    padded_BTV = logits.view(3, 4, 501)
    wide = torch.full((3, 5, 600), math.nan, device=device)[:, :4, 7:508]
    wide.copy_(padded_BTV)
    views = {
        "slice": (wide, ids.view(3, 4), want),
        "scattered columns": (logits.t().contiguous().t(), ids, want.flatten()),
        "transposed": (padded_BTV.transpose(0, 1), ids.view(3, 4).t(), want.t()),
        "every other row": (logits[::2], ids[::2], want.flatten()[::2]),
    }
    for name, (view, view_ids, expected) in views.items():
        got = kernels.token_logprobs(view, view_ids, backend=backend).logprobs
        assert torch.equal(got, expected), name


def test_16_expanded_and_zero_upstream_gradients(backend: str, device: str) -> None:
    logits, ids = random_rows(6, torch.float32, device)
    gradients = []
    ones = torch.ones(6, device=device)
    for weights in (ones, ones[:1].expand(6), ones * 0):
        leaf = logits.clone().requires_grad_()
        out = kernels.token_logprobs(leaf, ids, backend=backend)
        gradients.append(torch.autograd.grad(out.logprobs, leaf, weights)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert bool((gradients[2] == 0).all())
    batch = grpo_batch(8, 101, torch.float32, device=device)
    leaf = batch.logits_NV.clone().requires_grad_()
    (0 * grpo_loss(leaf, batch, backend)).backward()
    assert bool((leaf.grad == 0).all())


def test_16_float16_gradients_overflow_as_in_pytorch(backend: str, device: str) -> None:
    """Beyond 65504 a gradient is infinite, for a loss scaler to see; its row is not."""
    logits, ids = random_rows(2, torch.float16, device)
    weights = torch.tensor([1e6, -1.0], device=device)
    leaf = logits.clone().requires_grad_()
    out = kernels.token_logprobs(leaf, ids, backend=backend)
    got = torch.autograd.grad(out.logprobs, leaf, weights)[0]
    logprobs, _ = eager_token_values(leaf.float(), ids)
    want = torch.autograd.grad(logprobs, leaf, weights)[0]
    assert bool(want.isinf().any()) and torch.equal(got.isinf(), want.isinf())
    eps = torch.finfo(torch.float16).eps
    finite = want.isfinite()
    torch.testing.assert_close(got[finite], want[finite], rtol=2 * eps, atol=2**-24)


def test_16_float16_gradients_under_a_loss_scaler(backend: str, device: str) -> None:
    """A loss scaler multiplies the loss so that small gradients are not lost in float16."""
    batch = grpo_batch(8, 1003, torch.float16, device=device)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        leaf = batch.logits_NV.detach().to(dtype, copy=True).requires_grad_()
        loss = kernels.policy_loss(
            leaf,
            batch.token_ids_N,
            batch.old_logprobs_N,
            spec=LossSpec(aggregation="token_mean"),
            rewards=batch.rewards_S,
            group_size=4,
            cu_seqlens=batch.cu_seqlens,
            denominator=8192,
            backend="reference" if dtype == torch.float64 else backend,
        ).loss
        gradients.append(torch.autograd.grad(loss * 65536, leaf)[0])
    got, exact = gradients
    others = torch.ones_like(exact).scatter(1, batch.token_ids_N[:, None], 0).bool()
    rounding = relative_error(exact[others].half(), exact[others])
    assert relative_error(got[others], exact[others]) <= 2 * rounding


def grpo_loss(logits: Tensor, batch: Any, backend: str, **options: Any) -> Tensor:
    return kernels.policy_loss(
        logits,
        batch.token_ids_N,
        batch.old_logprobs_N,
        spec=LossSpec(),
        rewards=batch.rewards_S,
        group_size=4,
        cu_seqlens=batch.cu_seqlens,
        backend=backend,
        **options,
    ).loss


def logprob_sum(logits: Tensor, batch: Any, backend: str, **options: Any) -> Tensor:
    return kernels.token_logprobs(
        logits, batch.token_ids_N, backend=backend, **options
    ).logprobs.sum()


OPS = {"policy_loss": grpo_loss, "token_logprobs": logprob_sum}


@pytest.mark.parametrize("op", OPS)
def test_17_double_backward_raises(backend: str, device: str, op: str) -> None:
    batch = grpo_batch(8, 101, torch.float32, device=device)
    leaf = batch.logits_NV.clone().requires_grad_()
    for inplace in (False, True):
        loss = OPS[op](leaf * 1, batch, backend, inplace_backward=inplace)
        with pytest.raises(RuntimeError, match=f"{op}: .* not differentiable a second time"):
            torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize(
    ("op", "inplace", "message"),
    [
        ("policy_loss", False, "second backward through the same loss"),
        ("policy_loss", True, "second backward through the same loss"),
        ("token_logprobs", True, "modified by an inplace operation"),
    ],
)
def test_17_second_backward_raises(
    backend: str, device: str, op: str, inplace: bool, message: str
) -> None:
    batch = grpo_batch(8, 101, torch.float32, device=device)
    leaf = batch.logits_NV.clone().requires_grad_()
    loss = OPS[op](leaf * 1, batch, backend, inplace_backward=inplace)
    loss.backward(retain_graph=True)
    gradient = leaf.grad.clone()
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    assert torch.equal(leaf.grad, gradient)


def test_17_second_backward_adds_up_where_logits_are_kept(backend: str, device: str) -> None:
    batch = grpo_batch(8, 101, torch.float32, device=device)
    leaf = batch.logits_NV.clone().requires_grad_()
    loss = logprob_sum(leaf, batch, backend)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("needed_by", ["auxiliary loss", "their own operation"])
def test_17_logits_that_another_backward_needs_raise(
    backend: str, device: str, op: str, needed_by: str
) -> None:
    batch = grpo_batch(8, 101, torch.float32, device=device)
    leaf = batch.logits_NV.clone().requires_grad_()
    # Of exp the result is saved, of the square its argument.
    logits = (leaf / 8).exp() if needed_by == "their own operation" else leaf * 1
    auxiliary = logits.square().sum() if needed_by == "auxiliary loss" else 0.0
    loss = OPS[op](logits, batch, backend, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + auxiliary).backward()


@pytest.mark.parametrize(
    ("op", "auxiliary_first"),
    [("policy_loss", True), ("token_logprobs", True), ("token_logprobs", False)],
)
def test_17_auxiliary_losses_that_do_no_harm_add_up(
    backend: str, device: str, op: str, auxiliary_first: bool
) -> None:
    """A sum saves no logits; a square that follows the op runs its backward before ours."""
    batch = grpo_batch(8, 101, torch.float32, device=device)
    alone, both = (batch.logits_NV.clone().requires_grad_() for _ in range(2))
    OPS[op](alone * 1, batch, backend).backward()
    logits = both * 1
    auxiliary = logits.sum() if auxiliary_first else None
    loss = OPS[op](logits, batch, backend, inplace_backward=True)
    if auxiliary is None:
        auxiliary = logits.square().sum()
    (loss + auxiliary).backward()
    expected = alone.grad + (1 if auxiliary_first else 2 * batch.logits_NV)
    torch.testing.assert_close(both.grad, expected, rtol=2 * EPS, atol=EPS)


@pytest.mark.parametrize("op", OPS)
def test_17_overlapping_rows_cannot_be_overwritten(backend: str, device: str, op: str) -> None:
    batch = grpo_batch(8, 101, torch.float32, device=device)
    leaf = torch.randn(1, 101, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="inplace_backward: expected logits whose rows"):
        OPS[op](leaf.expand(8, 101), batch, backend, inplace_backward=True)
    OPS[op](leaf.expand(8, 101), batch, backend).backward()
    assert leaf.grad.shape == (1, 101)


def row_bits(logits: Tensor, ids: Tensor, backend: str) -> dict[str, Tensor]:
    """Everything a row gives, in both ops, with coefficients that do not depend on the batch."""
    leaf = logits.clone().requires_grad_()
    out, gradient = values_and_gradient(leaf, leaf, ids, backend, temperature=0.9)
    fused_leaf = logits.clone().requires_grad_()
    loss = kernels.policy_loss(
        fused_leaf,
        ids,
        torch.full(ids.shape, -5.0, device=ids.device),
        spec=LossSpec(aggregation="sum", entropy_weight=0.1),
        advantages=torch.full(ids.shape, 1.3, device=ids.device),
        temperature=0.9,
        backend=backend,
    )
    loss.loss.backward()
    return {
        "logprobs": out.logprobs,
        "entropy": out.entropy,
        "lse": out.lse,
        "gradient": gradient,
        "loss logprobs": loss.logprobs,
        "loss entropy": loss.entropy,
        "loss gradient": fused_leaf.grad,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [999, 9001])
def test_21_bits_of_a_row_depend_on_nothing_but_the_row(
    backend: str, device: str, dtype: torch.dtype, width: int
) -> None:
    """Run twice, permuted, alone, in chunks, padded to the right and below."""
    batch = grpo_batch(7, width, dtype, num_sequences=1, device=device)
    logits, ids = batch.logits_NV, batch.token_ids_N
    whole = row_bits(logits, ids, backend)
    assert torch.equal(whole["logprobs"], whole["loss logprobs"])
    assert torch.equal(whole["entropy"], whole["loss entropy"])
    wide = torch.full((9, width + 3), math.nan, dtype=dtype, device=device)
    wide[:7, 1:-2] = logits
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3], device=device)
    variants = {
        "again": (logits, ids, slice(None)),
        "permuted": (logits[order], ids[order], order),
        "alone": (logits[3:4], ids[3:4], slice(3, 4)),
        "chunk": (logits[4:], ids[4:], slice(4, None)),
        "padded": (wide[:, 1:-2], torch.cat([ids, ids.new_full((2,), -100)]), None),
    }
    for name, (part, part_ids, rows) in variants.items():
        for field, got in row_bits(part, part_ids, backend).items():
            got, want = (got[:7], whole[field]) if rows is None else (got, whole[field][rows])
            assert torch.equal(got, want), f"{name}: {field}"


def test_21_a_whole_loss_repeats_to_the_bit(backend: str, device: str) -> None:
    batch = grpo_batch(16, 1003, torch.bfloat16, device=device)
    spec = LossSpec.preset("dapo", kl="k3", kl_weight=0.1, entropy_weight=0.01)
    runs = []
    for _ in range(2):
        leaf = batch.logits_NV.clone().requires_grad_()
        out = kernels.policy_loss(
            leaf,
            batch.token_ids_N,
            batch.old_logprobs_N,
            spec=spec,
            rewards=batch.rewards_S,
            group_size=4,
            cu_seqlens=batch.cu_seqlens,
            ref_logprobs=batch.ref_logprobs_N,
            backend=backend,
        )
        out.loss.backward()
        runs.append((out.loss.detach(), leaf.grad, torch.stack([*out.metrics.values()])))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
