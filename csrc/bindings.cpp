// Python module kernels._native. Tensors arrive as addresses, sizes and strides: no torch header,
// so one build serves every torch version. kernels/native_backend.py is its only caller.
#include "bind_layers.h"
#include "bind_spec.h"
#include "bind_views.h"
#include "cpu/row_ops.h"
#include "cuda/plan.h"

namespace py = pybind11;
using namespace onepass;

namespace {

void check_same_shape(const LogitsView& logits, const LogitsView& out) {
  check_equal("rows of out", logits.num_rows(), out.num_rows());
  check_equal("columns of out", logits.width, out.width);
  check_equal("element size of out", logits.element_size(), out.element_size());
}

void bind_row_ops(py::module_& module) {
  module.def(
      "row_stats",
      [](const LogitsView& logits, uintptr_t token_ids, const RowScale& scale, uintptr_t stats,
         int threads) {
        row_stats(logits, pointer<const int64_t>(token_ids), scale, pointer<float>(stats), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "grad_logits",
      [](const LogitsView& logits, uintptr_t token_ids, const RowScale& scale, uintptr_t row_max,
         uintptr_t log_sum, uintptr_t entropy, uintptr_t coef_logprob, uintptr_t coef_entropy,
         const LogitsView& out, int threads) {
        check_same_shape(logits, out);
        const GradInputs inputs = {pointer<const float>(row_max), pointer<const float>(log_sum),
                                   pointer<const float>(entropy),
                                   pointer<const float>(coef_logprob),
                                   pointer<const float>(coef_entropy)};
        grad_logits(logits, pointer<const int64_t>(token_ids), scale, inputs, out, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def("scale_rows", &scale_rows, py::call_guard<py::gil_scoped_release>());
  module.def(
      "few_rows_linear",
      [](uintptr_t x, int64_t rows, uintptr_t weight, int64_t outputs, int64_t depth,
         uintptr_t bias, uintptr_t out, int threads) {
        few_rows_linear(pointer<const float>(x), rows, pointer<const float>(weight), outputs, depth,
                        pointer<const float>(bias), pointer<float>(out), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_policy_loss(py::module_& module) {
  module.attr("NUM_POLICY_METRICS") = kNumPolicyMetrics;
  module.def(
      "policy_loss",
      [](const LogitsView& logits, const RowScale& scale, const LossSpec& spec, uintptr_t token_ids,
         uintptr_t offsets, int64_t num_sequences, uintptr_t old_logprobs, uintptr_t ref_logprobs,
         uintptr_t sampler_logprobs, uintptr_t advantages, uintptr_t rewards, int64_t group_size,
         double denominator, uintptr_t loss, uintptr_t logprobs, uintptr_t entropy,
         uintptr_t metrics, const LogitsView* grad, int threads) {
        const int64_t* bounds = pointer<const int64_t>(offsets);
        check_equal("offsets[-1]", logits.num_rows(), bounds[num_sequences]);
        if (rewards) check_at_least("group_size", int64_t{1}, group_size);
        if (grad) check_same_shape(logits, *grad);
        const PolicyBatch batch = {pointer<const int64_t>(token_ids),
                                   bounds,
                                   num_sequences,
                                   pointer<const double>(old_logprobs),
                                   pointer<const double>(ref_logprobs),
                                   pointer<const double>(sampler_logprobs),
                                   pointer<const double>(advantages),
                                   pointer<const double>(rewards),
                                   group_size,
                                   denominator};
        const PolicyOutputs outputs = {pointer<float>(loss), pointer<float>(logprobs),
                                       pointer<float>(entropy), pointer<float>(metrics), grad};
        policy_loss(logits, scale, batch, spec, outputs, threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("logits"), py::arg("scale"),
      py::arg("spec"), py::kw_only(), py::arg("token_ids"), py::arg("offsets"),
      py::arg("num_sequences"), py::arg("old_logprobs"), py::arg("ref_logprobs"),
      py::arg("sampler_logprobs"), py::arg("advantages"), py::arg("rewards"), py::arg("group_size"),
      py::arg("denominator"), py::arg("loss"), py::arg("logprobs"), py::arg("entropy"),
      py::arg("metrics"), py::arg("grad").none(true), py::arg("threads"));
}

// How a GPU would take these rows: decided on the host, and so testable where there is none.
void bind_row_plan(py::module_& module) {
  py::class_<RowPlan>(module, "RowPlan")
      .def_readonly("resident", &RowPlan::resident)
      .def_readonly("aligned", &RowPlan::aligned)
      .def_readonly("rows", &RowPlan::rows)
      .def_readonly("parts", &RowPlan::parts)
      .def_readonly("part_columns", &RowPlan::part_columns)
      .def_readonly("slot_bytes", &RowPlan::slot_bytes)
      .def_readonly("shared_bytes", &RowPlan::shared_bytes);
  module.def(
      "plan_rows",
      [](const LogitsView& logits, const LogitsView* grad, int major, int shared_per_block) {
        return plan_rows(logits, grad, {major, shared_per_block});
      },
      py::arg("logits"), py::arg("grad").none(true), py::kw_only(), py::arg("major"),
      py::arg("shared_per_block"));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of onepass-rl on raw addresses; see kernels/native_backend.py.";
  bind_loss_spec(module);
  bind_views(module);
  bind_row_ops(module);
  bind_policy_loss(module);
  bind_row_plan(module);
  bind_layer_ops(module);
  module.def("supported_cpu_levels", &supported_cpu_levels);
  module.def("cpu_level", &cpu_level);
  module.def("set_cpu_level", &set_cpu_level);
}
