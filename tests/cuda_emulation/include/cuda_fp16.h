// float16 as CUDA names it: storage and conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  constexpr int kFractionBits = 10, kBias = 15, kLargestExponent = 31;
  const int exponent = value.bits >> kFractionBits & kLargestExponent;
  const int fraction = value.bits & ((1 << kFractionBits) - 1);
  float x = 0.0f;
  if (exponent == kLargestExponent) {
    x = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    x = std::ldexp(static_cast<float>(fraction), 1 - kBias - kFractionBits);
  } else {
    x = std::ldexp(static_cast<float>(fraction + (1 << kFractionBits)),
                   exponent - kBias - kFractionBits);
  }
  return value.bits & 0x8000 ? -x : x;
}
// Rounds to nearest, ties to even; beyond 65504 by half a step or more: infinity.
inline __half __float2half_rn(float x) {
  constexpr int kFractionBits = 10, kLowestExponent = -14, kInfinity = 0x7c00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  const float size = std::fabs(x);
  if (size == 0.0f) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | kInfinity)};
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = std::max(exponent - 1, kLowestExponent);
  // The number of steps of this exponent; a carry into the next one is right by itself.
  const float steps = std::nearbyint(std::ldexp(size, kFractionBits - exponent));
  const int above = (exponent - kLowestExponent) << kFractionBits;
  return {static_cast<uint16_t>(sign | (above + static_cast<int>(steps)))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
