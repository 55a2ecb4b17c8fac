// A product with transposed weights for a few rows, at one instruction set; see row_kernels_impl.h.
//
// BLAS packs the weights before it uses them, which pays when many rows share the packing. Here each
// weight is read from memory once, where it lies, and multiplied with all rows of a group, which lie
// side by side in the lanes. The order of a sum depends on the depth alone, so a row's result
// does not depend on the rows beside it.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace onepass {
namespace {

// Sums kept in registers at once: enough to hide the latency of a multiply-add, few enough for 16
// registers.
constexpr int kSums = 12;
// Products summed before they are added to the total, so that rounding does not grow with the depth.
constexpr int64_t kDepthOfSum = 64;
constexpr int64_t kFloatsOfLine = 16;
// Columns of the largest tile during which the next one is fetched: more of them leave nothing to
// compute while the processor fetches them by itself.
constexpr int kTileToFetch = 6;
constexpr int64_t kLargestGroup = 16;
constexpr int64_t kSmallestGroup = kLanes > 8 ? kLanes : 8;

// `next`: weights to fetch on the way, as many as those that are used; null for none.
template <int kGroup, int kColumns>
inline void few_rows_tile(const FewRows& x, const float* weight, const float* next, float* out,
                          int64_t stride) {
  constexpr int kVectors = kGroup / kLanes;
  Vector totals[kColumns][kVectors] = {};
  for (int64_t start = 0; start < x.depth; start += kDepthOfSum) {
    const int64_t end = start + kDepthOfSum < x.depth ? start + kDepthOfSum : x.depth;
    Vector sums[kColumns][kVectors] = {};
    for (int64_t line = start; line < end; line += kFloatsOfLine) {
#pragma GCC unroll 16
      for (int j = 0; next && j < kColumns; ++j) __builtin_prefetch(next + j * x.depth + line);
      const int64_t line_end = line + kFloatsOfLine < end ? line + kFloatsOfLine : end;
      for (int64_t k = line; k < line_end; ++k) {
        Vector rows[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          rows[v] = (Vector)load_bits(x.packed + k * kGroup + v * kLanes);
        }
#pragma GCC unroll 16
        for (int j = 0; j < kColumns; ++j) {
          const Vector factor = broadcast(weight[j * x.depth + k]);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) sums[j][v] = fused(factor, rows[v], sums[j][v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) totals[j][v] += sums[j][v];
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
    float column[kGroup];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store_bits(totals[j][v], column + v * kLanes);
    for (int64_t row = 0; row < x.rows; ++row) out[row * stride + j] = column[row];
  }
}

template <int kGroup>
void few_rows_group(const FewRows& x, const float* weight, int64_t columns, float* out,
                    int64_t stride) {
  constexpr int kTile = kSums / (kGroup / kLanes);
  int64_t j = 0;
  for (; j + kTile <= columns; j += kTile) {
    const float* tile = weight + j * x.depth;
    const bool has_next = kTile <= kTileToFetch && j + 2 * kTile <= columns;
    few_rows_tile<kGroup, kTile>(x, tile, has_next ? tile + kTile * x.depth : nullptr, out + j,
                                 stride);
  }
  for (; j < columns; ++j) {
    few_rows_tile<kGroup, 1>(x, weight + j * x.depth, nullptr, out + j, stride);
  }
}

void few_rows_linear(const FewRows& x, const float* weight, int64_t columns, float* out,
                     int64_t stride) {
  return x.group == kSmallestGroup ? few_rows_group<kSmallestGroup>(x, weight, columns, out, stride)
                                   : few_rows_group<kLargestGroup>(x, weight, columns, out, stride);
}

}  // namespace
}  // namespace onepass
