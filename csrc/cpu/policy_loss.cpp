// Raw rewards (or advantages) to loss, metrics and gradient, each row of logits read from memory
// once: its statistics, its token loss and its gradient are done while it is in the cache.
#include "../policy_loss.h"

#include <cstring>

#include "row_driver.h"

namespace onepass {
namespace {

// Advantages by sequence and the share of groups without spread.
struct SequenceAdvantages {
  std::vector<double> values;
  double zero_spread_fraction = 0.0;
};

SequenceAdvantages normalized_advantages(const PolicyBatch& batch, const LossSpec& spec) {
  SequenceAdvantages result;
  result.values.resize(batch.num_sequences);
  const GroupStats whole = group_stats(batch.rewards, 0, batch.num_sequences);
  int64_t groups = 0, without_spread = 0;
  for (int64_t start = 0; start < batch.num_sequences; start += batch.group_size) {
    const int64_t end = std::min(start + batch.group_size, batch.num_sequences);
    const GroupStats group = group_stats(batch.rewards, start, end);
    const GroupStats& scale = spec.advantage_scale == AdvantageScale::kBatch ? whole : group;
    for (int64_t i = start; i < end; ++i) {
      result.values[i] = advantage(batch.rewards[i], group, scale, spec);
    }
    ++groups;
    without_spread += group.has_spread ? 0 : 1;
  }
  if (groups > 0) result.zero_spread_fraction = static_cast<double>(without_spread) / groups;
  return result;
}

double value_or_zero(const double* values, int64_t n) { return values ? values[n] : 0.0; }

// What each token's loss depends on besides its logits; ignored tokens keep weight 0.
std::vector<Token> resolve_tokens(const PolicyBatch& batch, const LossSpec& spec,
                                  const SequenceAdvantages& of_rewards) {
  const int64_t num_tokens = batch.offsets[batch.num_sequences];
  int64_t active = 0;
  for (int64_t n = 0; n < num_tokens; ++n) active += batch.token_ids[n] != kIgnoredId;
  const int64_t counted =
      spec.aggregation == Aggregation::kTokenMean ? active : batch.num_sequences;
  const double count = batch.denominator != 0.0
                           ? batch.denominator
                           : static_cast<double>(std::max<int64_t>(counted, 1));
  std::vector<Token> tokens(num_tokens);
  for (int64_t i = 0; i < batch.num_sequences; ++i) {
    int64_t length = 0;
    double log_rho = 0.0;
    for (int64_t n = batch.offsets[i]; n < batch.offsets[i + 1]; ++n) {
      if (batch.token_ids[n] == kIgnoredId) continue;
      Token& token = tokens[n];
      token.advantage = batch.rewards ? of_rewards.values[i] : batch.advantages[n];
      token.has_old = batch.old_logprobs != nullptr;
      token.has_ref = batch.ref_logprobs != nullptr;
      token.has_sampler = batch.sampler_logprobs != nullptr;
      token.old_logprob = value_or_zero(batch.old_logprobs, n);
      token.ref_logprob = value_or_zero(batch.ref_logprobs, n);
      token.sampler_logprob = value_or_zero(batch.sampler_logprobs, n);
      if (token.has_old) log_rho += sampler_gap(token);
      ++length;
    }
    const double weight = aggregation_weight(spec, length, count);
    for (int64_t n = batch.offsets[i]; n < batch.offsets[i + 1]; ++n) {
      if (batch.token_ids[n] == kIgnoredId) continue;
      tokens[n].weight = weight;
      tokens[n].sequence_log_rho = log_rho;
    }
  }
  return tokens;
}

// Whole cache lines, so that no vector lies across two.
struct CacheLine {
  alignas(64) float values[16];
};

// Room for the exponentials of a row. Each thread keeps its own from call to call: fresh memory
// would cost a page fault every 1024 columns.
float* room_for_row(int64_t columns) {
  constexpr int64_t kPerLine = sizeof(CacheLine) / sizeof(float);
  thread_local std::vector<CacheLine> room;
  const size_t lines = (columns + kPerLine - 1) / kPerLine;
  if (room.size() < lines) room.resize(lines);
  return room.empty() ? nullptr : room.data()->values;
}

}  // namespace

void policy_loss(const LogitsView& logits, const RowScale& scale, const PolicyBatch& batch,
                 const LossSpec& spec, const PolicyOutputs& outputs, int threads) {
  SequenceAdvantages advantages;
  if (batch.rewards) advantages = normalized_advantages(batch, spec);
  std::vector<Token> tokens = resolve_tokens(batch, spec, advantages);
  std::vector<TokenLoss> losses(tokens.size());

  const int used_threads = threads_for(logits, threads);
  const int64_t blocks = num_blocks(logits.width);
  std::vector<float> bases(used_threads * blocks);
  const RowKernels& kernels = row_kernels();
  const auto forward = kernels.forward[static_cast<int>(logits.dtype)];
  const auto backward = kernels.backward[static_cast<int>(logits.dtype)];
  // Taking exponentials twice costs more than keeping them, for which a float32 gradient row has
  // room itself. The softcap's slope and the entropy's gradient need the logits once more in any
  // case.
  const bool keep = outputs.grad && scale.softcap <= 0.0f && spec.entropy_weight == 0.0;
  const bool keep_in_grad = logits.dtype == DType::kFloat32;
  const int64_t kept_columns = keep && !keep_in_grad ? blocks * kBlockColumns : 0;

  for_each_row(logits, used_threads, [&](int slot, int64_t n, int64_t next) {
    const int64_t id = batch.token_ids[n];
    void* out = outputs.grad ? outputs.grad->row(n) : nullptr;
    if (id == kIgnoredId) {
      outputs.logprobs[n] = outputs.entropy[n] = 0.0f;
      if (out) std::memset(out, 0, outputs.grad->row_bytes());
      return;
    }
    const Row row = row_of(logits, scale, n, id, next);
    const TargetLogit target = target_logit(read_column(logits, n, id), row, kernels);
    float* room = keep_in_grad ? static_cast<float*>(out) : room_for_row(kept_columns);
    const RowTrace trace = {keep ? room : nullptr, &bases[slot * blocks]};
    OnlineSoftmax<double> others = forward(row, trace);
    // Rounded to float32 where row_stats does, so that the log-probs are those of token_logprobs to
    // the bit and a token that has not changed has a ratio of exactly 1.
    others.sum = static_cast<float>(others.sum);
    others.weighted = static_cast<float>(others.weighted);
    const RowValues values = row_values(others, target.z);
    outputs.logprobs[n] = static_cast<float>(values.logprob);
    outputs.entropy[n] = static_cast<float>(values.entropy);
    Token& token = tokens[n];
    token.logprob = outputs.logprobs[n];
    token.entropy = outputs.entropy[n];
    losses[n] = token_loss(token, spec);
    if (!out) return;
    if (!losses[n].has_gradient()) {
      std::memset(out, 0, outputs.grad->row_bytes());
      return;
    }
    const RowGrad grad = {out,
                          others.max,
                          values.log_sum,
                          token.entropy,
                          losses[n].slope_logprob,
                          losses[n].slope_entropy};
    backward(row, trace, grad);
    write_column(*outputs.grad, n, id, target_gradient(target, grad));
  });
  LossTotals totals;
  for (size_t n = 0; n < losses.size(); ++n) {
    if (batch.token_ids[n] != kIgnoredId) totals.add(losses[n]);
  }
  *outputs.loss = static_cast<float>(totals.value);
  totals.write_metrics(advantages.zero_spread_fraction, outputs.metrics);
}

}  // namespace onepass
