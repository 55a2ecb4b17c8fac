// The policy-gradient loss of one token and what surrounds it: advantages, aggregation weights,
// sampler weights, metrics. Written once, for C++ and CUDA. kernels/reference.py is its
// specification and holds the sources of the equations.
#pragma once

#include <cmath>
#include <cstdint>

#include "online_softmax.h"

namespace onepass {

enum class Surrogate { kClip, kCispo, kSapo, kReinforce };
enum class KlEstimator { kNone, kK1, kK2, kK3 };
enum class Aggregation { kSequenceMean, kTokenMean, kSequenceSum, kConstant, kSum };
enum class AdvantageScale { kGroup, kBatch, kNone };
enum class SamplerCorrection {
  kNone,
  kTokenTruncate,
  kTokenMask,
  kSequenceTruncate,
  kSequenceMask
};

// Bounds that are not set are infinite (sampler_low: 0).
struct LossSpec {
  Surrogate surrogate = Surrogate::kClip;
  double clip_low = 0.2;
  double clip_high = 0.2;
  double dual_clip = INFINITY;
  double ratio_cap = INFINITY;
  double sapo_temperature_pos = 1.0;
  double sapo_temperature_neg = 1.05;
  KlEstimator kl = KlEstimator::kNone;
  double kl_weight = 0.0;
  bool kl_ratio_weighted = false;
  double entropy_weight = 0.0;
  Aggregation aggregation = Aggregation::kSequenceMean;
  double max_tokens = 1.0;
  AdvantageScale advantage_scale = AdvantageScale::kGroup;
  int advantage_ddof = 1;
  double advantage_eps = 1e-4;
  SamplerCorrection sampler_correction = SamplerCorrection::kNone;
  double sampler_low = 0.0;
  double sampler_high = INFINITY;
};

// Rewards of one group, NaN left out.
struct GroupStats {
  double mean = 0.0;
  double squares = 0.0;
  int64_t count = 0;
  bool has_spread = false;
};

// Of rewards[begin] to rewards[end]. Two passes: sum of squares around the mean.
template <class Rewards>
ONEPASS_HOST_DEVICE GroupStats group_stats(const Rewards& rewards, int64_t begin, int64_t end) {
  GroupStats stats;
  double sum = 0.0, lowest = INFINITY, highest = -INFINITY;
  for (int64_t i = begin; i < end; ++i) {
    if (std::isnan(rewards[i])) continue;
    sum += rewards[i];
    lowest = fmin(lowest, rewards[i]);
    highest = fmax(highest, rewards[i]);
    ++stats.count;
  }
  stats.mean = stats.count > 0 ? sum / static_cast<double>(stats.count) : 0.0;
  for (int64_t i = begin; i < end; ++i) {
    if (std::isnan(rewards[i])) continue;
    const double centred = rewards[i] - stats.mean;
    stats.squares += centred * centred;
  }
  stats.has_spread = highest > lowest;
  return stats;
}

ONEPASS_HOST_DEVICE inline double standard_deviation(double squares, int64_t count, int ddof) {
  return sqrt(squares / fmax(static_cast<double>(count - ddof), 1.0));
}

// `scale_stats` are the group's own statistics, or those of all rewards for "batch".
ONEPASS_HOST_DEVICE inline double advantage(double reward, const GroupStats& group,
                                            const GroupStats& scale_stats, const LossSpec& spec) {
  if (std::isnan(reward) || !group.has_spread) return 0.0;
  const double centred = reward - group.mean;
  if (centred == 0.0 || spec.advantage_scale == AdvantageScale::kNone) return centred;
  const double deviation =
      standard_deviation(scale_stats.squares, scale_stats.count, spec.advantage_ddof);
  return centred / (deviation + spec.advantage_eps);
}

// Weight of one token's loss in the total. `count` is the number of sequences, for token_mean of
// active tokens, or the caller's denominator.
ONEPASS_HOST_DEVICE inline double aggregation_weight(const LossSpec& spec, int64_t active_length,
                                                     double count) {
  switch (spec.aggregation) {
    case Aggregation::kSequenceMean:
      return 1.0 / fmax(static_cast<double>(active_length), 1.0) / count;
    case Aggregation::kConstant:
      return 1.0 / spec.max_tokens / count;
    case Aggregation::kSum:
      return 1.0;
    default:
      return 1.0 / count;
  }
}

ONEPASS_HOST_DEVICE inline bool is_sequence_level(SamplerCorrection correction) {
  return correction == SamplerCorrection::kSequenceTruncate ||
         correction == SamplerCorrection::kSequenceMask;
}

// Importance weight of the policy term from log rho = log-prob under old minus under the sampler.
ONEPASS_HOST_DEVICE inline double sampler_weight(double log_rho, const LossSpec& spec) {
  if (spec.sampler_correction == SamplerCorrection::kNone) return 1.0;
  const double rho = exp(log_rho);
  if (spec.sampler_correction == SamplerCorrection::kTokenTruncate ||
      spec.sampler_correction == SamplerCorrection::kSequenceTruncate) {
    return rho > spec.sampler_high ? spec.sampler_high : rho;
  }
  return rho >= spec.sampler_low && rho <= spec.sampler_high ? rho : 0.0;
}

// Value of a term and its derivative by the token's log-prob.
struct Term {
  double value = 0.0;
  double slope = 0.0;
};

// The importance ratio of a token and the derivative of its logarithm by the log-prob.
struct Ratio {
  double log = 0.0;
  double value = 1.0;
  double log_slope = 0.0;
};

// Without old log-probs r = 1 with gradient kept, NaN for NaN; a token that had no probability before
// counts as unchanged.
ONEPASS_HOST_DEVICE inline Ratio importance_ratio(double logprob, bool has_old,
                                                  double old_logprob) {
  const double before = has_old ? old_logprob : logprob;
  if (before == -INFINITY) return {};
  return {logprob - before, exp(logprob - before), 1.0};
}

ONEPASS_HOST_DEVICE inline Term clip_term(double advantage, const Ratio& ratio,
                                          const LossSpec& spec) {
  const double upper = advantage > 0.0 ? fmin(1.0 + spec.clip_high, spec.ratio_cap)
                                       : fmin(spec.dual_clip, spec.ratio_cap);
  const double lower = advantage < 0.0 ? 1.0 - spec.clip_low : -INFINITY;
  if (ratio.value > upper) return {-advantage * upper, 0.0};
  if (ratio.value < lower) return {-advantage * lower, 0.0};
  return {-advantage * ratio.value, -advantage * ratio.value * ratio.log_slope};
}

ONEPASS_HOST_DEVICE inline Term sapo_term(double advantage, const Ratio& ratio,
                                          const LossSpec& spec) {
  // Beyond e^30 the gate is 1 to the last bit with slope 0; the bound only avoids inf * 0.
  constexpr double kLargestRatio = 1.0686474581524463e13;
  const double tau = advantage > 0.0 ? spec.sapo_temperature_pos : spec.sapo_temperature_neg;
  const double scale = quotient(-4.0, tau) * advantage;
  const bool bounded = ratio.value > kLargestRatio;
  const double offset = (bounded ? kLargestRatio : ratio.value) - 1.0;
  const double e = exp(-fabs(tau * offset));
  // The logistic function of tau * offset, and of its negative.
  const double larger = quotient(1.0, 1.0 + e), smaller = e * larger;
  const double gate = offset < 0.0 ? smaller : larger;
  const double slope = scale * tau * larger * smaller * ratio.value * ratio.log_slope;
  return {scale * gate, bounded ? 0.0 : slope};
}

ONEPASS_HOST_DEVICE inline Term policy_term(double logprob, double advantage, const Ratio& ratio,
                                            const LossSpec& spec) {
  // Also where the ratio overflows: a sample without advantage has no policy gradient.
  if (advantage == 0.0) return {};
  switch (spec.surrogate) {
    case Surrogate::kClip:
      return clip_term(advantage, ratio, spec);
    case Surrogate::kSapo:
      return sapo_term(advantage, ratio, spec);
    case Surrogate::kCispo: {
      const double low = 1.0 - spec.clip_low, high = 1.0 + spec.clip_high;
      const double weight = ratio.value < low ? low : ratio.value > high ? high : ratio.value;
      return {-weight * advantage * logprob, -weight * advantage};
    }
    case Surrogate::kReinforce:
      return {-advantage * logprob, -advantage};
  }
  return {};
}

ONEPASS_HOST_DEVICE inline Term kl_term(double logprob, double ref_logprob, const Ratio& ratio,
                                        const LossSpec& spec) {
  const double u = ref_logprob - logprob;
  Term kl;
  if (spec.kl == KlEstimator::kK1) {
    kl = {-u, 1.0};
  } else if (spec.kl == KlEstimator::kK2) {
    kl = {u * u / 2.0, -u};
  } else {
    const double excess = expm1(u);
    kl = {excess - u, -excess};
  }
  if (!spec.kl_ratio_weighted) return kl;
  return {ratio.value * kl.value, ratio.value * (kl.value * ratio.log_slope + kl.slope)};
}

// What the loss of one active token depends on. Absent log-probs are marked by the flags.
struct Token {
  double logprob = 0.0;
  double entropy = 0.0;
  double advantage = 0.0;
  double weight = 0.0;  // of this token in the total
  bool has_old = false;
  bool has_ref = false;
  bool has_sampler = false;
  double old_logprob = 0.0;
  double ref_logprob = 0.0;
  double sampler_logprob = 0.0;
  double sequence_log_rho = 0.0;  // read by the sequence-level sampler corrections only
};

// Weighted loss of one token, its derivatives, and what the metrics are made of.
struct TokenLoss {
  double value = 0.0;
  double slope_logprob = 0.0;
  double slope_entropy = 0.0;
  double entropy = 0.0;
  double kl = 0.0;
  double log_ratio = 0.0;
  double ratio = 0.0;
  double sampler_gap = 0.0;
  bool clipped_low = false;
  bool clipped_high = false;
  bool kept = false;

