// The row kernels of one instruction set. The including file sets ONEPASS_LEVEL (the name of the
// table), ONEPASS_LEVEL_NAME and ONEPASS_VECTOR_BYTES, and includes row_kernels.h before it changes
// the target: inline functions shared with other files must keep the baseline.
//
// Order of every sum: lanes within kUnroll accumulators over a block of columns, lanes added in
// double, blocks in double from first to last. It depends on the width alone.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace onepass {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = int64_t{kUnroll} * kLanes;
constexpr int kCacheLine = 64;

// x -> z, with the slope dz/dx where it is asked for.
template <bool kSoftcap>
struct Transform {
  Floats inv_temperature, softcap, inv_softcap;

  explicit Transform(const Row& row)
      : inv_temperature(splat(row.inv_temperature)),
        softcap(splat(row.softcap)),
        inv_softcap(splat(kSoftcap ? 1.0f / row.softcap : 0.0f)) {}

  Floats operator()(Floats x) const {
    if constexpr (kSoftcap) x = softcap * hyperbolic_tangent(x * inv_softcap).tanh;
    return x * inv_temperature;
  }
  Floats slope(Floats x) const {
    if constexpr (kSoftcap) {
      return inv_temperature * hyperbolic_tangent(x * inv_softcap).slope;
    }
    return inv_temperature;
  }
};

template <class Element, bool kSoftcap>
float block_max(const Element* x, int64_t count, const Transform<kSoftcap>& transform) {
  const Floats lowest = splat(-__builtin_inff());
  Floats max[kUnroll] = {lowest, lowest, lowest, lowest};
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    for (int k = 0; k < kUnroll; ++k) max[k] = larger(transform(load(x + j + k * kLanes)), max[k]);
  }
  for (; j + kLanes <= count; j += kLanes) max[0] = larger(transform(load(x + j)), max[0]);
  if (j < count) {
    const int rest = static_cast<int>(count - j);
    const Floats z = keep_first(transform(load_first(x + j, rest)), rest, -__builtin_inff());
    max[0] = larger(z, max[0]);
  }
  return largest_lane(larger(larger(max[0], max[1]), larger(max[2], max[3])));
}

struct BlockSum {
  Floats sum[kUnroll] = {};
  Floats weighted[kUnroll] = {};

  Floats add(int k, Floats exponent) {
    const Floats bounded = larger(splat(kExpIsZero), exponent);
    const Floats e = exponential(bounded);
    sum[k] += e;
    weighted[k] = fused(bounded, e, weighted[k]);
    return e;
  }
};

template <class Element, bool kSoftcap, bool kKeep>
void sum_block(const Element* x, int64_t count, const Transform<kSoftcap>& transform, float* kept,
               OnlineSoftmax<double>& total) {
  const Floats base = splat(total.base());
  BlockSum block;
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t at = j + k * kLanes;
      const Floats e = block.add(k, transform(load(x + at)) - base);
      if constexpr (kKeep) store(e, kept + at);
    }
  }
  for (; j + kLanes <= count; j += kLanes) {
    const Floats e = block.add(0, transform(load(x + j)) - base);
    if constexpr (kKeep) store(e, kept + j);
  }
  if (j < count) {
    const int rest = static_cast<int>(count - j);
    const Floats z = keep_first(transform(load_first(x + j, rest)), rest, -__builtin_inff());
    const Floats e = block.add(0, z - base);
    if constexpr (kKeep) store_first(e, kept + j, rest);
  }
  double sum = 0.0, weighted = 0.0;
  for (int k = 0; k < kUnroll; ++k) {
    sum += sum_lanes(block.sum[k]);
    weighted += sum_lanes(block.weighted[k]);
  }
  total.add(sum, weighted);
}

template <class Element, bool kSoftcap, bool kKeep>
OnlineSoftmax<double> forward_as(const Row& row, const RowTrace& trace) {
  const Transform<kSoftcap> transform(row);
  const Element* x = static_cast<const Element*>(row.logits);
  OnlineSoftmax<double> total;
  for (int64_t start = 0; start < row.width; start += kBlockColumns) {
    const int64_t left = row.width - start;
    const int64_t count = left < kBlockColumns ? left : kBlockColumns;
    total.raise_max(block_max(x + start, count, transform));
    if (trace.bases) trace.bases[start / kBlockColumns] = total.base();
    float* kept = kKeep ? trace.exponentials + start : nullptr;
    sum_block<Element, kSoftcap, kKeep>(x + start, count, transform, kept, total);
  }
  return total;
}

template <class Element>
OnlineSoftmax<double> forward(const Row& row, const RowTrace& trace) {
  if (row.softcap > 0.0f) return forward_as<Element, true, false>(row, trace);
  if (trace.exponentials) return forward_as<Element, false, true>(row, trace);
  return forward_as<Element, false, false>(row, trace);
}

