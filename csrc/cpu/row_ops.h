// Operations over all rows of the logits, on CPU threads. Results do not depend on `threads`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../logits_view.h"
#include "../policy_loss.h"

namespace onepass {

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

// Null where absent. Either rewards and group_size or advantages, one a token, are given.
struct PolicyBatch {
  const int64_t* token_ids;
  const int64_t* offsets;  // [num_sequences + 1]
  int64_t num_sequences;
  const double* old_logprobs;
  const double* ref_logprobs;
  const double* sampler_logprobs;
  const double* advantages;
  const double* rewards;
  int64_t group_size;
  double denominator;  // 0: this batch's own count
};

struct PolicyOutputs {
  float* loss;
  float* logprobs;
  float* entropy;
  float* metrics;          // [kNumPolicyMetrics]
  const LogitsView* grad;  // null: no gradient
};

void policy_loss(const LogitsView& logits, const RowScale& scale, const PolicyBatch& batch,
                 const LossSpec& spec, const PolicyOutputs& outputs, int threads);

// out [rows, outputs] = x [rows, depth] weight^T + bias, all contiguous; bias null: none.
void few_rows_linear(const float* x, int64_t rows, const float* weight, int64_t outputs,
                     int64_t depth, const float* bias, float* out, int threads);

// Instruction set.
std::vector<std::string> supported_cpu_levels();
std::string cpu_level();
void set_cpu_level(const std::string& name);

}  // namespace onepass