  ONEPASS_HOST_DEVICE bool has_gradient() const {
    return slope_logprob != 0.0 || slope_entropy != 0.0;
  }
};

// log-prob under old (or the policy itself) minus under the sampler; 0 where the sampler has none.
ONEPASS_HOST_DEVICE inline double sampler_gap(const Token& token) {
  if (!token.has_sampler || std::isnan(token.sampler_logprob)) return 0.0;
  return (token.has_old ? token.old_logprob : token.logprob) - token.sampler_logprob;
}

ONEPASS_HOST_DEVICE inline TokenLoss token_loss(const Token& token, const LossSpec& spec) {
  TokenLoss loss;
  const Ratio ratio = importance_ratio(token.logprob, token.has_old, token.old_logprob);
  const double gap = sampler_gap(token);
  const double correction = sampler_weight(
      is_sequence_level(spec.sampler_correction) ? token.sequence_log_rho : gap, spec);
  Term total;
  if (correction != 0.0) {
    const Term policy = policy_term(token.logprob, token.advantage, ratio, spec);
    total = {correction * policy.value, correction * policy.slope};
  }
  if (token.has_ref) {
    const Term kl = kl_term(token.logprob, token.ref_logprob, ratio, spec);
    loss.kl = kl.value;
    if (spec.kl_weight != 0.0) {
      total.value += spec.kl_weight * kl.value;
      total.slope += spec.kl_weight * kl.slope;
    }
  }
  if (spec.entropy_weight != 0.0) {
    total.value -= spec.entropy_weight * token.entropy;
    loss.slope_entropy = -spec.entropy_weight * token.weight;
  }
  loss.value = token.weight * total.value;
  loss.slope_logprob = token.weight * total.slope;
  loss.entropy = token.entropy;
  loss.log_ratio = ratio.log;
  loss.ratio = ratio.value;
  loss.sampler_gap = fabs(gap);
  if (spec.surrogate == Surrogate::kClip || spec.surrogate == Surrogate::kCispo) {
    loss.clipped_low = token.advantage < 0.0 && loss.ratio < 1.0 - spec.clip_low;
    loss.clipped_high = token.advantage > 0.0 && loss.ratio > 1.0 + spec.clip_high;
  }
  loss.kept = correction > 0.0;
  return loss;
}

constexpr int kNumPolicyMetrics = 15;

// NaN wins, as in torch.amin and amax.
ONEPASS_HOST_DEVICE inline double smaller_or_nan(double a, double b) {
  return b < a || std::isnan(b) ? b : a;
}
ONEPASS_HOST_DEVICE inline double larger_or_nan(double a, double b) {
  return b > a || std::isnan(b) ? b : a;
}

// Sums over active tokens.
struct LossTotals {
  double value = 0.0;
  double entropy = 0.0;
  double kl = 0.0;
  double log_ratio = 0.0;
  double ratio = 0.0;
  double sampler_gap = 0.0;
  double active = 0.0;
  double clipped_low = 0.0;
  double clipped_high = 0.0;
  double kept = 0.0;
  double zero_gradient = 0.0;
  double ratio_min = INFINITY;
  double ratio_max = -INFINITY;
  double gap_max = 0.0;

