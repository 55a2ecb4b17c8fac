"""The public ops: checks of every argument, then one call into `autograd`.

Shapes: N packed tokens (prompt tokens already dropped), V whole vocabulary, W this rank's columns
of it, S sequences, B rows and T positions of a padded batch. Logits are packed [N, W] or padded [B,
T, W]; with padding, S = B.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.autograd import PolicyLossFunction, TokenLogprobsFunction
from kernels.backends import select_backend
from kernels.reference import IGNORED, METRIC_NAMES, TokenBatch
from kernels.sharding import VocabShard, localize
from kernels.spec import LossSpec, check_choice


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
    """0-d float32 tensors on the logits' device, one for each of `reference.METRIC_NAMES`."""


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
        logits: [N, W] or [B, T, W]; float32, bfloat16, float16, or float64 (reference only).
        token_ids: integers [N] or [B, T] in [0, V); -100 marks a token to ignore.
        temperature: above 0; a number, or one a token, shaped like `token_ids`.
        softcap: tanh soft cap of the logits; 0 for none.
        with_entropy: also return the entropy.
        vocab: the columns this rank holds, when the vocabulary is split over a process group.
        inplace_backward: let backward overwrite the logits with their gradient. Logits needed by
            another backward then raise there.
        backend: "auto" or a name of `available_backends()`.

    Returns:
        `TokenLogprobs`.

    Raises:
        ValueError, TypeError: an argument does not fit; "name: expected X, got Y".
        RuntimeError: the backend is not available.

    Collectives: with `vocab`, two all_reduces ([N] and [4, N]) in forward, none in backward.
    """
    backend = select_backend(backend, logits)
    rows = _checked_rows(logits, token_ids, None, vocab, inplace_backward)
    logprobs_N, entropy_N, lse_N = TokenLogprobsFunction.apply(
        rows.logits_OIW,
        localize(rows.token_ids_N, vocab),
        _inverse_temperature(temperature, token_ids),
        _checked_softcap(softcap),
        vocab,
        inplace_backward,
        backend,
    )
    shape = token_ids.shape
    entropy = entropy_N.view(shape) if with_entropy else None
    return TokenLogprobs(logprobs_N.view(shape), entropy, lse_N.view(shape))


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
    if rewards.dim() != 1:
        raise ValueError(f"rewards: expected shape [S], got {list(rewards.shape)}")
    if (group_size is None) == (group_ids is None):
        raise ValueError("group_size, group_ids: expected exactly one of them")
    check_choice("scale", scale, ("group", "batch", "none"))
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")
    order = torch.arange(len(rewards), device=rewards.device)
    if group_ids is not None:
        if group_ids.shape != rewards.shape:
            raise ValueError(
                f"group_ids: expected shape {list(rewards.shape)}, got {list(group_ids.shape)}"
            )
        _, group_S, count_P = group_ids.unique(return_inverse=True, return_counts=True)
        order = group_S.argsort(stable=True)
        offsets = torch.nn.functional.pad(count_P.cumsum(0), (1, 0))
    else:
        assert group_size is not None
        _check_group_size(group_size, len(rewards))
        offsets = reference.group_offsets(len(rewards), group_size, rewards.device)
    advantages_S = reference.normalized_advantages(
        rewards.detach()[order], offsets, scale=scale, ddof=ddof, eps=eps
    )
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return torch.empty_like(advantages_S).index_copy_(0, order, advantages_S).to(dtype)


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
    already in forward. The equations stand in `reference.py`.

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
            grad. Logits needed by another backward then raise there.

    Returns:
        `PolicyLoss`.

    Raises:
        ValueError, TypeError: an argument does not fit; "name: expected X, got Y".
        RuntimeError: the backend is not available; or, in backward, a second backward.

    Collectives: with `vocab`, two all_reduces ([N] and [4, N]) in forward, none in backward.
    Source: Shao et al. 2024 (2402.03300) equation 3, and the papers named in `spec.PRESETS`.
    """
    backend = select_backend(backend, logits)
    rows = _checked_rows(logits, token_ids, mask, vocab, inplace_backward)
    batch = _checked_batch(
        rows,
        spec,
        vocab,
        cu_seqlens=cu_seqlens,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        denominator=denominator,
        per_token={
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "sampler_logprobs": sampler_logprobs,
        },
    )
    loss, logprobs_N, entropy_N, metrics = PolicyLossFunction.apply(
        rows.logits_OIW,
        batch,
        spec,
        _inverse_temperature(temperature, token_ids),
        _checked_softcap(softcap),
        vocab,
        inplace_backward,
        backend,
    )
    shape = token_ids.shape
    named = dict(zip(METRIC_NAMES, metrics.unbind(), strict=True))
    return PolicyLoss(loss, logprobs_N.view(shape), entropy_N.view(shape), named)


