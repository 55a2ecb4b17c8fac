// Groups of float32 columns in the vector width of the level that is being compiled, with the
// loads, stores and elementary functions of the row kernels. Included by row_kernels_impl.h only,
// with ONEPASS_VECTOR_BYTES set and the target chosen by pragma; everything has internal linkage,
// so that no code of a wide level can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtypes.h"

#if ONEPASS_VECTOR_BYTES > 16 || defined(__aarch64__)
#define ONEPASS_HAS_FMA 1
#endif

namespace onepass {
namespace {

constexpr int kLanes = ONEPASS_VECTOR_BYTES / 4;
constexpr int kColumns = 2 * kLanes;

using Vector = float __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
using Bits = uint32_t __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
using Halves = uint16_t __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
using SignedHalves = int16_t __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));

inline Vector broadcast(float value) { return value - Vector{}; }

// The second argument where either is NaN.
inline Vector larger(Vector x, Vector y) {
#if ONEPASS_VECTOR_BYTES == 64
  return _mm512_max_ps(x, y);
#elif ONEPASS_VECTOR_BYTES == 32
  return _mm256_max_ps(x, y);
#elif defined(__x86_64__)
  return _mm_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

// x y + z, rounded once where the level has it. The compiler is told not to contract by itself, so
// that z is rounded before the maximum is subtracted.
inline Vector fused(Vector x, Vector y, Vector z) {
#if ONEPASS_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(x, y, z);
#elif ONEPASS_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(x, y, z);
#elif defined(__aarch64__)
  return vfmaq_f32(z, x, y);
#else
  return x * y + z;
#endif
}

// kColumns columns; which lane holds which is the business of load and store of an element type.
// The two vectors go through every step side by side: beside one chain of dependent operations the
// other has room, and the schedulers of current cores are too short to find it further on.
struct Floats {
  Vector first, second;
};

inline Floats splat(float value) { return {broadcast(value), broadcast(value)}; }
inline Floats operator+(Floats a, Floats b) { return {a.first + b.first, a.second + b.second}; }
inline Floats operator-(Floats a) { return {-a.first, -a.second}; }
inline Floats operator-(Floats a, Floats b) { return {a.first - b.first, a.second - b.second}; }
inline Floats operator*(Floats a, Floats b) { return {a.first * b.first, a.second * b.second}; }
inline Floats operator/(Floats a, Floats b) { return {a.first / b.first, a.second / b.second}; }
inline Floats larger(Floats a, Floats b) {
  return {larger(a.first, b.first), larger(a.second, b.second)};
}
inline Floats fused(Floats a, Floats b, Floats c) {
  return {fused(a.first, b.first, c.first), fused(a.second, b.second, c.second)};
}

template <class Element>
inline Bits load_bits(const Element* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

template <class Packed, class Element>
inline void store_bits(Packed packed, Element* to) {
  std::memcpy(to, &packed, sizeof packed);
}

inline Floats load(const float* from) {
  return {(Vector)load_bits(from), (Vector)load_bits(from + kLanes)};
}

inline void store(Floats value, float* to) {
  store_bits(value.first, to);
  store_bits(value.second, to + kLanes);
}

// bfloat16 is the upper half of float32: even columns in one vector, odd ones in the other, without
// moving anything between lanes.
inline Floats load(const BFloat16* from) {
  const Bits bits = load_bits(from);
  return {(Vector)(bits << 16), (Vector)(bits & 0xffff0000u)};
}

// The upper halves of both, interleaved.
inline Bits upper_halves(Bits even, Bits odd) {
#if ONEPASS_VECTOR_BYTES == 64
  return (Bits)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(even >> 16), (__m512i)odd);
#elif ONEPASS_VECTOR_BYTES == 32
  return (Bits)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
  return even >> 16 | (odd & 0xffff0000u);
#endif
}

// Rounds to the nearest bfloat16, ties to even, in the upper half. A NaN stems from arithmetic or a
// widened 16-bit NaN; the sum cannot carry out of either.
inline Bits round_to_bfloat16(Vector value) {
  const Bits bits = (Bits)value;
  return bits + 0x7fffu + (bits >> 16 & 1u);
}

inline void store(Floats value, BFloat16* to) {
  store_bits(upper_halves(round_to_bfloat16(value.first), round_to_bfloat16(value.second)), to);
}

// To the nearest, where ties may go away from zero: as exact, and cheaper for bfloat16.
inline void store_nearest(Floats value, BFloat16* to) {
  store_bits(upper_halves((Bits)value.first + 0x8000u, (Bits)value.second + 0x8000u), to);
}

#if ONEPASS_VECTOR_BYTES == 64
inline Vector widen(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void narrow(Vector value, Float16* to) {
  store_bits(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT), to);
}
#elif ONEPASS_VECTOR_BYTES == 32
inline Vector widen(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void narrow(Vector value, Float16* to) {
  store_bits(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT), to);
}
#else
inline Vector widen(const Float16* from) {
  Vector value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = to_float(from[lane]);
  return value;
}
inline void narrow(Vector value, Float16* to) {
  for (int lane = 0; lane < kLanes; ++lane) from_float(value[lane], to + lane);
}
#endif

inline Floats load(const Float16* from) { return {widen(from), widen(from + kLanes)}; }

inline void store(Floats value, Float16* to) {
  narrow(value.first, to);
  narrow(value.second, to + kLanes);
}

template <class Element>
inline void store_nearest(Floats value, Element* to) {
  store(value, to);
}

// The first `count` columns of a group; the others come from zeros.
template <class Element>
inline Floats load_first(const Element* from, int count) {
  Element buffer[kColumns] = {};
  std::memcpy(buffer, from, count * sizeof(Element));
  return load(buffer);
}

template <class Element>
inline void store_first(Floats value, Element* to, int count) {
  Element buffer[kColumns];
  store(value, buffer);
  std::memcpy(to, buffer, count * sizeof(Element));
}

// 0 in the first `count` columns as `load` of this element type lays them out, -inf in the others.
template <class Element>
inline Floats absent_after(int count) {
  Element buffer[kColumns] = {};
  for (int column = count; column < kColumns; ++column) {
    from_float(-__builtin_inff(), buffer + column);
  }
  return load(buffer);
}

// -inf in the given column of a group, 0 in the others.
template <class Element>
inline Floats absent_at(int column) {
  Element buffer[kColumns] = {};
  from_float(-__builtin_inff(), buffer + column);
  return load(buffer);
}

// The reductions go through an array: with a subscript by a variable the compiler keeps a vector in
// memory, also in the loop that it is summed up in.
inline double sum_columns(Floats value) {
  float columns[kColumns];
  store(value, columns);
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += double{columns[lane]} + columns[kLanes + lane];
  return sum;
}

// The largest column that is not NaN; -inf if all are.
inline float largest_column(Floats value) {
  float columns[kColumns];
  store(value, columns);
  float largest = -__builtin_inff();
  for (float column : columns) largest = column > largest ? column : largest;
  return largest;
}

template <class Lane, class Lanes>
inline Lane largest_lane(Lanes lanes) {
  Lane values[kColumns];
  store_bits(lanes, values);
  Lane largest = values[0];
  for (Lane value : values) largest = value > largest ? value : largest;
  return largest;
}

// From here down exp is 0 exactly: the power of two in `exponential` has a zero bit pattern.
constexpr float kExpIsZero = -88.03f;

// exp(x) for kExpIsZero <= x <= 88, NaN for NaN, 1 exactly for 0. Relative error below
// 1.7e-7 + 1.4e-8 |x| where the result is normal.
inline Floats exponential(Floats x) {
  // Adding 1.5 * 2^23 rounds x / ln 2 to an integer, found in the low bits plus the bias of 127.
  constexpr float kRound = 0x1.8p23f + 127.0f;
  constexpr float kInverseLn2 = 0x1.715476p0f;
  const Floats shifted = fused(x, splat(kInverseLn2), splat(kRound));
  const Floats power = {(Vector)((Bits)shifted.first << 23), (Vector)((Bits)shifted.second << 23)};
  const Floats count = shifted - splat(kRound);
#if ONEPASS_HAS_FMA
  const Floats f = fused(x, splat(kInverseLn2), -count);
#else
  // ln 2 in two parts, the first short enough that its products are exact.
  const Floats r = x - count * splat(0.693359375f) + count * splat(2.12194440e-4f);
  const Floats f = r * splat(kInverseLn2);
#endif
  // 2^f = 1 + f q(f), q fitted to the smallest relative error on |f| <= 1/2 (9e-8).
  Floats q = splat(0x1.5bb9b6p-10f);
  q = fused(q, f, splat(0x1.3ceae2p-7f));
  q = fused(q, f, splat(0x1.c6b756p-5f));
  q = fused(q, f, splat(0x1.ebf9bap-3f));
  q = fused(q, f, splat(0x1.62e42ap-1f));
  q = fused(q, f, splat(1.0f));
  return q * power;
}

struct TanhAndSlope {
  Floats tanh;
  Floats slope;  // 1 - tanh^2 without its cancellation
};

inline Vector magnitude(Vector x) { return (Vector)((Bits)x & 0x7fffffffu); }

inline Vector choose_tanh(Vector x, Vector near, Vector far) {
  const Vector signed_far = (Vector)((Bits)far | ((Bits)x & 0x80000000u));
  return magnitude(x) < broadcast(0.625f) ? near : signed_far;
}

inline TanhAndSlope hyperbolic_tangent(Floats x) {
  const Floats one = splat(1.0f);
  const Floats size = {magnitude(x.first), magnitude(x.second)};
  const Floats e = exponential(larger(splat(kExpIsZero), size * splat(-2.0f)));
  const Floats far = (one - e) / (one + e);
  // Near 0, 1 - e cancels: x + x^3 q(x^2), coefficients of Cephes tanhf (S. Moshier).
  const Floats square = x * x;
  Floats q = splat(-5.70498872745e-3f);
  q = fused(q, square, splat(2.06390887954e-2f));
  q = fused(q, square, splat(-5.37397155531e-2f));
  q = fused(q, square, splat(1.33314422036e-1f));
  q = fused(q, square, splat(-3.33332819422e-1f));
  const Floats near = fused(q * square, x, x);
  return {
      {choose_tanh(x.first, near.first, far.first), choose_tanh(x.second, near.second, far.second)},
      splat(4.0f) * e / ((one + e) * (one + e))};
}

}  // namespace
}  // namespace onepass
