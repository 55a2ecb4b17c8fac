// What is decided on the host before a launch, from sizes and addresses alone: how a row is cut,
// which kernel takes it, how much memory that needs. No CUDA header, so that it is tested without a
// GPU, as kernels._native.plan_rows.
#pragma once

#include <cstdint>

#include "../checks.h"
#include "../logits_view.h"

namespace onepass {

constexpr int kPackBytes = 16;
constexpr int kThreads = 256;
constexpr int kMaxParts = 4;
// 4 packs a thread: what a block takes at a time.
constexpr int kTileBytes = 4 * kThreads * kPackBytes;
constexpr int kBlocksPerMultiprocessor = 3;
// At the start of a resident block's shared memory; its slot follows.
constexpr int kScratchBytes = 512;

// A multiprocessor of compute capability 9.0 or 10.0 has 228 KiB of shared memory, of which each
// block takes 1 KiB for itself. Three blocks (one loads while one computes and one stores) leave a
// row's part 76272 bytes, and the 16 by which it may be shifted.
constexpr int kSlotBytesOfThree =
    228 * 1024 / kBlocksPerMultiprocessor - 1024 - kScratchBytes;
constexpr int kPartBytesOfThree = kSlotBytesOfThree - kPackBytes;

struct DeviceLimits {
  int major;             // of the compute capability
  int shared_per_block;  // bytes of shared memory that a block can ask for
};

struct RowPlan {
  bool resident;     // one read: the row stays in the shared memory of a cluster
  bool aligned;      // every row starts at a multiple of 16 bytes, in logits and gradient
  int rows;
  int parts;         // blocks of a cluster; what a row is cut into by every kernel
  int part_columns;  // a multiple of 16 bytes
  int slot_bytes;    // of a resident block
  int shared_bytes;  // of a resident block, scratch included
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// By width and element size alone, and so is the order of every sum. 1, 2 or 4 parts, the fewest that
// let three blocks share a multiprocessor.
inline void cut_row(const LogitsView& logits, RowPlan& plan) {
  const int64_t size = logits.element_size();
  for (plan.parts = 1;; plan.parts *= 2) {
    const int64_t columns = (logits.width + plan.parts - 1) / plan.parts;
    const int64_t bytes = round_up(columns * size, kPackBytes);
    plan.part_columns = static_cast<int>(bytes / size);
    if (bytes <= kPartBytesOfThree || plan.parts == kMaxParts) return;
  }
}

// Whether every row is off a multiple of 16 bytes by as much in both.
inline bool rows_share_alignment(const LogitsView& a, const LogitsView& b) {
  const int64_t size = a.element_size();
  const auto agree = [](int64_t x, int64_t y) { return (x - y) % kPackBytes == 0; };
  return agree(static_cast<int64_t>(a.data), static_cast<int64_t>(b.data)) &&
         (a.outer == 1 || agree(a.outer_stride * size, b.outer_stride * size)) &&
         (a.inner == 1 || agree(a.inner_stride * size, b.inner_stride * size));
}

inline bool rows_are_aligned(const LogitsView& view) {
  const LogitsView zero = {0, view.dtype, view.outer, view.inner, view.width, 0, 0};
  return rows_share_alignment(view, zero);
}

// `grad` is null where none is written, or none in the same pass.
inline RowPlan plan_rows(const LogitsView& logits, const LogitsView* grad,
                         const DeviceLimits& limits) {
  constexpr int64_t kLargestWidth = int64_t{1} << 28, kMostRows = (int64_t{1} << 31) / kMaxParts - 1;
  check_at_most("columns of logits", kLargestWidth, logits.width);
  check_at_most("rows of logits", kMostRows, logits.num_rows());
  if (grad) {
    check_equal("rows of the gradient", logits.num_rows(), grad->num_rows());
    check_equal("columns of the gradient", logits.width, grad->width);
    check_equal("element size of the gradient", logits.element_size(), grad->element_size());
  }
  RowPlan plan = {};
  plan.rows = static_cast<int>(logits.num_rows());
  cut_row(logits, plan);
  plan.aligned = rows_are_aligned(logits) && (!grad || rows_are_aligned(*grad));
  const int64_t part_bytes = plan.part_columns * logits.element_size();
  const int64_t shared = kScratchBytes + part_bytes + kPackBytes;
  plan.resident = limits.major >= 9 && shared <= limits.shared_per_block &&
                  (!grad || rows_share_alignment(logits, *grad));
  if (plan.resident) {
    plan.slot_bytes = static_cast<int>(part_bytes + kPackBytes);
    plan.shared_bytes = static_cast<int>(shared);
  }
  return plan;
}

}  // namespace onepass
