"""What the adapters share: calls of the ops on tensors as other trainers shape them.

Shapes: B rows and T positions of a padded batch, N tokens, V whole vocabulary, W this rank's rows
of the LM head, D model width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels import token_loss
from kernels.ops import TokenLogprobs, linear_token_logprobs, token_logprobs
from kernels.reference import IGNORED
from kernels.sharding import VocabShard
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch


def row_logprobs(
    logits: Tensor, index: Tensor, *, temperature: float = 1.0, inplace_backward: bool = False
) -> TokenLogprobs:
    """`token_logprobs` with entropy of logits [..., V] and token ids [...]."""
    if index.shape != logits.shape[:-1]:
        raise ValueError(
            f"index: expected shape {list(logits.shape[:-1])}, got {list(index.shape)}"
        )
    shape = index.shape
    if logits.dim() not in (2, 3):
        logits, index = logits.reshape(-1, logits.shape[-1]), index.reshape(-1)
    out = token_logprobs(
        logits,
        index,
        temperature=temperature,
        with_entropy=True,
        inplace_backward=inplace_backward,
    )
    assert out.entropy is not None
    return TokenLogprobs(out.logprobs.view(shape), out.entropy.view(shape), out.lse.view(shape))


def row_entropy(logits: Tensor) -> Tensor:
    """Entropy [...] of softmax(logits), differentiable; logits [..., V]."""
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = row_logprobs(logits, any_token).entropy
    assert entropy is not None
    return entropy


def head_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias in one dtype: the given one, that of an active autocast, or
    the hidden states'."""
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "weight: expected the whole LM-head weight, got a DeepSpeed ZeRO-3 parameter, which is "
            "partitioned again before backward reads it"
        )
    device = hidden.device.type
    if dtype is None:
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    vocab: VocabShard | None = None,
    chunk_tokens: int | None = None,
) -> TokenLogprobs:
    """`linear_token_logprobs` with entropy, operands brought to one dtype as autocast would."""
    hidden, weight, bias = head_operands(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_token_logprobs(
            hidden,
            weight,
            token_ids,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            with_entropy=True,
            vocab=vocab,
            chunk_tokens=chunk_tokens,
        )


def loss_from_logprobs(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    spec: LossSpec,
    *,
    weights_BT: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """The loss of `spec` for log-probs that are known already, 0-d float64, differentiable by them.

    `token_loss.objective` computes it. `weights_BT` multiplies the policy term, detached;
    `denominator` is that of `policy_loss`. What masked slots hold does not matter, NaN included.
    """
    active_BT = mask_BT.bool()
    num_rows, num_positions = active_BT.shape
    batch = TokenBatch(
        token_ids_N=torch.where(active_BT, 0, IGNORED).reshape(-1),
        offsets=torch.arange(num_rows + 1, device=active_BT.device) * num_positions,
        old_logprobs_N=old_logprobs_BT.detach().reshape(-1),
        advantages_N=advantages_BT.detach().expand(active_BT.shape).reshape(-1),
        denominator=denominator,
    )
    terms = token_loss.token_terms(batch, spec)
    if weights_BT is not None:
        weights_BT = weights_BT.detach().expand(active_BT.shape).double()
        weights_BT = torch.where(active_BT, weights_BT, 0.0)
        terms = replace(terms, sampler_weight_N=weights_BT.reshape(-1))
    logprobs_N = torch.where(active_BT, logprobs_BT.double(), 0.0).reshape(-1)
    return token_loss.objective(logprobs_N, torch.zeros_like(logprobs_N), terms, spec)


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the active slots, 0-d, 0 without any; what masked slots hold does not matter."""
    active_BT = mask_BT.bool()
    total = torch.where(active_BT, values_BT, 0.0).sum()
    return total / active_BT.sum().clamp(min=1)


def masked_row_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the active slots of each row, [B, 1], 0 for a row without any."""
    active_BT = mask_BT.bool()
    total_B1 = torch.where(active_BT, values_BT, 0.0).sum(dim=1, keepdim=True)
    return total_B1 / active_BT.sum(dim=1, keepdim=True).clamp(min=1)
