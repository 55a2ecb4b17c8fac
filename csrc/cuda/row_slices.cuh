// A run of bytes of a row at any address: the whole, aligned packs in its middle and the loose elements
// around them.
#pragma once

#include "row_math.cuh"

namespace onepass {

// Counted in bytes from the multiple of 16 at or below its address, as it lies in a slot.
struct Slice {
  const char* from;  // first byte of its logits
  char* to;          // of its gradient, which shares `lead`
  int lead;          // where it starts
  int end;           // where it ends

  // The whole packs: [inner_begin, inner_end).
  __device__ int inner_begin() const {
    const int aligned = (lead + kPackBytes - 1) / kPackBytes * kPackBytes;
    return aligned < end ? aligned : end;
  }
  __device__ int inner_end() const {
    const int aligned = end / kPackBytes * kPackBytes;
    return aligned > inner_begin() ? aligned : inner_begin();
  }
};

__device__ inline Slice slice_at(const char* from, char* to, int bytes) {
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(from) % kPackBytes);
  return {from, to, lead, lead + bytes};
}

// Calls copy(byte) for the loose elements of a slice in [begin, end), on the lanes of one warp: there
// are at most 7 before the whole packs and 7 after them.
template <class Bits, class Copy>
__device__ void for_loose_elements(const Slice& slice, int begin, int end, const Copy& copy) {
  constexpr int kMost = kPackBytes / sizeof(Bits);
  const int lane = lane_index();
  if (lane >= 2 * kMost) return;
  const bool before = lane < kMost;
  const int first = before ? slice.lead : slice.inner_end();
  const int last = before ? slice.inner_begin() : slice.end;
  const int at = first + (lane % kMost) * static_cast<int>(sizeof(Bits));
  if (at < last && at >= begin && at < end) copy(at);
}

// Zeros for the gradient of a slice, by the whole block.
template <class Bits>
__device__ void write_zeros(const Slice& slice) {
  if (warp_index() == 0) {
    for_loose_elements<Bits>(slice, 0, slice.end, [&](int at) {
      *reinterpret_cast<Bits*>(slice.to + (at - slice.lead)) = 0;
    });
  }
#pragma unroll 1
  for (int at = slice.inner_begin() + thread_index() * kPackBytes; at < slice.inner_end();
       at += kThreads * kPackBytes) {
    *reinterpret_cast<Pack*>(slice.to + (at - slice.lead)) = {};
  }
}

}  // namespace onepass
