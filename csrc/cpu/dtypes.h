// 16-bit element types and their scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace onepass {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bits_float(uint32_t{value.bits} << 16); }
inline float to_float(Float16 value) {
  // Exponents are rebased by an exact multiplication with 2^112, which also normalises subnormals.
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const bool special = magnitude >= 0x0f800000u;
  const float rebased = bits_float(magnitude) * 0x1p112f;
  const uint32_t bits = special ? magnitude | 0x7f800000u : float_bits(rebased);
  return bits_float(bits | uint32_t{value.bits & 0x8000u} << 16);
}

inline void from_float(float value, float* out) { *out = value; }
inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = float_bits(value);
  const bool nan = value != value;
  out->bits = nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void from_float(float value, Float16* out) {
  const uint32_t sign = float_bits(value) >> 16 & 0x8000u;
  const uint32_t magnitude = float_bits(value) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 1/2 aligns the bits at 2^-24 and rounds them.
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace onepass
