"""The public ops: the only file a user needs to read.

Shapes: N packed tokens (prompt tokens already dropped), V whole vocabulary, W this rank's columns
of it, S sequences, B rows and T positions of a padded batch. Logits are packed [N, W] or padded [B,
T, W]; with padding, S = B.

Arguments are checked when an op runs. On a CPU a wrong value is a ValueError; on a GPU, where
reading it would stop the stream, wrong token ids, offsets and temperatures are an assertion on the
device. torch.compile(fullgraph=True, dynamic=True) keeps each op whole.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import library
from kernels.arguments import LossArguments, RowArguments
from kernels.autograd import (
    LinearPolicyLossFunction,
    LinearTokenLogprobsFunction,
    PolicyLossFunction,
    TokenLogprobsFunction,
)
from kernels.checks import check_devices, checked_product_dtype
from kernels.library import run
from kernels.loss_metrics import METRIC_NAMES
from kernels.sharding import VocabShard, local_logits
from kernels.spec import LossSpec


class TokenLogprobs(NamedTuple):
    """Results a token, float32 (float64 for float64 logits), shaped like the token ids."""

    logprobs: Tensor
    """log p(token), differentiable; 0 at ignored tokens."""
    entropy: Tensor | None
    """Entropy of the whole distribution in nats, differentiable; None unless asked for."""
    lse: Tensor
    """Log of the sum of exp of the scaled logits; not differentiable."""


class PolicyLoss(NamedTuple):
    """A loss and what a trainer logs with it. Only `loss` carries a gradient."""

    loss: Tensor
    """0-d float32 (float64 for float64 logits)."""
    logprobs: Tensor
    """log p(token), shaped like the token ids; 0 at ignored tokens."""
    entropy: Tensor
    """Entropy in nats, shaped like the token ids; 0 at ignored tokens."""
    metrics: dict[str, Tensor]
    """0-d float32 tensors on the logits' device, one for each of `METRIC_NAMES`."""


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    with_entropy: bool = False,
    vocab: VocabShard | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-probabilities of tokens under softmax(z), z = softcap * tanh(logits / softcap) /
    temperature.

    Equivalent to `(logits / temperature).log_softmax(-1).gather(-1, token_ids[..., None])`, with
    every reduction in float32 and the logits read once.

    Args:
        logits: [N, W] or [B, T, W]; float32, bfloat16, float16, or float64 (reference only). A
            DTensor may be sharded over the last dimension; it gets its gradient placed alike.
        token_ids: integers [N] or [B, T] in [0, V); -100 marks a token to ignore.
        temperature: above 0; a number, or one a token, shaped like `token_ids`.
        softcap: tanh soft cap of the logits; 0 for none.
        with_entropy: also return the entropy.
        vocab: the columns this rank holds, when the vocabulary is split over a process group.
        inplace_backward: let backward overwrite the logits with their gradient. Logits needed by
            another backward then raise there. Not under torch.compile.
        backend: "auto" or a name of `available_backends()`.

    Returns:
        `TokenLogprobs`.

    Raises:
        ValueError, TypeError: an argument does not fit; "name: expected X, got Y".
        RuntimeError: the backend is not available.

    Collectives: with `vocab`, two all_reduces ([N] and [4, N]) in forward, none in backward.
    """
    logits, vocab = local_logits(logits, vocab, inplace=inplace_backward)
    rows = row_arguments(logits, token_ids, temperature, softcap, vocab, backend)
    logprobs, entropy, lse = TokenLogprobsFunction.apply(logits, inplace_backward, *rows)
    return TokenLogprobs(logprobs, entropy if with_entropy else None, lse)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    with_entropy: bool = False,
    vocab: VocabShard | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """`token_logprobs` of the logits hidden @ weight.T + bias, which never exist beyond one chunk.

    Any gradient may come from above, so backward computes the logits a second time: four matrix
    products. `linear_policy_loss` needs three. Its text on dtypes and bits holds here too.

    Args:
        hidden: [N, D] or [B, T, D].
        weight: [W, D] on the same device; a plain tensor, as FSDP2 hands it to a module's forward.
        bias: [W] or None.
        chunk_tokens: tokens a chunk; None: as many as fit 128 MiB of logits (2.5 GiB on a GPU).
        vocab: the rows of the weight that this rank holds; `hidden` is the same on all ranks.
        The others are those of `token_logprobs`.

    Returns:
        `TokenLogprobs`.

    Raises:
        ValueError, TypeError: an argument does not fit; "name: expected X, got Y".
        RuntimeError: the backend is not available.

    Collectives: with `vocab`, two all_reduces ([n] and [4, n]) a chunk in forward, and one integer
    if `chunk_tokens` is None; one of the hidden gradient in backward.
    """
    product_dtype = checked_product_dtype(hidden, weight, bias)
    rows = row_arguments(hidden, token_ids, temperature, softcap, vocab, backend)
    logprobs, entropy, lse = LinearTokenLogprobsFunction.apply(
        hidden, weight, bias, product_dtype, chunk_tokens, *rows
    )
    return TokenLogprobs(logprobs, entropy if with_entropy else None, lse)


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Group-relative advantages (R - mean) / (std + eps).

    Args:
        rewards: [S], any real dtype. NaN rewards leave the statistics and get advantage 0.
        group_size: groups are this many consecutive rewards; or give
        group_ids: [S] integers, equal for the members of a group.
        scale: "group" divides by the std of the group, "batch" by the std of all rewards, "none"
            leaves R - mean (Dr. GRPO).
        ddof: 1 (sample std, as TRL, verl and Dr. GRPO) or 0.
        eps: added to the std.

    Returns:
        [S] float32 (float64 for float64 rewards); exactly 0 in a group without spread or of one.

    Raises:
        ValueError: an argument does not fit.

    Source: Shao et al. 2024 (DeepSeekMath, 2402.03300) section 4.1.2; Liu et al. 2025 (2503.20783).
    """
    return run(library.group_advantages, rewards.detach(), group_size, group_ids, scale, ddof, eps)


def policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    *,
    spec: LossSpec,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    denominator: float | Tensor | None = None,
    vocab: VocabShard | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> PolicyLoss:
    """A policy-gradient loss from logits and raw rewards (or advantages), with all its metrics.

    Log-probabilities, entropy, importance ratio, clipping, KL to the reference, group-relative
    advantages, aggregation and the gradient by the logits are computed together, the gradient
    already in forward. The equations stand in `token_loss.py`.

    Args:
        logits, token_ids, temperature, softcap, vocab, backend: as in `token_logprobs`.
        old_logprobs: [N] or [B, T] log-probs of the policy that the ratio refers to; None means
            on-policy (ratio 1, gradient kept).
        spec: which loss.
        advantages: [S], or one a token ([N] or [B, T]); or instead of it
        rewards: [S] raw rewards of groups of `group_size` consecutive sequences, normalised as
            `spec` says.
        cu_seqlens: int [S+1] with packed logits: sequence i holds tokens cu_seqlens[i] to
            cu_seqlens[i+1]. None: the pack is one sequence.
        mask: [N] or [B, T], True or 1 where a token counts.
        ref_logprobs: reference policy's log-probs, like `old_logprobs`; needed if `spec.kl` is set.
        sampler_logprobs: the rollout engine's log-probs; needed by sampler corrections and the
            off-policy mask, and otherwise only measured. NaN: unknown, counts as no difference.
        denominator: global number of tokens (aggregation "token_mean") or of sequences (all
            others) when the batch is a part of a larger one, so that gradients of parts add up.
        inplace_backward: overwrite the logits with their gradient, in this call, if they require
            grad: read them before. Logits needed by another backward then raise there. Not under
            torch.compile.

    Returns:
        `PolicyLoss`.

    Raises:
        ValueError, TypeError: an argument does not fit; "name: expected X, got Y".
        RuntimeError: the backend is not available; or, in backward, a second backward.

    Collectives: with `vocab`, two all_reduces ([N] and [4, N]) in forward, none in backward.
    Source: Shao et al. 2024 (2402.03300) equation 3, and the papers named in `spec.PRESETS`.
    """
    logits, vocab = local_logits(logits, vocab, inplace=inplace_backward)
    rows = row_arguments(logits, token_ids, temperature, softcap, vocab, backend)
    terms = loss_arguments(
        logits.device,
        spec,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        cu_seqlens=cu_seqlens,
        mask=mask,
        denominator=denominator,
    )
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    results = PolicyLossFunction.apply(
        logits, inplace_backward, wants_gradient, backend, *rows, *terms
    )
    return named_loss(*results)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    *,
    spec: LossSpec,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    denominator: float | Tensor | None = None,
    vocab: VocabShard | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """`policy_loss` of the logits hidden @ weight.T + bias, which never exist beyond one chunk.

    Three matrix products in all: the gradients by hidden states, weight and bias are computed in
    forward, each only if it is required. Ignored tokens take no part in any product, tokens without
    gradient (metric "zero_gradient_fraction") none in the last two.

    Dtypes: logits are float32 from the product to the loss, and the weight gradient is accumulated
    in float32, also under autocast, which changes nothing where hidden, weight and bias share a
    dtype. They may differ only under autocast: a GPU then multiplies in autocast's dtype, a CPU in
    float32. Each gradient has the dtype of its input.

    Bits: the same input with the same `chunk_tokens` gives the same bits, gradients included. On a
    CPU with MKL a token's log-prob and entropy have the same bits whatever tokens are beside it and
    however they are cut into chunks; other matrix libraries, and GPUs, may round otherwise for
    another number of rows. The weight gradient is a sum over chunks, which moves with them.

    Args:
        hidden: [N, D] or [B, T, D].
        weight: [W, D] on the same device; a plain tensor, as FSDP2 hands it to a module's forward.
        bias: [W] or None.
        chunk_tokens: tokens a chunk; None: as many as fit 128 MiB of logits (2.5 GiB on a GPU).
            Losses that couple the tokens of a sequence keep each sequence in one chunk, whose
            memory is then that of the longest sequence at least.
        vocab: the rows of the weight that this rank holds; `hidden` is the same on all ranks.
        The others are those of `policy_loss`.

    Returns:
        `PolicyLoss`.

    Raises:
        ValueError, TypeError: an argument does not fit; "name: expected X, got Y".
        RuntimeError: the backend is not available; or, in backward, a second backward.

    Collectives: with `vocab`, two all_reduces ([n] and [4, n]) a chunk, one of the hidden gradient,
    and one integer if `chunk_tokens` is None, all in forward.
    """
    product_dtype = checked_product_dtype(hidden, weight, bias)
    rows = row_arguments(hidden, token_ids, temperature, softcap, vocab, backend)
    terms = loss_arguments(
        hidden.device,
        spec,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        cu_seqlens=cu_seqlens,
        mask=mask,
        denominator=denominator,
    )
    inputs = hidden, weight, bias
    wanted = [x is not None and torch.is_grad_enabled() and x.requires_grad for x in inputs]
    results = LinearPolicyLossFunction.apply(
        *inputs, wanted, backend, product_dtype, chunk_tokens, *rows, *terms
    )
    return named_loss(*results)


