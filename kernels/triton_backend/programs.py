"""The kernels that are launched, in a grid of one dimension: one program a row, or, where the loss
is fused, as many as fit the GPU, which share a queue.

Row n lies at (n // inner) * stride_outer + (n % inner) * stride_inner, in 64 bits. No length,
count, stride, temperature or bound is a compile-time constant, so none of them compiles anew; which
terms a loss has is one. Optional inputs are None where they are absent.
"""

import triton
import triton.language as tl

from kernels import reference
from kernels.triton_backend.loss_slopes import token_slope
from kernels.triton_backend.row_passes import (
    logprob_and_entropy,
    merged_sums,
    part_of_row,
    rounded,
    row_offset,
    row_sums,
    scaled,
    write_gradient,
    write_zeros,
)

IGNORED = tl.constexpr(reference.IGNORED)
# What a part of a row leaves for the whole: maximum, sum, weighted sum, target.
NUM_SUMS = tl.constexpr(4)
# Integers that vary with the batch; Triton would compile anew for 1 and for multiples of 16.
BATCH_DEPENDENT = [
    "num_rows",
    "rows_ahead",
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
    PARTS: tl.constexpr,
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
        row_max = -float("inf")
        for part in range(0, PARTS):
            begin, end = part_of_row(part, width, PARTS, LANES, DEPTH)
            part_max, part_sum, part_weighted = row_sums(
                row_ptr, begin, end, token_id, inv_temperature, softcap, HAS_SOFTCAP, LANES, DEPTH
            )
            row_max, others, weighted = merged_sums(
                row_max, others, weighted, part_max, part_sum, part_weighted
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
        write_zeros(out_row_ptr, 0, width, LANES, DEPTH)
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
            0,
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
    sums_ptr: tl.tensor,
    parts_read_ptr: tl.tensor,
    next_task_ptr: tl.tensor,
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
    num_rows: tl.int32,
    rows_ahead: tl.int32,
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
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Programs take tasks from one queue until it is empty. Turn t of the queue holds the PARTS
    reading tasks of row t, then the PARTS writing tasks of row t - rows_ahead, which find their
    logits in the L2 cache. A writing task waits for tasks taken before it, and those wait for
    nothing, so the queue moves however many programs run at a time.
    """
    num_tasks = (num_rows.to(tl.int64) + rows_ahead) * (2 * PARTS)
    task = tl.atomic_add(next_task_ptr, 1)
    while task < num_tasks:
        turn, kind = task // (2 * PARTS), task % (2 * PARTS)
        part = kind % PARTS
        row = tl.where(kind < PARTS, turn, turn - rows_ahead)
        if (row >= 0) & (row < num_rows):
            token_id = tl.load(token_ids_ptr + row)
            begin, end = part_of_row(part.to(tl.int32), width, PARTS, LANES, DEPTH)
            row_ptr = logits_ptr + row_offset(
                row, inner, logits_stride_outer, logits_stride_inner, ALIGNED
            )
            scale = inv_temperature
            if inv_temperatures_ptr is not None:
                scale = tl.load(inv_temperatures_ptr + row)
            part_sums_ptr = sums_ptr + row * (PARTS * NUM_SUMS)
            if kind < PARTS:
                if token_id != IGNORED:
                    read_part(
                        row_ptr,
                        part_sums_ptr + part * NUM_SUMS,
                        token_id,
                        begin,
                        end,
                        scale,
                        softcap,
                        HAS_SOFTCAP,
                        LANES,
                        DEPTH,
                    )
                # All threads have stored before one of them says so.
                tl.debug_barrier()
                tl.atomic_add(parts_read_ptr + row, 1, sem="release")
            else:
                while tl.atomic_add(parts_read_ptr + row, 0, sem="acquire") < PARTS:
                    pass
                out_row_ptr = out_ptr
                if out_ptr is not None:
                    out_row_ptr = out_ptr + row_offset(
                        row, inner, out_stride_outer, out_stride_inner, ALIGNED
                    )
                if token_id == IGNORED:
                    if part == 0:
                        tl.store(logprobs_ptr + row, 0.0)
                        tl.store(entropy_ptr + row, 0.0)
                        tl.store(coef_logprob_ptr + row, 0.0)
                    if out_ptr is not None:
                        write_zeros(out_row_ptr, begin, end, LANES, DEPTH)
                else:
                    row_max, log_sum, exact_logprob, entropy = whole_row(part_sums_ptr, PARTS)
                    # The token loss is a function of the log-prob that the caller sees, as in
                    # `token_loss`.
                    rounded_logprob = exact_logprob.to(tl.float32)
                    slope = token_slope(
                        rounded_logprob.to(tl.float64),
                        tl.load(advantages_ptr + row),
                        old_logprobs_ptr,
                        ref_logprobs_ptr,
                        sampler_logprobs_ptr,
                        row,
                        lower,
                        upper_positive,
                        upper_negative,
                        temperature_positive,
                        temperature_negative,
                        sampler_low,
                        sampler_high,
                        kl_weight,
                        SURROGATE,
                        KL,
                        KL_RATIO_WEIGHTED,
                        SAMPLER_MASK,
                    )
                    weight = tl.load(weights_ptr + row)
                    coef_logprob = weight * slope
                    coef_entropy = -weight * entropy_weight
                    if part == 0:
                        tl.store(logprobs_ptr + row, rounded_logprob)
                        tl.store(entropy_ptr + row, entropy.to(tl.float32))
                        tl.store(coef_logprob_ptr + row, coef_logprob)
                    if out_ptr is not None:
                        if (coef_logprob == 0.0) & (coef_entropy == 0.0):
                            write_zeros(out_row_ptr, begin, end, LANES, DEPTH)
                        else:
                            write_gradient(
                                row_ptr,
                                out_row_ptr,
                                begin,
                                end,
                                token_id,
                                scale,
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
        task = tl.atomic_add(next_task_ptr, 1)


@triton.jit
def read_part(
    row_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    token_id: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    inv_temperature: tl.tensor,
    softcap: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Leaves the sums of a part, and the target's logit with the part that has it: in place, the
    gradient of that part may overwrite it before the others need it."""
    part_max, part_sum, part_weighted = row_sums(
        row_ptr, begin, end, token_id, inv_temperature, softcap, HAS_SOFTCAP, LANES, DEPTH
    )
    here = (token_id >= begin) & (token_id < end)
    x = tl.load(row_ptr + token_id, mask=here, other=0.0).to(tl.float32)
    target, _ = scaled(x, inv_temperature, softcap, HAS_SOFTCAP)
    tl.store(sums_ptr, part_max)
    tl.store(sums_ptr + 1, part_sum)
    tl.store(sums_ptr + 2, part_weighted)
    tl.store(sums_ptr + 3, target)


@triton.jit
def whole_row(
    sums_ptr: tl.tensor, PARTS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Maximum, log-sum, log-prob and entropy of a row from what `read_part` left; the L1 cache,
    which does not see other multiprocessors, is passed by."""
    row_max = -float("inf")
    others = 0.0
    weighted = 0.0
    target = 0.0
    for part in range(0, PARTS):
        part_ptr = sums_ptr + part * NUM_SUMS
        row_max, others, weighted = merged_sums(
            row_max,
            others,
            weighted,
            tl.load(part_ptr, cache_modifier=".cg"),
            tl.load(part_ptr + 1, cache_modifier=".cg"),
            tl.load(part_ptr + 2, cache_modifier=".cg"),
        )
        target += tl.load(part_ptr + 3, cache_modifier=".cg")
    log_sum, logprob, entropy = logprob_and_entropy(target, row_max, others, weighted)
    return row_max, log_sum, logprob, entropy


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
            tl.store(row_ptr + columns, rounded(grad, grad_ptr.dtype.element_ty), mask=inside)
