"""The kernels that are launched: one program a row, rows in a grid of one dimension.

Row n lies at (n // inner) * stride_outer + (n % inner) * stride_inner, in 64 bits. No length,
count, stride, temperature or bound is a compile-time constant, so none of them compiles anew; which
terms a loss has is one. Optional inputs are None where they are absent.
"""

import triton
import triton.language as tl

from kernels import reference
from kernels.triton_backend.loss_slopes import kl_slope, policy_slope, sampler_weight
from kernels.triton_backend.row_passes import (
    logprob_and_entropy,
    row_offset,
    row_sums,
    scaled,
    write_gradient,
    write_zeros,
)

IGNORED = tl.constexpr(reference.IGNORED)
# Integers that vary with the batch; Triton would compile anew for 1 and for multiples of 16.
BATCH_DEPENDENT = [
    "inner",
    "logits_stride_outer",
    "logits_stride_inner",
    "out_stride_outer",
    "out_stride_inner",
    "grad_stride_outer",
    "grad_stride_inner",
]


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def row_stats_kernel(
    logits_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    inv_temperatures_ptr: tl.tensor | None,
    inv_temperature: tl.tensor,
    softcap: tl.tensor,
    width: tl.tensor,
    inner: tl.int64,
    logits_stride_outer: tl.int64,
    logits_stride_inner: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + row)
    row_max = 0.0
    others = 0.0
    weighted = 0.0
    target = 0.0
    if token_id != IGNORED:
        if inv_temperatures_ptr is not None:
            inv_temperature = tl.load(inv_temperatures_ptr + row)
        row_ptr = logits_ptr + row_offset(
            row, inner, logits_stride_outer, logits_stride_inner, ALIGNED
        )
        x = tl.load(row_ptr + token_id, mask=token_id >= 0, other=0.0).to(tl.float32)
        target, _ = scaled(x, inv_temperature, softcap, HAS_SOFTCAP)
        row_max, others, weighted = row_sums(
            row_ptr, width, token_id, inv_temperature, softcap, HAS_SOFTCAP, LANES, DEPTH
        )
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + num_rows + row, others)
    tl.store(stats_ptr + 2 * num_rows + row, weighted)
    tl.store(stats_ptr + 3 * num_rows + row, target)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def grad_logits_kernel(
    logits_ptr: tl.tensor,
    out_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    row_max_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    coef_logprob_ptr: tl.tensor,
    coef_entropy_ptr: tl.tensor,
    inv_temperatures_ptr: tl.tensor | None,
    inv_temperature: tl.tensor,
    softcap: tl.tensor,
    width: tl.tensor,
    inner: tl.int64,
    logits_stride_outer: tl.int64,
    logits_stride_inner: tl.int64,
    out_stride_outer: tl.int64,
    out_stride_inner: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + row)
    coef_logprob = tl.load(coef_logprob_ptr + row).to(tl.float64)
    coef_entropy = tl.load(coef_entropy_ptr + row).to(tl.float64)
    out_row_ptr = out_ptr + row_offset(row, inner, out_stride_outer, out_stride_inner, ALIGNED)
    if (token_id == IGNORED) | ((coef_logprob == 0.0) & (coef_entropy == 0.0)):
        write_zeros(out_row_ptr, width, LANES, DEPTH)
    else:
        if inv_temperatures_ptr is not None:
            inv_temperature = tl.load(inv_temperatures_ptr + row)
        row_ptr = logits_ptr + row_offset(
            row, inner, logits_stride_outer, logits_stride_inner, ALIGNED
        )
        row_max = tl.load(row_max_ptr + row)
        x = tl.load(row_ptr + token_id, mask=token_id >= 0, other=0.0).to(tl.float32)
        target, _ = scaled(x, inv_temperature, softcap, HAS_SOFTCAP)
        log_sum = tl.load(log_sum_ptr + row).to(tl.float64)
        # Every thread must have read the target before one of them may overwrite it.
        tl.debug_barrier()
        write_gradient(
            row_ptr,
            out_row_ptr,
            width,
            token_id,
            inv_temperature,
            softcap,
            row_max,
            target.to(tl.float64) - row_max - log_sum,
            log_sum,
            tl.load(entropy_ptr + row).to(tl.float64),
            coef_logprob,
            coef_entropy,
            HAS_SOFTCAP,
            True,
            LANES,
            DEPTH,
        )


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def policy_loss_kernel(
    logits_ptr: tl.tensor,
    out_ptr: tl.tensor | None,
    token_ids_ptr: tl.tensor,
    advantages_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    old_logprobs_ptr: tl.tensor | None,
    ref_logprobs_ptr: tl.tensor | None,
    sampler_logprobs_ptr: tl.tensor | None,
    inv_temperatures_ptr: tl.tensor | None,
    logprobs_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    coef_logprob_ptr: tl.tensor,
    inv_temperature: tl.tensor,
    softcap: tl.tensor,
    lower: tl.float64,
    upper_positive: tl.float64,
    upper_negative: tl.float64,
    temperature_positive: tl.float64,
    temperature_negative: tl.float64,
    sampler_low: tl.float64,
    sampler_high: tl.float64,
    kl_weight: tl.float64,
    entropy_weight: tl.float64,
    width: tl.tensor,
    inner: tl.int64,
    logits_stride_outer: tl.int64,
    logits_stride_inner: tl.int64,
    out_stride_outer: tl.int64,
    out_stride_inner: tl.int64,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    SAMPLER_MASK: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + row)
    if token_id == IGNORED:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(coef_logprob_ptr + row, 0.0)
        if out_ptr is not None:
            offset = row_offset(row, inner, out_stride_outer, out_stride_inner, ALIGNED)
            write_zeros(out_ptr + offset, width, LANES, DEPTH)
    else:
        if inv_temperatures_ptr is not None:
            inv_temperature = tl.load(inv_temperatures_ptr + row)
        row_ptr = logits_ptr + row_offset(
            row, inner, logits_stride_outer, logits_stride_inner, ALIGNED
        )
        x = tl.load(row_ptr + token_id).to(tl.float32)
        target, _ = scaled(x, inv_temperature, softcap, HAS_SOFTCAP)
        row_max, others, weighted = row_sums(
            row_ptr, width, token_id, inv_temperature, softcap, HAS_SOFTCAP, LANES, DEPTH
        )
        log_sum, exact_logprob, entropy = logprob_and_entropy(target, row_max, others, weighted)
        tl.store(entropy_ptr + row, entropy.to(tl.float32))
        rounded_logprob = exact_logprob.to(tl.float32)
        tl.store(logprobs_ptr + row, rounded_logprob)

        # The token loss is a function of the log-prob that the caller sees, as in `token_loss`.
        logprob = rounded_logprob.to(tl.float64)
        old_logprob = logprob
        if old_logprobs_ptr is not None:
            old_logprob = tl.load(old_logprobs_ptr + row)
        no_ratio = old_logprob == -float("inf")
        ratio = tl.exp(tl.where(no_ratio, 0.0, logprob - old_logprob))
        ratio_slope = tl.where(no_ratio, 0.0, ratio)
        slope = policy_slope(
            ratio,
            ratio_slope,
            tl.load(advantages_ptr + row),
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
        weight = tl.load(weights_ptr + row)
        coef_logprob = weight * slope
        coef_entropy = -weight * entropy_weight
        tl.store(coef_logprob_ptr + row, coef_logprob)
        if out_ptr is not None:
            out_row_ptr = out_ptr + row_offset(
                row, inner, out_stride_outer, out_stride_inner, ALIGNED
            )
            if (coef_logprob == 0.0) & (coef_entropy == 0.0):
                write_zeros(out_row_ptr, width, LANES, DEPTH)
            else:
                write_gradient(
                    row_ptr,
                    out_row_ptr,
                    width,
                    token_id,
                    inv_temperature,
                    softcap,
                    row_max,
                    exact_logprob,
                    log_sum,
                    entropy,
                    coef_logprob,
                    coef_entropy,
                    HAS_SOFTCAP,
                    HAS_ENTROPY,
                    LANES,
                    DEPTH,
                )


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def scale_kernel(
    grad_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    width: tl.tensor,
    inner: tl.int64,
    grad_stride_outer: tl.int64,
    grad_stride_inner: tl.int64,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        row = tl.program_id(0).to(tl.int64)
        row_ptr = grad_ptr + row_offset(row, inner, grad_stride_outer, grad_stride_inner, ALIGNED)
        for start in range(0, width, DEPTH * LANES):
            columns = start + tl.arange(0, DEPTH * LANES)
            inside = columns < width
            grad = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(row_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
