// What the kernels ask of the hardware, one small function each. Kernels use nothing of CUDA but the
// function qualifiers and what is declared here, so that another version of this file can run them
// elsewhere.
#pragma once

#include <cstdint>

namespace onepass {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// 16 bytes, what one thread loads or stores at once.
struct alignas(16) Pack {
  uint32_t word[4];
};

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x / 32u); }
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x % 32u); }
__device__ inline int block_index() { return static_cast<int>(blockIdx.x); }
__device__ inline int block_count() { return static_cast<int>(gridDim.x); }

// The dynamic shared memory of the block, aligned to 128 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

__device__ inline void block_sync() { __syncthreads(); }
__device__ inline void warp_sync() { __syncwarp(); }

// The value that the lane with number (own lane ^ mask) has.
template <class Value>
__device__ inline Value from_lane_across(Value value, int mask) {
  return __shfl_xor_sync(kWholeWarp, value, mask);
}

// Returns the counter as it was before; integer, so that the order does not matter.
__device__ inline void add_to_counter(unsigned long long* counter, unsigned long long value) {
  atomicAdd(counter, value);
}

// 2^x to 2 ulp, results below the normal range 0.
__device__ inline float exp2_approximately(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// One rounding each, never contracted with a neighbour.
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The larger; NaN if either is, unlike fmaxf.
__device__ inline float larger_or_nan(float a, float b) {
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(b));
  return largest;
}

// The same of two 16-bit numbers in a word.
__device__ inline uint32_t larger_or_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t largest;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
  return largest;
}

__device__ inline uint32_t larger_or_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t largest;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
  return largest;
}

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t as_bits(float x) { return __float_as_uint(x); }

__device__ inline float from_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// To nearest even; `low` is the column at the lower address.
__device__ inline uint32_t to_bf16x2(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ inline uint32_t to_f16x2(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// A barrier in shared memory that bulk loads and sends complete. Its phases have parity 0, 1, 0...
using Barrier = uint64_t;

// Clusters and bulk copies exist from compute capability 9.0 on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define ONEPASS_HAS_CLUSTERS 1
#else
#define ONEPASS_HAS_CLUSTERS 0
#endif

#if ONEPASS_HAS_CLUSTERS

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ inline int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// The two halves of a barrier of all threads of the cluster, each thread once and in turn. What was
// written before an arrive, in shared memory of any block, is seen after the wait.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// By one thread; publish_barriers and a sync come before any other thread uses it.
__device__ inline void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and has the phase wait for that many bytes, which may be none or have come already.
__device__ inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Returns once the phase of that parity is over; what bulk loads wrote in it is then seen.
__device__ inline void barrier_wait(Barrier* barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// The same for what other blocks of the cluster sent.
__device__ inline void barrier_wait_for_cluster(Barrier* barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Writes where `shared` lies in the shared memory of block `rank` of the cluster, and counts 16 bytes
// on the barrier that lies where `barrier` does.
__device__ inline void send_to_block(Pack* shared, int rank, const Pack& pack, Barrier* barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 to, counting;\n"
      "mapa.shared::cluster.u32 to, %0, %6;\n"
      "mapa.shared::cluster.u32 counting, %1, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%2, %3, %4, %5}, "
      "[counting];\n"
      "}" ::"r"(shared_address(shared)),
      "r"(shared_address(barrier)), "r"(pack.word[0]), "r"(pack.word[1]), "r"(pack.word[2]),
      "r"(pack.word[3]), "r"(rank)
      : "memory");
}

// Addresses and sizes of bulk copies are multiples of 16.
__device__ inline void bulk_load(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Part of the calling thread's open group of stores.
__device__ inline void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

__device__ inline void bulk_close_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most kPending of the calling thread's groups still read shared memory.
template <int kPending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Orders the calling thread's own accesses to shared memory before bulk copies issued after it, by
// this thread or by one that it synchronises with.
__device__ inline void fence_before_bulk() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif  // ONEPASS_HAS_CLUSTERS

}  // namespace onepass
