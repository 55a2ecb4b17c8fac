// The arithmetic over the columns of a row: statistics with the target left out, and the gradient.
//
// A row is summed in the same order by every kernel, whatever the alignment and whoever runs it: it
// is cut into 1, 2 or 4 parts by its width alone, thread t of 256 takes packs t, t + 256, ... of a
// part, and a fixed tree joins the threads. What a column does is float32 relative to a maximum
// that is known before its exponentials are taken; what a row does once is float64.
#pragma once

#include "../logits_view.h"
#include "plan.h"
#include "primitives.h"

namespace onepass {

constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTilePacks = kTileBytes / kPackBytes;
// Loads a thread has in flight, and folds together before it rebases its sums.
constexpr int kPacksPerThread = kTilePacks / kThreads;

constexpr float kLog2E = 1.44269504f;
constexpr float kLog2ERest = 1.92596303e-8f;
constexpr float kLn2 = 0.693147181f;
// exp of anything lower is 0 in float32; a finite bound keeps -inf out of products.
constexpr float kLowestExponent = -200.0f;

__device__ inline float at_least_lowest(float exponent) {
  return larger_or_nan(exponent, kLowestExponent);
}

template <DType kType>
struct Elements;

template <>
struct Elements<DType::kFloat32> {
  static constexpr int kPerWord = 1;
  using Bits = uint32_t;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  __device__ static void widen(uint32_t word, float* x) { x[0] = as_float(word); }
  __device__ static uint32_t round(const float* x) { return as_bits(x[0]); }
  __device__ static uint32_t larger(uint32_t a, uint32_t b) {
    return as_bits(larger_or_nan(as_float(a), as_float(b)));
  }
};

template <>
struct Elements<DType::kBFloat16> {
  static constexpr int kPerWord = 2;
  using Bits = uint16_t;
  static constexpr uint32_t kMinusInfinity = 0xff80u;
  __device__ static void widen(uint32_t word, float* x) {
    x[0] = as_float(word << 16);
    x[1] = as_float(word & 0xffff0000u);
  }
  __device__ static uint32_t round(const float* x) { return to_bf16x2(x[0], x[1]); }
  __device__ static uint32_t larger(uint32_t a, uint32_t b) { return larger_or_nan_bf16x2(a, b); }
};

template <>
struct Elements<DType::kFloat16> {
  static constexpr int kPerWord = 2;
  using Bits = uint16_t;
  static constexpr uint32_t kMinusInfinity = 0xfc00u;
  __device__ static void widen(uint32_t word, float* x) {
    x[0] = from_f16(static_cast<uint16_t>(word));
    x[1] = from_f16(static_cast<uint16_t>(word >> 16));
  }
  __device__ static uint32_t round(const float* x) { return to_f16x2(x[0], x[1]); }
  __device__ static uint32_t larger(uint32_t a, uint32_t b) { return larger_or_nan_f16x2(a, b); }
};

template <DType kType>
constexpr int kPackColumns = 4 * Elements<kType>::kPerWord;

template <DType kType>
__device__ float widen_one(const typename Elements<kType>::Bits* element) {
  float x[2];
  Elements<kType>::widen(*element, x);
  return x[0];
}

template <DType kType>
__device__ void set_column(Pack& pack, int column, uint32_t bits) {
  constexpr int kPerWord = Elements<kType>::kPerWord;
  constexpr uint32_t kColumnMask = kPerWord == 1 ? 0xffffffffu : 0xffffu;
#pragma unroll
  for (int i = 0; i < kPackColumns<kType>; ++i) {
    const int shift = i % kPerWord * 16;
    uint32_t& word = pack.word[i / kPerWord];
    if (i == column) word = (word & ~(kColumnMask << shift)) | bits << shift;
  }
}

template <DType kType>
__device__ typename Elements<kType>::Bits column_bits(const Pack& pack, int column) {
  constexpr int kPerWord = Elements<kType>::kPerWord;
  const uint32_t word = pack.word[column / kPerWord];
  return static_cast<typename Elements<kType>::Bits>(word >> column % kPerWord * 16);
}

// exp(d) of d <= 0 or NaN. A sum over columns of 16 bits is well served by the hardware's power of
// two; where kPrecise it is corrected for the rounding of its argument.
template <bool kPrecise>
__device__ float exp_of(float d) {
  const float exponent = multiply(d, kLog2E);
  const float power = exp2_approximately(exponent);
  if constexpr (!kPrecise) return power;
  const float rest = multiply_add(d, kLog2ERest, multiply_add(d, kLog2E, -exponent));
  return multiply_add(power, multiply(rest, kLn2), power);
}

template <DType kType>
constexpr bool kIsPrecise = kType == DType::kFloat32;

// z = inv_temperature * x.
struct Linear {
  static constexpr bool kKeepsMinusInfinity = true;
  static constexpr int kBlocks = kBlocksPerMultiprocessor;
  float inv_temperature;

