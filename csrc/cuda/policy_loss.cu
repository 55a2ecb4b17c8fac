// Raw rewards (or advantages) to loss, metrics and gradient in four launches: three of O(tokens)
// around the one that reads the logits.
#include "batch.cuh"
#include "row_ops.h"
#include "run_rows.cuh"

namespace onepass {
namespace {

struct Workspace {
  int64_t terms = 0, records = 0, active_lengths = 0, counters = 0, bytes = 0;

  Workspace(int64_t num_tokens, int64_t num_sequences) {
    terms = take(num_tokens * int64_t{sizeof(TokenTerms)});
    records = take(num_tokens * int64_t{sizeof(TokenRecord)});
    active_lengths = take(num_sequences * int64_t{sizeof(int64_t)});
    counters = take(sizeof(Counters));
  }

  int64_t take(int64_t size) {
    const int64_t start = bytes;
    bytes += round_up(size, 16);
    return start;
  }
};

}  // namespace

int64_t policy_workspace_bytes(int64_t num_tokens, int64_t num_sequences) {
  return Workspace(num_tokens, num_sequences).bytes;
}

void policy_loss_cuda(const LogitsView& logits, const RowScale& scale, const LossSpec& spec,
                      PolicyInputs inputs, PolicyResults results, const LogitsView* grad,
                      char* workspace, const Stream& stream) {
  const Launcher launcher(stream.device, stream.handle, "policy_loss on the GPU");
  const RowPlan plan = plan_rows(logits, grad, launcher.limits());
  check_equal("rows of logits", inputs.num_tokens, logits.num_rows());
  check_at_most("num_sequences", int64_t{1} << 30, inputs.num_sequences);
  const Workspace layout(inputs.num_tokens, inputs.num_sequences);
  inputs.terms = reinterpret_cast<TokenTerms*>(workspace + layout.terms);
  inputs.active_lengths = reinterpret_cast<int64_t*>(workspace + layout.active_lengths);
  inputs.counters = reinterpret_cast<Counters*>(workspace + layout.counters);
  results.records = reinterpret_cast<TokenRecord*>(workspace + layout.records);
  constexpr size_t kRoom = kWarps * sizeof(double);
  const int sequences = static_cast<int>(inputs.num_sequences);
  check_cuda(cudaMemsetAsync(inputs.counters, 0, sizeof(Counters), launcher.stream),
             launcher.what);
  launcher.run(count_kernel, sequences, kRoom, inputs);
  launcher.run(terms_kernel, sequences, kRoom, inputs, spec);
  const PolicyTask task = {inputs, spec, results, grad ? *grad : LogitsView{}};
  run_rows(launcher, rows_of(logits, inputs.token_ids, scale, plan), plan, task);
  launcher.run(totals_kernel, 1, kThreads * sizeof(LossTotals), inputs, results);
}

}  // namespace onepass
