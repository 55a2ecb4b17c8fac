"""TRL's log-prob functions and ours on the same tensors, values and gradients."""

import inspect

import pytest
import torch
from torch import Tensor

from kernels.adapters import trl as ours

theirs = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL is not installed")

NUM_ROWS, NUM_POSITIONS, WIDTH, DEPTH = 3, 5, 37, 8
FUNCTIONS = ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits")


def random_rows(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, token ids and a mask with both values, of the given leading shape."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*shape, WIDTH, generator=generator) * 3).to(dtype).requires_grad_()
    index = torch.randint(0, WIDTH, shape, generator=generator)
    mask = (torch.rand(shape, generator=generator) > 0.3).int()
    return logits, index, mask


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a weighted sum of the outputs, a different weight for each value."""
    total = torch.zeros(())
    for number, output in enumerate(outputs, start=1):
        if output.requires_grad:
            weights = torch.linspace(-1, number, output.numel()).view(output.shape)
            total = total + (weights * output.float()).sum()
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_trls(name: str) -> None:
    def arguments(function: object) -> list[tuple[str, object]]:
        parameters = inspect.signature(function).parameters.values()
        return [(parameter.name, parameter.default) for parameter in parameters]

    assert arguments(getattr(ours, name)) == arguments(getattr(theirs, name))


def test_chunked_signature_is_trls() -> None:
    wanted = list(inspect.signature(chunked.ChunkedLogProbFunction.forward).parameters.values())
    got = inspect.signature(ours.ChunkedLogProbFunction.apply).parameters.values()
    assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in wanted[1:]]


@pytest.mark.parametrize("shape", [(4,), (NUM_ROWS, NUM_POSITIONS), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_selective_log_softmax_and_entropy_matches_trl(
    shape: tuple[int, ...], temperature: float, masked: bool
) -> None:
    logits, index, mask = random_rows(*shape)
    arguments = (logits, index, True, temperature, mask if masked else None)
    got = ours.selective_log_softmax_and_entropy(*arguments)
    want = theirs.selective_log_softmax_and_entropy(*arguments)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(list(got), [logits]), gradients(list(want), [logits]))
    only = ours.selective_log_softmax(logits, index, temperature, mask if masked else None)
    assert torch.equal(only, got[0])


def test_entropy_without_gradient_is_detached() -> None:
    logits, index, _ = random_rows(NUM_ROWS, NUM_POSITIONS)
    logprobs, entropy = ours.selective_log_softmax_and_entropy(logits, index, False)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_entropy_from_logits_matches_trl() -> None:
    logits, _, _ = random_rows(NUM_ROWS, NUM_POSITIONS)
    got, want = ours.entropy_from_logits(logits), theirs.entropy_from_logits(logits)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients([got], [logits]), gradients([want], [logits]))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_several_tokens_a_row_match_trl(masked: bool) -> None:
    logits, index, _ = random_rows(NUM_ROWS, NUM_POSITIONS)
    index = torch.stack([index, (index + 1) % WIDTH, (index + 5) % WIDTH], dim=-1)
    mask = torch.ones_like(index)
    mask[0, 0], mask[1, 1, 2] = 0, 0
    arguments = (logits, index, 0.7, mask if masked else None)
    got, want = ours.selective_log_softmax(*arguments), theirs.selective_log_softmax(*arguments)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients([got], [logits]), gradients([want], [logits]))


def test_bfloat16_logits_come_closer_to_float64_than_trls() -> None:
    logits, index, _ = random_rows(NUM_ROWS, NUM_POSITIONS, dtype=torch.bfloat16)
    exact = theirs.selective_log_softmax(logits.double(), index)
    error = (ours.selective_log_softmax(logits, index).double() - exact).abs().max()
    assert error < 1e-5
    assert error < (theirs.selective_log_softmax(logits, index).double() - exact).abs().max()


def test_masked_rows_may_hold_nan_and_any_token() -> None:
    logits, index, mask = random_rows(NUM_ROWS, NUM_POSITIONS)
    clean = ours.selective_log_softmax(logits, index, 1.0, mask)
    with torch.no_grad():
        logits[mask == 0] = torch.nan
    index = index.masked_fill(mask == 0, WIDTH + 1)
    logprobs, entropy = ours.selective_log_softmax_and_entropy(logits, index, True, 1.0, mask)
    assert torch.equal(logprobs, clean)
    (gradient,) = gradients([logprobs, entropy], [logits])
    assert torch.equal(gradient[mask == 0], torch.zeros_like(gradient[mask == 0]))
    assert gradient.isfinite().all()


def head(
    dtype: torch.dtype = torch.float32, num_tokens: int = 11
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets."""
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((num_tokens, DEPTH), (WIDTH, DEPTH), (WIDTH,))
    ]
    return *tensors, torch.randint(0, WIDTH, (num_tokens,), generator=generator)


