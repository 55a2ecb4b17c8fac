"""The ops on hidden states and their gradients: logits exist for one chunk of tokens at a time.

The policy loss takes three matrix products in all, because its gradient is computed in forward
while a chunk's logits are at hand. Ignored tokens leave before the first product, tokens whose
gradient is exactly zero before the other two. Shape legend: `linear_head.py`; A active tokens.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import token_loss
from kernels.linear_head import Gradients, Head, HeadSettings
from kernels.loss_metrics import loss_metrics
from kernels.reference import IGNORED
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch, TokenTerms

Gradient = Tensor | None


def active_tokens(token_ids_N: Tensor) -> Tensor | None:
    """Positions of the tokens that are not ignored, [A]; None where all are active."""
    active_N = token_ids_N != IGNORED
    return None if bool(active_N.all()) else active_N.nonzero()[:, 0]


def active_part(batch: TokenBatch, index_A: Tensor) -> TokenBatch:
    """The batch without its ignored tokens; it has the same loss and the same sequences."""

    def take(values_N: Tensor | None) -> Tensor | None:
        return None if values_N is None else values_N[index_A]

    active_before = pad((batch.token_ids_N != IGNORED).cumsum(0), (1, 0))
    return replace(
        batch,
        token_ids_N=batch.token_ids_N[index_A],
        offsets=active_before[batch.offsets],
        old_logprobs_N=take(batch.old_logprobs_N),
        ref_logprobs_N=take(batch.ref_logprobs_N),
        sampler_logprobs_N=take(batch.sampler_logprobs_N),
        advantages_N=take(batch.advantages_N),
    )


def spread(values_AX: Tensor, index_A: Tensor | None, num_tokens: int) -> Tensor:
    """Values of the active tokens at their positions among all tokens; 0 at the ignored ones."""
    if index_A is None:
        return values_AX
    spread_NX = values_AX.new_zeros(num_tokens, *values_AX.shape[1:])
    return spread_NX.index_copy_(0, index_A, values_AX)


def chunks(
    num_tokens: int, chunk_tokens: int, offsets: Tensor, *, whole_sequences: bool
) -> Iterator[tuple[slice, slice | None]]:
    """Token ranges of at most `chunk_tokens`, with the sequences they hold if those stay whole.

    A single sequence longer than that is a chunk of its own.
    """
    if not whole_sequences:
        for start in range(0, num_tokens, chunk_tokens):
            yield slice(start, min(start + chunk_tokens, num_tokens)), None
        return
    bounds = offsets.tolist()
    first = 0
    for last in range(1, len(bounds)):
        at_end = last == len(bounds) - 1
        if at_end or bounds[last + 1] - bounds[first] > chunk_tokens:
            if bounds[last] > bounds[first]:
                yield slice(bounds[first], bounds[last]), slice(first, last)
            first = last


def policy_loss_rows(
    head: Head,
    gradients: Gradients | None,
    hidden_AD: Tensor,
    batch: TokenBatch,
    terms: TokenTerms,
    spec: LossSpec,
    parts: list[tuple[slice, slice | None]],
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and, [4, A], log-prob, entropy and derivatives of the loss by them; float64.

    Adds to `gradients` what each chunk contributes.
    """
    loss = hidden_AD.new_zeros((), dtype=torch.float64)
    rows_4A = hidden_AD.new_zeros(4, len(hidden_AD), dtype=torch.float64)
    for tokens, sequences in parts:
        chunk = head.chunk(hidden_AD, batch.token_ids_N, tokens)
        logits_nW = head.logits(chunk)
        logprobs_n, entropy_n, max_n, log_sum_n = head.statistics(chunk, logits_nW)
        part_loss, coef_logprob_n, coef_entropy_n = token_loss.loss_and_derivatives(
            logprobs_n,
            entropy_n,
            token_loss.slice_terms(terms, tokens.start, tokens.stop, sequences),
            spec,
        )
        loss += part_loss
        rows_4A[:, tokens] = torch.stack([logprobs_n, entropy_n, coef_logprob_n, coef_entropy_n])
        if gradients is not None:
            gradients.add(
                chunk, logits_nW, (max_n, log_sum_n, entropy_n), (coef_logprob_n, coef_entropy_n)
            )
    return loss, rows_4A


