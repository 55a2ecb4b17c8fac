// bfloat16 as CUDA names it: storage and conversions.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}
// Rounds to nearest, ties to even; a NaN becomes the one that the hardware gives.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof(wide));
  wide += 0x7fff + (wide >> 16 & 1);
  return {static_cast<uint16_t>(wide >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
