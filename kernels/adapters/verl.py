"""verl 0.9.1: log-probs from logits and from hidden states, and registered policy losses.

    from kernels.adapters import verl
    verl.register_policy_losses()   # then actor.policy_loss.loss_mode=onepass_vanilla

The losses start from log-probs that verl has already computed, so they run on `token_loss`.
Shape legend: `common.py`.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.adapters.common import (
    head_logprobs,
    loss_from_logprobs,
    masked_mean,
    masked_row_mean,
    row_logprobs,
)
from kernels.reference import compute_dtype
from kernels.sharding import VocabShard
from kernels.spec import LossSpec, check_choice

# verl bounds log-ratios by these before it exponentiates them.
TOKEN_BOUND = 20.0
SEQUENCE_BOUND = 10.0


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs of the labels; verl/utils/torch_functional.py.

    Args:
        logits: [..., V].
        labels: integers [...]; -100 gives 0.
        inplace_backward: backward may overwrite the logits with their gradient; logits needed by
            another backward then raise there. Logits whose rows are not contiguous are copied
            first, as verl does.

    Returns:
        [...] float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return row_logprobs(logits, labels, inplace_backward=inplace_backward).logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs (not their negative) and entropy from hidden states;
    verl/utils/kernel/linear_cross_entropy.py.

    Args:
        hidden: [N, D] or [B, T, D]; with a process group the same on all its ranks.
        weight: [W, D]; with a process group rank r holds rows r*W to (r+1)*W of the vocabulary.
        labels: integers [N] or [B, T] into the whole vocabulary.
        temperature: above 0; divides the logits.
        reduction: "none", or "sum" or "mean" of the log-probs (never of the entropy).

    Returns:
        Log-probs [N] (0-d if reduced) and entropy [N] in nats, flat also for a padded batch;
        float32.

    Raises:
        ValueError, TypeError: an argument does not fit.

    Collectives: with a process group those of `linear_token_logprobs`. As with verl, the hidden
    gradients of the ranks are shares that the caller sums (Megatron's reduce-scatter).
    """
    check_choice("reduction", reduction, ("none", "sum", "mean"))
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    vocab = None
    if dist_process_group is not None:
        rank, width = dist.get_rank(dist_process_group), len(weight)
        vocab = VocabShard(dist_process_group, rank * width, (rank + 1) * width)
        hidden = _GradientShare.apply(hidden, dist.get_world_size(dist_process_group))
    out = head_logprobs(hidden, weight, None, labels, temperature=temperature, vocab=vocab)
    assert out.entropy is not None
    if reduction == "none":
        return out.logprobs, out.entropy
    total = out.logprobs.sum()
    return total if reduction == "sum" else total / len(labels), out.entropy


