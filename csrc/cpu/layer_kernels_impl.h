// Parts of a decoder layer over one row, in float32, at one instruction set; see
// row_kernels_impl.h. The order of a sum depends on its length alone.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace onepass {
namespace {

struct WholeGroup {
  Floats get(const float* from) const { return load(from); }
  void put(Floats value, float* to) const { store(value, to); }
};

struct FirstColumns {
  int count;
  Floats get(const float* from) const { return load_first(from, count); }
  void put(Floats value, float* to) const { store_first(value, to, count); }
};

// body(j, group) for each group of columns from column j on; a last part reads zeros behind its end.
template <class Body>
inline void for_groups(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns) body(j, WholeGroup{});
  if (j < count) body(j, FirstColumns{static_cast<int>(count - j)});
}

float rms_norm(const float* x, const float* weight, int64_t width, float epsilon, float* out) {
  Floats squares = splat(0.0f);
  for_groups(width, [&](int64_t j, auto group) {
    const Floats values = group.get(x + j);
    squares = fused(values, values, squares);
  });
  const double mean = sum_columns(squares) / static_cast<double>(width);
  const float inverse = static_cast<float>(1.0 / __builtin_sqrt(mean + epsilon));
  for_groups(width, [&](int64_t j, auto group) {
    group.put(group.get(x + j) * splat(inverse) * group.get(weight + j), out + j);
  });
  return inverse;
}

void rms_norm_backward(const RmsNormGrad& row, float* grad_x, float* grad_weight) {
  Floats products = splat(0.0f);
  for_groups(row.width, [&](int64_t j, auto group) {
    const Floats grad = group.get(row.grad + j) * group.get(row.weight + j);
    products = fused(grad, group.get(row.x + j), products);
  });
  const double inverse = row.inverse;
  const double mean = sum_columns(products) / static_cast<double>(row.width);
  const Floats along = splat(static_cast<float>(-inverse * inverse * inverse * mean));
  const Floats scale = splat(row.inverse);
  for_groups(row.width, [&](int64_t j, auto group) {
    const Floats x = group.get(row.x + j), grad = group.get(row.grad + j) * scale;
    group.put(fused(along, x, grad * group.get(row.weight + j)), grad_x + j);
    group.put(fused(grad, x, group.get(grad_weight + j)), grad_weight + j);
  });
}

// 1 / (1 + exp(-x)), without overflow.
inline Floats sigmoid(Floats x) {
  const Floats size = {magnitude(x.first), magnitude(x.second)};
  const Floats e = exponential(larger(splat(kExpIsZero), -size));
  const Floats numerator = {x.first < broadcast(0.0f) ? e.first : broadcast(1.0f),
                            x.second < broadcast(0.0f) ? e.second : broadcast(1.0f)};
  return numerator / (splat(1.0f) + e);
}

void gated_silu(const float* gate, const float* up, int64_t count, float* out) {
  for_groups(count, [&](int64_t j, auto group) {
    const Floats x = group.get(gate + j);
    group.put(x * sigmoid(x) * group.get(up + j), out + j);
  });
}

void gated_silu_backward(const float* grad, const float* gate, const float* up, int64_t count,
                         float* grad_gate, float* grad_up) {
  for_groups(count, [&](int64_t j, auto group) {
    const Floats x = group.get(gate + j), of_out = group.get(grad + j);
    const Floats share = sigmoid(x), one = splat(1.0f);
    group.put(of_out * group.get(up + j) * share * fused(x, one - share, one), grad_gate + j);
    group.put(of_out * x * share, grad_up + j);
  });
}

inline float dot(const float* x, const float* y, int64_t width) {
  Floats sums = splat(0.0f);
  for_groups(width, [&](int64_t j, auto group) {
    sums = fused(group.get(x + j), group.get(y + j), sums);
  });
  const Vector both = sums.first + sums.second;
  float lanes[kLanes], sum = 0.0f;
  store_bits(both, lanes);
  for (float lane : lanes) sum += lane;
  return sum;
}

void attend(const OneQuery& query, float* scores, float* out) {
  float largest = -__builtin_inff();
  for (int64_t t = 0; t < query.length; ++t) {
    scores[t] = query.scale * dot(query.query, query.keys + t * query.width, query.width);
    largest = scores[t] > largest ? scores[t] : largest;
  }
  double total = 0.0;
  for_groups(query.length, [&](int64_t t, auto group) {
    const Floats shifted = group.get(scores + t) - splat(largest);
    group.put(exponential(larger(splat(kExpIsZero), shifted)), scores + t);
  });
  for (int64_t t = 0; t < query.length; ++t) total += scores[t];
  const Floats share = splat(static_cast<float>(1.0 / total));
  for_groups(query.width, [&](int64_t j, auto group) {
    Floats sums = splat(0.0f);
    for (int64_t t = 0; t < query.length; ++t) {
      sums = fused(splat(scores[t]), group.get(query.values + t * query.width + j), sums);
    }
    group.put(sums * share, out + j);
  });
}

}  // namespace
}  // namespace onepass
