"""The token loss as device functions: derivatives of the terms that `reference.objective` defines.

Values are float64, as there; the value of the loss itself is taken from `kernels.token_loss`.
"""

import triton
import triton.language as tl


@triton.jit
def policy_slope(
    ratio: tl.tensor,
    ratio_slope: tl.tensor,
    advantage: tl.tensor,
    lower: tl.tensor,
    upper_positive: tl.tensor,
    upper_negative: tl.tensor,
    temperature_positive: tl.tensor,
    temperature_negative: tl.tensor,
    SURROGATE: tl.constexpr,
) -> tl.tensor:
    """d `reference.policy_term` / d logprob, for surrogates of one token."""
    if SURROGATE == "clip":
        above = tl.where(advantage > 0, ratio > upper_positive, ratio > upper_negative)
        clipped = above | ((advantage < 0) & (ratio < lower))
        slope = tl.where(clipped, 0.0, -advantage * ratio_slope)
    elif SURROGATE == "cispo":
        capped = tl.where(ratio > upper_positive, upper_positive, ratio)
        slope = -advantage * tl.where(capped < lower, lower, capped)
    elif SURROGATE == "sapo":
        offset = ratio - 1.0
        steepness = tl.where(
            advantage > 0, offset * temperature_positive, offset * temperature_negative
        )
        # sigmoid' is even; from -|x| the exponential cannot overflow, nor inf meet 0 in a product.
        decay = tl.exp(-tl.abs(steepness))
        gate = decay / ((1.0 + decay) * (1.0 + decay))
        slope = tl.where(gate == 0.0, 0.0, -4.0 * advantage * gate * ratio_slope)
    else:
        slope = -advantage
    return tl.where(advantage == 0, 0.0, slope)


@triton.jit
def kl_slope(
    gap: tl.tensor,
    ratio: tl.tensor,
    ratio_slope: tl.tensor,
    KL: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
) -> tl.tensor:
    """d `reference.kl_term` / d logprob; gap = reference log-prob - logprob."""
    if KL == "k1":
        value = -gap
        slope = tl.full(gap.shape, 1.0, tl.float64)
    elif KL == "k2":
        value = gap * gap / 2.0
        slope = -gap
    else:
        value = tl.exp(gap) - 1.0 - gap
        slope = 1.0 - tl.exp(gap)
    if KL_RATIO_WEIGHTED:
        slope = ratio * slope + ratio_slope * value
    return slope


@triton.jit
def sampler_weight(
    log_weight: tl.tensor, low: tl.tensor, high: tl.tensor, MASK: tl.constexpr
) -> tl.tensor:
    """Truncated or masked exp(log_weight); 1 where the sampler gave NaN."""
    weight = tl.where(log_weight == log_weight, tl.exp(log_weight), 1.0)
    if MASK:
        return tl.where((weight >= low) & (weight <= high), weight, 0.0)
    return tl.where(weight > high, high, weight)


@triton.jit
def token_slope(
    logprob: tl.tensor,
    advantage: tl.tensor,
    old_logprobs_ptr: tl.tensor | None,
    ref_logprobs_ptr: tl.tensor | None,
    sampler_logprobs_ptr: tl.tensor | None,
    row: tl.tensor,
    lower: tl.tensor,
    upper_positive: tl.tensor,
    upper_negative: tl.tensor,
    temperature_positive: tl.tensor,
    temperature_negative: tl.tensor,
    sampler_low: tl.tensor,
    sampler_high: tl.tensor,
    kl_weight: tl.tensor,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    SAMPLER_MASK: tl.constexpr,
) -> tl.tensor:
    """d (policy term + kl_weight * KL) / d logprob of the token of a row."""
    old_logprob = logprob
    if old_logprobs_ptr is not None:
        old_logprob = tl.load(old_logprobs_ptr + row)
    no_ratio = old_logprob == -float("inf")
    ratio = tl.exp(tl.where(no_ratio, 0.0, logprob - old_logprob))
    ratio_slope = tl.where(no_ratio, 0.0, ratio)
    slope = policy_slope(
        ratio,
        ratio_slope,
        advantage,
        lower,
        upper_positive,
        upper_negative,
        temperature_positive,
        temperature_negative,
        SURROGATE,
    )
    if sampler_logprobs_ptr is not None:
        log_weight = logprob - tl.load(sampler_logprobs_ptr + row)
        correction = sampler_weight(log_weight, sampler_low, sampler_high, SAMPLER_MASK)
        slope = tl.where(slope == 0.0, 0.0, slope * correction)
    if KL != "none":
        gap = tl.load(ref_logprobs_ptr + row) - logprob
        slope += kl_weight * kl_slope(gap, ratio, ratio_slope, KL, KL_RATIO_WEIGHTED)
    return slope
