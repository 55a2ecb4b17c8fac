"""The specification of the passes over the logits in plain PyTorch, any device, float64-capable.

`row_stats` reads the logits once; `grad_logits` writes their gradient. Between the two stands the
token loss (`token_loss.py`), everything that is O(N). Every other backend is held to these files.

Shapes: N packed tokens, W this rank's columns of the vocabulary, logits_OIW a view [outer, inner,
W] of the logits with N = outer * inner. Token ids are local columns; two values are special:
`IGNORED` marks a row outside the loss, `NOT_OWNED` a row whose target lies on another vocabulary
shard.
"""

import math

import torch
from torch import Tensor

IGNORED = -100
NOT_OWNED = -1


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for everything else."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def scaled_logits(logits_OIW: Tensor, inv_temperature: Tensor | float, softcap: float) -> Tensor:
    """z = inv_temperature * softcap(x), [N, W] in the compute dtype."""
    x_NW = logits_OIW.reshape(-1, logits_OIW.shape[-1]).to(compute_dtype(logits_OIW))
    if softcap > 0:
        x_NW = softcap * torch.tanh(x_NW / softcap)
    if isinstance(inv_temperature, Tensor):
        return x_NW * inv_temperature.to(x_NW.dtype)[:, None]
    return x_NW if inv_temperature == 1.0 else x_NW * inv_temperature


def row_stats(
    logits_OIW: Tensor, token_ids_N: Tensor, inv_temperature: Tensor | float, softcap: float
) -> Tensor:
    """First pass: [4, N] row maximum, sum of exp, weighted sum and target logit.

    m = max_j z_j; s = sum_{j != y} exp(z_j - m); w = sum_{j != y} (z_j - m) exp(z_j - m); z_y (0
    where the target y is not here). The sums leave the target out, because beside its 1 they would
    lose a 1 - p_y below the resolution of float32. Columns at -inf add nothing. An all -inf row
    gives m = -inf, s = w = 0; an ignored row four zeros whatever it holds.
    """
    ignored_N = token_ids_N == IGNORED
    z_NW = scaled_logits(logits_OIW, inv_temperature, softcap)
    z_NW = torch.where(ignored_N[:, None], 0.0, z_NW)
    ids_N1 = token_ids_N.clamp(min=0)[:, None]
    here_N1 = (token_ids_N >= 0)[:, None]
    target_N1 = z_NW.gather(1, ids_N1)
    max_N = z_NW.amax(dim=1)
    others_NW = z_NW.scatter_(1, ids_N1, torch.where(here_N1, -math.inf, target_N1))
    if len(z_NW) == 1:
        # PyTorch sums a single row in another order than the rows of a batch; two rows keep the
        # bits of a row independent of the batch it is in.
        sums = _sums_over_row(others_NW.expand(2, -1), max_N)
        sum_N, weighted_N = (value[:1] for value in sums)
    else:
        sum_N, weighted_N = _sums_over_row(others_NW, max_N)
    target_N = torch.where(here_N1, target_N1, 0.0)[:, 0]
    stats_4N = torch.stack([max_N, sum_N, weighted_N, target_N])
    return stats_4N.masked_fill_(ignored_N, 0.0)


def _sums_over_row(z_NW: Tensor, max_N: Tensor) -> tuple[Tensor, Tensor]:
    shifted_NW = z_NW - torch.where(max_N == -math.inf, 0.0, max_N)[:, None]
    exp_NW = shifted_NW.exp()
    weighted_NW = torch.where(shifted_NW == -math.inf, 0.0, shifted_NW * exp_NW)
    return exp_NW.sum(dim=1), weighted_NW.sum(dim=1)


def grad_logits(
    logits_OIW: Tensor,
    token_ids_N: Tensor,
    inv_temperature: Tensor | float,
    softcap: float,
    row_max_N: Tensor,
    log_sum_N: Tensor,
    entropy_N: Tensor,
    coef_logprob_N: Tensor,
    coef_entropy_N: Tensor,
    out_OIW: Tensor,
) -> None:
    """Second pass: writes d loss / d logits, given the coefficients d loss / d (logprob, entropy).

    With log p_j = z_j - row_max - log_sum,
        d_j = coef_logprob * (1[j=y] - p_j) - coef_entropy * p_j * (log p_j + entropy),
    times the derivative of z_j; 1 - p_y is -expm1(log p_y), so that it survives p_y -> 1. Rows
    whose coefficients are both zero, and ignored rows, are exact zeros. `out_OIW` may be the
    logits themselves. What all columns of a row share, and the target column, is computed in
    float64 and rounded once, as the other backends do.
    """
    z_NW = scaled_logits(logits_OIW, inv_temperature, softcap)
    dtype = z_NW.dtype
    max_N1, log_sum_N1, entropy_N1, logprob_slope_N1, entropy_slope_N1 = (
        values_N.double()[:, None]
        for values_N in (row_max_N, log_sum_N, entropy_N, coef_logprob_N, coef_entropy_N)
    )
    share_N1 = torch.exp(-log_sum_N1)
    shift_NW = z_NW - row_max_N[:, None]
    exp_NW = shift_NW.exp()
    surprise_NW = exp_NW * (shift_NW + (entropy_N1 - log_sum_N1).to(dtype))
    grad_NW = exp_NW * (-logprob_slope_N1 * share_N1).to(dtype)
    grad_NW -= torch.where(exp_NW == 0, 0.0, surprise_NW * (entropy_slope_N1 * share_N1).to(dtype))
    ids_N1 = token_ids_N.clamp(min=0)[:, None]
    logp_N1 = z_NW.gather(1, ids_N1).double() - max_N1 - log_sum_N1
    p_N1 = logp_N1.exp()
    surprise_N1 = torch.where(p_N1 == 0, 0.0, p_N1 * (logp_N1 + entropy_N1))
    target_N1 = -logprob_slope_N1 * logp_N1.expm1() - entropy_slope_N1 * surprise_N1
    here_N1 = token_ids_N[:, None] >= 0
    grad_NW.scatter_(
        1, ids_N1, torch.where(here_N1, target_N1.to(dtype), grad_NW.gather(1, ids_N1))
    )
    if softcap > 0:
        x_NW = logits_OIW.reshape(z_NW.shape).to(dtype)
        grad_NW *= 1 - torch.tanh(x_NW / softcap) ** 2
    if isinstance(inv_temperature, Tensor):
        grad_NW *= inv_temperature.to(dtype)[:, None]
    else:
        grad_NW *= inv_temperature
    zero_N = (token_ids_N == IGNORED) | ((coef_logprob_N == 0) & (coef_entropy_N == 0))
    out_OIW.copy_(grad_NW.masked_fill_(zero_N[:, None], 0.0).view(out_OIW.shape))


def scale_(grad_OIW: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient by a 0-d factor in place."""
    dtype = compute_dtype(grad_OIW)
    grad_OIW.copy_(grad_OIW.to(dtype) * factor.to(dtype))
