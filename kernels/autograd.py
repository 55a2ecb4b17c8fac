"""What the gradient of each op is.

`TokenLogprobsFunction` keeps the logits and computes their gradient in backward; its linear form
keeps the hidden states. `PolicyLossFunction` and its linear form compute the gradient in forward,
while logits are at hand, and only scale it in backward: its buffer is handed out once, so a second
backward raises. All raise on double backward. Writing into the logits' memory bumps their version,
so autograd refuses to run any other backward that still needs their old values.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import library, linear_library
from kernels.checks import checked_layout
from kernels.library import run


def check_inplace(logits: Tensor, inplace: bool) -> None:
    """Refuses logits whose memory cannot take their gradient."""
    if inplace and torch.compiler.is_compiling():
        raise ValueError(
            "inplace_backward: expected False under torch.compile, which plans memory itself"
        )
    if inplace:
        checked_layout(logits, inplace=True)


def gradient_buffer(logits: Tensor, inplace: bool) -> Tensor:
    """Where the gradient goes: the logits' memory or new memory."""
    if inplace:
        return logits.detach()
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def note_write(gradient: Tensor, inplace: bool) -> None:
    """Tells autograd that the logits are no longer what they were."""
    if inplace:
        torch.autograd.graph.increment_version(gradient)


def refuse_double_backward(name: str) -> None:
    """Backward runs with gradients enabled only under create_graph=True; a trace is no run."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}: its gradient is not differentiable a second time; expected a backward "
            "without create_graph=True"
        )


class TokenLogprobsFunction(torch.autograd.Function):
    """log-prob, entropy and lse of the target tokens, with gradient through the first two."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inplace: bool, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_inplace(logits, inplace)
        logprobs, entropy, row_max, log_sum = run(library.token_logprobs, logits, *arguments)
        lse = row_max + log_sum
        token_ids, temperature, *ctx.settings = arguments
        ctx.save_for_backward(logits, token_ids, temperature, logprobs, entropy, row_max, log_sum)
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)
        return logprobs, entropy, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("token_logprobs")
        logits, token_ids, temperature, *values = ctx.saved_tensors
        gradient = gradient_buffer(logits, ctx.inplace)
        run(
            library.token_logprobs_gradient,
            gradient,
            logits.detach(),
            token_ids,
            temperature,
            *ctx.settings,
            values,
            *given_or_zero(grads[:2], values[0]),
        )
        note_write(gradient, ctx.inplace)
        return gradient, *[None] * (3 + len(ctx.settings))


class PolicyLossFunction(torch.autograd.Function):
    """Policy loss with its gradient computed in forward; returns loss, logprobs, entropy,
    metrics."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        inplace: bool,
        wants_gradient: bool,
        backend: str,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_inplace(logits, inplace)
        gradient = gradient_buffer(logits, inplace) if wants_gradient else None
        *outputs, unit = run(library.policy_loss, gradient, logits.detach(), *arguments)
        if gradient is not None:
            note_write(gradient, inplace)
            ctx.save_for_backward(gradient, unit)
        ctx.backend, ctx.num_arguments, ctx.handed_out = backend, len(arguments), False
        loss, logprobs, entropy, metrics = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logprobs, entropy, metrics)
        return loss, logprobs, entropy, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("policy_loss")
        refuse_second_backward(ctx, "policy_loss")
        gradient, unit = ctx.saved_tensors
        factor = grads[0]
        if gradient.dtype == torch.float16:
            factor = (factor * unit).to(factor.dtype)
        run(library.scale_, gradient, factor, ctx.backend)
        return gradient, *[None] * (3 + ctx.num_arguments)


class LinearTokenLogprobsFunction(torch.autograd.Function):
    """`token_logprobs` of hidden @ weight.T + bias; backward computes the logits once more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product_dtype: torch.dtype,
        chunk_tokens: int | None,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs, ctx.head_settings = (hidden, weight, bias), (product_dtype, chunk_tokens)
        logprobs, entropy, row_max, log_sum = run(
            linear_library.linear_token_logprobs, *inputs, *ctx.head_settings, *arguments
        )
        lse = row_max + log_sum
        token_ids, temperature, *ctx.settings = arguments
        values = logprobs, entropy, row_max, log_sum
        ctx.save_for_backward(*inputs, token_ids, temperature, *values)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)
        return logprobs, entropy, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_token_logprobs")
        hidden, weight, bias, token_ids, temperature, *values = ctx.saved_tensors
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        gradients = run(
            linear_library.linear_token_logprobs_gradients,
            hidden.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            *ctx.head_settings,
            token_ids,
            temperature,
            *ctx.settings,
            values,
            *given_or_zero(grads[:2], values[0]),
            wanted,
        )
        gradients = [
            None if gradient is None else gradient.to(x.dtype)
            for gradient, x in zip(
                only_wanted(gradients, wanted), (hidden, weight, bias), strict=True
            )
        ]
        return *gradients, *[None] * (4 + len(ctx.settings))


class LinearPolicyLossFunction(torch.autograd.Function):
    """`policy_loss` of hidden @ weight.T + bias, its gradients computed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: list[bool],
        backend: str,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *outputs, of_hidden, of_weight, of_bias = run(
            linear_library.linear_policy_loss, hidden, weight, bias, *arguments, wanted
        )
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.wanted, ctx.backend, ctx.num_arguments = wanted, backend, len(arguments)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.handed_out = False
        loss, logprobs, entropy, metrics = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logprobs, entropy, metrics)
        return loss, logprobs, entropy, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_policy_loss")
        refuse_second_backward(ctx, "linear_policy_loss")
        gradients = only_wanted(ctx.saved_tensors, ctx.wanted)
        for gradient in gradients:
            if gradient is not None:
                run(library.scale_, gradient, grads[0], ctx.backend)
        gradients = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *gradients, *[None] * (2 + ctx.num_arguments)


def given_or_zero(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Zeros in place of the gradients that nobody sent."""
    return [torch.zeros_like(like) if grad is None else grad for grad in grads]


def only_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """None in place of the gradients that were not computed."""
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def refuse_second_backward(ctx: Any, name: str) -> None:
    """A gradient computed in forward is handed out once."""
    if torch.compiler.is_compiling():
        return
    if ctx.handed_out:
        raise RuntimeError(
            f"{name}: a second backward through the same loss; its gradient is computed once, in "
            f"forward, and was handed out. Call {name} again instead"
        )
    ctx.handed_out = True
