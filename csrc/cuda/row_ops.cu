#include "row_ops.h"

#include "run_rows.cuh"

namespace onepass {

void row_stats_cuda(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                    const StatsOutputs& out, const Stream& stream) {
  const Launcher launcher(stream.device, stream.handle, "row_stats on the GPU");
  const RowPlan plan = plan_rows(logits, nullptr, launcher.limits());
  run_rows(launcher, rows_of(logits, token_ids, scale, plan), plan, StatsTask{out});
}

void grad_logits_cuda(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                      const GradInputs& inputs, const LogitsView& out, const Stream& stream) {
  const Launcher launcher(stream.device, stream.handle, "grad_logits on the GPU");
  const RowPlan plan = plan_rows(logits, &out, launcher.limits());
  const Rows rows = rows_of(logits, token_ids, scale, plan);
  with_element_type(logits.dtype, [&](auto type) {
    with_scaling(scale.softcap, [&](auto scaling) {
      using Scaling = typename decltype(scaling)::type;
      launcher.run(gradient_kernel<decltype(type)::value, Scaling>, rows.count * rows.parts,
                   sizeof(RowGrad), rows, inputs, Destination{out, plan.aligned});
    });
  });
}

void scale_rows_cuda(const LogitsView& grad, const float* factor, const Stream& stream) {
  const Launcher launcher(stream.device, stream.handle, "scale_ on the GPU");
  const RowPlan plan = plan_rows(grad, nullptr, launcher.limits());
  const Rows rows = rows_of(grad, nullptr, {}, plan);
  with_element_type(grad.dtype, [&](auto type) {
    launcher.run(scale_kernel<decltype(type)::value>, rows.count * rows.parts, 0, rows, factor,
                 plan.aligned);
  });
}

}  // namespace onepass