class _Rows(NamedTuple):
    logits_OIW: Tensor
    token_ids_N: Tensor
    """int64 global ids; masked tokens are IGNORED."""
    shape: torch.Size
    """Of the caller's token ids."""


def _checked_rows(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    vocab: VocabShard | None,
    inplace: bool,
) -> _Rows:
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: expected shape [N, W] or [B, T, W] with W > 0, got {list(logits.shape)}"
        )
    _check_like_tokens("token_ids", token_ids, logits.shape[:-1], logits.device)
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token_ids: expected dtype int64 or int32, got {token_ids.dtype}")
    if vocab is not None and logits.shape[-1] < vocab.width:
        raise ValueError(
            f"logits: expected at least the {vocab.width} columns of the vocabulary shard, "
            f"got {logits.shape[-1]}"
        )
    token_ids_N = token_ids.reshape(-1).long()
    if mask is not None:
        _check_like_tokens("mask", mask, token_ids.shape, logits.device)
        token_ids_N = torch.where(mask.reshape(-1).bool(), token_ids_N, IGNORED)
    _check_id_range(token_ids_N, None if vocab is not None else logits.shape[-1])
    logits_OIW = logits[None] if logits.dim() == 2 else logits
    overlaps = any(
        size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)
    )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 or overlaps:
        if inplace:
            raise ValueError(
                "inplace_backward: expected logits whose rows are contiguous and do not overlap, "
                f"got strides {list(logits.stride())}"
            )
        logits_OIW = logits_OIW.contiguous()
    return _Rows(logits_OIW, token_ids_N, token_ids.shape)


