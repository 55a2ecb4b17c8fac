// The choices and numbers of a loss, for every extension module that computes one. Local to the
// module, so that several can be loaded side by side.
#pragma once

#include <pybind11/pybind11.h>

#include "policy_loss.h"

namespace onepass {

inline void bind_loss_spec(pybind11::module_& module) {
  namespace py = pybind11;
  py::enum_<Surrogate>(module, "Surrogate", py::module_local())
      .value("clip", Surrogate::kClip)
      .value("cispo", Surrogate::kCispo)
      .value("sapo", Surrogate::kSapo)
      .value("reinforce", Surrogate::kReinforce);
  py::enum_<KlEstimator>(module, "KlEstimator", py::module_local())
      .value("none", KlEstimator::kNone)
      .value("k1", KlEstimator::kK1)
      .value("k2", KlEstimator::kK2)
      .value("k3", KlEstimator::kK3);
  py::enum_<Aggregation>(module, "Aggregation", py::module_local())
      .value("sequence_mean", Aggregation::kSequenceMean)
      .value("token_mean", Aggregation::kTokenMean)
      .value("sequence_sum", Aggregation::kSequenceSum)
      .value("constant", Aggregation::kConstant)
      .value("sum", Aggregation::kSum);
  py::enum_<AdvantageScale>(module, "AdvantageScale", py::module_local())
      .value("group", AdvantageScale::kGroup)
      .value("batch", AdvantageScale::kBatch)
      .value("none", AdvantageScale::kNone);
  py::enum_<SamplerCorrection>(module, "SamplerCorrection", py::module_local())
      .value("none", SamplerCorrection::kNone)
      .value("token_truncate", SamplerCorrection::kTokenTruncate)
      .value("token_mask", SamplerCorrection::kTokenMask)
      .value("sequence_truncate", SamplerCorrection::kSequenceTruncate)
      .value("sequence_mask", SamplerCorrection::kSequenceMask);
  py::class_<LossSpec>(module, "LossSpec", py::module_local())
      .def(py::init<>())
      .def_readwrite("surrogate", &LossSpec::surrogate)
      .def_readwrite("clip_low", &LossSpec::clip_low)
      .def_readwrite("clip_high", &LossSpec::clip_high)
      .def_readwrite("dual_clip", &LossSpec::dual_clip)
      .def_readwrite("ratio_cap", &LossSpec::ratio_cap)
      .def_readwrite("sapo_temperature_pos", &LossSpec::sapo_temperature_pos)
      .def_readwrite("sapo_temperature_neg", &LossSpec::sapo_temperature_neg)
      .def_readwrite("kl", &LossSpec::kl)
      .def_readwrite("kl_weight", &LossSpec::kl_weight)
      .def_readwrite("kl_ratio_weighted", &LossSpec::kl_ratio_weighted)
      .def_readwrite("entropy_weight", &LossSpec::entropy_weight)
      .def_readwrite("aggregation", &LossSpec::aggregation)
      .def_readwrite("max_tokens", &LossSpec::max_tokens)
      .def_readwrite("advantage_scale", &LossSpec::advantage_scale)
      .def_readwrite("advantage_ddof", &LossSpec::advantage_ddof)
      .def_readwrite("advantage_eps", &LossSpec::advantage_eps)
      .def_readwrite("sampler_correction", &LossSpec::sampler_correction)
      .def_readwrite("sampler_low", &LossSpec::sampler_low)
      .def_readwrite("sampler_high", &LossSpec::sampler_high);
}

}  // namespace onepass
