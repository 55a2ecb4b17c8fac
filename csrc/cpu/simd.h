// Vectors of float32 in the width of the level that is being compiled, with the loads, stores and
// elementary functions of the row kernels. Included by row_kernels_impl.h only, which is compiled
// with ONEPASS_LEVEL and ONEPASS_VECTOR_BYTES set and the target chosen by pragma; everything has
// internal linkage, so that no code of a wide level can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtypes.h"

namespace onepass {
namespace {

constexpr int kLanes = ONEPASS_VECTOR_BYTES / 4;

using Floats = float __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
using Words = uint32_t __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
using Halves = uint16_t __attribute__((vector_size(ONEPASS_VECTOR_BYTES / 2)));

inline Floats splat(float value) { return value - Floats{}; }

// The compiler is told not to contract, so that z is rounded before the maximum is subtracted.
inline Floats fused(Floats a, Floats b, Floats c) {
#if ONEPASS_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif ONEPASS_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The second argument where either is NaN.
inline Floats larger(Floats a, Floats b) {
#if ONEPASS_VECTOR_BYTES == 64
  return _mm512_max_ps(a, b);
#elif ONEPASS_VECTOR_BYTES == 32
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Floats as_floats(Words words) { return (Floats)words; }
inline Words as_words(Floats floats) { return (Words)floats; }

template <class Vector, class Element>
inline Vector load_bits(const Element* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats load(const float* from) { return load_bits<Floats>(from); }

inline Floats load(const BFloat16* from) {
  return as_floats(__builtin_convertvector(load_bits<Halves>(from), Words) << 16);
}

inline Floats load(const Float16* from) {
#if ONEPASS_VECTOR_BYTES == 64
  return _mm512_cvtph_ps(load_bits<__m256i>(from));
#elif ONEPASS_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(load_bits<__m128i>(from));
#else
  const Words half = __builtin_convertvector(load_bits<Halves>(from), Words);
  const Words magnitude = (half & 0x7fffu) << 13;
  const Words rebased = as_words(as_floats(magnitude) * splat(0x1p112f));
  const Words bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : rebased;
  return as_floats(bits | (half & 0x8000u) << 16);
#endif
}

template <class Vector, class Element>
inline void store_bits(Vector vector, Element* to) {
  std::memcpy(to, &vector, sizeof vector);
}

inline void store(Floats value, float* to) { store_bits(value, to); }

inline void store(Floats value, BFloat16* to) {
  const Words bits = as_words(value);
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Words nan = Words{} + 0x7fc0u;
  store_bits(__builtin_convertvector(value == value ? rounded : nan, Halves), to);
}

inline void store(Floats value, Float16* to) {
#if ONEPASS_VECTOR_BYTES == 64
  store_bits(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT), to);
#elif ONEPASS_VECTOR_BYTES == 32
  store_bits(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT), to);
#else
  for (int lane = 0; lane < kLanes; ++lane) from_float(value[lane], to + lane);
#endif
}

// The first `count` lanes; the others hold 0.
template <class Element>
inline Floats load_first(const Element* from, int count) {
  Element buffer[kLanes] = {};
  std::memcpy(buffer, from, count * sizeof(Element));
  return load(buffer);
}

template <class Element>
inline void store_first(Floats value, Element* to, int count) {
  Element buffer[kLanes];
  store(value, buffer);
  std::memcpy(to, buffer, count * sizeof(Element));
}

inline Floats keep_first(Floats value, int count, float rest) {
  for (int lane = count; lane < kLanes; ++lane) value[lane] = rest;
  return value;
}

inline double sum_lanes(Floats value) {
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}

// The largest lane that is not NaN; -inf if all are.
inline float largest_lane(Floats value) {
  float largest = -__builtin_inff();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (value[lane] > largest) largest = value[lane];
  }
  return largest;
}

// Below this exp is 0 exactly: the power of two in `exponential` has a zero bit pattern.
constexpr float kExpIsZero = -88.03f;

// exp(x) for kExpIsZero <= x <= 88, NaN for NaN; error below 1 ulp where the result is normal.
inline Floats exponential(Floats x) {
  // Adding 1.5 * 2^23 rounds x / ln 2 to an integer, found in the low bits plus the bias of 127.
  constexpr float kRound = 0x1.8p23f + 127.0f;
  const Floats shifted = fused(x, splat(0x1.715476p0f), splat(kRound));
  const Floats power = as_floats(as_words(shifted) << 23);
  const Floats count = shifted - splat(kRound);
  // ln 2 in two parts, the first short enough that its products are exact without fused arithmetic.
  Floats r = fused(count, splat(-0.693359375f), x);
  r = fused(count, splat(2.12194440054690583e-4f), r);
  // 1 + r + r^2 q(r), q fitted to the smallest relative error on |r| <= ln 2 / 2 (3e-9).
  Floats q = splat(0x1.6a23d0p-10f);
  q = fused(q, r, splat(0x1.123a20p-7f));
  q = fused(q, r, splat(0x1.5558f2p-5f));
  q = fused(q, r, splat(0x1.555492p-3f));
  q = fused(q, r, splat(0x1.fffffcp-2f));
  q = fused(q, r, splat(1.0f));
  q = fused(q, r, splat(1.0f));
  return q * power;
}

// exp(x) for x <= 88: exactly 0 from kExpIsZero down, -inf included.
inline Floats exponential_or_zero(Floats x) { return exponential(larger(splat(kExpIsZero), x)); }

struct TanhAndSlope {
  Floats tanh;
  Floats slope;  // 1 - tanh^2 without its cancellation
};

inline TanhAndSlope hyperbolic_tangent(Floats x) {
  const Words sign = as_words(x) & 0x80000000u;
  const Floats magnitude = as_floats(as_words(x) ^ sign);
  const Floats e = exponential_or_zero(magnitude * splat(-2.0f));
  const Floats sum = e + splat(1.0f);
  const Floats far = as_floats(as_words((splat(1.0f) - e) / sum) | sign);
  // Near 0, 1 - e cancels: x + x^3 q(x^2), coefficients of Cephes tanhf (S. Moshier).
  const Floats square = x * x;
  Floats q = splat(-5.70498872745e-3f);
  q = fused(q, square, splat(2.06390887954e-2f));
  q = fused(q, square, splat(-5.37397155531e-2f));
  q = fused(q, square, splat(1.33314422036e-1f));
  q = fused(q, square, splat(-3.33332819422e-1f));
  const Floats near = fused(q * square, x, x);
  return {magnitude < splat(0.625f) ? near : far, splat(4.0f) * e / (sum * sum)};
}

}  // namespace
}  // namespace onepass