  __device__ Linear(float inv_temperature, float) : inv_temperature(inv_temperature) {}
  __device__ float z(float x) const { return multiply(inv_temperature, x); }
  // z is rounded first: the largest one, minus itself, is exactly 0 at any temperature.
  __device__ float exponent(float x, float origin) const { return z(x) - origin; }
  // dz/dx without the temperature.
  __device__ float slope(float) const { return 1.0f; }
};

// z = inv_temperature * softcap * tanh(x / softcap).
struct Softcapped {
  static constexpr bool kKeepsMinusInfinity = false;
  // tanh takes more registers than three blocks can have.
  static constexpr int kBlocks = 2;
  float inv_temperature;
  float softcap;

  __device__ Softcapped(float inv_temperature, float softcap)
      : inv_temperature(inv_temperature), softcap(softcap) {}
  __device__ float z(float x) const {
    return multiply(inv_temperature, multiply(softcap, tanhf(x / softcap)));
  }
  __device__ float exponent(float x, float origin) const { return z(x) - origin; }
  // 1 - tanh^2 without its cancellation.
  __device__ float slope(float x) const {
    const float e = expf(-2.0f * fabsf(x / softcap));
    return 4.0f * e / ((1.0f + e) * (1.0f + e));
  }
};

// The columns of a row that a block sums at a time, the target left out.
struct Part {
  int columns;
  int target;  // relative to the part; negative: none here
};

// Sums over columns of exp(z - max) and (z - max) exp(z - max); what threads, warps and blocks hand
// to one another.
struct alignas(16) Sums {
  float max = -INFINITY;
  float sum = 0.0f;
  float weighted = 0.0f;
  float unused = 0.0f;

  // What exponents are taken against: finite also while only -inf has been seen.
  __device__ float origin() const { return max == -INFINITY ? 0.0f : max; }

  // Moves the sums to a maximum that is not below their own, or NaN.
  __device__ void rebase(float new_max) {
    const float before = max;
    max = new_max;
    const float step = at_least_lowest(before - origin());
    const float factor = exp_of<true>(step);
    weighted = multiply(factor, multiply_add(step, sum, weighted));
    sum = multiply(factor, sum);
  }
};

// The sums of all lanes of a warp, in every lane.
__device__ inline Sums join_lanes(Sums sums) {
  float max = sums.max;
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    max = larger_or_nan(max, from_lane_across(max, mask));
  }
  sums.rebase(max);
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    sums.sum += from_lane_across(sums.sum, mask);
    sums.weighted += from_lane_across(sums.weighted, mask);
  }
  return sums;
}

// The sums of `count` <= 32 in a fixed order; called by a whole warp.
__device__ inline Sums join(const Sums* sums, int count) {
  const int lane = lane_index();
  return join_lanes(lane < count ? sums[lane] : Sums());
}

template <DType kType>
__device__ float largest_column(const Pack (&packs)[kPacksPerThread]) {
  uint32_t word = packs[0].word[0];
#pragma unroll
  for (int i = 0; i < kPacksPerThread; ++i) {
#pragma unroll
    for (int w = 0; w < 4; ++w) word = Elements<kType>::larger(word, packs[i].word[w]);
  }
  float x[2];
  Elements<kType>::widen(word, x);
  return Elements<kType>::kPerWord == 1 ? x[0] : larger_or_nan(x[0], x[1]);
}

