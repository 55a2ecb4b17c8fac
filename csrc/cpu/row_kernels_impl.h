// The row kernels of one instruction set. The including file sets ONEPASS_LEVEL (the name of the
// table), ONEPASS_LEVEL_NAME and ONEPASS_VECTOR_BYTES, and includes row_kernels.h before it changes
// the target: inline functions shared with other files must keep the baseline.
//
// Order of every sum: groups of columns over a block, the lanes of the group in double, blocks in
// double from first to last. It depends on the width alone; the target stays in its place as an
// exact 0.
#pragma once

#include "few_rows_impl.h"
#include "layer_kernels_impl.h"
#include "row_kernels.h"
#include "simd.h"

namespace onepass {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = int64_t{kUnroll} * kColumns;
constexpr int kCacheLine = 64;

enum class Scaling { kNone, kTemperature, kSoftcap };

// x -> z, and the slope dz/dx.
template <Scaling kScaling>
struct Transform {
  Floats inv_temperature, softcap, inv_softcap;

  explicit Transform(const Row& row)
      : inv_temperature(splat(row.inv_temperature)),
        softcap(splat(row.softcap)),
        inv_softcap(splat(kScaling == Scaling::kSoftcap ? 1.0f / row.softcap : 0.0f)) {}

  Floats operator()(Floats x) const {
    if constexpr (kScaling == Scaling::kNone) return x;
    if constexpr (kScaling == Scaling::kSoftcap) {
      x = softcap * hyperbolic_tangent(x * inv_softcap).tanh;
    }
    return x * inv_temperature;
  }
  Floats slope(Floats x) const {
    if constexpr (kScaling == Scaling::kSoftcap) {
      return inv_temperature * hyperbolic_tangent(x * inv_softcap).slope;
    }
    return inv_temperature;
  }
};

// The largest z of a block and a bound below all of them; NaN may hide either.
struct Range {
  float largest;
  float smallest;
};

template <Scaling kScaling>
Range block_range(const float* x, int64_t count, const Transform<kScaling>& transform) {
  Floats max[kUnroll];
  for (Floats& columns : max) columns = splat(-__builtin_inff());
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    for (int k = 0; k < kUnroll; ++k) {
      max[k] = larger(transform(load(x + j + k * kColumns)), max[k]);
    }
  }
  for (; j + kColumns <= count; j += kColumns) max[0] = larger(transform(load(x + j)), max[0]);
  if (j < count) {
    const int rest = static_cast<int>(count - j);
    const Floats z = transform(load_first(x + j, rest)) + absent_after<float>(rest);
    max[0] = larger(z, max[0]);
  }
  for (int k = 1; k < kUnroll; ++k) max[0] = larger(max[k], max[0]);
  return {largest_column(max[0]), -__builtin_inff()};
}

// What is known of the 16-bit floats seen so far, by their bits: those above zero are ordered as
// signed integers, those below, which have the sign bit set, against unsigned ones.
struct LargestAndSmallest {
  SignedHalves above = SignedHalves{} + int16_t{INT16_MIN};
  Halves below = {};

  void add(Halves group) {
    above = (SignedHalves)group > above ? (SignedHalves)group : above;
    below = group > below ? group : below;
  }
};

// The largest where all are below zero.
struct LargestBelowZero {
  Halves inverted = {};

  void add(Halves group) { inverted = ~group > inverted ? ~group : inverted; }
};

// Adds every column of a block; the last group may overlap the one before, or repeat a column.
template <class Seen, class Element>
Seen see_all(const Element* x, int64_t count) {
  Seen seen;
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns) seen.add((Halves)load_bits(x + j));
  if (j == count) return seen;
  Element group[kColumns];
  for (int k = 0; k < kColumns; ++k) group[k] = x[j + k < count ? j + k : j];
  seen.add((Halves)load_bits(group));
  return seen;
}

template <class Element, Scaling kScaling>
float z_of(uint16_t bits, const Transform<kScaling>& transform) {
  return transform(splat(to_float(Element{bits}))).first[0];
}

// Of a block of which everything has been seen; z rises with x.
template <class Element, Scaling kScaling>
Range range_of(const LargestAndSmallest& seen, const Element* x, int64_t count,
               const Transform<kScaling>& transform) {
  constexpr uint16_t kSign = 0x8000u;
  const uint16_t smallest = largest_lane<uint16_t>(seen.below);
  uint16_t largest = static_cast<uint16_t>(largest_lane<int16_t>(seen.above));
  if (largest >= kSign) {
    const auto below_zero = see_all<LargestBelowZero>(x, count);
    largest = static_cast<uint16_t>(~largest_lane<uint16_t>(below_zero.inverted));
  }
  return {z_of<Element>(largest, transform),
          smallest >= kSign ? z_of<Element>(smallest, transform) : 0.0f};
}

