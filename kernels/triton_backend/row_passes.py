"""The passes over a row of logits or a part of one, as device functions: sums, and the gradient.

`row_sums` keeps a running maximum, sum of exp and weighted sum for each of LANES columns and merges
the lanes once at the end: threads do not wait for one another inside the loop. A row is summed in
PARTS, merged from first to last whoever summed them, so that the order of every sum depends on the
width of the row alone. `write_gradient` goes from the last column to the
first, whose data is the likeliest to be still in cache. What a row does once is float64, what a
column does is float32 and relative to the maximum.

To be compiled without contraction of a * b + c, so that both passes see the same z; `tl.fma` stands
where one is meant. All loops run over tiles of DEPTH * LANES columns.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950216293335)
LOG2_E_REST = tl.constexpr(1.925963033500711e-08)
LN_2 = tl.constexpr(0.6931471805599453)
# exp of anything lower is 0 in float32; a finite bound keeps -inf out of products.
LOWEST = tl.constexpr(-200.0)
ROW_ALIGNMENT = tl.constexpr(16)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _bounded_exp(shift: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """b = max(shift, LOWEST) for shift <= 0, and exp(b); NaN stays NaN.

    The hardware's 2^x, corrected for the rounding of its argument.
    """
    shift = tl.where(shift < LOWEST, LOWEST, shift)
    exponent = shift * LOG2_E
    rest = tl.fma(shift, LOG2_E_REST, tl.fma(shift, LOG2_E, -exponent))
    power = tl.exp2(exponent)
    return shift, tl.fma(power, rest * LN_2, power)


@triton.jit
def _expm1(x: tl.tensor) -> tl.tensor:
    """exp(x) - 1 of x <= 0 without cancellation: Taylor to x^8 above -1/2."""
    series = tl.fma(x, 1 / 40320, 1 / 5040)
    series = tl.fma(x, series, 1 / 720)
    series = tl.fma(x, series, 1 / 120)
    series = tl.fma(x, series, 1 / 24)
    series = tl.fma(x, series, 1 / 6)
    series = tl.fma(x, series, 0.5)
    series = tl.fma(x * x, series, x)
    _, power = _bounded_exp(x)
    return tl.where(x > -0.5, series, power - 1.0)


@triton.jit
def scaled(
    x: tl.tensor, inv_temperature: tl.tensor, softcap: tl.tensor, HAS_SOFTCAP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """z = inv_temperature * softcap(x), and the derivative of softcap.

    With e = expm1(-2 |x| / softcap): tanh = -e / (2 + e) and 1 - tanh^2 = 4 (1 + e) / (2 + e)^2.
    """
    slope = tl.full(x.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        e = _expm1(-2.0 * tl.div_rn(tl.abs(x), softcap))
        capped = softcap * tl.div_rn(-e, 2.0 + e)
        slope = tl.div_rn(4.0 * (1.0 + e), (2.0 + e) * (2.0 + e))
        x = tl.where(x < 0, -capped, capped)
    return x * inv_temperature, slope


@triton.jit
def rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 to the nearest of DTYPE. Triton's interpreter cuts the low half of the bits off for
    bfloat16, and so is given bits that are already rounded, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def row_offset(
    row: tl.tensor,
    inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Where row (row // inner, row % inner) starts, in elements.

    Rows are counted in 32 bits, where dividing takes a few instructions, elements in 64.
    """
    outer = (row.to(tl.int32) // inner.to(tl.int32)).to(tl.int64)
    offset = outer * stride_outer + (row - outer * inner) * stride_inner
    if ALIGNED:
        offset = tl.multiple_of(offset, ROW_ALIGNMENT)
    return offset


@triton.jit
def row_sums(
    row_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    left_out: tl.tensor,
    inv_temperature: tl.tensor,
    softcap: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of columns begin to end: maximum m of z, and without column `left_out` the sums of exp(z - m)
    and of (z - m) exp(z - m)."""
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    lane_max = tl.full([LANES], -float("inf"), tl.float32)
    lane_sum = tl.full([LANES], 0.0, tl.float32)
    lane_weighted = tl.full([LANES], 0.0, tl.float32)
    for start in range(begin, end, DEPTH * LANES):
        columns = start + tile
        inside = columns < end
        x = tl.load(row_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
        z, _ = scaled(x, inv_temperature, softcap, HAS_SOFTCAP)
        z = tl.where(inside, z, -float("inf"))
        new_max = tl.maximum(lane_max, tl.max(z, axis=0))
        # A lane that saw nothing but -inf is measured from 0: its terms are 0 and not NaN.
        origin = tl.where(new_max == -float("inf"), 0.0, new_max)
        rise, factor = _bounded_exp(lane_max - origin)
        lane_weighted = factor * (lane_weighted + rise * lane_sum)
        lane_sum = factor * lane_sum
        z = tl.where(columns == left_out, -float("inf"), z)
        shift, power = _bounded_exp(z - origin[None, :])
        lane_sum += tl.sum(power, axis=0)
        lane_weighted += tl.sum(shift * power, axis=0)
        lane_max = new_max
    row_max = tl.max(lane_max, axis=0)
    rise, factor = _bounded_exp(lane_max - tl.where(row_max == -float("inf"), 0.0, row_max))
    row_sum = tl.sum(factor * lane_sum, axis=0)
    return row_max, row_sum, tl.sum(factor * (lane_weighted + rise * lane_sum), axis=0)


@triton.jit
def merged_sums(
    max_a: tl.tensor,
    sum_a: tl.tensor,
    weighted_a: tl.tensor,
    max_b: tl.tensor,
    sum_b: tl.tensor,
    weighted_b: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The `row_sums` of two ranges of columns as those of both."""
    row_max = tl.maximum(max_a, max_b)
    origin = tl.where(row_max == -float("inf"), 0.0, row_max)
    rise_a, factor_a = _bounded_exp(max_a - origin)
    rise_b, factor_b = _bounded_exp(max_b - origin)
    row_sum = factor_a * sum_a + factor_b * sum_b
    weighted = factor_a * (weighted_a + rise_a * sum_a) + factor_b * (weighted_b + rise_b * sum_b)
    return row_max, row_sum, weighted


@triton.jit
def part_of_row(
    part: tl.tensor,
    width: tl.tensor,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """First column of a part and the one after its last: whole tiles, the last part may be short
    or empty."""
    tiles = (width + DEPTH * LANES - 1) // (DEPTH * LANES)
    size = (tiles + PARTS - 1) // PARTS * (DEPTH * LANES)
    return part * size, tl.minimum(part * size + size, width)


@triton.jit
def _one_minus_exp(x: tl.tensor) -> tl.tensor:
    """1 - exp(x) of x <= 0 in float64, corrected for the rounding of exp where it cancels."""
    power = tl.exp(x)
    divisor = tl.log(tl.where((power < 0.5) | (power == 1.0), 0.5, power))
    small = tl.where(power == 1.0, -x, (1.0 - power) * (x / divisor))
    return tl.where(power < 0.5, 1.0 - power, small)


@triton.jit
def logprob_and_entropy(
    target: tl.tensor, row_max: tl.tensor, others: tl.tensor, weighted: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Log of the sum of exp(z - row_max), log-prob of the target and entropy, all float64.

    `others` and `weighted` are the sums of `row_sums` without the target; see
    `autograd.finish_stats`.
    """
    others = others.to(tl.float64)
    shift = target.to(tl.float64) - row_max
    shift = tl.where(target == -float("inf"), -float("inf"), shift)
    power = tl.exp(shift)
    row_sum = others + power
    log_sum = tl.log(row_sum)
    # Where the target is the maximum: log1p(others), corrected for the rounding of 1 + others.
    excess = tl.where(row_sum == 1.0, 1.0, row_sum - 1.0)
    log1p = tl.where(row_sum == 1.0, others, log_sum * (others / excess))
    log_sum = tl.where(shift == 0.0, log1p, log_sum)
    weighted = weighted.to(tl.float64) + tl.where(power == 0.0, 0.0, shift * power)
    return log_sum, shift - log_sum, log_sum - weighted / row_sum


@triton.jit
def write_gradient(
    row_ptr: tl.tensor,
    out_row_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    token_id: tl.tensor,
    inv_temperature: tl.tensor,
    softcap: tl.tensor,
    row_max: tl.tensor,
    logprob: tl.tensor,
    log_sum: tl.tensor,
    entropy: tl.tensor,
    coef_logprob: tl.tensor,
    coef_entropy: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """d_j = coef_logprob (1[j=y] - p_j) - coef_entropy p_j (log p_j + entropy), times dz_j/dx_j.

    Of columns begin to end. p_j = exp(shift_j - log_sum) with shift_j = z_j - row_max. The factors
    that all columns share are multiplied in float64 and rounded once.
    """
    probability = tl.exp(logprob)
    surprise = tl.where(probability == 0.0, 0.0, probability * (logprob + entropy))
    target = coef_logprob * _one_minus_exp(logprob) - coef_entropy * surprise
    target = (target * inv_temperature).to(tl.float32)
    common = -inv_temperature * tl.exp(-log_sum)
    weight_logprob = (coef_logprob * common).to(tl.float32)
    weight_entropy = (coef_entropy * common).to(tl.float32)
    mean_shift = (log_sum - entropy).to(tl.float32)
    num_tiles = (end - begin + DEPTH * LANES - 1) // (DEPTH * LANES)
    for done in range(0, num_tiles):
        columns = begin + (num_tiles - 1 - done) * (DEPTH * LANES) + tl.arange(0, DEPTH * LANES)
        inside = columns < end
        x = tl.load(row_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
        z, slope = scaled(x, inv_temperature, softcap, HAS_SOFTCAP)
        shift, gradient = _bounded_exp(z - row_max)
        if HAS_ENTROPY:
            gradient *= tl.fma(shift - mean_shift, weight_entropy, weight_logprob)
        else:
            gradient *= weight_logprob
        gradient = tl.where(columns == token_id, target, gradient)
        if HAS_SOFTCAP:
            gradient *= slope
        gradient = rounded(gradient, out_row_ptr.dtype.element_ty)
        tl.store(out_row_ptr + columns, gradient, mask=inside)


@triton.jit
def write_zeros(
    out_row_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    zeros = tl.full([DEPTH * LANES], 0.0, out_row_ptr.dtype.element_ty)
    for start in range(begin, end, DEPTH * LANES):
        columns = start + tl.arange(0, DEPTH * LANES)
        tl.store(out_row_ptr + columns, zeros, mask=columns < end)
