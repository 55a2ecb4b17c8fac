// The parts of a decoder layer, for kernels._native.
#pragma once

#include "bind_views.h"
#include "cpu/layer_ops.h"

namespace onepass {

inline RmsNorm make_norm(uintptr_t weight, int64_t width, float epsilon) {
  return {pointer<const float>(weight), width, epsilon};
}

using Addresses = std::pair<uintptr_t, uintptr_t>;  // of weight and bias

inline Linear make_linear(const Addresses& addresses) {
  return {pointer<const float>(addresses.first), pointer<const float>(addresses.second)};
}

inline DecoderLayer make_decoder_layer(int64_t width, int64_t heads, int64_t key_value_heads,
                                       int64_t head_width, int64_t inner_width, float scale,
                                       float epsilon, std::array<uintptr_t, 4> norms,
                                       std::array<Addresses, 7> linears) {
  return {width,
          heads,
          key_value_heads,
          head_width,
          inner_width,
          scale,
          epsilon,
          pointer<const float>(norms[0]),
          make_linear(linears[0]),
          make_linear(linears[1]),
          make_linear(linears[2]),
          make_linear(linears[3]),
          pointer<const float>(norms[1]),
          pointer<const float>(norms[2]),
          pointer<const float>(norms[3]),
          make_linear(linears[4]),
          make_linear(linears[5]),
          make_linear(linears[6])};
}

inline void bind_layer_ops(pybind11::module_& module) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def(
      "rms_norm",
      [](uintptr_t x, int64_t rows, uintptr_t weight, int64_t width, float epsilon, uintptr_t out,
         uintptr_t inverse, int threads) {
        rms_norm(pointer<const float>(x), rows, make_norm(weight, width, epsilon),
                 pointer<float>(out), pointer<float>(inverse), threads);
      },
      Unlocked());
  module.def(
      "rms_norm_backward",
      [](uintptr_t grad, uintptr_t x, int64_t rows, uintptr_t weight, int64_t width,
         uintptr_t inverse, uintptr_t grad_x, uintptr_t grad_weight, int threads) {
        rms_norm_backward(pointer<const float>(grad), pointer<const float>(x), rows,
                          make_norm(weight, width, 0.0f), pointer<const float>(inverse),
                          pointer<float>(grad_x), pointer<float>(grad_weight), threads);
      },
      Unlocked());
  module.def(
      "gated_silu",
      [](uintptr_t gate, uintptr_t up, int64_t count, uintptr_t out, int threads) {
        gated_silu(pointer<const float>(gate), pointer<const float>(up), count, pointer<float>(out),
                   threads);
      },
      Unlocked());
  module.def(
      "gated_silu_backward",
      [](uintptr_t grad, uintptr_t gate, uintptr_t up, int64_t count, uintptr_t grad_gate,
         uintptr_t grad_up, int threads) {
        gated_silu_backward(pointer<const float>(grad), pointer<const float>(gate),
                            pointer<const float>(up), count, pointer<float>(grad_gate),
                            pointer<float>(grad_up), threads);
      },
      Unlocked());
  py::class_<DecoderLayer>(module, "DecoderLayer", py::module_local())
      .def(py::init(&make_decoder_layer), py::kw_only(), py::arg("width"), py::arg("heads"),
           py::arg("key_value_heads"), py::arg("head_width"), py::arg("inner_width"),
           py::arg("scale"), py::arg("epsilon"), py::arg("norms"), py::arg("linears"));
  module.def(
      "decode_layer",
      [](const DecoderLayer& layer, uintptr_t x, int64_t rows, uintptr_t cosines, uintptr_t sines,
         uintptr_t starts, int64_t position, int64_t room, uintptr_t keys, uintptr_t values,
         int threads) {
        const DecodeStep step = {rows,
                                 pointer<const float>(cosines),
                                 pointer<const float>(sines),
                                 pointer<const int64_t>(starts),
                                 position,
                                 room,
                                 pointer<float>(keys),
                                 pointer<float>(values)};
        decode_layer(layer, step, pointer<float>(x), threads);
      },
      Unlocked());
}

}  // namespace onepass