template <class Element, Scaling kScaling>
Range block_range(const Element* x, int64_t count, const Transform<kScaling>& transform) {
  return range_of(see_all<LargestAndSmallest>(x, count), x, count, transform);
}

template <class Element>
void prefetch(const Element* from, int64_t count) {
  for (int64_t j = 0; j < count; j += kCacheLine / int64_t{sizeof(Element)}) {
    __builtin_prefetch(from + j, 0, 2);
  }
}

// Where the range of a block is not asked for.
struct NothingSeen {
  void add(Halves) {}
};

template <class Seen>
struct BlockSum {
  Floats sum;
  Floats weighted;
  Seen seen;

  void add_to(OnlineSoftmax<double>& total) const {
    total.add(sum_columns(sum), sum_columns(weighted));
  }
};

template <bool kInRange>
Floats bounded(Floats exponent) {
  if constexpr (kInRange) return exponent;
  return larger(splat(kExpIsZero), exponent);
}

// kInRange: no exponent is NaN or below kExpIsZero.
template <bool kInRange, class Seen, Scaling kScaling, bool kKeep, class Element>
BlockSum<Seen> sum_block(const Element* x, int64_t count, const Transform<kScaling>& transform,
                         float base_of_block, float* kept, const Element* ahead) {
  const Floats base = splat(base_of_block);
  // Variables of their own: the members of a result would be written to memory in every step.
  Floats sum = splat(0.0f), weighted = splat(0.0f);
  Seen seen;
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns) {
    prefetch(ahead + j, kColumns);
    seen.add((Halves)load_bits(x + j));
    const Floats exponent = bounded<kInRange>(transform(load(x + j)) - base);
    const Floats e = exponential(exponent);
    sum = sum + e;
    weighted = fused(exponent, e, weighted);
    if constexpr (kKeep) store(e, kept + j);
  }
  if (j < count) {
    const int rest = static_cast<int>(count - j);
    const Floats z = transform(load_first(x + j, rest)) + absent_after<Element>(rest);
    const Floats exponent = bounded<false>(z - base);
    const Floats e = exponential(exponent);
    sum = sum + e;
    weighted = fused(exponent, e, weighted);
    if constexpr (kKeep && sizeof(Element) == sizeof(float)) store_first(e, kept + j, rest);
    if constexpr (kKeep && sizeof(Element) != sizeof(float)) store(e, kept + j);
  }
  return {sum, weighted, seen};
}

// Few blocks raise the maximum of the row by much. So a whole block of 16-bit logits is summed
// against the maximum before it, and its range is learnt on the way; false, and nothing added,
// where it turns out not to fit.
template <Scaling kScaling, bool kKeep, class Element>
bool add_if_in_range(const Element* x, const Transform<kScaling>& transform, float* kept,
                     const Element* ahead, OnlineSoftmax<double>& total) {
  // Exponents above 0 lose nothing as long as they are small.
  constexpr float kLargestExponent = 2.0f;
  const auto block = sum_block<true, LargestAndSmallest, kScaling, kKeep>(
      x, kBlockColumns, transform, total.max, kept, ahead);
  const Range range = range_of(block.seen, x, kBlockColumns, transform);
  const bool in_range =
      range.largest - total.max < kLargestExponent && range.smallest - total.max > kExpIsZero;
  if (!in_range) return false;
  block.add_to(total);
  total.raise_max(range.largest);
  return true;
}

// The block itself, or a copy of it in which the target counts nothing.
template <class Element>
const Element* without_target(const Element* x, int64_t count, int64_t target, Element* copy) {
  if (target < 0 || target >= count || __builtin_isnan(to_float(x[target]))) return x;
  std::memcpy(copy, x, count * sizeof(Element));
  from_float(-__builtin_inff(), copy + target);
  return copy;
}