  ONEPASS_HOST_DEVICE void add(const TokenLoss& loss) {
    value += loss.value;
    entropy += loss.entropy;
    kl += loss.kl;
    log_ratio += loss.log_ratio;
    ratio += loss.ratio;
    sampler_gap += loss.sampler_gap;
    active += 1.0;
    clipped_low += loss.clipped_low ? 1.0 : 0.0;
    clipped_high += loss.clipped_high ? 1.0 : 0.0;
    kept += loss.kept ? 1.0 : 0.0;
    zero_gradient += loss.has_gradient() ? 0.0 : 1.0;
    ratio_min = smaller_or_nan(ratio_min, loss.ratio);
    ratio_max = larger_or_nan(ratio_max, loss.ratio);
    gap_max = larger_or_nan(gap_max, loss.sampler_gap);
  }

  ONEPASS_HOST_DEVICE void merge(const LossTotals& other) {
    value += other.value;
    entropy += other.entropy;
    kl += other.kl;
    log_ratio += other.log_ratio;
    ratio += other.ratio;
    sampler_gap += other.sampler_gap;
    active += other.active;
    clipped_low += other.clipped_low;
    clipped_high += other.clipped_high;
    kept += other.kept;
    zero_gradient += other.zero_gradient;
    ratio_min = smaller_or_nan(ratio_min, other.ratio_min);
    ratio_max = larger_or_nan(ratio_max, other.ratio_max);
    gap_max = larger_or_nan(gap_max, other.gap_max);
  }

  // In the order of METRIC_NAMES in kernels/loss_metrics.py.
  ONEPASS_HOST_DEVICE void write_metrics(double zero_spread_fraction, float* metrics) const {
    const double count = fmax(active, 1.0);
    const double values[kNumPolicyMetrics] = {
        active,
        entropy / count,
        kl / count,
        -log_ratio / count,
        ratio / count,
        active > 0.0 ? ratio_min : 0.0,
        active > 0.0 ? ratio_max : 0.0,
        (clipped_low + clipped_high) / count,
        clipped_low / count,
        clipped_high / count,
        sampler_gap / count,
        gap_max,
        kept / count,
        zero_gradient / count,
        zero_spread_fraction,
    };
    for (int i = 0; i < kNumPolicyMetrics; ++i) metrics[i] = static_cast<float>(values[i]);
  }
};

}  // namespace onepass
