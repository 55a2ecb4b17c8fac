#include <cstring>

#include "row_driver.h"

namespace onepass {

void row_stats(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
               float* stats, int threads) {
  const RowKernels& kernels = row_kernels();
  const auto forward = kernels.forward[static_cast<int>(logits.dtype)];
  const int64_t rows = logits.num_rows();
  for_each_row(logits, threads_for(logits, threads), [&](int, int64_t n, int64_t next) {
    const int64_t id = token_ids[n];
    OnlineSoftmax<double> others;
    others.max = 0.0f;
    float target = 0.0f;
    if (id != kIgnoredId) {
      const Row row = row_of(logits, scale, n, id, next);
      others = forward(row, {});
      if (std::isnan(others.sum)) others.max = NAN;
      if (id >= 0)
        target = static_cast<float>(target_logit(read_column(logits, n, id), row, kernels).z);
    }
    stats[n] = others.max;
    stats[rows + n] = static_cast<float>(others.sum);
    stats[2 * rows + n] = static_cast<float>(others.weighted);
    stats[3 * rows + n] = target;
  });
}

void grad_logits(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                 const GradInputs& inputs, const LogitsView& out, int threads) {
  const RowKernels& kernels = row_kernels();
  const auto backward = kernels.backward[static_cast<int>(logits.dtype)];
  for_each_row(logits, threads_for(logits, threads), [&](int, int64_t n, int64_t next) {
    const int64_t id = token_ids[n];
    const bool has_gradient = inputs.coef_logprob[n] != 0.0f || inputs.coef_entropy[n] != 0.0f;
    if (id == kIgnoredId || !has_gradient) {
      std::memset(out.row(n), 0, out.row_bytes());
      return;
    }
    const Row row = row_of(logits, scale, n, id, next);
    const RowGrad grad = {out.row(n),        inputs.row_max[n],      inputs.log_sum[n],
                          inputs.entropy[n], inputs.coef_logprob[n], inputs.coef_entropy[n]};
    TargetLogit target;
    if (id >= 0) target = target_logit(read_column(logits, n, id), row, kernels);
    backward(row, {}, grad);
    if (id >= 0) write_column(out, n, id, target_gradient(target, grad));
  });
}

void scale_rows(const LogitsView& grad, float factor, int threads) {
  if (factor == 1.0f) return;
  const auto scale = row_kernels().scale[static_cast<int>(grad.dtype)];
  for_each_row(grad, threads_for(grad, threads),
               [&](int, int64_t n, int64_t) { scale(grad.row(n), grad.width, factor); });
}

}  // namespace onepass
