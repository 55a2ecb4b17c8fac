// The inner loops, over one row of logits and over a few rows of a product, compiled once per
// instruction set and chosen at load time.
#pragma once

#include <cstdint>

#include "../online_softmax.h"
#include "dtypes.h"

namespace onepass {

// Columns that share one maximum, and the granularity of partial sums.
constexpr int64_t kBlockColumns = 2048;

inline int64_t num_blocks(int64_t width) { return (width + kBlockColumns - 1) / kBlockColumns; }

// Effective logit z = inv_temperature * (softcap > 0 ? softcap * tanh(x / softcap) : x), in
// float32.
struct Row {
  const void* logits;
  int64_t width;
  float inv_temperature;
  float softcap;
  // Counts for the maximum but not for the sums; negative: no such column. NaN is not left out.
  int64_t target;
  // The row that this thread reads next, brought into the cache on the way; null: none.
  const void* next;
};

// What the forward loop leaves for the backward loop.
struct RowTrace {
  // exp(z - base of its block) of every column; null: not kept, the backward loop takes it again.
  // For float32 [width], and may be the logits or the gradient themselves; for 16-bit logits room
  // for num_blocks * kBlockColumns, in an order of the kernels' own. Never with softcap or
  // coef_entropy.
  float* exponentials;
  // [num_blocks]: the maximum that each block's exponents were taken against.
  float* bases;
};

// out_j = -(coef_logprob + coef_entropy (log p_j + entropy)) p_j inv_temperature dz/dx. The target
// column's own term is the caller's.
struct RowGrad {
  void* out;  // may be the logits
  double row_max;
  double log_sum;
  double entropy;
  double coef_logprob;
  double coef_entropy;
};

// x [rows, depth] of a product with transposed weights, for few rows.
struct FewRows {
  // [depth, group]: x transposed, group 8 or 16, zeros behind the last row.
  const float* packed;
  int64_t group;
  int64_t rows;
  int64_t depth;
};

// One row of the gradient of out = x * inverse * weight, inverse = 1 / rms(x).
struct RmsNormGrad {
  const float* grad;
  const float* x;
  const float* weight;
  int64_t width;
  float inverse;
};

// Attention of one query [width] to keys and values [length, width].
struct OneQuery {
  const float* query;
  const float* keys;
  const float* values;
  int64_t length;
  int64_t width;
  float scale;
};

struct RowKernels {
  const char* name;
  // By DType.
  OnlineSoftmax<double> (*forward[3])(const Row& row, const RowTrace& trace);
  void (*backward[3])(const Row& row, const RowTrace& trace, const RowGrad& grad);
  void (*scale[3])(void* row, int64_t width, float factor);
  // z of one logit, the same bits as in the loops.
  float (*effective_logit)(float x, const Row& row);
  // out[row, j] = sum over k of x[row, k] weight[j, k], for `columns` rows of the weight
  // from its pointer on; `stride` from one row of out to the next.
  void (*few_rows_linear)(const FewRows& x, const float* weight, int64_t columns, float* out,
                          int64_t stride);
  // The smallest group that FewRows may have.
  int64_t smallest_group;
  // Returns 1 / sqrt(mean of squares + epsilon).
  float (*rms_norm)(const float* x, const float* weight, int64_t width, float epsilon, float* out);
  // Adds to grad_weight.
  void (*rms_norm_backward)(const RmsNormGrad& row, float* grad_x, float* grad_weight);
  // out = gate sigmoid(gate) up
  void (*gated_silu)(const float* gate, const float* up, int64_t count, float* out);
  void (*gated_silu_backward)(const float* grad, const float* gate, const float* up, int64_t count,
                              float* grad_gate, float* grad_up);
  // `scores` is room for `length` numbers.
  void (*attend)(const OneQuery& query, float* scores, float* out);
};

extern const RowKernels kRowKernelsBaseline;
#if defined(__x86_64__)
extern const RowKernels kRowKernelsAvx2;
extern const RowKernels kRowKernelsAvx512;
#endif

}  // namespace onepass