template <class Element, Scaling kScaling, bool kKeep>
OnlineSoftmax<double> forward_as(const Row& row, const RowTrace& trace) {
  const Transform<kScaling> transform(row);
  const Element* next = static_cast<const Element*>(row.next);
  Element copy[kBlockColumns];
  OnlineSoftmax<double> total;
  for (int64_t start = 0; start < row.width; start += kBlockColumns) {
    const int64_t left = row.width - start;
    const int64_t count = left < kBlockColumns ? left : kBlockColumns;
    const Element* x = static_cast<const Element*>(row.logits) + start;
    const Element* ahead = next ? next + start : x;
    float* kept = kKeep ? trace.exponentials + start : nullptr;
    const Element* others = without_target(x, count, row.target - start, copy);
    if constexpr (sizeof(Element) == 2) {
      const float base = total.base();
      if (count == kBlockColumns && others == x && total.max > -__builtin_inff() &&
          add_if_in_range<kScaling, kKeep>(x, transform, kept, ahead, total)) {
        if (trace.bases) trace.bases[start / kBlockColumns] = base;
        continue;
      }
    }
    total.raise_max(block_range(x, count, transform).largest);
    if (trace.bases) trace.bases[start / kBlockColumns] = total.base();
    sum_block<false, NothingSeen, kScaling, kKeep>(others, count, transform, total.base(), kept,
                                                   ahead)
        .add_to(total);
  }
  return total;
}

// z of a block, in the order of the element type's lanes and whole groups, absent columns -inf;
// returns the number of columns of all groups.
template <class Element, Scaling kScaling>
int64_t transform_block(const Element* x, int64_t count, const Transform<kScaling>& transform,
                        float* z) {
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns) store(transform(load(x + j)), z + j);
  if (j == count) return count;
  const int rest = static_cast<int>(count - j);
  store(transform(load_first(x + j, rest)) + absent_after<Element>(rest), z + j);
  return j + kColumns;
}

// The softcap is taken once a column, and its z kept for the two loops over a block: no logit has a
// z of -inf, so that the target can only be left out there.
template <class Element>
OnlineSoftmax<double> forward_softcapped(const Row& row, const RowTrace& trace) {
  const Transform<Scaling::kSoftcap> transform(row);
  const Transform<Scaling::kNone> as_it_is(row);
  const Element* x = static_cast<const Element*>(row.logits);
  const Element* ahead = static_cast<const Element*>(row.next);
  float z[kBlockColumns];
  OnlineSoftmax<double> total;
  for (int64_t start = 0; start < row.width; start += kBlockColumns) {
    const int64_t left = row.width - start;
    const int64_t count = left < kBlockColumns ? left : kBlockColumns;
    if (ahead) prefetch(ahead + start, count);
    const int64_t columns = transform_block(x + start, count, transform, z);
    total.raise_max(block_range(z, columns, as_it_is).largest);
    if (trace.bases) trace.bases[start / kBlockColumns] = total.base();
    const int64_t target = row.target - start;
    if (target >= 0 && target < count) {
      const int64_t group = target / kColumns * kColumns;
      const Floats hole = absent_at<Element>(static_cast<int>(target - group));
      store(load(z + group) + hole, z + group);
    }
    sum_block<false, NothingSeen, Scaling::kNone, false>(z, columns, as_it_is, total.base(),
                                                         nullptr, z)
        .add_to(total);
  }
  return total;
}

template <class Element, Scaling kScaling>
OnlineSoftmax<double> forward_scaled(const Row& row, const RowTrace& trace) {
  return trace.exponentials ? forward_as<Element, kScaling, true>(row, trace)
                            : forward_as<Element, kScaling, false>(row, trace);
}

Scaling scaling_of(const Row& row) {
  if (row.softcap > 0.0f) return Scaling::kSoftcap;
  return row.inv_temperature == 1.0f ? Scaling::kNone : Scaling::kTemperature;
}

template <class Element>
OnlineSoftmax<double> forward(const Row& row, const RowTrace& trace) {
  switch (scaling_of(row)) {
    case Scaling::kSoftcap:
      return forward_softcapped<Element>(row, trace);
    case Scaling::kTemperature:
      return forward_scaled<Element, Scaling::kTemperature>(row, trace);
    default:
      return forward_scaled<Element, Scaling::kNone>(row, trace);
  }
}

// out = -(scale + entropy_scale (z - base + offset)) exp(z - base) dz/dx, over one block.
struct BlockGrad {
  float base;
  float scale;
  float entropy_scale;
  float offset;
};

template <Scaling kScaling, bool kEntropy>
struct GradOfLogits {
  Transform<kScaling> transform;
  Floats base, scale, entropy_scale, offset;

  GradOfLogits(const Transform<kScaling>& transform, const BlockGrad& block)
      : transform(transform),
        base(splat(block.base)),
        scale(splat(-block.scale)),
        entropy_scale(splat(-block.entropy_scale)),
        offset(splat(block.offset)) {}

  Floats operator()(Floats x) const {
    const Floats exponent = larger(splat(kExpIsZero), transform(x) - base);
    Floats factor = scale;
    if constexpr (kEntropy) factor = fused(entropy_scale, exponent + offset, scale);
    if constexpr (kScaling == Scaling::kSoftcap) factor = factor * transform.slope(x);
    return exponential(exponent) * factor;
  }
};

