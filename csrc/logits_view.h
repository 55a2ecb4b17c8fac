// How logits and their gradient are addressed, on CPU and GPU.
#pragma once

#include <cstdint>

#include "online_softmax.h"

namespace onepass {

// The token id of a row outside the loss; the one other negative id, -1, is a target that lies on
// another vocabulary shard.
constexpr int64_t kIgnoredId = -100;

enum class DType { kFloat32, kBFloat16, kFloat16 };

// A view [outer, inner, width]; strides in elements, the last one is 1.
struct LogitsView {
  uintptr_t data;
  DType dtype;
  int64_t outer;
  int64_t inner;
  int64_t width;
  int64_t outer_stride;
  int64_t inner_stride;

  ONEPASS_HOST_DEVICE int64_t num_rows() const { return outer * inner; }
  ONEPASS_HOST_DEVICE int64_t element_size() const { return dtype == DType::kFloat32 ? 4 : 2; }
  ONEPASS_HOST_DEVICE int64_t row_bytes() const { return width * element_size(); }
  ONEPASS_HOST_DEVICE char* row(int64_t n) const {
    const int64_t offset = n / inner * outer_stride + n % inner * inner_stride;
    return reinterpret_cast<char*>(data) + offset * element_size();
  }
};

// z = inv_temperature(n) * (softcap > 0 ? softcap * tanh(x / softcap) : x) for logits x of row n.
struct RowScale {
  const float* per_row;  // null: `number` for all rows
  float number;
  float softcap;

  ONEPASS_HOST_DEVICE float inv_temperature(int64_t n) const {
    return per_row ? per_row[n] : number;
  }
};

}  // namespace onepass
