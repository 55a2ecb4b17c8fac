"""The ops on hidden states and their gradients: logits exist for one chunk of tokens at a time.

The policy loss takes three matrix products in all, because its gradient is computed in forward
while a chunk's logits are at hand. On a CPU ignored tokens leave before the first product, tokens
whose gradient is exactly zero before the other two. On a GPU all tokens stay and nothing waits for
the device, so that a CUDA graph can capture it all. Shape legend: `linear_head.py`; A active tokens
(on a GPU all).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import token_loss
from kernels.linear_head import Gradients, Head, HeadSettings, power_of_two_below
from kernels.loss_metrics import loss_metrics
from kernels.reference import IGNORED
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch, TokenTerms

Gradient = Tensor | None


class Active(NamedTuple):
    """The tokens that take part."""

    index_A: Tensor | None
    """Their positions; None where all take part."""
    hidden_AD: Tensor
    token_ids_A: Tensor
    settings: HeadSettings


def active_tokens(hidden_ND: Tensor, token_ids_N: Tensor, settings: HeadSettings) -> Active:
    """Leaves ignored tokens out, or keeps them as zeros where settings say so.

    The hidden states of ignored tokens may hold NaN, which times a gradient of zero is NaN.
    """
    active_N = token_ids_N != IGNORED
    if not settings.compact:
        hidden_ND = torch.where(active_N[:, None], hidden_ND, 0.0)
        return Active(None, hidden_ND, token_ids_N, settings)
    if bool(active_N.all()):
        return Active(None, hidden_ND, token_ids_N, settings)
    index_A = active_N.nonzero()[:, 0]
    settings = settings.of_tokens(index_A)
    return Active(index_A, hidden_ND[index_A], token_ids_N[index_A], settings)


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


def token_slices(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Ranges of at most `chunk_tokens` that cover the tokens."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def sequence_slices(bounds: Sequence[int], chunk_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of at most `chunk_tokens` made of whole sequences, with the sequences they hold.

    A single sequence longer than that is a range of its own.
    """
    first = 0
    for last in range(1, len(bounds)):
        at_end = last == len(bounds) - 1
        if at_end or bounds[last + 1] - bounds[first] > chunk_tokens:
            if bounds[last] > bounds[first]:
                yield slice(bounds[first], bounds[last]), slice(first, last)
            first = last


def separate_parts(
    batch: TokenBatch,
    spec: LossSpec,
    settings: HeadSettings,
    chunk_tokens: int,
    row_tokens: int | None,
) -> list[tuple[slice, slice | None]] | None:
    """Token ranges whose losses do not depend on each other, with the sequences they hold (None
    where a cut may fall inside a sequence).

    Returns None where the host cannot cut between sequences without waiting for a GPU.
    """
    num_tokens = len(batch.token_ids_N)
    if token_loss.tokens_are_independent(spec, on_policy=batch.old_logprobs_N is None):
        return [(tokens, None) for tokens in token_slices(num_tokens, chunk_tokens)]
    if settings.compact:
        return list(sequence_slices(batch.offsets.tolist(), chunk_tokens))
    if row_tokens:
        return list(sequence_slices(range(0, num_tokens + 1, row_tokens), chunk_tokens))
    if num_tokens <= chunk_tokens:
        return [(slice(0, num_tokens), slice(0, len(batch.offsets) - 1))]
    return None


def row_statistics(head: Head, hidden_AD: Tensor, token_ids_A: Tensor, chunk_tokens: int) -> Tensor:
    """Log-prob, entropy, row maximum and log-sum, [4, A]."""
    rows_4A = hidden_AD.new_zeros(4, len(hidden_AD), dtype=head.settings.compute_dtype)
    for tokens in token_slices(len(hidden_AD), chunk_tokens):
        chunk = head.chunk(hidden_AD, token_ids_A, tokens)
        rows_4A[:, tokens] = torch.stack(head.statistics(chunk, head.logits(chunk)))
    return rows_4A


def add_gradients(
    gradients: Gradients,
    hidden_AD: Tensor,
    token_ids_A: Tensor,
    chunk_tokens: int,
    rows_4A: Tensor,
    coefficients: tuple[Tensor, Tensor],
) -> None:
    """Adds what each chunk contributes; computes the logits of `row_statistics` once more."""
    head = gradients.head
    _, entropy_A, max_A, log_sum_A = rows_4A
    for tokens in token_slices(len(hidden_AD), chunk_tokens):
        chunk = head.chunk(hidden_AD, token_ids_A, tokens)
        gradients.add(
            chunk,
            head.logits(chunk),
            (max_A[tokens], log_sum_A[tokens], entropy_A[tokens]),
            (coefficients[0][tokens], coefficients[1][tokens]),
        )


