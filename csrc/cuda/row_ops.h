// Operations over all rows of the logits, on a stream of a CUDA device. Nothing here waits for the
// device or allocates memory on it. Errors of CUDA are std::runtime_error.
#pragma once

#include <cstdint>

#include "../logits_view.h"
#include "../policy_loss.h"
#include "policy_batch.h"

namespace onepass {

struct Stream {
  int device;
  uintptr_t handle;
};

// Four numbers a row: the statistics of kernels/reference.py row_stats or, if `finished`, log-prob,
// entropy, maximum and log of the sum of exp(z - maximum).
struct StatsOutputs {
  float* of_rows[4];
  bool finished;
};

void row_stats_cuda(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                    const StatsOutputs& out, const Stream& stream);

// float32 [N] each.
struct GradInputs {
  const float* row_max;
  const float* log_sum;
  const float* entropy;
  const float* coef_logprob;
  const float* coef_entropy;
};

void grad_logits_cuda(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                      const GradInputs& inputs, const LogitsView& out, const Stream& stream);

// Multiplies by a number on the device.
void scale_rows_cuda(const LogitsView& grad, const float* factor, const Stream& stream);

// Bytes of device memory that a call of policy_loss_cuda works in.
int64_t policy_workspace_bytes(int64_t num_tokens, int64_t num_sequences);

// `inputs` and `results` come without their scratch, which is laid out in `workspace`, aligned to 16.
// `grad` may be the logits, or null for no gradient.
void policy_loss_cuda(const LogitsView& logits, const RowScale& scale, const LossSpec& spec,
                      PolicyInputs inputs, PolicyResults results, const LogitsView* grad,
                      char* workspace, const Stream& stream);

}  // namespace onepass
