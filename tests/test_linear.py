"""The head from hidden states equals the head on materialised logits, chunked anyhow."""

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LossSpec
from kernels.testing import grpo_batch, relative_error

SPECS = {
    "dapo + entropy": LossSpec.preset("dapo", entropy_weight=0.01),
    "gspo": LossSpec.preset("gspo"),
    "sequence tis": LossSpec(sampler_correction="sequence_truncate"),
    "off-policy": LossSpec(off_policy_threshold=0.1),
}


def problem(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 16, generator=generator)
    weight = torch.randn(211, 16, generator=generator) / 4
    bias = torch.randn(211, generator=generator)
    hidden, weight, bias = (value.to(device, dtype) for value in (hidden, weight, bias))
    return hidden, weight, bias


def leaves(*values: Tensor) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


def loss_arguments(device: str, backend: str) -> dict:
    batch = grpo_batch(48, 211, torch.float32, device=device)
    return dict(
        token_ids=batch.token_ids_N,
        old_logprobs=torch.full((48,), -5.0, device=device),
        sampler_logprobs=torch.full((48,), -5.1, device=device),
        rewards=batch.rewards_S,
        group_size=4,
        cu_seqlens=batch.cu_seqlens,
        temperature=torch.linspace(0.7, 1.4, 48, device=device),
        softcap=20.0,
        backend=backend,
    )


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_linear_policy_loss_equals_the_materialised_one(
    backend: str, device: str, name: str, chunk_tokens: int
) -> None:
    values = problem(device)
    arguments = loss_arguments(device, backend)
    hidden, weight, bias = leaves(*values)
    want = kernels.policy_loss(hidden @ weight.T + bias, spec=SPECS[name], **arguments)
    want.loss.backward()
    hidden2, weight2, bias2 = leaves(*values)
    got = kernels.linear_policy_loss(
        hidden2, weight2, bias=bias2, spec=SPECS[name], chunk_tokens=chunk_tokens, **arguments
    )
    got.loss.backward()
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-7)
    for leaf, exact in ((hidden2, hidden), (weight2, weight), (bias2, bias)):
        assert relative_error(leaf.grad, exact.grad) < 1e-5
    for metric, value in want.metrics.items():
        assert got.metrics[metric].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_linear_token_logprobs_equals_the_materialised_one(
    backend: str, device: str, chunk_tokens: int
) -> None:
    values = problem(device)
    ids = grpo_batch(48, 211, torch.float32, device=device).token_ids_N.clone()
    ids[5] = -100
    gradients = []
    for chunked in (False, True):
        hidden, weight, bias = leaves(*values)
        if chunked:
            out = kernels.linear_token_logprobs(
                hidden,
                weight,
                ids,
                bias=bias,
                with_entropy=True,
                chunk_tokens=chunk_tokens,
                backend=backend,
            )
        else:
            out = kernels.token_logprobs(
                hidden @ weight.T + bias, ids, with_entropy=True, backend=backend
            )
        (out.logprobs.sin() + out.entropy.cos()).sum().backward()
        gradients.append([hidden.grad, weight.grad, bias.grad])
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert relative_error(got, want) < 1e-5


def test_frozen_weight_and_frozen_hidden_get_no_gradient(backend: str, device: str) -> None:
    hidden, weight, _ = problem(device)
    arguments = dict(loss_arguments(device, backend), spec=SPECS["gspo"])
    trained = hidden.clone().requires_grad_()
    kernels.linear_policy_loss(trained, weight, **arguments).loss.backward()
    head = weight.clone().requires_grad_()
    kernels.linear_policy_loss(hidden, head, **arguments).loss.backward()
    both = leaves(hidden, weight)
    kernels.linear_policy_loss(*both, **arguments).loss.backward()
    assert torch.equal(trained.grad, both[0].grad) and torch.equal(head.grad, both[1].grad)