def named_loss(loss: Tensor, logprobs: Tensor, entropy: Tensor, metrics: Tensor) -> PolicyLoss:
    """Gives the outputs of a loss function their public form."""
    named = dict(zip(METRIC_NAMES, metrics.unbind(), strict=True))
    return PolicyLoss(loss, logprobs, entropy, named)


def row_arguments(
    features: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    softcap: float,
    vocab: VocabShard | None,
    backend: str,
) -> RowArguments:
    """What every op reads beside logits or hidden states, as the custom ops take it."""
    check_devices(features.device, token_ids=token_ids)
    shard = [] if vocab is None else [vocab.start, vocab.end]
    group_name = "" if vocab is None else vocab.group.group_name
    return RowArguments(
        token_ids, as_tensor(temperature), float(softcap), shard, group_name, backend
    )


def loss_arguments(
    device: torch.device,
    spec: LossSpec,
    *,
    group_size: int | None,
    denominator: float | Tensor | None,
    **tensors: Tensor | None,
) -> LossArguments:
    """What the loss ops read besides, as the custom ops take it: detached."""
    check_devices(device, **tensors)
    return LossArguments(
        **{name: detached(tensor) for name, tensor in tensors.items()},
        group_size=group_size,
        denominator=None if denominator is None else as_tensor(denominator),
        spec_choices=spec.choices,
        spec_numbers=spec.numbers,
    )


def as_tensor(number: float | Tensor) -> Tensor:
    """A number as a tensor on the CPU, which torch.compile does not take for a constant."""
    if isinstance(number, Tensor):
        return number.detach()
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64) * number
    return constant(number)


@lru_cache(maxsize=64)
def constant(number: float) -> Tensor:
    """A number as a tensor that nobody writes to."""
    return torch.tensor(number, dtype=torch.float64)


def detached(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor
