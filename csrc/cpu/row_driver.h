// What the operations over rows share: the chosen kernels, handing out rows, the target column.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "row_kernels.h"
#include "row_ops.h"
#include "thread_pool.h"

namespace onepass {

const RowKernels& row_kernels();

inline Row row_of(const LogitsView& logits, const RowScale& scale, int64_t n, int64_t target,
                  int64_t next) {
  return {logits.row(n),
          logits.width,
          scale.inv_temperature(n),
          scale.softcap,
          target,
          next < 0 ? nullptr : logits.row(next)};
}

inline float read_column(const LogitsView& view, int64_t n, int64_t column) {
  const char* row = view.row(n);
  switch (view.dtype) {
    case DType::kBFloat16:
      return to_float(reinterpret_cast<const BFloat16*>(row)[column]);
    case DType::kFloat16:
      return to_float(reinterpret_cast<const Float16*>(row)[column]);
    default:
      return reinterpret_cast<const float*>(row)[column];
  }
}

inline void write_column(const LogitsView& view, int64_t n, int64_t column, double value) {
  char* row = view.row(n);
  const float rounded = static_cast<float>(value);
  switch (view.dtype) {
    case DType::kBFloat16:
      return from_float(rounded, reinterpret_cast<BFloat16*>(row) + column);
    case DType::kFloat16:
      return from_float(rounded, reinterpret_cast<Float16*>(row) + column);
    default:
      return from_float(rounded, reinterpret_cast<float*>(row) + column);
  }
}

// z of one column and dz/dx.
struct TargetLogit {
  double z = 0.0;
  double slope = 0.0;
};

inline TargetLogit target_logit(float x, const Row& row, const RowKernels& kernels) {
  const double z = kernels.effective_logit(x, row);
  if (row.softcap <= 0.0f) return {z, row.inv_temperature};
  const double hyperbolic_cosine = std::cosh(double{x} / row.softcap);
  return {z, row.inv_temperature / (hyperbolic_cosine * hyperbolic_cosine)};
}

// The gradient of the target column: 1 - p_y without cancellation where p_y is near 1.
inline double target_gradient(const TargetLogit& target, const RowGrad& grad) {
  const double logprob = (target.z - grad.row_max) - grad.log_sum;
  double value = -grad.coef_logprob * std::expm1(logprob);
  const double p = std::exp(logprob);
  if (grad.coef_entropy != 0.0 && p != 0.0) {
    value -= grad.coef_entropy * p * (logprob + grad.entropy);
  }
  return value * target.slope;
}

// Rows per claim: enough columns to be worth one, few enough that threads end together.
inline int64_t rows_per_claim(const LogitsView& logits, int threads) {
  constexpr int64_t kColumnsPerClaim = 65536;
  const int64_t by_size = kColumnsPerClaim / std::max<int64_t>(logits.width, 1);
  const int64_t by_share = logits.num_rows() / (8 * int64_t{threads});
  return std::max<int64_t>(1, std::min(by_size, by_share));
}

inline int threads_for(const LogitsView& logits, int threads) {
  constexpr int64_t kColumnsPerThread = 16384;
  const int64_t useful = logits.num_rows() * logits.width / kColumnsPerThread;
  return static_cast<int>(std::clamp<int64_t>(useful, 1, std::max(threads, 1)));
}

// Calls body(slot, n, next) for every row; `next` is the row that the same thread takes after n, or
// -1. Which thread takes a row is left to chance; what is computed for it is not.
template <class Body>
void for_each_row(const LogitsView& logits, int threads, const Body& body) {
  const int64_t rows = logits.num_rows();
  const int64_t claim = rows_per_claim(logits, threads);
  std::atomic<int64_t> unclaimed{0};
  run_on_threads(threads, [&](int slot) {
    int64_t start = unclaimed.fetch_add(claim);
    while (start < rows) {
      const int64_t following = unclaimed.fetch_add(claim);
      const int64_t end = std::min(start + claim, rows);
      for (int64_t n = start; n < end; ++n) {
        const int64_t next = n + 1 < end ? n + 1 : following < rows ? following : -1;
        body(slot, n, next);
      }
      start = following;
    }
  });
}

// Calls body(first, last) for all parts of [0, count), each of `size`.
template <class Body>
void for_parts(int64_t count, int64_t size, int threads, const Body& body) {
  const int64_t parts = (count + size - 1) / size;
  std::atomic<int64_t> unclaimed{0};
  const int useful = static_cast<int>(std::clamp<int64_t>(parts, 1, std::max(threads, 1)));
  run_on_threads(useful, [&](int) {
    for (int64_t part; (part = unclaimed.fetch_add(1)) < parts;) {
      body(part * size, std::min(count, (part + 1) * size));
    }
  });
}

}  // namespace onepass
