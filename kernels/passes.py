"""What is computed between checked arguments and the backends' passes over the logits.

Statistics of each row, merged over vocabulary shards; the token loss; the gradient of the logits.
Nothing here is differentiable: `autograd` says what the gradient is. Shape legend: `reference.py`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import token_loss
from kernels.backends import load_backend
from kernels.loss_metrics import loss_metrics
from kernels.sharding import VocabShard, merge_row_stats
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch


class Scaling(NamedTuple):
    """How logits x become z = inv_temperature * softcap(x)."""

    inv_temperature: Tensor | float
    """A number, or one a row [N]."""
    softcap: float
    """tanh soft cap; 0 for none."""


class RowValues(NamedTuple):
    """What the statistics of a whole row say, each [N] in the compute dtype."""

    logprobs_N: Tensor
    entropy_N: Tensor
    max_N: Tensor
    log_sum_N: Tensor
    """log of the sum of exp(z - max)."""


def finish_stats(stats_4N: Tensor) -> RowValues:
    """Log-prob, entropy and normaliser from the statistics of `reference.row_stats`.

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
    return RowValues(
        logprobs_N.to(dtype), entropy_N.to(dtype), stats_4N[0].clone(), log_sum_N.to(dtype)
    )


def owned_columns(logits_OIW: Tensor, vocab: VocabShard | None) -> Tensor:
    """The logits without the padding columns that follow a shard."""
    return logits_OIW if vocab is None else logits_OIW[..., : vocab.width]


def row_values(
    logits_OIW: Tensor,
    token_ids_N: Tensor,
    scaling: Scaling,
    vocab: VocabShard | None,
    backend: str,
) -> RowValues:
    """First pass, merged over the shards.

    Collectives: with `vocab`, two all_reduces.
    """
    module = load_backend(backend)
    if vocab is None and hasattr(module, "row_values"):
        return RowValues(*module.row_values(logits_OIW, token_ids_N, *scaling))
    stats_4N = module.row_stats(owned_columns(logits_OIW, vocab), token_ids_N, *scaling)
    return finish_stats(merge_row_stats(stats_4N, token_ids_N, vocab))


def write_gradient(
    logits_OIW: Tensor,
    token_ids_N: Tensor,
    scaling: Scaling,
    values: RowValues,
    coefficients: tuple[Tensor, Tensor],
    vocab: VocabShard | None,
    backend: str,
    out_OIW: Tensor,
) -> None:
    """Second pass: the gradient of the logits, given the derivatives of the loss by log-prob and
    entropy, [N] each. Padding columns get 0; `out_OIW` may be the logits."""
    dtype = values.max_N.dtype
    load_backend(backend).grad_logits(
        owned_columns(logits_OIW, vocab),
        token_ids_N,
        *scaling,
        values.max_N,
        values.log_sum_N,
        values.entropy_N,
        *(coefficient_N.to(dtype).contiguous() for coefficient_N in coefficients),
        owned_columns(out_OIW, vocab),
    )
    if vocab is not None:
        out_OIW[..., vocab.width :] = 0


def policy_loss(
    logits_OIW: Tensor,
    batch: TokenBatch,
    spec: LossSpec,
    scaling: Scaling,
    vocab: VocabShard | None,
    backend: str,
    out_OIW: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probs, entropy and metrics; writes the gradient of the logits to `out_OIW`.

    In one launch where the backend fuses such a loss and the row is whole, else in two passes with
    the token loss between them.
    """
    module = load_backend(backend)
    on_policy = batch.old_logprobs_N is None
    independent = token_loss.tokens_are_independent(spec, on_policy=on_policy)
    if vocab is None and independent and hasattr(module, "policy_loss"):
        fused = module.policy_loss(logits_OIW, batch, spec, *scaling, out_OIW)
        return fused.loss, fused.logprobs_N, fused.entropy_N, fused.metrics
    values = row_values(logits_OIW, batch.token_ids_N, scaling, vocab, backend)
    terms = token_loss.token_terms(batch, spec)
    loss, *coefficients = token_loss.loss_and_derivatives(
        values.logprobs_N, values.entropy_N, terms, spec
    )
    slopes = coefficients[0], coefficients[1]
    metrics = loss_metrics(values.logprobs_N, values.entropy_N, *slopes, batch, terms, spec)
    if out_OIW is not None:
        write_gradient(
            logits_OIW, batch.token_ids_N, scaling, values, slopes, vocab, backend, out_OIW
        )
    return loss.to(values.max_N.dtype), values.logprobs_N, values.entropy_N, metrics
