// Softmax statistics of a row read in pieces and what follows from them, for C++ and CUDA.
//
// The exact maximum of each piece is known before its exponentials are taken, so every exponent is
// <= 0 and -inf columns add exactly 0; a piece (or row) of nothing but -inf keeps max = -inf, sum =
// 0.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define ONEPASS_HOST_DEVICE __host__ __device__
#else
#define ONEPASS_HOST_DEVICE
#endif

namespace onepass {

// sum = sum_j exp(z_j - max), weighted = sum_j (z_j - max) exp(z_j - max).
template <class Accumulator>
struct OnlineSoftmax {
  float max = -INFINITY;
  Accumulator sum = 0;
  Accumulator weighted = 0;

  // What exponents are taken against: finite also while only -inf has been seen.
  ONEPASS_HOST_DEVICE float base() const { return max == -INFINITY ? 0.0f : max; }

  // Moves the statistics to a maximum that covers `piece_max`.
  ONEPASS_HOST_DEVICE void raise_max(float piece_max) {
    if (!(piece_max > max)) return;
    if (max == -INFINITY) {
      max = piece_max;
      return;
    }
    const Accumulator step = static_cast<Accumulator>(max) - static_cast<Accumulator>(piece_max);
    const Accumulator scale = exp(step);
    weighted = scale * (weighted + step * sum);
    sum *= scale;
    max = piece_max;
  }

  // Adds a piece summed against this->base().
  ONEPASS_HOST_DEVICE void add(Accumulator piece_sum, Accumulator piece_weighted) {
    sum += piece_sum;
    weighted += piece_weighted;
  }

  // Joins statistics of other columns.
  ONEPASS_HOST_DEVICE void merge(OnlineSoftmax other) {
    raise_max(other.max);
    other.raise_max(max);
    add(other.sum, other.weighted);
  }
};

// a / b for a b that is neither tiny nor huge. A GPU's general division is a call, which costs a
// kernel its stack; this is correct to the last bit or two without one.
ONEPASS_HOST_DEVICE inline double quotient(double a, double b) {
#ifdef __CUDA_ARCH__
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(b));
  r = fma(r, fma(-b, r, 1.0), r);
  r = fma(r, fma(-b, r, 1.0), r);
  const double q = a * r;
  return fma(fma(-b, q, a), r, q);
#else
  return a / b;
#endif
}

// log-prob of the target, entropy, and the log of the sum of exp(z - max) over all columns.
struct RowValues {
  double logprob;
  double entropy;
  double log_sum;
};

// `others` are the statistics of a row whose maximum is over all columns and whose sums leave the
// target out. Where the target is the maximum, log1p keeps a 1 - p_y that its 1 would swallow.
ONEPASS_HOST_DEVICE inline RowValues row_values(const OnlineSoftmax<double>& others,
                                                double target) {
  const double shift = target == -INFINITY ? target : target - others.max;
  const double e = exp(shift);
  const double sum = others.sum + e;
  const double weighted = others.weighted + (e == 0.0 ? 0.0 : shift * e);
  const double log_sum = shift == 0.0 ? log1p(others.sum) : log(sum);
  return {shift - log_sum, log_sum - quotient(weighted, sum), log_sum};
}

}  // namespace onepass
