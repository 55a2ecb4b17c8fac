// Parts of a decoder layer in float32, on CPU threads. Tensors are contiguous; results do not
// depend on `threads`.
#pragma once

#include <cstdint>

namespace onepass {

struct RmsNorm {
  const float* weight;
  int64_t width;
  float epsilon;
};

// out [rows, width] = x * inverse * weight; inverse [rows] = 1 / sqrt(mean of squares + epsilon).
void rms_norm(const float* x, int64_t rows, const RmsNorm& norm, float* out, float* inverse,
              int threads);

void rms_norm_backward(const float* grad, const float* x, int64_t rows, const RmsNorm& norm,
                       const float* inverse, float* grad_x, float* grad_weight, int threads);

// out [count] = gate sigmoid(gate) up.
void gated_silu(const float* gate, const float* up, int64_t count, float* out, int threads);

void gated_silu_backward(const float* grad, const float* gate, const float* up, int64_t count,
                         float* grad_gate, float* grad_up, int threads);

// A weight [outputs, inputs] and a bias, null where there is none.
struct Linear {
  const float* weight;
  const float* bias;
};

// A decoder layer of the Llama family: attention with rotary positions, then a gated MLP, each
// behind an RMSNorm and added to what it read.
struct DecoderLayer {
  int64_t width;
  int64_t heads;
  int64_t key_value_heads;
  int64_t head_width;
  int64_t inner_width;
  float scale;
  float epsilon;
  const float* attention_norm;
  Linear query, key, value, output;
  // Of each head, null where there is none.
  const float* query_norm;
  const float* key_norm;
  const float* mlp_norm;
  Linear gate, up, down;
};

// One new position of every row. Keys and values [rows, key_value_heads, room, head_width]; a row
// sees the positions from its `starts` to the new one, `position`.
struct DecodeStep {
  int64_t rows;
  const float* cosines;  // [rows, head_width]
  const float* sines;
  const int64_t* starts;
  int64_t position;
  int64_t room;
  float* keys;
  float* values;
};

// x [rows, width] through the layer, in place; appends to keys and values.
void decode_layer(const DecoderLayer& layer, const DecodeStep& step, float* x, int threads);

}  // namespace onepass
