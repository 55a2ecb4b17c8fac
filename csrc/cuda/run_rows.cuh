// Chooses the kernel for a task over rows: by element type, scaling and plan.
#pragma once

#include <type_traits>

#include "launch.h"
#include "resident.cuh"
#include "streaming.cuh"

namespace onepass {

template <DType kType>
using TypeConstant = std::integral_constant<DType, kType>;

template <class Scaling>
struct ScalingTag {
  using type = Scaling;
};

template <class Call>
void with_element_type(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat32:
      return call(TypeConstant<DType::kFloat32>());
    case DType::kBFloat16:
      return call(TypeConstant<DType::kBFloat16>());
    case DType::kFloat16:
      return call(TypeConstant<DType::kFloat16>());
  }
}

template <class Call>
void with_scaling(float softcap, const Call& call) {
  return softcap > 0.0f ? call(ScalingTag<Softcapped>()) : call(ScalingTag<Linear>());
}

inline Rows rows_of(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                    const RowPlan& plan) {
  return {logits, token_ids, scale, plan.rows, plan.parts, plan.part_columns};
}

template <class Task>
void run_rows(const Launcher& launcher, const Rows& rows, const RowPlan& plan, const Task& task) {
  if (rows.count == 0) return;
  with_element_type(rows.logits.dtype, [&](auto type) {
    with_scaling(rows.scale.softcap, [&](auto scaling) {
      using Scaling = typename decltype(scaling)::type;
      constexpr DType kType = decltype(type)::value;
      if (plan.resident) {
        launcher.run_clusters(resident_kernel<kType, Scaling, Task>, rows.count, rows.parts,
                              plan.shared_bytes, rows, task, plan.slot_bytes);
      } else {
        launcher.run(streaming_kernel<kType, Scaling, Task>, rows.count, sizeof(StreamingScratch),
                     rows, task, plan.aligned);
      }
    });
  });
}

}  // namespace onepass
