// Operations over all rows of the logits, on CPU threads. Results do not depend on `threads`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../policy_loss.h"
#include "dtypes.h"

namespace onepass {

constexpr int64_t kIgnoredId = -100;

// A view [outer, inner, width] of logits or their gradient; strides in elements, the last one is 1.
struct LogitsView {
  uintptr_t data;
  DType dtype;
  int64_t outer;
  int64_t inner;
  int64_t width;
  int64_t outer_stride;
  int64_t inner_stride;

  int64_t num_rows() const { return outer * inner; }
  int64_t row_bytes() const { return width * element_size(); }
  int64_t element_size() const { return dtype == DType::kFloat32 ? 4 : 2; }
  char* row(int64_t n) const {
    const int64_t offset = n / inner * outer_stride + n % inner * inner_stride;
    return reinterpret_cast<char*>(data) + offset * element_size();
  }
};

// inv_temperature[n * stride]: stride 0 for one value.
struct RowScale {
  const float* inv_temperature;
  int64_t stride;
  float softcap;
};

void row_stats(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
               float* stats, int threads);

struct GradInputs {
  const float* row_max;
  const float* log_sum;
  const float* entropy;
  const float* coef_logprob;
  const float* coef_entropy;
};

void grad_logits(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                 const GradInputs& inputs, const LogitsView& out, int threads);

void scale_rows(const LogitsView& grad, float factor, int threads);

// Null where absent. Either rewards and group_size or advantages are given.
struct PolicyBatch {
  const int64_t* token_ids;
  const int64_t* offsets;  // [num_sequences + 1]
  int64_t num_sequences;
  const double* old_logprobs;
  const double* ref_logprobs;
  const double* sampler_logprobs;
  const double* advantages;
  bool advantages_per_token;
  const double* rewards;
  int64_t group_size;
  double denominator;  // 0: this batch's own count
};

constexpr int kNumPolicyMetrics = 15;

struct PolicyOutputs {
  float* loss;
  float* logprobs;
  float* entropy;
  float* metrics;          // [kNumPolicyMetrics], the order of METRIC_NAMES in reference.py
  const LogitsView* grad;  // null: no gradient
};

void policy_loss(const LogitsView& logits, const RowScale& scale, const PolicyBatch& batch,
                 const LossSpec& spec, const PolicyOutputs& outputs, int threads);

// Instruction set.
std::vector<std::string> supported_cpu_levels();
std::string cpu_level();
void set_cpu_level(const std::string& name);

}  // namespace onepass
