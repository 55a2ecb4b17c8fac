// What the fused loss reads and writes besides the logits: one token's inputs, one token's record
// for the metrics. Plain data and arithmetic, for host and device.
#pragma once

#include "../logits_view.h"
#include "../policy_loss.h"

namespace onepass {

// float32 or float64 numbers, or none.
struct Numbers {
  const void* data = nullptr;
  bool is_double = false;

  ONEPASS_HOST_DEVICE bool given() const { return data != nullptr; }
  ONEPASS_HOST_DEVICE double operator[](int64_t n) const {
    if (!data) return 0.0;
    return is_double ? static_cast<const double*>(data)[n] : static_cast<const float*>(data)[n];
  }
};

// What a token takes from its sequence, its group and the batch; written before the logits are read.
struct TokenTerms {
  double advantage;
  double weight;   // of its loss in the total
  double log_rho;  // summed over its sequence; 0 without old and sampler log-probs
};

// Counted over the whole batch.
struct Counters {
  unsigned long long active_tokens;
  unsigned long long groups_without_spread;
};

// All on the device; a call with rewards has no advantages and the other way round.
struct PolicyInputs {
  const int64_t* token_ids;
  const int64_t* offsets;  // [num_sequences + 1]
  int64_t num_tokens;
  int64_t num_sequences;
  Numbers old_logprobs;
  Numbers ref_logprobs;
  Numbers sampler_logprobs;
  Numbers advantages;  // one a token
  Numbers rewards;     // one a sequence
  int64_t group_size;
  const double* denominator;  // null: this batch's own count
  // Scratch of the call.
  TokenTerms* terms;        // [num_tokens]
  int64_t* active_lengths;  // [num_sequences]
  Counters* counters;
};

// What a token adds to loss and metrics.
struct TokenRecord {
  double loss;
  float kl;
  float log_ratio;
  float ratio;
  float sampler_gap;
  float entropy;
  uint32_t flags;  // 0: an ignored token
};

enum RecordFlag : uint32_t {
  kActive = 1,
  kClippedLow = 2,
  kClippedHigh = 4,
  kKept = 8,
  kZeroGradient = 16,
};

struct PolicyResults {
  float* loss;
  float* logprobs;
  float* entropy;
  float* metrics;
  TokenRecord* records;  // scratch of the call
};

ONEPASS_HOST_DEVICE inline Token token(const PolicyInputs& inputs, int64_t n, float logprob,
                                       float entropy) {
  const TokenTerms& terms = inputs.terms[n];
  Token token;
  token.logprob = logprob;
  token.entropy = entropy;
  token.advantage = terms.advantage;
  token.weight = terms.weight;
  token.has_old = inputs.old_logprobs.given();
  token.has_ref = inputs.ref_logprobs.given();
  token.has_sampler = inputs.sampler_logprobs.given();
  token.old_logprob = inputs.old_logprobs[n];
  token.ref_logprob = inputs.ref_logprobs[n];
  token.sampler_logprob = inputs.sampler_logprobs[n];
  token.sequence_log_rho = terms.log_rho;
  return token;
}

ONEPASS_HOST_DEVICE inline TokenRecord record_of(const TokenLoss& loss) {
  const uint32_t flags = kActive | (loss.clipped_low ? kClippedLow : 0u) |
                         (loss.clipped_high ? kClippedHigh : 0u) | (loss.kept ? kKept : 0u) |
                         (loss.has_gradient() ? 0u : kZeroGradient);
  return {loss.value,
          static_cast<float>(loss.kl),
          static_cast<float>(loss.log_ratio),
          static_cast<float>(loss.ratio),
          static_cast<float>(loss.sampler_gap),
          static_cast<float>(loss.entropy),
          flags};
}

ONEPASS_HOST_DEVICE inline TokenLoss loss_of(const TokenRecord& record) {
  TokenLoss loss;
  loss.value = record.loss;
  loss.kl = record.kl;
  loss.log_ratio = record.log_ratio;
  loss.ratio = record.ratio;
  loss.sampler_gap = record.sampler_gap;
  loss.entropy = record.entropy;
  loss.slope_logprob = record.flags & kZeroGradient ? 0.0 : 1.0;
  loss.clipped_low = record.flags & kClippedLow;
  loss.clipped_high = record.flags & kClippedHigh;
  loss.kept = record.flags & kKept;
  return loss;
}

}  // namespace onepass
