// Rows that do not stay on chip: read for their statistics, and read again for their gradient. For
// GPUs without clusters, rows too long for one, and a gradient that is misaligned to its logits.
//
// A block takes a whole row, part after part and from the last columns to the first for the gradient:
// what was read last is the likeliest to be in the cache still. Sums are those of resident.cuh, to the
// bit.
#pragma once

#include "row_slices.cuh"
#include "row_tasks.cuh"

namespace onepass {

struct StreamingScratch {
  Sums of_warps[kMaxParts][kWarps];
  Sums of_parts[kMaxParts];
  RowGrad grad;
};

// The columns of a part in memory. Whole packs are moved at once only where they are aligned.
struct Run {
  char* at;
  int columns;
  int in_packs;  // columns that may be moved in packs: all or none
};

template <DType kType>
__device__ Run run_of(const LogitsView& view, const Rows& rows, int n, int part, bool aligned) {
  using Bits = typename Elements<kType>::Bits;
  const int64_t skipped = int64_t{part} * rows.part_columns * int64_t{sizeof(Bits)};
  const int columns = rows.columns_of(part);
  return {row_of(view, n) + skipped, columns, aligned ? columns : 0};
}

// A pack of columns from `first` on; those beyond the run are 0.
template <DType kType>
__device__ Pack load_columns(const Run& run, int first) {
  using Bits = typename Elements<kType>::Bits;
  const Bits* from = reinterpret_cast<const Bits*>(run.at) + first;
  if (first + kPackColumns<kType> <= run.in_packs) return *reinterpret_cast<const Pack*>(from);
  Pack pack = {};
#pragma unroll
  for (int i = 0; i < kPackColumns<kType>; ++i) {
    if (first + i < run.columns) set_column<kType>(pack, i, from[i]);
  }
  return pack;
}

template <DType kType>
__device__ void store_columns(const Run& run, int first, const Pack& pack) {
  using Bits = typename Elements<kType>::Bits;
  Bits* to = reinterpret_cast<Bits*>(run.at) + first;
  if (first + kPackColumns<kType> <= run.in_packs) {
    *reinterpret_cast<Pack*>(to) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPackColumns<kType>; ++i) {
    if (first + i < run.columns) to[i] = column_bits<kType>(pack, i);
  }
}

// The gradient of one part, by the whole block; `to` may be `from`.
template <DType kType, bool kEntropy, class Scaling>
__device__ void write_run(const Run& from, const Run& to, int target, const RowGrad& grad,
                          const Scaling& scaling) {
  constexpr int kColumns = kPackColumns<kType>;
  constexpr int kTileColumns = kTilePacks * kColumns;
#pragma unroll 1
  for (int tile = (to.columns - 1) / kTileColumns; tile >= 0; --tile) {
    Pack packs[kPacksPerThread];
#pragma unroll
    for (int i = 0; i < kPacksPerThread; ++i) {
      const int first = pack_of(tile, i) * kColumns;
      if (first < from.columns) packs[i] = load_columns<kType>(from, first);
    }
#pragma unroll
    for (int i = 0; i < kPacksPerThread; ++i) {
      const int first = pack_of(tile, i) * kColumns;
      if (first >= to.columns) break;
      to_gradient<kType, kEntropy>(packs[i], grad, scaling, target < 0 ? -1 : target - first);
      store_columns<kType>(to, first, packs[i]);
    }
  }
}

// Where gradients go, and whether logits and gradients have all their rows at multiples of 16 bytes.
struct Destination {
  LogitsView grad;
  bool aligned;
};

// One part of a row's gradient, zeros where it has none.
template <DType kType, class Scaling>
__device__ void write_part(const Rows& rows, const Destination& out, int n, int part,
                           const RowGrad& grad, const Scaling& scaling) {
  using Bits = typename Elements<kType>::Bits;
  const Run to = run_of<kType>(out.grad, rows, n, part, out.aligned);
  if (grad.is_zero) {
    write_zeros<Bits>(slice_at(to.at, to.at, to.columns * int{sizeof(Bits)}));
    return;
  }
  const Run from = run_of<kType>(rows.logits, rows, n, part, out.aligned);
  const int target = rows.target_in(part, n);
  if (grad.entropy_scale != 0.0f) {
    write_run<kType, true>(from, to, target, grad, scaling);
  } else {
    write_run<kType, false>(from, to, target, grad, scaling);
  }
}

// The sums of the whole row, in the lanes of the first warp.
template <DType kType, class Scaling>
__device__ Sums sum_row(StreamingScratch& scratch, const Rows& rows, int n, bool aligned,
                        const Scaling& scaling) {
  constexpr int kTileColumns = kTilePacks * kPackColumns<kType>;
#pragma unroll 1
  for (int p = 0; p < rows.parts; ++p) {
    const Part part = {rows.columns_of(p), rows.target_in(p, n)};
    const Run run = run_of<kType>(rows.logits, rows, n, p, aligned);
    Sums sums;
#pragma unroll 1
    for (int tile = 0; tile * kTileColumns < part.columns; ++tile) {
      add_tile<kType>(sums, part, tile, scaling, [&](int pack) {
        return load_columns<kType>(run, pack * kPackColumns<kType>);
      });
    }
    sums = join_lanes(sums);
    if (lane_index() == 0) scratch.of_warps[p][warp_index()] = sums;
  }
  block_sync();
  if (warp_index() != 0) return {};
#pragma unroll 1
  for (int p = 0; p < rows.parts; ++p) {
    const Sums sums = join(scratch.of_warps[p], kWarps);
    if (lane_index() == 0) scratch.of_parts[p] = sums;
  }
  warp_sync();
  return join(scratch.of_parts, rows.parts);
}

template <DType kType, class Scaling, class Task>
__global__ void __launch_bounds__(kThreads, Scaling::kBlocks)
    streaming_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Task task,
                     bool aligned) {
  StreamingScratch& scratch = *reinterpret_cast<StreamingScratch*>(shared_memory());
#pragma unroll 1
  for (int n = block_index(); n < rows.count; n += block_count()) {
    const Scaling scaling(rows.scale.inv_temperature(n), rows.scale.softcap);
    if (rows.is_ignored(n)) {
      if (thread_index() == 0) {
        task.skip(n);
        scratch.grad = {};
        scratch.grad.is_zero = true;
      }
    } else {
      const Sums others = sum_row<kType>(scratch, rows, n, aligned, scaling);
      if (warp_index() == 0) {
        const Target target = target_of(target_logit<kType>(rows, n), scaling);
        const RowGrad grad =
            task.finish(n, others, target, scaling.inv_temperature, lane_index() == 0);
        if (lane_index() == 0) scratch.grad = grad;
      }
    }
    block_sync();
    if (task.writes_gradient()) {
      const RowGrad grad = scratch.grad;
#pragma unroll 1
      for (int part = rows.parts - 1; part >= 0; --part) {
        write_part<kType>(rows, {task.gradient(), aligned}, n, part, grad, scaling);
      }
    }
    // The next row's numbers take the place of this row's.
    block_sync();
  }
}

