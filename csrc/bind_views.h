// The two argument types that every extension module takes. Local to the module, so that several
// modules can be loaded side by side.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "checks.h"
#include "logits_view.h"

namespace onepass {

template <class Element>
Element* pointer(uintptr_t address) {
  return reinterpret_cast<Element*>(address);
}

inline LogitsView make_view(uintptr_t data, DType dtype, std::array<int64_t, 3> sizes,
                            std::array<int64_t, 3> strides) {
  check_equal("stride of the last dimension", int64_t{1}, strides[2]);
  return {data, dtype, sizes[0], sizes[1], sizes[2], strides[0], strides[1]};
}

inline RowScale make_scale(uintptr_t per_row, float number, float softcap) {
  return {pointer<const float>(per_row), number, softcap};
}

inline void bind_views(pybind11::module_& module) {
  namespace py = pybind11;
  py::enum_<DType>(module, "DType", py::module_local())
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  py::class_<LogitsView>(module, "LogitsView", py::module_local())
      .def(py::init(&make_view), py::arg("data"), py::arg("dtype"), py::arg("sizes"),
           py::arg("strides"));
  py::class_<RowScale>(module, "RowScale", py::module_local())
      .def(py::init(&make_scale), py::arg("per_row"), py::arg("number"), py::arg("softcap"));
}

}  // namespace onepass
