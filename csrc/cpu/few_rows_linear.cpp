#include "row_driver.h"

namespace onepass {
namespace {

// A group of rows of x, transposed, in `packed` [depth, group].
FewRows pack_group(const float* x, int64_t rows, int64_t depth, int64_t group, float* packed) {
  for (int64_t k = 0; k < depth; ++k) {
    float* column = packed + k * group;
    for (int64_t row = 0; row < rows; ++row) column[row] = x[row * depth + k];
    std::fill(column + rows, column + group, 0.0f);
  }
  return {packed, group, rows, depth};
}

}  // namespace

void few_rows_linear(const float* x, int64_t rows, const float* weight, int64_t outputs,
                     int64_t depth, const float* bias, float* out, int threads) {
  constexpr int64_t kGroup = 16;
  // A multiple of every tile, and little enough of the weight for a cache of its own.
  constexpr int64_t kOutputsPerClaim = 48;
  const RowKernels& kernels = row_kernels();
  thread_local std::vector<float> packed;
  packed.resize((rows + kGroup - 1) / kGroup * kGroup * depth);
  std::vector<FewRows> groups;
  for (int64_t row = 0; row < rows; row += kGroup) {
    const int64_t count = std::min(kGroup, rows - row);
    const int64_t group = count <= kernels.smallest_group ? kernels.smallest_group : kGroup;
    groups.push_back(pack_group(x + row * depth, count, depth, group, packed.data() + row * depth));
  }
  std::atomic<int64_t> unclaimed{0};
  run_on_threads(threads, [&](int) {
    for (int64_t first; (first = unclaimed.fetch_add(kOutputsPerClaim)) < outputs;) {
      const int64_t columns = std::min(kOutputsPerClaim, outputs - first);
      float* group_out = out + first;
      for (const FewRows& group : groups) {
        kernels.few_rows_linear(group, weight + first * depth, columns, group_out, outputs);
        for (int64_t row = 0; bias && row < group.rows; ++row) {
          for (int64_t j = 0; j < columns; ++j) group_out[row * outputs + j] += bias[first + j];
        }
        group_out += group.rows * outputs;
      }
    }
  });
}

}  // namespace onepass