// out = -(scale + entropy_scale (z - base + offset)) exp(z - base) dz/dx, over one block.
struct BlockGrad {
  float base;
  float scale;
  float entropy_scale;
  float offset;
};

template <class Element, bool kSoftcap, bool kEntropy, bool kKept>
struct GradColumns {
  Transform<kSoftcap> transform;
  Floats base, scale, entropy_scale, offset;

  GradColumns(const Transform<kSoftcap>& transform, const BlockGrad& block)
      : transform(transform),
        base(splat(block.base)),
        scale(splat(-block.scale)),
        entropy_scale(splat(-block.entropy_scale)),
        offset(splat(block.offset)) {}

  Floats operator()(Floats x) const {
    if constexpr (kKept) return x * scale;
    const Floats exponent = larger(splat(kExpIsZero), transform(x) - base);
    Floats factor = scale;
    if constexpr (kEntropy) factor = fused(entropy_scale, exponent + offset, scale);
    if constexpr (kSoftcap) factor = factor * transform.slope(x);
    return exponential(exponent) * factor;
  }
};

template <class Columns, class Source, class Element>
void grad_block(const Columns& columns, const Source* x, Element* out, int64_t count) {
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t at = j + k * kLanes;
      store(columns(load(x + at)), out + at);
    }
  }
  for (; j + kLanes <= count; j += kLanes) store(columns(load(x + j)), out + j);
  if (j < count) {
    const int rest = static_cast<int>(count - j);
    store_first(columns(load_first(x + j, rest)), out + j, rest);
  }
}

template <class Element>
void prefetch_block(const void* row, int64_t start, int64_t count) {
  const char* from = static_cast<const char*>(row) + start * sizeof(Element);
  for (int64_t at = 0; at < count * int64_t{sizeof(Element)}; at += kCacheLine) {
    __builtin_prefetch(from + at, 0, 2);
  }
}

template <class Element, bool kSoftcap, bool kEntropy, bool kKept>
void backward_as(const Row& row, const RowTrace& trace, const RowGrad& grad) {
  using Columns = GradColumns<Element, kSoftcap, kEntropy, kKept>;
  const Transform<kSoftcap> transform(row);
  const Element* x = static_cast<const Element*>(row.logits);
  Element* out = static_cast<Element*>(grad.out);
  // The softcap's slope carries the temperature.
  const double factor = kSoftcap ? 1.0 : row.inv_temperature;
  // Last block first: it is what the forward loop left nearest in the cache.
  for (int64_t index = num_blocks(row.width) - 1; index >= 0; --index) {
    const int64_t start = index * kBlockColumns;
    const int64_t left = row.width - start;
    const int64_t count = left < kBlockColumns ? left : kBlockColumns;
    if (grad.next_logits) prefetch_block<Element>(grad.next_logits, start, count);
    const double base = trace.bases ? trace.bases[index] : grad.row_max;
    const double log_scale = base - grad.row_max - grad.log_sum;
    const double scale = factor * exp(log_scale);
    const Columns columns(transform, {static_cast<float>(base),
                                      static_cast<float>(scale * grad.coef_logprob),
                                      static_cast<float>(scale * grad.coef_entropy),
                                      static_cast<float>(log_scale + grad.entropy)});
    if constexpr (kKept) {
      grad_block(columns, trace.exponentials + start, out + start, count);
    } else {
      grad_block(columns, x + start, out + start, count);
    }
  }
}

template <class Element>
void backward(const Row& row, const RowTrace& trace, const RowGrad& grad) {
  const bool entropy = grad.coef_entropy != 0.0;
  if (row.softcap > 0.0f) {
    return entropy ? backward_as<Element, true, true, false>(row, trace, grad)
                   : backward_as<Element, true, false, false>(row, trace, grad);
  }
  if (entropy) return backward_as<Element, false, true, false>(row, trace, grad);
  return trace.exponentials ? backward_as<Element, false, false, true>(row, trace, grad)
                            : backward_as<Element, false, false, false>(row, trace, grad);
}

struct Scaled {
  Floats factor;
  Floats operator()(Floats x) const { return x * factor; }
};

template <class Element>
void scale(void* row, int64_t width, float factor) {
  Element* x = static_cast<Element*>(row);
  grad_block(Scaled{splat(factor)}, x, x, width);
}

float effective_logit(float x, const Row& row) {
  return row.softcap > 0.0f ? Transform<true>(row)(splat(x))[0] : Transform<false>(row)(splat(x))[0];
}

}  // namespace

const RowKernels ONEPASS_LEVEL = {
    ONEPASS_LEVEL_NAME,
    {forward<float>, forward<BFloat16>, forward<Float16>},
    {backward<float>, backward<BFloat16>, backward<Float16>},
    {scale<float>, scale<BFloat16>, scale<Float16>},
    effective_logit,
};

}  // namespace onepass
