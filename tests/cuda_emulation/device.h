// What device code finds in CUDA without a header: its position, barriers, warp operations, atomics
// and arithmetic intrinsics.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "bulk_copies.h"

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

using dim3 = emulation::Dim3;

using emulation::blockDim;
using emulation::blockIdx;
using emulation::gridDim;
using emulation::threadIdx;
constexpr int warpSize = emulation::kWarpSize;

inline void __syncthreads() {
  emulation::Block& block = *emulation::current->block;
  emulation::meet(block.barrier, emulation::launch_shape().block.count(), "__syncthreads");
}

namespace emulation {

inline unsigned lane() { return current->rank % kWarpSize; }

// All lanes of the mask show `value` and read what lane `source` has shown.
template <class Value>
Value exchange(unsigned mask, Value value, const char* operation, unsigned source) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  if (!(mask >> lane() & 1)) fail(std::string(operation) + ": the mask lacks the calling lane");
  if (!(mask >> source & 1)) fail(std::string(operation) + ": reads a lane outside the mask");
  WarpExchange& warp = current->block->warps[{current->rank / kWarpSize, mask}];
  const unsigned half = warp.meeting.round % 2;
  if (warp.meeting.arrived == 0) warp.operation[half] = operation;
  if (std::strcmp(warp.operation[half], operation) != 0) {
    fail(std::string("lanes of a warp meet in ") + operation + " and " + warp.operation[half]);
  }
  std::memcpy(&warp.shown[half][lane()], &value, sizeof(Value));
  meet(warp.meeting, static_cast<unsigned>(__builtin_popcount(mask)), operation);
  std::memcpy(&value, &warp.shown[half][source], sizeof(Value));
  return value;
}

// What each lane of the mask shows, folded in the order of the lanes.
template <class Value, class Fold>
Value fold_lanes(unsigned mask, Value value, const char* operation, Fold fold) {
  WarpExchange& warp = current->block->warps[{current->rank / kWarpSize, mask}];
  const unsigned half = warp.meeting.round % 2;
  exchange(mask, value, operation, lane());
  bool first = true;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    Value other;
    std::memcpy(&other, &warp.shown[half][i], sizeof(Value));
    value = first ? other : fold(value, other);
    first = false;
  }
  return value;
}

// The lane at `source` if it is in the calling lane's segment, else the calling lane.
inline unsigned within(int source, int width) {
  const int own = static_cast<int>(lane()), first = own / width * width;
  return static_cast<unsigned>(source >= first && source < first + width ? source : own);
}

}  // namespace emulation

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::exchange(mask, 0, "__syncwarp", emulation::lane());
}
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = warpSize) {
  const int first = static_cast<int>(emulation::lane()) / width * width;
  return emulation::exchange(mask, value, "__shfl_sync",
                             static_cast<unsigned>(first + source % width));
}
template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, int delta, int width = warpSize) {
  const int own = static_cast<int>(emulation::lane());
  return emulation::exchange(mask, value, "__shfl_down_sync",
                             emulation::within(own + delta, width));
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int delta, int width = warpSize) {
  const int own = static_cast<int>(emulation::lane());
  return emulation::exchange(mask, value, "__shfl_up_sync", emulation::within(own - delta, width));
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int bits, int width = warpSize) {
  const int own = static_cast<int>(emulation::lane());
  return emulation::exchange(mask, value, "__shfl_xor_sync", emulation::within(own ^ bits, width));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned own = predicate ? 1u << emulation::lane() : 0u;
  return emulation::fold_lanes(mask, own, "__ballot_sync",
                               [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulation::yield("__nanosleep"); }

template <class Value, class Operand>
Value atomicAdd(Value* at, Operand value) {
  const Value before = *at;
  *at = before + static_cast<Value>(value);
  return before;
}
template <class Value, class Operand>
Value atomicMax(Value* at, Operand value) {
  const Value before = *at;
  *at = std::max(before, static_cast<Value>(value));
  return before;
}
template <class Value, class Operand>
Value atomicExch(Value* at, Operand value) {
  const Value before = *at;
  *at = static_cast<Value>(value);
  return before;
}

template <class Value>
Value __ldg(const Value* at) {
  return *at;
}
template <class Value>
Value __ldcs(const Value* at) {
  return *at;
}
template <class Value>
void __stcs(Value* at, Value value) {
  *at = value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
inline size_t __cvta_generic_to_shared(const void* at) { return reinterpret_cast<size_t>(at); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
