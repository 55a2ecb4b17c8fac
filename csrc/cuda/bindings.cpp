// Python module kernels._cuda: the CUDA kernels on raw addresses and a stream.
#include "../bind_views.h"
#include "row_stats.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of onepass-rl on raw addresses; see kernels/native_backend.py.";
  onepass::bind_views(module);
  module.def(
      "row_stats",
      [](const onepass::LogitsView& logits, uintptr_t token_ids, const onepass::RowScale& scale,
         uintptr_t stats, int device, uintptr_t stream) {
        onepass::row_stats_cuda(logits, onepass::pointer<const int64_t>(token_ids), scale,
                                onepass::pointer<float>(stats), device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
}
