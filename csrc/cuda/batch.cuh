// What surrounds the pass over the logits and is O(tokens): what each token takes from its sequence,
// its group and the batch before, and loss and metrics after. Sums have a fixed order.
#pragma once

#include "policy_batch.h"
#include "row_math.cuh"

namespace onepass {

// The sum over all threads of the block, in every thread. `room` holds one number a warp.
__device__ inline double sum_over_block(double value, double* room) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += from_lane_across(value, mask);
  // Of an earlier sum.
  block_sync();
  if (lane_index() == 0) room[warp_index()] = value;
  block_sync();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += room[warp];
  return sum;
}

// Active tokens of each sequence, one a block, and of the batch.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ PolicyInputs inputs) {
  double* room = reinterpret_cast<double*>(shared_memory());
  const int sequence = block_index();
  double count = 0.0;
  for (int64_t n = inputs.offsets[sequence] + thread_index(); n < inputs.offsets[sequence + 1];
       n += kThreads) {
    count += inputs.token_ids[n] != kIgnoredId ? 1.0 : 0.0;
  }
  count = sum_over_block(count, room);
  if (thread_index() != 0) return;
  inputs.active_lengths[sequence] = static_cast<int64_t>(count);
  add_to_counter(&inputs.counters->active_tokens, static_cast<unsigned long long>(count));
}

// Statistics of all rewards, as far as a scale needs them.
__device__ inline GroupStats whole_batch(const PolicyInputs& inputs, double* room) {
  double sum = 0.0, count = 0.0, squares = 0.0;
  for (int64_t i = thread_index(); i < inputs.num_sequences; i += kThreads) {
    const double reward = inputs.rewards[i];
    sum += isnan(reward) ? 0.0 : reward;
    count += isnan(reward) ? 0.0 : 1.0;
  }
  sum = sum_over_block(sum, room);
  count = sum_over_block(count, room);
  GroupStats stats;
  stats.count = static_cast<int64_t>(count);
  stats.mean = count > 0.0 ? sum / count : 0.0;
  for (int64_t i = thread_index(); i < inputs.num_sequences; i += kThreads) {
    const double centred = inputs.rewards[i] - stats.mean;
    squares += isnan(centred) ? 0.0 : centred * centred;
  }
  stats.squares = sum_over_block(squares, room);
  return stats;
}

__device__ inline double sequence_advantage(const PolicyInputs& inputs, const LossSpec& spec,
                                            int sequence, double* room) {
  const int64_t begin = sequence - sequence % inputs.group_size;
  const int64_t past = begin + inputs.group_size;
  const int64_t end = past < inputs.num_sequences ? past : inputs.num_sequences;
  const GroupStats group = group_stats(inputs.rewards, begin, end);
  if (sequence == begin && thread_index() == 0 && !group.has_spread) {
    add_to_counter(&inputs.counters->groups_without_spread, 1);
  }
  const bool by_batch = spec.advantage_scale == AdvantageScale::kBatch;
  const GroupStats scale = by_batch ? whole_batch(inputs, room) : group;
  return advantage(inputs.rewards[sequence], group, scale, spec);
}

// Sum over a sequence of log-prob under old minus under the sampler.
__device__ inline double sequence_log_rho(const PolicyInputs& inputs, int64_t begin, int64_t end,
                                          double* room) {
  double sum = 0.0;
  for (int64_t n = begin + thread_index(); n < end; n += kThreads) {
    const double gap = inputs.old_logprobs[n] - inputs.sampler_logprobs[n];
    const bool counts =
        inputs.token_ids[n] != kIgnoredId && !isnan(inputs.sampler_logprobs[n]);
    sum += counts ? gap : 0.0;
  }
  return sum_over_block(sum, room);
}

__device__ inline double token_weight(const PolicyInputs& inputs, const LossSpec& spec,
                                      int sequence) {
  double count;
  if (inputs.denominator) {
    count = *inputs.denominator;
  } else if (spec.aggregation == Aggregation::kTokenMean) {
    count = fmax(static_cast<double>(inputs.counters->active_tokens), 1.0);
  } else {
    count = static_cast<double>(inputs.num_sequences);
  }
  return aggregation_weight(spec, inputs.active_lengths[sequence], count);
}

// The terms of every token, one sequence a block.
__global__ void __launch_bounds__(kThreads)
    terms_kernel(const __grid_constant__ PolicyInputs inputs,
                 const __grid_constant__ LossSpec spec) {
  double* room = reinterpret_cast<double*>(shared_memory());
  const int sequence = block_index();
  const int64_t begin = inputs.offsets[sequence], end = inputs.offsets[sequence + 1];
  const bool has_rewards = inputs.rewards.given();
  TokenTerms terms;
  terms.advantage = has_rewards ? sequence_advantage(inputs, spec, sequence, room) : 0.0;
  terms.weight = token_weight(inputs, spec, sequence);
  const bool has_rho = inputs.old_logprobs.given() && inputs.sampler_logprobs.given();
  terms.log_rho = has_rho ? sequence_log_rho(inputs, begin, end, room) : 0.0;
  for (int64_t n = begin + thread_index(); n < end; n += kThreads) {
    if (!has_rewards) terms.advantage = inputs.advantages[n];
    inputs.terms[n] = terms;
  }
}

// Loss and metrics from the records of all tokens, by one block.
__global__ void __launch_bounds__(kThreads)
    totals_kernel(const __grid_constant__ PolicyInputs inputs,
                  const __grid_constant__ PolicyResults results) {
  LossTotals* totals = reinterpret_cast<LossTotals*>(shared_memory());
  LossTotals mine;
#pragma unroll 4
  for (int64_t n = thread_index(); n < inputs.num_tokens; n += kThreads) {
    const TokenRecord record = results.records[n];
    if (record.flags != 0) mine.add(loss_of(record));
  }
  totals[thread_index()] = mine;
#pragma unroll 1
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block_sync();
    if (thread_index() < half) totals[thread_index()].merge(totals[thread_index() + half]);
  }
  if (thread_index() != 0) return;
  *results.loss = static_cast<float>(totals[0].value);
  const int64_t groups =
      inputs.rewards.given() ? (inputs.num_sequences - 1) / inputs.group_size + 1 : 0;
  const double without_spread = static_cast<double>(inputs.counters->groups_without_spread);
  totals[0].write_metrics(groups > 0 ? without_spread / groups : 0.0, results.metrics);
}

}  // namespace onepass