// Packs of a tile, in the order in which a thread counts them.
__device__ inline int pack_of(int tile, int i) {
  return tile * kTilePacks + i * kThreads + thread_index();
}

// Columns [begin, end) of a pack become -inf.
template <DType kType>
__device__ void blank(Pack& pack, int begin, int end) {
#pragma unroll
  for (int i = 0; i < kPackColumns<kType>; ++i) {
    if (i >= begin && i < end) set_column<kType>(pack, i, Elements<kType>::kMinusInfinity);
  }
}

// Counts this thread's packs of one tile; load(pack) reads one that starts inside the part.
template <DType kType, class Scaling, class Load>
__device__ void add_tile(Sums& sums, const Part& part, int tile, const Scaling& scaling,
                         const Load& load) {
  constexpr int kColumns = kPackColumns<kType>;
  Pack packs[kPacksPerThread];
#pragma unroll
  for (int i = 0; i < kPacksPerThread; ++i) {
    const int first = pack_of(tile, i) * kColumns;
    packs[i] = {};
    if (first < part.columns) packs[i] = load(pack_of(tile, i));
  }
  // The maximum is over all columns, the target among them.
#pragma unroll
  for (int i = 0; i < kPacksPerThread; ++i) {
    const int first = pack_of(tile, i) * kColumns;
    if (first + kColumns > part.columns) {
      blank<kType>(packs[i], part.columns - first, kColumns);
    }
  }
  const float largest = scaling.z(largest_column<kType>(packs));
  sums.rebase(larger_or_nan(sums.max, largest));
  const float origin = sums.origin();
#pragma unroll
  for (int i = 0; i < kPacksPerThread; ++i) {
    const int first = pack_of(tile, i) * kColumns;
    const int target = part.target - first;
    if (Scaling::kKeepsMinusInfinity && target >= 0 && target < kColumns) {
      blank<kType>(packs[i], target, target + 1);
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float x[Elements<kType>::kPerWord];
      Elements<kType>::widen(packs[i].word[w], x);
#pragma unroll
      for (int c = 0; c < Elements<kType>::kPerWord; ++c) {
        float exponent = at_least_lowest(scaling.exponent(x[c], origin));
        if constexpr (!Scaling::kKeepsMinusInfinity) {
          const int column = first + w * Elements<kType>::kPerWord + c;
          if (column >= part.columns || column == part.target) exponent = kLowestExponent;
        }
        const float e = exp_of<kIsPrecise<kType>>(exponent);
        sums.sum += e;
        sums.weighted = multiply_add(exponent, e, sums.weighted);
      }
    }
  }
}

// out_j = (scale + entropy_scale (d_j + offset)) exp(d_j) dcap_j/dx_j with d_j = z_j - max; `target`
// in the target's column.
struct RowGrad {
  float max;
  float scale;
  float entropy_scale;
  float offset;
  float target;
  bool is_zero;
};

// The gradient of a pack whose columns start at `first`, in place.
template <DType kType, bool kEntropy, class Scaling>
__device__ void to_gradient(Pack& pack, const RowGrad& grad, const Scaling& scaling,
                            int target_column) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float x[2], g[2];
    Elements<kType>::widen(pack.word[w], x);
#pragma unroll
    for (int c = 0; c < Elements<kType>::kPerWord; ++c) {
      float d = scaling.exponent(x[c], grad.max);
      float factor = grad.scale;
      if constexpr (kEntropy) {
        d = at_least_lowest(d);
        factor = multiply_add(grad.entropy_scale, d + grad.offset, factor);
      }
      g[c] = multiply(multiply(exp_of<kIsPrecise<kType>>(d), factor), scaling.slope(x[c]));
    }
    pack.word[w] = Elements<kType>::round(g);
  }
  if (target_column >= 0 && target_column < kPackColumns<kType>) {
    float both[2] = {grad.target, 0.0f};
    set_column<kType>(pack, target_column,
                      Elements<kType>::round(both) & (kPackColumns<kType> == 4 ? ~0u : 0xffffu));
  }
}

}  // namespace onepass