struct Scaled {
  Floats factor;
  Floats operator()(Floats x) const { return x * factor; }
};

template <bool kTiesToEven, class Element>
void put(Floats value, Element* to) {
  if constexpr (kTiesToEven) {
    store(value, to);
  } else {
    store_nearest(value, to);
  }
}

// out = columns(x), for logits x or, with Source float and a 16-bit Element, for kept exponentials,
// which lie in whole groups in the order of the element type's lanes. Loads come before stores,
// which may overwrite them.
template <bool kTiesToEven, class Columns, class Source, class Element>
void map_block(const Columns& columns, const Source* x, Element* out, int64_t count) {
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    Floats values[kUnroll];
    for (int k = 0; k < kUnroll; ++k) values[k] = columns(load(x + j + k * kColumns));
    for (int k = 0; k < kUnroll; ++k) put<kTiesToEven>(values[k], out + j + k * kColumns);
  }
  for (; j + kColumns <= count; j += kColumns) put<kTiesToEven>(columns(load(x + j)), out + j);
  if (j < count) {
    const int rest = static_cast<int>(count - j);
    const Floats last = sizeof(Source) == sizeof(Element) ? load_first(x + j, rest) : load(x + j);
    Element group[kColumns];
    put<kTiesToEven>(columns(last), group);
    std::memcpy(out + j, group, rest * sizeof(Element));
  }
}

template <class Element, Scaling kScaling, bool kEntropy>
void backward_as(const Row& row, const RowTrace& trace, const RowGrad& grad) {
  const Transform<kScaling> transform(row);
  const Element* x = static_cast<const Element*>(row.logits);
  Element* out = static_cast<Element*>(grad.out);
  // The softcap's slope carries the temperature.
  const double factor = kScaling == Scaling::kSoftcap ? 1.0 : row.inv_temperature;
  for (int64_t start = 0; start < row.width; start += kBlockColumns) {
    const int64_t left = row.width - start;
    const int64_t count = left < kBlockColumns ? left : kBlockColumns;
    const double base = trace.bases ? trace.bases[start / kBlockColumns] : grad.row_max;
    const double log_scale = base - grad.row_max - grad.log_sum;
    const double scale = factor * exp(log_scale);
    const float logprob_scale = static_cast<float>(scale * grad.coef_logprob);
    if (trace.exponentials) {
      map_block<false>(Scaled{splat(-logprob_scale)}, trace.exponentials + start, out + start,
                       count);
      continue;
    }
    const GradOfLogits<kScaling, kEntropy> columns(
        transform,
        {static_cast<float>(base), logprob_scale, static_cast<float>(scale * grad.coef_entropy),
         static_cast<float>(log_scale + grad.entropy)});
    map_block<false>(columns, x + start, out + start, count);
  }
}

template <class Element, Scaling kScaling>
void backward_scaled(const Row& row, const RowTrace& trace, const RowGrad& grad) {
  return grad.coef_entropy != 0.0 ? backward_as<Element, kScaling, true>(row, trace, grad)
                                  : backward_as<Element, kScaling, false>(row, trace, grad);
}

template <class Element>
void backward(const Row& row, const RowTrace& trace, const RowGrad& grad) {
  switch (scaling_of(row)) {
    case Scaling::kSoftcap:
      return backward_scaled<Element, Scaling::kSoftcap>(row, trace, grad);
    case Scaling::kTemperature:
      return backward_scaled<Element, Scaling::kTemperature>(row, trace, grad);
    default:
      return backward_scaled<Element, Scaling::kNone>(row, trace, grad);
  }
}

template <class Element>
void scale(void* row, int64_t width, float factor) {
  Element* x = static_cast<Element*>(row);
  map_block<true>(Scaled{splat(factor)}, x, x, width);
}

float effective_logit(float x, const Row& row) {
  return row.softcap > 0.0f ? Transform<Scaling::kSoftcap>(row)(splat(x)).first[0]
                            : x * row.inv_temperature;
}

}  // namespace

const RowKernels ONEPASS_LEVEL = {
    ONEPASS_LEVEL_NAME,
    {forward<float>, forward<BFloat16>, forward<Float16>},
    {backward<float>, backward<BFloat16>, backward<Float16>},
    {scale<float>, scale<BFloat16>, scale<Float16>},
    effective_logit,
    few_rows_linear,
    kSmallestGroup,
    rms_norm,
    rms_norm_backward,
    gated_silu,
    gated_silu_backward,
    attend,
};

}  // namespace onepass
