// Python module kernels._cuda: the CUDA kernels on raw addresses and a stream. Tensors arrive as in
// kernels._native; kernels/cuda_backend.py is its only caller.
#include "../bind_spec.h"
#include "../bind_views.h"
#include "row_ops.h"

namespace py = pybind11;
using namespace onepass;

namespace {

void bind_arguments(py::module_& module) {
  py::class_<Numbers>(module, "Numbers", py::module_local())
      .def(py::init([](uintptr_t data, bool is_double) {
             return Numbers{pointer<const void>(data), is_double};
           }),
           py::arg("data"), py::arg("is_double"));
  py::class_<Stream>(module, "Stream", py::module_local())
      .def(py::init([](int device, uintptr_t handle) {
             return Stream{device, handle};
           }),
           py::arg("device"), py::arg("handle"));
}

void bind_row_ops(py::module_& module) {
  module.def(
      "row_stats",
      [](const LogitsView& logits, uintptr_t token_ids, const RowScale& scale,
         std::array<uintptr_t, 4> out, bool finished, const Stream& stream) {
        const StatsOutputs outputs = {{pointer<float>(out[0]), pointer<float>(out[1]),
                                       pointer<float>(out[2]), pointer<float>(out[3])},
                                      finished};
        row_stats_cuda(logits, pointer<const int64_t>(token_ids), scale, outputs, stream);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("logits"), py::arg("token_ids"),
      py::arg("scale"), py::arg("out"), py::arg("finished"), py::arg("stream"));
  module.def(
      "grad_logits",
      [](const LogitsView& logits, uintptr_t token_ids, const RowScale& scale, uintptr_t row_max,
         uintptr_t log_sum, uintptr_t entropy, uintptr_t coef_logprob, uintptr_t coef_entropy,
         const LogitsView& out, const Stream& stream) {
        const GradInputs inputs = {pointer<const float>(row_max), pointer<const float>(log_sum),
                                   pointer<const float>(entropy),
                                   pointer<const float>(coef_logprob),
                                   pointer<const float>(coef_entropy)};
        grad_logits_cuda(logits, pointer<const int64_t>(token_ids), scale, inputs, out, stream);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "scale_rows",
      [](const LogitsView& grad, uintptr_t factor, const Stream& stream) {
        scale_rows_cuda(grad, pointer<const float>(factor), stream);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_policy_loss(py::module_& module) {
  module.attr("NUM_POLICY_METRICS") = kNumPolicyMetrics;
  module.def("policy_workspace_bytes", &policy_workspace_bytes, py::arg("num_tokens"),
             py::arg("num_sequences"));
  module.def(
      "policy_loss",
      [](const LogitsView& logits, const RowScale& scale, const LossSpec& spec, uintptr_t token_ids,
         uintptr_t offsets, int64_t num_sequences, const Numbers& old_logprobs,
         const Numbers& ref_logprobs, const Numbers& sampler_logprobs, const Numbers& advantages,
         const Numbers& rewards, int64_t group_size, uintptr_t denominator, uintptr_t loss,
         uintptr_t logprobs, uintptr_t entropy, uintptr_t metrics, const LogitsView* grad,
         uintptr_t workspace, const Stream& stream) {
        if (rewards.given()) check_at_least("group_size", int64_t{1}, group_size);
        PolicyInputs inputs = {};
        inputs.token_ids = pointer<const int64_t>(token_ids);
        inputs.offsets = pointer<const int64_t>(offsets);
        inputs.num_tokens = logits.num_rows();
        inputs.num_sequences = num_sequences;
        inputs.old_logprobs = old_logprobs;
        inputs.ref_logprobs = ref_logprobs;
        inputs.sampler_logprobs = sampler_logprobs;
        inputs.advantages = advantages;
        inputs.rewards = rewards;
        inputs.group_size = group_size;
        inputs.denominator = pointer<const double>(denominator);
        const PolicyResults results = {pointer<float>(loss), pointer<float>(logprobs),
                                       pointer<float>(entropy), pointer<float>(metrics), nullptr};
        policy_loss_cuda(logits, scale, spec, inputs, results, grad, pointer<char>(workspace),
                         stream);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("logits"), py::arg("scale"),
      py::arg("spec"), py::kw_only(), py::arg("token_ids"), py::arg("offsets"),
      py::arg("num_sequences"), py::arg("old_logprobs"), py::arg("ref_logprobs"),
      py::arg("sampler_logprobs"), py::arg("advantages"), py::arg("rewards"), py::arg("group_size"),
      py::arg("denominator"), py::arg("loss"), py::arg("logprobs"), py::arg("entropy"),
      py::arg("metrics"), py::arg("grad").none(true), py::arg("workspace"), py::arg("stream"));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of onepass-rl on raw addresses; see kernels/cuda_backend.py.";
  bind_loss_spec(module);
  bind_views(module);
  bind_arguments(module);
  bind_row_ops(module);
  bind_policy_loss(module);
}
