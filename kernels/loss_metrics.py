"""What a trainer logs about a policy loss. Shape legend: `token_loss.py`."""

import math

import torch
from torch import Tensor

from kernels import token_loss
from kernels.advantages import group_offsets, has_spread
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch, TokenTerms

METRIC_NAMES = (
    "tokens",  # active tokens
    "entropy",  # mean over active tokens, as all that follow where nothing else is said
    "kl",  # the spec's estimator of KL to the reference (k3 if it has none), 0 without reference
    "kl_old",  # old_logprob - logprob
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "clip_fraction",
    "clip_fraction/low",  # ratio below the lower clip and advantage negative
    "clip_fraction/high",  # ratio above the upper clip and advantage positive
    "sampler/gap_mean",  # |old_logprob - sampler_logprob|, 0 without sampler log-probs
    "sampler/gap_max",
    "sampler/kept_fraction",  # share of tokens whose policy term no mask removed
    "zero_gradient_fraction",  # share of active tokens whose gradient is exactly zero
    "zero_spread_fraction",  # share of reward groups without spread, 0 for given advantages
)


def loss_metrics(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    coef_logprob_N: Tensor,
    coef_entropy_N: Tensor,
    batch: TokenBatch,
    terms: TokenTerms,
    spec: LossSpec,
) -> Tensor:
    """The values of METRIC_NAMES, float32 [len(METRIC_NAMES)], without a host sync."""
    logprobs_N = logprobs_N.detach().double()
    active_N, advantages_N = terms.active_N, terms.advantages_N
    count = active_N.sum().clamp(min=1)

    def mean(values_N: Tensor) -> Tensor:
        return torch.where(active_N, values_N.double(), 0.0).sum() / count

    def extreme(values_N: Tensor, largest: bool) -> Tensor:
        bound = -math.inf if largest else math.inf
        filled_N = torch.where(active_N, values_N, bound)
        filled_N = torch.cat([filled_N, torch.where(active_N.any(), bound, 0.0)[None]])
        return filled_N.amax() if largest else filled_N.amin()

    token_log_ratio_N = token_loss.token_log_ratio(logprobs_N, terms)
    log_ratio_N = token_log_ratio_N
    if spec.ratio_level == "sequence":
        log_ratio_N = token_loss.segment_mean(log_ratio_N, terms)
    ratio_N = log_ratio_N.exp()
    if spec.surrogate in ("clip", "cispo"):
        below_N, above_N = ratio_N < 1 - spec.clip_low, ratio_N > 1 + spec.clip_high
    elif spec.surrogate == "gmpo":
        below_N, above_N = log_ratio_N < -spec.clip_low, log_ratio_N > spec.clip_high
    else:
        below_N = above_N = torch.zeros_like(active_N)
    low_N, high_N = below_N & (advantages_N < 0), above_N & (advantages_N > 0)
    zero = logprobs_N.new_zeros(())
    kl = zero
    if terms.ref_logprobs_N is not None:
        kl = mean(token_loss.kl_term(logprobs_N, token_log_ratio_N, terms, spec))
    gap_N = torch.zeros_like(logprobs_N)
    if terms.sampler_logprobs_N is not None:
        old_N = logprobs_N if terms.old_logprobs_N is None else terms.old_logprobs_N
        gap_N = token_loss.sampler_gap(old_N, terms).abs()
    zero_spread = zero
    if batch.rewards_S is not None and len(batch.rewards_S) > 0:
        assert batch.group_size is not None
        offsets = group_offsets(len(batch.rewards_S), batch.group_size, active_N.device)
        zero_spread = (~has_spread(batch.rewards_S, offsets)).double().mean()
    return torch.stack(
        [
            active_N.sum().double(),
            mean(entropy_N),
            kl,
            mean(-token_log_ratio_N),
            mean(ratio_N),
            extreme(ratio_N, largest=False),
            extreme(ratio_N, largest=True),
            mean(low_N | high_N),
            mean(low_N),
            mean(high_N),
            mean(gap_N),
            extreme(gap_N, largest=True),
            mean(token_loss.policy_weight(logprobs_N, terms, spec) > 0),
            mean((coef_logprob_N == 0) & (coef_entropy_N == 0)),
            zero_spread,
        ]
    ).float()
