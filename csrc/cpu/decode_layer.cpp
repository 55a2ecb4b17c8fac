#include "layer_ops.h"
#include "row_driver.h"

namespace onepass {
namespace {

// What a layer computes on the way, kept from call to call.
struct Scratch {
  std::vector<float> normed, query, key, value, attended, gate, up, inverse;
};

// x cos + (-second half, first half of x) sin, for each head of a row.
void rotate(float* x, int64_t heads, int64_t width, const float* cosines, const float* sines) {
  const int64_t half = width / 2;
  for (float* head = x; head < x + heads * width; head += width) {
    for (int64_t j = 0; j < half; ++j) {
      const float first = head[j], second = head[half + j];
      head[j] = first * cosines[j] - second * sines[j];
      head[half + j] = second * cosines[half + j] + first * sines[half + j];
    }
  }
}

void norm_rows(float* x, int64_t rows, const float* weight, int64_t width, float epsilon) {
  const RowKernels& kernels = row_kernels();
  for (int64_t row = 0; weight && row < rows; ++row) {
    kernels.rms_norm(x + row * width, weight, width, epsilon, x + row * width);
  }
}

void add(const std::vector<float>& more, float* x) {
  for (size_t i = 0; i < more.size(); ++i) x[i] += more[i];
}

void attend_all(const DecoderLayer& layer, const DecodeStep& step, Scratch& scratch, int threads) {
  const RowKernels& kernels = row_kernels();
  const int64_t width = layer.head_width, group = layer.heads / layer.key_value_heads;
  for_parts(step.rows * layer.key_value_heads, 1, threads, [&](int64_t place, int64_t) {
    const int64_t row = place / layer.key_value_heads, head = place % layer.key_value_heads;
    const int64_t start = step.starts[row], cached = (place * step.room + start) * width;
    thread_local std::vector<float> scores;
    scores.resize(step.position + 1 - start);
    for (int64_t member = 0; member < group; ++member) {
      const int64_t at = (row * layer.heads + head * group + member) * width;
      kernels.attend({scratch.query.data() + at, step.keys + cached, step.values + cached,
                      step.position + 1 - start, width, layer.scale},
                     scores.data(), scratch.attended.data() + at);
    }
  });
}

}  // namespace

void decode_layer(const DecoderLayer& layer, const DecodeStep& step, float* x, int threads) {
  thread_local Scratch scratch;
  const int64_t rows = step.rows, width = layer.width;
  const int64_t query_width = layer.heads * layer.head_width;
  const int64_t key_width = layer.key_value_heads * layer.head_width;
  for (auto [part, columns] :
       {std::pair{&scratch.normed, width}, std::pair{&scratch.query, query_width},
        std::pair{&scratch.key, key_width}, std::pair{&scratch.value, key_width},
        std::pair{&scratch.attended, query_width}, std::pair{&scratch.gate, layer.inner_width},
        std::pair{&scratch.up, layer.inner_width}, std::pair{&scratch.inverse, int64_t{1}}}) {
    part->resize(rows * columns);
  }
  const auto multiply = [&](const std::vector<float>& from, const Linear& linear, int64_t inputs,
                            int64_t outputs, std::vector<float>& to) {
    few_rows_linear(from.data(), rows, linear.weight, outputs, inputs, linear.bias, to.data(),
                    threads);
  };
  const auto norm = [&](const float* weight) {
    rms_norm(x, rows, {weight, width, layer.epsilon}, scratch.normed.data(), scratch.inverse.data(),
             threads);
  };
  norm(layer.attention_norm);
  multiply(scratch.normed, layer.query, width, query_width, scratch.query);
  multiply(scratch.normed, layer.key, width, key_width, scratch.key);
  multiply(scratch.normed, layer.value, width, key_width, scratch.value);
  norm_rows(scratch.query.data(), rows * layer.heads, layer.query_norm, layer.head_width,
            layer.epsilon);
  norm_rows(scratch.key.data(), rows * layer.key_value_heads, layer.key_norm, layer.head_width,
            layer.epsilon);
  for (int64_t row = 0; row < rows; ++row) {
    const float* cosines = step.cosines + row * layer.head_width;
    const float* sines = step.sines + row * layer.head_width;
    float* keys = scratch.key.data() + row * key_width;
    rotate(scratch.query.data() + row * query_width, layer.heads, layer.head_width, cosines, sines);
    rotate(keys, layer.key_value_heads, layer.head_width, cosines, sines);
    for (int64_t head = 0; head < layer.key_value_heads; ++head) {
      const int64_t place = row * layer.key_value_heads + head;
      const int64_t to = (place * step.room + step.position) * layer.head_width;
      const int64_t from = head * layer.head_width;
      std::copy_n(keys + from, layer.head_width, step.keys + to);
      std::copy_n(scratch.value.data() + row * key_width + from, layer.head_width,
                  step.values + to);
    }
  }
  attend_all(layer, step, scratch, threads);
  multiply(scratch.attended, layer.output, query_width, width, scratch.normed);
  add(scratch.normed, x);
  norm(layer.mlp_norm);
  multiply(scratch.normed, layer.gate, width, layer.inner_width, scratch.gate);
  multiply(scratch.normed, layer.up, width, layer.inner_width, scratch.up);
  gated_silu(scratch.gate.data(), scratch.up.data(), rows * layer.inner_width, scratch.gate.data(),
             threads);
  multiply(scratch.gate, layer.down, layer.inner_width, width, scratch.normed);
  add(scratch.normed, x);
}

}  // namespace onepass