class _GradientShare(torch.autograd.Function):
    """Identity whose gradient is one of `world_size` equal shares of the incoming one."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return hidden_ND.view_as(hidden_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.world_size, None


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """PPO clip with dual clip; verl's "vanilla".

    Args:
        old_log_prob, log_prob, advantages: [B, T]; only `log_prob` is differentiated.
        response_mask: [B, T], True or 1 where a token counts.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm" or
            "seq-mean-token-mean".
        config: verl's actor config; its `global_batch_info` carries the global counts.
        rollout_is_weights: [B, T] weights of the policy term, or None.

    Returns:
        The loss, 0-d float32 (float64 for float64 advantages), and verl's metrics as numbers.

    Raises:
        ValueError: an argument does not fit.

    Source: Schulman et al. 2017 (1707.06347); Ye et al. 2020 (1912.09729).
    """
    low, high = _clip_range(config)
    cap = config.get("clip_ratio_c", 3.0)
    spec = _spec(config, loss_agg_mode, response_mask, clip_low=low, clip_high=high, dual_clip=cap)
    log_ratio_BT = (log_prob - old_log_prob).clamp(-TOKEN_BOUND, TOKEN_BOUND)
    loss = _aggregated(
        old_log_prob.double() + log_ratio_BT.double(),
        old_log_prob,
        advantages,
        response_mask,
        spec,
        config,
        rollout_is_weights,
    )
    ratio_BT = log_ratio_BT.detach().exp()
    hits_cap_BT = (ratio_BT > cap) & (advantages < 0)
    return loss, _metrics(
        _clips(ratio_BT, advantages, spec), hits_cap_BT, log_ratio_BT, response_mask
    )


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clip of the sequence ratio, each token's gradient through its own log-prob; verl's "gspo".

    Arguments, results and errors are those of `compute_policy_loss_vanilla`.

    Source: Zheng et al. 2025 (2507.18071), equation 14 (GSPO-token).
    """
    low, high = _clip_range(config)
    spec = _spec(
        config,
        loss_agg_mode,
        response_mask,
        clip_low=low,
        clip_high=high,
        ratio_cap=math.exp(SEQUENCE_BOUND),
    )
    log_ratio_BT = (log_prob - old_log_prob).detach()
    # With this for the old log-prob the token ratio is sg[s_i] * p / sg[p] of equation 14.
    sequence_old_BT = log_prob.detach().double() - masked_row_mean(
        log_ratio_BT.double(), response_mask
    )
    loss = _aggregated(
        log_prob,
        sequence_old_BT,
        advantages,
        response_mask,
        spec,
        config,
        rollout_is_weights,
    )
    ratio_BT = (log_prob.detach() - sequence_old_BT).exp()
    clips_BT = _clips(ratio_BT, advantages, spec)
    return loss, _metrics(clips_BT, torch.zeros_like(clips_BT), log_ratio_BT, response_mask)


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Sigmoid gate instead of a clip; verl's "sapo", which reads no `loss_agg_mode` and always
    takes "seq-mean-token-mean".

    Arguments, results and errors are those of `compute_policy_loss_vanilla`.

    Source: 2511.20347.
    """
    spec = _spec(
        config,
        "seq-mean-token-mean",
        response_mask,
        surrogate="sapo",
        sapo_temperature_pos=config.tau_pos,
        sapo_temperature_neg=config.tau_neg,
    )
    log_ratio_BT = (log_prob - old_log_prob).clamp(-TOKEN_BOUND, TOKEN_BOUND)
    loss = _aggregated(
        old_log_prob.double() + log_ratio_BT.double(),
        old_log_prob,
        advantages,
        response_mask,
        spec,
        config,
        rollout_is_weights,
    )
    none_BT = torch.zeros_like(log_ratio_BT)
    return loss, _metrics(none_BT, none_BT, log_ratio_BT, response_mask)


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """REINFORCE weighted by the clipped, detached ratio; verl's "cispo".

    Arguments, results and errors are those of `compute_policy_loss_vanilla`.

    Source: MiniMax-M1 (2506.13585).
    """
    low, high = _clip_range(config)
    spec = _spec(
        config, loss_agg_mode, response_mask, surrogate="cispo", clip_low=low, clip_high=high
    )
    log_ratio_BT = (log_prob - old_log_prob).detach().clamp(-TOKEN_BOUND, TOKEN_BOUND)
    loss = _aggregated(
        log_prob,
        log_prob.detach().double() - log_ratio_BT.double(),
        advantages,
        response_mask,
        spec,
        config,
        rollout_is_weights,
    )
    ratio_BT = log_ratio_BT.exp()
    clips_BT = (ratio_BT < 1 - low) | (ratio_BT > 1 + high)
    return loss, _metrics(clips_BT, torch.zeros_like(clips_BT), log_ratio_BT, response_mask)


POLICY_LOSSES = {
    "vanilla": compute_policy_loss_vanilla,
    "gspo": compute_policy_loss_gspo,
    "sapo": compute_policy_loss_sapo,
    "cispo": compute_policy_loss_cispo,
}


def register_policy_losses(prefix: str = "onepass_") -> None:
    """Registers each of `POLICY_LOSSES` with verl under its name behind `prefix`; an empty prefix
    replaces verl's own.

    Raises:
        ModuleNotFoundError: verl is not installed.
    """
    from verl.trainer.ppo.core_algos import register_policy_loss

    for name, policy_loss in POLICY_LOSSES.items():
        register_policy_loss(prefix + name)(policy_loss)


AGGREGATION = {
    "token-mean": "token_mean",
    "token-sum": "sum",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "sequence_mean",
}


def _spec(config: Any, loss_agg_mode: str, response_mask: Tensor, **fields: Any) -> LossSpec:
    """The loss of `fields` with verl's aggregation."""
    check_choice("loss_agg_mode", loss_agg_mode, tuple(AGGREGATION))
    if loss_agg_mode == "seq-mean-token-sum-norm":
        scale = config.global_batch_info.get("loss_scale_factor")
        fields["max_tokens"] = response_mask.shape[-1] if scale is None else scale
    return LossSpec(aggregation=AGGREGATION[loss_agg_mode], **fields)  # type: ignore[arg-type]


def _clip_range(config: Any) -> tuple[float, float]:
    """Lower and upper clip; each defaults to `clip_ratio`."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    both = config.clip_ratio
    return both if low is None else low, both if high is None else high


def _aggregated(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    spec: LossSpec,
    config: Any,
    weights_BT: Tensor | None,
) -> Tensor:
    """The loss over the global batch that `config.global_batch_info` describes.

    verl divides by the global count (its default: this batch's tokens or non-empty sequences) and
    multiplies by `dp_size`, because data-parallel training averages gradients.
    """
    info = config.global_batch_info
    dp_size = info.get("dp_size", 1)
    by_token = spec.aggregation == "token_mean"
    name = "batch_num_tokens" if by_token else "global_batch_size"
    count = info.get(name)
    if spec.aggregation == "sum":
        denominator = None
    elif count is not None:
        denominator = count / dp_size
    elif dp_size > 1:
        raise ValueError(f"config.global_batch_info[{name!r}]: expected a count, got None")
    else:
        active_BT = mask_BT.bool()
        active = active_BT if by_token else active_BT.any(dim=-1)
        denominator = active.sum().clamp(min=1)
    loss = loss_from_logprobs(
        logprobs_BT,
        old_logprobs_BT,
        advantages_BT,
        mask_BT,
        spec,
        weights_BT=weights_BT,
        denominator=denominator,
    )
    loss = loss.to(compute_dtype(advantages_BT))
    return loss * dp_size if spec.aggregation == "sum" else loss


def _clips(ratio_BT: Tensor, advantages_BT: Tensor, spec: LossSpec) -> Tensor:
    """Where the clip lowers the objective."""
    above_BT = (ratio_BT > 1 + spec.clip_high) & (advantages_BT > 0)
    return above_BT | ((ratio_BT < 1 - spec.clip_low) & (advantages_BT < 0))


def _metrics(
    clips_BT: Tensor, hits_cap_BT: Tensor, log_ratio_BT: Tensor, mask_BT: Tensor
) -> dict[str, float]:
    """verl's three metrics, read from the device at once."""
    means = [
        masked_mean(values_BT.float(), mask_BT)
        for values_BT in (clips_BT, -log_ratio_BT.detach(), hits_cap_BT)
    ]
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, torch.stack(means).tolist(), strict=True))