@pytest.mark.parametrize("name", SPECS)
def test_ignored_tokens_take_no_part(backend: str, device: str, name: str) -> None:
    """Hidden states of ignored tokens hold NaN; one sequence is ignored as a whole."""
    values = problem(device)
    arguments = loss_arguments(device, backend)
    ids = arguments["token_ids"] = arguments["token_ids"].clone()
    ids[3:17], ids[40] = -100, -100
    hidden, weight, bias = leaves(*values)
    want = kernels.policy_loss(hidden @ weight.T + bias, spec=SPECS[name], **arguments)
    want.loss.backward()
    broken = values[0].masked_fill((ids == -100)[:, None], float("nan"))
    hidden2, weight2, bias2 = leaves(broken, *values[1:])
    got = kernels.linear_policy_loss(
        hidden2, weight2, bias=bias2, spec=SPECS[name], chunk_tokens=7, **arguments
    )
    got.loss.backward()
    assert bool((hidden2.grad[ids == -100] == 0).all())
    for leaf, exact in ((hidden2, hidden), (weight2, weight), (bias2, bias)):
        assert relative_error(leaf.grad, exact.grad) < 1e-5
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
    for metric, value in want.metrics.items():
        assert got.metrics[metric].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), metric


def test_only_ignored_tokens_give_zero(backend: str, device: str) -> None:
    values = problem(device)
    ids = torch.full((6, 8), -100, device=device)
    for name in ("dapo + entropy", "gspo"):
        hidden, weight, bias = leaves(values[0].view(6, 8, 16), *values[1:])
        out = kernels.linear_policy_loss(
            hidden,
            weight,
            ids,
            None,
            bias=bias,
            spec=SPECS[name],
            advantages=torch.ones(6, device=device),
            backend=backend,
        )
        logprobs = kernels.linear_token_logprobs(hidden, weight, ids, bias=bias, backend=backend)
        (out.loss + logprobs.logprobs.sum()).backward()
        assert out.loss.item() == 0 and out.metrics["tokens"].item() == 0
        assert all(bool((leaf.grad == 0).all()) for leaf in (hidden, weight, bias))


def test_bfloat16_logits_are_not_rounded_before_the_loss(backend: str, device: str) -> None:
    hidden, weight, _ = problem(device, torch.bfloat16)
    ids = grpo_batch(48, 211, torch.float32, device=device).token_ids_N
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    got = kernels.linear_token_logprobs(hidden, weight, ids, backend=backend).logprobs
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=0)


def test_autocast_changes_nothing(backend: str, device: str) -> None:
    values = problem(device)
    ids = grpo_batch(48, 211, torch.float32, device=device).token_ids_N
    results = []
    for enabled in (False, True):
        hidden, weight, bias = leaves(*values)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            out = kernels.linear_token_logprobs(hidden, weight, ids, bias=bias, backend=backend)
            out.logprobs.sum().backward()
        results.append((out.logprobs, hidden.grad, weight.grad, bias.grad))
    assert all(torch.equal(plain, under) for plain, under in zip(*results, strict=True))


def test_gradient_is_handed_out_once(backend: str, device: str) -> None:
    hidden, weight, _ = problem(device)
    arguments = dict(loss_arguments(device, backend), spec=SPECS["gspo"])
    loss = kernels.linear_policy_loss(hidden.requires_grad_(), weight, **arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through the same loss"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"weight: expected shape \[W, 16\], got \[5, 3\]"),
        ({"weight": torch.zeros(5, 16).half()}, "weight: expected torch.float32"),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \[211\]"),
        ({"chunk_tokens": 0}, "chunk_tokens: expected a count > 0, got 0"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    hidden, weight, _ = problem("cpu")
    arguments = {"weight": weight, **change}
    with pytest.raises(ValueError, match=message):
        kernels.linear_token_logprobs(
            hidden, token_ids=torch.zeros(48, dtype=torch.long), **arguments
        )