def _check_like_tokens(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _check_id_range(token_ids_N: Tensor, width: int | None) -> None:
    """On a GPU this costs one host sync a call."""
    wrong_N = (token_ids_N < 0) & (token_ids_N != IGNORED)
    if width is not None:
        wrong_N |= token_ids_N >= width
    if wrong_N.any():
        first = int(wrong_N.nonzero()[0, 0])
        limit = "V" if width is None else str(width)
        raise ValueError(
            f"token_ids: expected ids in [0, {limit}) or {IGNORED}, "
            f"got {int(token_ids_N[first])} at token {first}"
        )


def _checked_batch(
    rows: _Rows,
    spec: LossSpec,
    vocab: VocabShard | None,
    *,
    cu_seqlens: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    denominator: float | Tensor | None,
    per_token: dict[str, Tensor | None],
) -> TokenBatch:
    _check_spec_inputs(spec, denominator, per_token)
    device = rows.token_ids_N.device
    flat: dict[str, Tensor | None] = {}
    for name, tensor in per_token.items():
        if tensor is not None:
            _check_like_tokens(name, tensor, rows.shape, device)
        flat[f"{name}_N"] = None if tensor is None else tensor.detach().reshape(-1)
    offsets = _checked_offsets(rows, cu_seqlens)
    num_sequences = len(offsets) - 1
    if (advantages is None) == (rewards is None):
        raise ValueError("advantages, rewards: expected exactly one of them")
    if rewards is not None:
        if rewards.shape != (num_sequences,):
            raise ValueError(
                f"rewards: expected shape [{num_sequences}], one a sequence, "
                f"got {list(rewards.shape)}"
            )
        if group_size is None:
            raise ValueError("group_size: expected the size of the reward groups, got None")
        _check_group_size(group_size, num_sequences)
    elif advantages is not None:
        if group_size is not None:
            raise ValueError("group_size: expected None with given advantages")
        if advantages.shape not in ((num_sequences,), rows.shape):
            raise ValueError(
                f"advantages: expected shape [{num_sequences}] or {list(rows.shape)}, "
                f"got {list(advantages.shape)}"
            )
        advantages = advantages.detach().reshape(-1)
    return TokenBatch(
        token_ids_N=localize(rows.token_ids_N, vocab),
        offsets=offsets,
        old_logprobs_N=flat["old_logprobs_N"],
        ref_logprobs_N=flat["ref_logprobs_N"],
        sampler_logprobs_N=flat["sampler_logprobs_N"],
        advantages=advantages,
        rewards_S=None if rewards is None else rewards.detach(),
        group_size=group_size,
        denominator=denominator,
    )


def _check_spec_inputs(
    spec: LossSpec, denominator: float | Tensor | None, per_token: dict[str, Tensor | None]
) -> None:
    if spec.kl != "none" and per_token["ref_logprobs"] is None:
        raise ValueError(f"ref_logprobs: expected a tensor with spec.kl={spec.kl!r}, got None")
    if spec.needs_sampler_logprobs and per_token["sampler_logprobs"] is None:
        raise ValueError(
            "sampler_logprobs: expected a tensor with spec.sampler_correction="
            f"{spec.sampler_correction!r} and spec.off_policy_threshold="
            f"{spec.off_policy_threshold!r}, got None"
        )
    if spec.aggregation == "constant" and spec.max_tokens is None:
        raise ValueError('spec.max_tokens: expected a count with aggregation "constant", got None')
    if spec.aggregation == "sum" and denominator is not None:
        raise ValueError(f'denominator: expected None with aggregation "sum", got {denominator!r}')
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(
                f"denominator: expected one number, got shape {list(denominator.shape)}"
            )
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator: expected a count > 0, got {denominator!r}")


def _checked_offsets(rows: _Rows, cu_seqlens: Tensor | None) -> Tensor:
    device, num_tokens = rows.token_ids_N.device, len(rows.token_ids_N)
    if len(rows.shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None with padded logits [B, T, W]")
        return torch.arange(rows.shape[0] + 1, device=device) * rows.shape[1]
    if cu_seqlens is None:
        return torch.tensor([0, num_tokens], device=device)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens: expected integers [S+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected device {device}, got {cu_seqlens.device}")
    offsets = cu_seqlens.long()
    rising = bool((offsets.diff() >= 0).all())
    if not rising or int(offsets[0]) != 0 or int(offsets[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens: expected offsets rising from 0 to {num_tokens}, the number of tokens, "
            f"got {offsets.tolist() if len(offsets) < 9 else [*offsets[:4].tolist(), '...']}"
        )
    return offsets


def _check_group_size(group_size: int, num_sequences: int) -> None:
    if group_size < 1 or num_sequences % group_size:
        raise ValueError(
            f"group_size: expected a divisor of the {num_sequences} rewards, got {group_size}"
        )


def _inverse_temperature(temperature: float | Tensor, token_ids: Tensor) -> Tensor | float:
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
        return 1.0 / temperature
    if temperature.dim() == 0:
        temperature = temperature.expand(token_ids.shape)
    _check_like_tokens("temperature", temperature, token_ids.shape, token_ids.device)
    if not bool((temperature > 0).all()):
        raise ValueError("temperature: expected numbers > 0 for every token")
    dtype = torch.float64 if temperature.dtype == torch.float64 else torch.float32
    return (1.0 / temperature.detach().to(dtype)).reshape(-1)


def _checked_softcap(softcap: float) -> float:
    if not softcap >= 0:
        raise ValueError(f"softcap: expected a number >= 0, got {softcap!r}")
    return float(softcap)
