#include "layer_ops.h"

#include "row_driver.h"

namespace onepass {
namespace {

constexpr int64_t kElementsPerClaim = 16384;

int64_t rows_per_part(int64_t width) { return std::max<int64_t>(1, kElementsPerClaim / width); }

}  // namespace

void rms_norm(const float* x, int64_t rows, const RmsNorm& norm, float* out, float* inverse,
              int threads) {
  const RowKernels& kernels = row_kernels();
  for_parts(rows, rows_per_part(norm.width), threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * norm.width;
      inverse[row] = kernels.rms_norm(x + at, norm.weight, norm.width, norm.epsilon, out + at);
    }
  });
}

void rms_norm_backward(const float* grad, const float* x, int64_t rows, const RmsNorm& norm,
                       const float* inverse, float* grad_x, float* grad_weight, int threads) {
  const RowKernels& kernels = row_kernels();
  const int64_t width = norm.width, size = rows_per_part(width);
  // A sum for each part, so that the order of additions is always the same.
  std::vector<float> sums((rows + size - 1) / size * width, 0.0f);
  for_parts(rows, size, threads, [&](int64_t first, int64_t last) {
    float* sum = sums.data() + first / size * width;
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * width;
      kernels.rms_norm_backward({grad + at, x + at, norm.weight, width, inverse[row]}, grad_x + at,
                                sum);
    }
  });
  for (int64_t j = 0; j < width; ++j) {
    double total = 0.0;
    for (size_t at = j; at < sums.size(); at += width) total += sums[at];
    grad_weight[j] = static_cast<float>(total);
  }
}

void gated_silu(const float* gate, const float* up, int64_t count, float* out, int threads) {
  const RowKernels& kernels = row_kernels();
  for_parts(count, kElementsPerClaim, threads, [&](int64_t first, int64_t last) {
    kernels.gated_silu(gate + first, up + first, last - first, out + first);
  });
}

void gated_silu_backward(const float* grad, const float* gate, const float* up, int64_t count,
                         float* grad_gate, float* grad_up, int threads) {
  const RowKernels& kernels = row_kernels();
  for_parts(count, kElementsPerClaim, threads, [&](int64_t first, int64_t last) {
    kernels.gated_silu_backward(grad + first, gate + first, up + first, last - first,
                                grad_gate + first, grad_up + first);
  });
}

}  // namespace onepass