@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "with_bias"),
    [(1.0, None, 1.0, False), (0.7, None, 1.0, True), (1.3, 5.0, 0.5, True)],
    ids=["plain", "temperature-bias", "softcap-scale"],
)
@pytest.mark.parametrize("outputs", [(), ("entropy",), ours.OPTIONAL_OUTPUTS], ids=len)
def test_chunked_function_matches_trl(
    temperature: float,
    softcap: float | None,
    scale: float,
    with_bias: bool,
    outputs: tuple[str, ...],
) -> None:
    hidden, weight, bias, targets = head()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    arguments = (hidden, weight, bias if with_bias else None, targets)
    options = (temperature, 16, softcap, scale, outputs)
    got = ours.ChunkedLogProbFunction.apply(*arguments, *options)
    want = chunked.ChunkedLogProbFunction.apply(*arguments, *options)
    assert [value is None for value in got] == [value is None for value in want]
    got = [value for value in got if value is not None]
    want = [value for value in want if value is not None]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients(got[:2], leaves), gradients(want[:2], leaves), rtol=1e-4, atol=1e-5
    )


def test_chunked_function_counts_ties_as_trl() -> None:
    hidden, weight = torch.ones(2, DEPTH), torch.ones(WIDTH, DEPTH)
    targets = torch.tensor([0, 1])
    for function in (ours.ChunkedLogProbFunction, chunked.ChunkedLogProbFunction):
        is_top1 = function.apply(hidden, weight, None, targets, 1.0, 16)[4]
        assert is_top1.tolist() == [True, False]


def test_chunked_function_takes_no_tokens() -> None:
    hidden, weight, bias, targets = head(num_tokens=0)
    outputs = ours.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 16)
    assert [value.shape for value in outputs] == [(0,)] * 5
    for gradient in gradients(list(outputs[:2]), [hidden, weight]):
        assert not gradient.any()


def test_chunked_function_under_autocast_is_no_worse_than_trls() -> None:
    hidden, weight, bias, targets = head()
    exact = ours.ChunkedLogProbFunction.apply(
        hidden.double(), weight.double(), bias.double(), targets, 1.0, 16
    )[0]
    errors = []
    for function in (ours.ChunkedLogProbFunction, chunked.ChunkedLogProbFunction):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs = function.apply(hidden, weight, bias, targets, 1.0, 16)[0]
        assert logprobs.dtype == torch.float32
        errors.append((logprobs.double() - exact).norm())
        (gradient,) = gradients([logprobs], [weight])
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()
    assert errors[0] <= errors[1]


def test_partitioned_weight_is_refused() -> None:
    hidden, weight, _, targets = head()
    weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3"):
        ours.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 16)


def test_logit_scale_of_zero_is_refused() -> None:
    hidden, weight, _, targets = head()
    with pytest.raises(ValueError, match="logit_scale: expected a number > 0, got 0.0"):
        ours.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 16, None, 0.0)
