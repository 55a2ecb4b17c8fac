// csrc/cuda/primitives.h for the emulation: the same functions, on the fibers of scheduler.h.
//
// Bulk copies take place later than they are issued, as the seed decides. Beyond what a GPU does,
// misuse that a GPU would let pass by chance stops the launch: barriers without init, copies that
// are not aligned or leave shared memory, stores whose source was not fenced.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <cstring>

namespace onepass {

constexpr int kWarpSize = emulation::kWarpSize;
constexpr unsigned kWholeWarp = 0xffffffffu;

struct alignas(16) Pack {
  uint32_t word[4];
};

// --- Threads ---

inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline int warp_index() { return thread_index() / kWarpSize; }
inline int lane_index() { return thread_index() % kWarpSize; }
inline int block_index() { return static_cast<int>(blockIdx.x); }
inline int block_count() { return static_cast<int>(gridDim.x); }
inline char* shared_memory() { return emulation::current->block->dynamic_base; }

inline void block_sync() {
  __syncthreads();
  emulation::note_sync();
}
inline void warp_sync() { __syncwarp(); }

template <class Value>
inline Value from_lane_across(Value value, int mask) {
  return __shfl_xor_sync(kWholeWarp, value, mask);
}

inline void add_to_counter(unsigned long long* counter, unsigned long long value) {
  atomicAdd(counter, value);
}

// --- Numbers ---

// The hardware is allowed to be wrong by 2 ulp; this is wrong by 1, in a direction that depends on
// the argument, wherever the hardware need not be exact.
inline float exp2_approximately(float x) {
  const float power = exp2f(x);
  if (power < FLT_MIN) return 0.0f;
  if (x == 0.0f || !std::isfinite(power)) return power;
  const uint32_t mixed = __float_as_uint(x) * 2654435761u;
  return nextafterf(power, mixed >> 31 ? 0.0f : INFINITY);
}

inline float multiply(float a, float b) { return a * b; }
inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

inline float larger_or_nan(float a, float b) {
  if (a != a || b != b) return NAN;
  return a > b ? a : b;
}

namespace halves {

template <class Widen>
uint32_t larger_or_nan(uint32_t a, uint32_t b, const Widen& widen) {
  uint32_t largest = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    const float wide_x = widen(x), wide_y = widen(y);
    uint16_t larger = wide_x > wide_y ? x : y;
    if (wide_x != wide_x || wide_y != wide_y) larger = 0x7fff;
    largest |= static_cast<uint32_t>(larger) << shift;
  }
  return largest;
}

inline uint32_t joined(uint16_t low, uint16_t high) {
  return static_cast<uint32_t>(high) << 16 | low;
}

}  // namespace halves

inline float from_f16(uint16_t bits) { return __half2float({bits}); }

inline uint32_t larger_or_nan_bf16x2(uint32_t a, uint32_t b) {
  return halves::larger_or_nan(a, b, [](uint16_t bits) { return __bfloat162float({bits}); });
}
inline uint32_t larger_or_nan_f16x2(uint32_t a, uint32_t b) {
  return halves::larger_or_nan(a, b, from_f16);
}

inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
inline uint32_t as_bits(float x) { return __float_as_uint(x); }

inline uint32_t to_bf16x2(float low, float high) {
  return halves::joined(__float2bfloat16_rn(low).bits, __float2bfloat16_rn(high).bits);
}
inline uint32_t to_f16x2(float low, float high) {
  return halves::joined(__float2half_rn(low).bits, __float2half_rn(high).bits);
}

// --- Clusters and bulk copies ---

#define ONEPASS_HAS_CLUSTERS 1

inline int cluster_rank() { return static_cast<int>(emulation::current->block->rank_in_cluster); }
inline int cluster_size() { return static_cast<int>(emulation::launch_shape().cluster_size); }
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }

using Barrier = uint64_t;

inline void barrier_init(Barrier* barrier, int arrivals) {
  emulation::barrier_init(barrier, arrivals);
}
inline void publish_barriers() {}
inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  emulation::barrier_arrive(barrier, bytes);
}
inline void barrier_wait(Barrier* barrier, int parity) {
  emulation::barrier_wait(barrier, parity);
}
inline void barrier_wait_for_cluster(Barrier* barrier, int parity) {
  emulation::barrier_wait(barrier, parity);
}

inline void send_to_block(Pack* shared, int rank, const Pack& pack, Barrier* barrier) {
  emulation::send_to_block(shared, rank, &pack, sizeof(pack), barrier);
}

inline void bulk_load(void* shared, const void* global, int bytes, Barrier* barrier) {
  emulation::bulk_load(shared, global, bytes, barrier);
}
inline void bulk_store(void* global, const void* shared, int bytes) {
  emulation::bulk_store(global, shared, bytes);
}
inline void bulk_close_group() { emulation::bulk_close_group(); }
template <int kPending>
inline void bulk_wait_read() {
  emulation::bulk_wait_read(kPending);
}
inline void fence_before_bulk() { emulation::current->fenced = true; }

}  // namespace onepass