def policy_loss_and_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    settings: HeadSettings,
    batch: TokenBatch,
    spec: LossSpec,
    chunk_tokens: int,
    wanted: tuple[bool, ...],
) -> tuple[list[Gradient], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Gradients by `inputs` (hidden states, weight, bias), then loss, log-probs, entropy and
    metrics."""
    hidden_ND, weight_WD, bias_W = inputs
    num_tokens, dtype = len(hidden_ND), settings.compute_dtype
    index_A = active_tokens(batch.token_ids_N)
    if index_A is not None:
        batch, hidden_ND = active_part(batch, index_A), hidden_ND[index_A]
        settings = settings.of_tokens(index_A)
    terms = token_loss.token_terms(batch, spec)
    on_policy = batch.old_logprobs_N is None
    coupled = not token_loss.tokens_are_independent(spec, on_policy=on_policy)
    parts = list(chunks(len(hidden_ND), chunk_tokens, batch.offsets, whole_sequences=coupled))
    longest = max((tokens.stop - tokens.start for tokens, _ in parts), default=0)
    head = Head(weight_WD, bias_W, settings, longest)
    gradients = None
    if any(wanted):
        gradients = Gradients(head, (hidden_ND, weight_WD, bias_W), wanted)
    loss, rows_4A = policy_loss_rows(head, gradients, hidden_ND, batch, terms, spec, parts)
    logprobs_A, entropy_A, coef_logprob_A, coef_entropy_A = rows_4A.unbind()
    metrics = loss_metrics(
        logprobs_A, entropy_A, coef_logprob_A, coef_entropy_A, batch, terms, spec
    )
    logprobs_N, entropy_N = (
        spread(values_A.to(dtype, copy=True), index_A, num_tokens)
        for values_A in (logprobs_A, entropy_A)
    )
    results: list[Gradient] = [None, None, None]
    if gradients is not None:
        results = gradients.finish()
        if results[0] is not None:
            results[0] = spread(results[0], index_A, num_tokens)
    return results, (loss.to(dtype), logprobs_N, entropy_N, metrics)


def token_logprobs_rows(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    settings: HeadSettings,
    token_ids_N: Tensor,
    chunk_tokens: int,
) -> tuple[Tensor, ...]:
    """Log-prob, entropy, row maximum and log-sum, [N] each."""
    hidden_ND, weight_WD, bias_W = inputs
    num_tokens = len(hidden_ND)
    index_A = active_tokens(token_ids_N)
    if index_A is not None:
        hidden_ND, token_ids_N = hidden_ND[index_A], token_ids_N[index_A]
        settings = settings.of_tokens(index_A)
    head = Head(weight_WD, bias_W, settings, min(chunk_tokens, len(hidden_ND)))
    rows_4A = hidden_ND.new_zeros(4, len(hidden_ND), dtype=settings.compute_dtype)
    for tokens in token_slices(len(hidden_ND), chunk_tokens):
        chunk = head.chunk(hidden_ND, token_ids_N, tokens)
        rows_4A[:, tokens] = torch.stack(head.statistics(chunk, head.logits(chunk)))
    return tuple(spread(values_A.clone(), index_A, num_tokens) for values_A in rows_4A)


def token_logprobs_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    settings: HeadSettings,
    token_ids_N: Tensor,
    chunk_tokens: int,
    values: list[Tensor],
    coefficients: tuple[Tensor, Tensor],
    wanted: tuple[bool, ...],
) -> list[Gradient]:
    """Gradients by `inputs`, for `values` that `token_logprobs_rows` returned and gradients by
    log-prob and entropy, [N] each; computes the logits once more."""
    hidden_ND, weight_WD, bias_W = inputs
    num_tokens = len(hidden_ND)
    index_A = active_tokens(token_ids_N)
    if index_A is not None:
        hidden_ND, token_ids_N = hidden_ND[index_A], token_ids_N[index_A]
        settings = settings.of_tokens(index_A)
        values = [values_N[index_A] for values_N in values]
        coefficients = (coefficients[0][index_A], coefficients[1][index_A])
    _, entropy_A, max_A, log_sum_A = values
    head = Head(weight_WD, bias_W, settings, min(chunk_tokens, len(hidden_ND)))
    gradients = Gradients(head, (hidden_ND, weight_WD, bias_W), wanted)
    for tokens in token_slices(len(hidden_ND), chunk_tokens):
        chunk = head.chunk(hidden_ND, token_ids_N, tokens)
        gradients.add(
            chunk,
            head.logits(chunk),
            (max_A[tokens], log_sum_A[tokens], entropy_A[tokens]),
            (coefficients[0][tokens], coefficients[1][tokens]),
        )
    results = gradients.finish()
    if results[0] is not None:
        results[0] = spread(results[0], index_A, num_tokens)
    return results


def token_slices(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Ranges of at most `chunk_tokens` that cover the tokens."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))