def loss_by_parts(
    head: Head,
    gradients: Gradients | None,
    hidden_AD: Tensor,
    batch: TokenBatch,
    terms: TokenTerms,
    spec: LossSpec,
    parts: Sequence[tuple[slice, slice | None]],
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and, [4, A], log-prob, entropy and derivatives of the loss by them; float64.

    Each part is computed from product to gradient before the next one. Adds to `gradients`.
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


def loss_over_all_tokens(
    head: Head,
    gradients: Gradients | None,
    hidden_AD: Tensor,
    batch: TokenBatch,
    terms: TokenTerms,
    spec: LossSpec,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`loss_by_parts` where a chunk may end inside a sequence whose tokens depend on each other.

    The loss is computed once all log-probs are known, the logits a second time.
    """
    rows_4A = row_statistics(head, hidden_AD, batch.token_ids_N, chunk_tokens)
    loss, *coefficients = token_loss.loss_and_derivatives(rows_4A[0], rows_4A[1], terms, spec)
    slopes = coefficients[0], coefficients[1]
    if gradients is not None:
        add_gradients(gradients, hidden_AD, batch.token_ids_N, chunk_tokens, rows_4A, slopes)
    return loss, torch.stack([*rows_4A[:2].double(), *slopes])


def policy_loss_and_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    settings: HeadSettings,
    batch: TokenBatch,
    spec: LossSpec,
    chunk_tokens: int,
    wanted: tuple[bool, ...],
    row_tokens: int | None = None,
) -> tuple[list[Gradient], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Gradients by `inputs` (hidden states, weight, bias), then loss, log-probs, entropy and
    metrics. `row_tokens` are the tokens of each sequence where all have the same number."""
    num_tokens, dtype = len(inputs[0]), settings.compute_dtype
    index_A, hidden_AD, _, settings = active_tokens(inputs[0], batch.token_ids_N, settings)
    if index_A is not None:
        batch = active_part(batch, index_A)
    terms = token_loss.token_terms(batch, spec)
    parts = separate_parts(batch, spec, settings, chunk_tokens, row_tokens)
    longest = min(chunk_tokens, len(hidden_AD))
    if parts is not None:
        longest = max((tokens.stop - tokens.start for tokens, _ in parts), default=0)
    head = Head(inputs[1], inputs[2], settings, longest)
    gradients = None
    if any(wanted):
        unit = power_of_two_below(terms.weights_N)
        gradients = Gradients(head, (hidden_AD, *inputs[1:]), wanted, unit)
    if parts is not None:
        loss, rows_4A = loss_by_parts(head, gradients, hidden_AD, batch, terms, spec, parts)
    else:
        loss, rows_4A = loss_over_all_tokens(
            head, gradients, hidden_AD, batch, terms, spec, chunk_tokens
        )
    logprobs_A, entropy_A, coef_logprob_A, coef_entropy_A = rows_4A.unbind()
    metrics = loss_metrics(
        logprobs_A, entropy_A, coef_logprob_A, coef_entropy_A, batch, terms, spec
    )
    logprobs_N, entropy_N = (
        spread(values_A.to(dtype, copy=True), index_A, num_tokens)
        for values_A in (logprobs_A, entropy_A)
    )
    results = finished(gradients, index_A, num_tokens)
    return results, (loss.to(dtype), logprobs_N, entropy_N, metrics)


def finished(
    gradients: Gradients | None, index_A: Tensor | None, num_tokens: int
) -> list[Gradient]:
    """Gradients by hidden states of all tokens, weight and bias."""
    if gradients is None:
        return [None, None, None]
    of_hidden, *others = gradients.finish()
    if of_hidden is not None:
        of_hidden = spread(of_hidden, index_A, num_tokens)
    return [of_hidden, *others]


def token_logprobs_rows(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    settings: HeadSettings,
    token_ids_N: Tensor,
    chunk_tokens: int,
) -> tuple[Tensor, ...]:
    """Log-prob, entropy, row maximum and log-sum, [N] each."""
    active = active_tokens(inputs[0], token_ids_N, settings)
    num_tokens, num_active = len(token_ids_N), len(active.token_ids_A)
    head = Head(inputs[1], inputs[2], active.settings, min(chunk_tokens, num_active))
    rows_4A = row_statistics(head, active.hidden_AD, active.token_ids_A, chunk_tokens)
    return tuple(spread(values_A.clone(), active.index_A, num_tokens) for values_A in rows_4A)


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
    active = active_tokens(inputs[0], token_ids_N, settings)
    rows_4A, slopes_2A = torch.stack(values), torch.stack(coefficients)
    if active.index_A is not None:
        rows_4A, slopes_2A = rows_4A[:, active.index_A], slopes_2A[:, active.index_A]
    num_active = len(active.token_ids_A)
    head = Head(inputs[1], inputs[2], active.settings, min(chunk_tokens, num_active))
    unit = power_of_two_below(slopes_2A.flatten().abs())
    gradients = Gradients(head, (active.hidden_AD, *inputs[1:]), wanted, unit)
    slopes = slopes_2A[0], slopes_2A[1]
    add_gradients(gradients, active.hidden_AD, active.token_ids_A, chunk_tokens, rows_4A, slopes)
    return finished(gradients, active.index_A, len(token_ids_N))
