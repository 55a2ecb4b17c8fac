"""The differentiable ops between `ops` (checked arguments) and the backends (passes over the
logits).

`TokenLogprobsFunction` keeps the logits and computes their gradient in backward.
`PolicyLossFunction` computes the gradient in forward, while the logits are at hand, and only scales
it in backward: its buffer is handed out once, so a second backward raises. Both raise on double
backward. Writing into the logits' memory bumps their version, so autograd refuses to run any other
backward that still needs their old values. Shape legend: `reference.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels import token_loss
from kernels.backends import load_backend
from kernels.sharding import VocabShard, merge_row_stats
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch


def owned_columns(logits_OIW: Tensor, vocab: VocabShard | None) -> Tensor:
    """The logits without the padding columns that follow a shard."""
    return logits_OIW if vocab is None else logits_OIW[..., : vocab.width]


def finish_stats(stats_4N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-prob, entropy, row maximum and log of the sum of exp(z - maximum), each [N].

    The target is added to the sums over the other columns here. Where it is the maximum the sum is
    1 + others, and log1p(others) is minus the log-prob to the last digit, however small. Scalar
    work a row is done in float64 and rounded once, as the fused kernels do.
    """
    max_N, others_N, weighted_N, target_N = stats_4N.double().unbind()
    shift_N = torch.where(target_N == -math.inf, -math.inf, target_N - max_N)
    exp_N = shift_N.exp()
    sum_N = others_N + exp_N
    log_sum_N = torch.where(shift_N == 0, others_N.log1p(), sum_N.log())
    logprobs_N = shift_N - log_sum_N
    weighted_N = weighted_N + torch.where(exp_N == 0, 0.0, shift_N * exp_N)
    entropy_N = log_sum_N - weighted_N / sum_N
    dtype = stats_4N.dtype
    return logprobs_N.to(dtype), entropy_N.to(dtype), stats_4N[0], log_sum_N.to(dtype)


def gradient_buffer(logits_OIW: Tensor, vocab: VocabShard | None, inplace: bool) -> Tensor:
    """Where the gradient goes: the logits' memory or new memory; padding columns are zero."""
    buffer_OIW = (
        logits_OIW.detach()
        if inplace
        else torch.empty_like(logits_OIW, memory_format=torch.contiguous_format)
    )
    if vocab is not None:
        buffer_OIW[..., vocab.width :] = 0
    return buffer_OIW


def refuse_double_backward(name: str) -> None:
    """Backward runs with gradients enabled only under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: its gradient is not differentiable a second time; expected a backward "
            "without create_graph=True"
        )


class TokenLogprobsFunction(torch.autograd.Function):
    """log-prob, entropy and lse of the target tokens, with gradient through the first two."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_OIW: Tensor,
        token_ids_N: Tensor,
        inv_temperature: Tensor | float,
        softcap: float,
        vocab: VocabShard | None,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stats_4N = load_backend(backend).row_stats(
            owned_columns(logits_OIW, vocab), token_ids_N, inv_temperature, softcap
        )
        logprobs_N, entropy_N, max_N, log_sum_N = finish_stats(
            merge_row_stats(stats_4N, token_ids_N, vocab)
        )
        lse_N = max_N + log_sum_N
        ctx.save_for_backward(logits_OIW, token_ids_N, max_N, log_sum_N, entropy_N)
        ctx.arguments = (inv_temperature, softcap, vocab, inplace, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse_N)
        return logprobs_N, entropy_N, lse_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("token_logprobs")
        grad_logprobs_N, grad_entropy_N, _ = grads
        inv_temperature, softcap, vocab, inplace, backend = ctx.arguments
        logits_OIW, token_ids_N, max_N, log_sum_N, entropy_N = ctx.saved_tensors
        zero_N = torch.zeros_like(max_N)
        out_OIW = gradient_buffer(logits_OIW, vocab, inplace)
        load_backend(backend).grad_logits(
            owned_columns(logits_OIW.detach(), vocab),
            token_ids_N,
            inv_temperature,
            softcap,
            max_N,
            log_sum_N,
            entropy_N,
            zero_N if grad_logprobs_N is None else grad_logprobs_N.contiguous(),
            zero_N if grad_entropy_N is None else grad_entropy_N.contiguous(),
            owned_columns(out_OIW, vocab),
        )
        if inplace:
            torch.autograd.graph.increment_version(logits_OIW)
        return out_OIW, None, None, None, None, None, None


class PolicyLossFunction(torch.autograd.Function):
    """Policy loss with its gradient computed in forward; returns loss, logprobs, entropy,
    metrics."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_OIW: Tensor,
        batch: TokenBatch,
        spec: LossSpec,
        inv_temperature: Tensor | float,
        softcap: float,
        vocab: VocabShard | None,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out_OIW = None
        if ctx.needs_input_grad[0]:
            out_OIW = gradient_buffer(logits_OIW, vocab, inplace)
        ctx.gradient_OIW, ctx.backend = out_OIW, backend
        module = load_backend(backend)
        on_policy = batch.old_logprobs_N is None
        if (
            vocab is None
            and hasattr(module, "policy_loss")
            and token_loss.tokens_are_independent(spec, on_policy=on_policy)
        ):
            fused = module.policy_loss(
                logits_OIW.detach(), batch, spec, inv_temperature, softcap, out_OIW
            )
            outputs = fused.loss, fused.logprobs_N, fused.entropy_N, fused.metrics
        else:
            outputs = two_pass_policy_loss(
                logits_OIW.detach(), batch, spec, inv_temperature, softcap, vocab, backend, out_OIW
            )
        if inplace and out_OIW is not None:
            torch.autograd.graph.increment_version(logits_OIW)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("policy_loss")
        out_OIW, ctx.gradient_OIW = ctx.gradient_OIW, None
        if out_OIW is None:
            raise RuntimeError(
                "policy_loss: a second backward through the same loss; its gradient is computed "
                "once, in forward, and was handed out. Call policy_loss again instead"
            )
        load_backend(ctx.backend).scale_(out_OIW, grads[0])
        return out_OIW, None, None, None, None, None, None, None


def two_pass_policy_loss(
    logits_OIW: Tensor,
    batch: TokenBatch,
    spec: LossSpec,
    inv_temperature: Tensor | float,
    softcap: float,
    vocab: VocabShard | None,
    backend: str,
    out_OIW: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any loss, sharded or not: statistics, `token_loss`, then the gradient."""
    module = load_backend(backend)
    owned_OIW = owned_columns(logits_OIW, vocab)
    stats_4N = module.row_stats(owned_OIW, batch.token_ids_N, inv_temperature, softcap)
    logprobs_N, entropy_N, max_N, log_sum_N = finish_stats(
        merge_row_stats(stats_4N, batch.token_ids_N, vocab)
    )
    terms = token_loss.token_terms(batch, spec)
    loss, coef_logprob_N, coef_entropy_N = token_loss.loss_and_derivatives(
        logprobs_N, entropy_N, terms, spec
    )
    metrics = token_loss.loss_metrics(
        logprobs_N, entropy_N, coef_logprob_N, coef_entropy_N, batch, terms, spec
    )
    if out_OIW is not None:
        module.grad_logits(
            owned_OIW,
            batch.token_ids_N,
            inv_temperature,
            softcap,
            max_N,
            log_sum_N,
            entropy_N,
            coef_logprob_N.to(max_N.dtype),
            coef_entropy_N.to(max_N.dtype),
            owned_columns(out_OIW, vocab),
        )
    return loss.to(max_N.dtype), logprobs_N, entropy_N, metrics