// A block writes the gradient of one part of a row.
template <DType kType, class Scaling>
__global__ void __launch_bounds__(kThreads, Scaling::kBlocks)
    gradient_kernel(const __grid_constant__ Rows rows, const __grid_constant__ GradInputs inputs,
                    const __grid_constant__ Destination out) {
  RowGrad& shared_grad = *reinterpret_cast<RowGrad*>(shared_memory());
  const int n = block_index() / rows.parts, part = block_index() % rows.parts;
  const Scaling scaling(rows.scale.inv_temperature(n), rows.scale.softcap);
  if (warp_index() == 0) {
    RowGrad grad = {};
    grad.is_zero = rows.is_ignored(n) ||
                   (inputs.coef_logprob[n] == 0.0f && inputs.coef_entropy[n] == 0.0f);
    if (!grad.is_zero) {
      // Another block may have written its part over a target elsewhere.
      const bool here = rows.target_in(part, n) >= 0;
      const Target target = target_of(here ? target_logit<kType>(rows, n) : 0.0f, scaling);
      grad = row_grad(inputs.row_max[n], inputs.log_sum[n], inputs.entropy[n],
                      inputs.coef_logprob[n], inputs.coef_entropy[n], target,
                      scaling.inv_temperature);
    }
    if (lane_index() == 0) shared_grad = grad;
  }
  block_sync();
  write_part<kType>(rows, out, n, part, shared_grad, scaling);
}

// Multiplies every row by a number on the device; reads nothing else where that is 1.
template <DType kType>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ Rows rows, const float* factor, bool aligned) {
  constexpr int kColumns = kPackColumns<kType>;
  const float by = *factor;
  if (by == 1.0f) return;
  const int n = block_index() / rows.parts, part = block_index() % rows.parts;
  const Run run = run_of<kType>(rows.logits, rows, n, part, aligned);
#pragma unroll 4
  for (int first = thread_index() * kColumns; first < run.columns; first += kThreads * kColumns) {
    Pack pack = load_columns<kType>(run, first);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float x[2] = {};
      Elements<kType>::widen(pack.word[w], x);
      x[0] = multiply(x[0], by);
      x[1] = multiply(x[1], by);
      pack.word[w] = Elements<kType>::round(x);
    }
    store_columns<kType>(run, first, pack);
  }
}

}  // namespace onepass
