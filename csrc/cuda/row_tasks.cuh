// What is done with the statistics of a row once they are joined, by one warp: they are handed out,
// or the token's loss follows from them and its gradient is written.
#pragma once

#include "../policy_loss.h"
#include "policy_batch.h"
#include "row_math.cuh"
#include "row_ops.h"

namespace onepass {

// The rows of an operation and how each is cut.
struct Rows {
  LogitsView logits;
  const int64_t* token_ids;
  RowScale scale;
  int count;
  int parts;
  int part_columns;  // a multiple of the columns of a pack; the last part may be shorter

  __device__ bool is_ignored(int n) const { return token_ids[n] == kIgnoredId; }
  __device__ int columns_of(int part) const {
    const int64_t left = logits.width - int64_t{part} * part_columns;
    return static_cast<int>(left < part_columns ? (left > 0 ? left : 0) : part_columns);
  }
  // Relative to the part; negative where the target lies elsewhere.
  __device__ int target_in(int part, int n) const {
    const int64_t target = token_ids[n] - int64_t{part} * part_columns;
    return target >= 0 && target < part_columns ? static_cast<int>(target) : -1;
  }
};

// Row n of a view; rows are counted in 32 bits, where dividing takes a few instructions.
__device__ inline char* row_of(const LogitsView& view, int n) {
  const int inner = static_cast<int>(view.inner);
  const int64_t offset = int64_t{n / inner} * view.outer_stride + int64_t{n % inner} * view.inner_stride;
  return reinterpret_cast<char*>(view.data) + offset * view.element_size();
}

// The logit of a row's target; 0 where another shard owns it.
template <DType kType>
__device__ float target_logit(const Rows& rows, int n) {
  const int64_t id = rows.token_ids[n];
  if (id < 0) return 0.0f;
  using Bits = typename Elements<kType>::Bits;
  return widen_one<kType>(reinterpret_cast<const Bits*>(row_of(rows.logits, n)) + id);
}

// z and dz/dx of a target.
struct Target {
  float z;
  float slope;
};

template <class Scaling>
__device__ Target target_of(float x, const Scaling& scaling) {
  return {scaling.z(x), multiply(scaling.inv_temperature, scaling.slope(x))};
}

// The factors of a row's gradient, for derivatives of the loss by log-prob and entropy.
__device__ inline RowGrad row_grad(float max, double log_sum, double entropy, double coef_logprob,
                                   double coef_entropy, const Target& target,
                                   float inv_temperature) {
  const double common = -inv_temperature * exp(-log_sum);
  const double logprob = (static_cast<double>(target.z) - max) - log_sum;
  double of_target = -coef_logprob * expm1(logprob);
  if (coef_entropy != 0.0) {
    const double p = exp(logprob);
    if (p != 0.0) of_target -= coef_entropy * p * (logprob + entropy);
  }
  return {max,
          static_cast<float>(coef_logprob * common),
          static_cast<float>(coef_entropy * common),
          static_cast<float>(entropy - log_sum),
          static_cast<float>(of_target * target.slope),
          coef_logprob == 0.0 && coef_entropy == 0.0};
}

// Hands the statistics out, or what follows from them.
struct StatsTask {
  StatsOutputs out;

  __device__ bool writes_gradient() const { return false; }
  __device__ LogitsView gradient() const { return {}; }

  __device__ void write(int n, float first, float second, float third, float fourth) const {
    out.of_rows[0][n] = first;
    out.of_rows[1][n] = second;
    out.of_rows[2][n] = third;
    out.of_rows[3][n] = fourth;
  }

  __device__ void skip(int n) const { write(n, 0.0f, 0.0f, 0.0f, 0.0f); }

  __device__ RowGrad finish(int n, const Sums& others, const Target& target, float,
                            bool leads) const {
    if (!leads) return {};
    const float max = isnan(others.sum) ? NAN : others.max;
    if (out.finished) {
      const RowValues values = row_values({others.max, others.sum, others.weighted}, target.z);
      write(n, static_cast<float>(values.logprob), static_cast<float>(values.entropy), max,
            static_cast<float>(values.log_sum));
    } else {
      write(n, max, others.sum, others.weighted, target.z);
    }
    return {};
  }
};

// The loss of every token and, where wanted, the gradient of its logits.
struct PolicyTask {
  PolicyInputs inputs;
  LossSpec spec;
  PolicyResults results;
  LogitsView grad;  // data 0: no gradient

  __device__ bool writes_gradient() const { return grad.data != 0; }
  __device__ const LogitsView& gradient() const { return grad; }

  __device__ void skip(int n) const {
    results.logprobs[n] = 0.0f;
    results.entropy[n] = 0.0f;
    results.records[n] = {};
  }

  __device__ RowGrad finish(int n, const Sums& others, const Target& target, float inv_temperature,
                            bool leads) const {
    const RowValues values = row_values({others.max, others.sum, others.weighted}, target.z);
    // Rounded as token_logprobs hands them out: a token that has not changed has a ratio of 1.
    const float logprob = static_cast<float>(values.logprob);
    const float entropy = static_cast<float>(values.entropy);
    const TokenLoss loss = token_loss(token(inputs, n, logprob, entropy), spec);
    if (leads) {
      results.logprobs[n] = logprob;
      results.entropy[n] = entropy;
      results.records[n] = record_of(loss);
    }
    return row_grad(others.max, values.log_sum, entropy, loss.slope_logprob, loss.slope_entropy,
                    target, inv_temperature);
  }
};

}  // namespace onepass
