"""TRL 1.16: log-probs and entropy from logits and from hidden states (trl/trainer/utils.py,
trl/kernels), and a `GRPOTrainer` mixin.

    from kernels.adapters import trl as onepass
    import trl

    trl.trainer.utils._ChunkedLogProbFunction = onepass.ChunkedLogProbFunction   # any trainer
    class GRPOTrainer(onepass.GRPOLossMixin, trl.GRPOTrainer): ...               # or the whole loss

Shape legend: `common.py`; K tokens gathered a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.adapters.common import head_logprobs, head_operands, row_entropy, row_logprobs
from kernels.adapters.trl_trainer import GRPOLossMixin, grpo_loss_spec
from kernels.reference import IGNORED, scaled_logits

__all__ = [
    "ChunkedLogProbFunction",
    "GRPOLossMixin",
    "entropy_from_logits",
    "grpo_loss_spec",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]

# Tokens a tile of TRL's chunked function; its `chunk_size` is the tile's other side.
TRL_TILE_TOKENS = 4096
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`(logits / temperature).log_softmax(-1).gather(-1, index)`.

    Args:
        logits: [..., V].
        index: integers [...], or [..., K] for K tokens a row.
        temperature: above 0.
        row_mask: like `index`; 0 skips: log-prob 0, gradient 0, whatever the logits hold.

    Returns:
        float32 (float64 for float64 logits), shaped like `index`.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    if index.dim() < logits.dim():
        return _masked_rows(logits, index, temperature, row_mask)[0]
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, 0)
    # A row's log-probs differ as its logits do, so one pass over the row serves all K. The largest
    # of them anchors the differences, which are then finite unless every one is -inf.
    gathered = logits.gather(-1, index).to(torch.promote_types(logits.dtype, torch.float32))
    anchor = gathered.detach().argmax(dim=-1, keepdim=True)
    any_row = None if row_mask is None else (row_mask != 0).any(dim=-1)
    best = _masked_rows(logits, index.gather(-1, anchor)[..., 0], temperature, any_row)[0]
    logprobs = best[..., None] + (gathered - gathered.gather(-1, anchor)) / temperature
    return logprobs if row_mask is None else torch.where(row_mask == 0, 0.0, logprobs)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` of one token a row, and the entropy of the row, in one pass.

    Args:
        logits: [..., V].
        index: integers [...].
        entropy_requires_grad: whether the entropy is differentiable.
        temperature: above 0.
        row_mask: [...]; 0 skips: log-prob, entropy and gradient 0, whatever the logits hold.

    Returns:
        Log-probs and entropies in nats, [...] float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    logprobs, entropy = _masked_rows(logits, index, temperature, row_mask)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy [...] in nats of softmax(logits), differentiable.

    Args:
        logits: [..., V].
        chunk_size: unused; nothing the size of the logits is allocated in forward.

    Raises:
        ValueError, TypeError: the logits have no columns or an unknown dtype.
    """
    return row_entropy(logits)


def _masked_rows(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if row_mask is None:
        out = row_logprobs(logits, index, temperature=temperature)
        assert out.entropy is not None
        return out.logprobs, out.entropy
    out = row_logprobs(logits, index.masked_fill(row_mask == 0, IGNORED), temperature=temperature)
    assert out.entropy is not None
    return out.logprobs, torch.where(row_mask == 0, 0.0, out.entropy)


class ChunkedLogProbFunction:
    """Stands where TRL has an autograd function; only `apply` is used of either."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Statistics of softmax(z), z = softcap(logit_scale * (hidden @ weight.T + bias)) /
        temperature.

        Operands are brought to the dtype of an active autocast, else of the hidden states; logits
        stay float32. Whatever "log_sum_sq_probs", "mean_logits" or "is_top1" asks for costs a
        second product without gradient.

        Args:
            hidden: [N, D].
            weight: [V, D], whole: DTensor and DeepSpeed ZeRO-3 parameters have to be gathered.
            bias: [V] or None.
            targets: integers [N].
            temperature: above 0.
            chunk_size: as many logits exist at a time as in TRL's tile of 4096 tokens by
                `chunk_size` columns; the chunk here is of tokens only.
            final_logit_softcapping: bound of the tanh cap, or None.
            logit_scale: above 0.
            outputs: which of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1" to return.

        Returns:
            [N] log-probs and entropy in nats, differentiable; log(sum_v p_v^2); mean of z over the
            vocabulary; whether the target is the first largest (bool). None where not asked for.

        Raises:
            ValueError, TypeError: an argument does not fit.
        """
        if not logit_scale > 0:
            raise ValueError(f"logit_scale: expected a number > 0, got {logit_scale!r}")
        # Scale s and cap c on logits x at temperature T are cap c/s at temperature T/s.
        temperature = temperature / logit_scale
        softcap = (final_logit_softcapping or 0.0) / logit_scale
        chunk_tokens = max(1, TRL_TILE_TOKENS * chunk_size // len(weight))
        out = head_logprobs(
            hidden,
            weight,
            bias,
            targets,
            temperature=temperature,
            softcap=softcap,
            chunk_tokens=chunk_tokens,
        )
        wanted = [name for name in OPTIONAL_OUTPUTS[1:] if name in outputs]
        extra: dict[str, Tensor] = {}
        if wanted:
            hidden, weight, bias = head_operands(hidden, weight, bias)
            statistics = torch.cat(
                [
                    _row_statistics(z_NV, targets[tokens], out.lse[tokens])
                    for tokens, z_NV in _scaled_logits_by_chunk(
                        hidden, weight, bias, temperature, softcap, chunk_tokens
                    )
                ],
                dim=1,
            )
            extra = dict(zip(OPTIONAL_OUTPUTS[1:], statistics, strict=True))
        is_top1 = extra["is_top1"].bool() if "is_top1" in wanted else None
        return (
            out.logprobs,
            out.entropy if "entropy" in outputs else None,
            extra["log_sum_sq_probs"] if "log_sum_sq_probs" in wanted else None,
            extra["mean_logits"] if "mean_logits" in wanted else None,
            is_top1,
        )


@torch.no_grad()
def _scaled_logits_by_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    chunk_tokens: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Token ranges and their z [n, V]; one empty range if there are no tokens."""
    for start in range(0, max(len(hidden), 1), chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            logits_NV = torch.nn.functional.linear(hidden[tokens], weight, bias)
        yield tokens, scaled_logits(logits_NV[None], 1 / temperature, softcap)


def _row_statistics(z_NV: Tensor, targets_N: Tensor, lse_N: Tensor) -> Tensor:
    """[3, N]: log(sum p^2), mean z, 1 where the target is the first largest."""
    log_sum_sq_N = (2 * z_NV).logsumexp(dim=-1) - 2 * lse_N
    return torch.stack(
        [log_sum_sq_N, z_NV.mean(dim=-1), (z_NV.argmax(dim=-1) == targets_N).float()]
    )
