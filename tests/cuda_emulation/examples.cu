// Small kernels, each right or with one fault, to show that the emulation finds such a fault.
#include "primitives.h"

#include <cstring>

namespace {

using namespace onepass;

constexpr int kThreads = 64;
constexpr int kRowBytes = kThreads * static_cast<int>(sizeof(float));

float* row() { return reinterpret_cast<float*>(shared_memory()); }
Barrier* barrier() { return reinterpret_cast<Barrier*>(shared_memory() + kRowBytes); }

// Each thread doubles what another one wrote to shared memory.
void reverse(bool faulty, const float* in, float* out) {
  row()[thread_index()] = in[thread_index()];
  if (!faulty) block_sync();
  out[thread_index()] = 2.0f * row()[kThreads - 1 - thread_index()];
}

// Half of the threads miss a barrier.
void diverge(bool faulty, const float* in, float* out) {
  out[thread_index()] = 2.0f * in[kThreads - 1 - thread_index()];
  if (!faulty || thread_index() < kThreads / 2) block_sync();
}

void set_up_barrier() {
  if (thread_index() == 0) {
    barrier_init(barrier(), 1);
    publish_barriers();
  }
  block_sync();
}

void use_before_arrival(bool faulty, const float* in, float* out) {
  set_up_barrier();
  if (thread_index() == 0) {
    barrier_arrive_expecting(barrier(), kRowBytes);
    bulk_load(row(), in, kRowBytes, barrier());
  }
  if (!faulty) barrier_wait(barrier(), 0);
  out[thread_index()] = 2.0f * row()[kThreads - 1 - thread_index()];
  if (faulty) barrier_wait(barrier(), 0);
}

void wait_for_too_many_bytes(bool faulty, const float* in, float* out) {
  set_up_barrier();
  if (thread_index() == 0) {
    barrier_arrive_expecting(barrier(), kRowBytes + (faulty ? 16 : 0));
    bulk_load(row(), in, kRowBytes, barrier());
  }
  barrier_wait(barrier(), 0);
  out[thread_index()] = 2.0f * row()[kThreads - 1 - thread_index()];
}

void overwrite_before_read(bool faulty, const float* in, float* out) {
  row()[thread_index()] = 2.0f * in[kThreads - 1 - thread_index()];
  fence_before_bulk();
  block_sync();
  if (thread_index() == 0) {
    bulk_store(out, row(), kRowBytes);
    bulk_close_group();
    if (!faulty) bulk_wait_read<0>();
  }
  block_sync();
  row()[thread_index()] = -1.0f;
  if (thread_index() == 0) bulk_wait_read<0>();
}

void store_without_fence(bool faulty, const float* in, float* out) {
  row()[thread_index()] = 2.0f * in[kThreads - 1 - thread_index()];
  if (!faulty) fence_before_bulk();
  block_sync();
  if (thread_index() == 0) {
    bulk_store(out, row(), kRowBytes);
    bulk_close_group();
    bulk_wait_read<0>();
  }
}

void write_beyond_shared(bool faulty, const float* in, float* out) {
  row()[thread_index() + (faulty ? kThreads : 0)] = 0.0f;
  out[thread_index()] = 2.0f * in[kThreads - 1 - thread_index()];
}

// Run by a cluster of two blocks: each sends its half of the row to both.
void exchange(bool faulty, const float* in, float* out) {
  set_up_barrier();
  cluster_arrive();
  cluster_wait();
  constexpr int kPacks = kThreads / 4, kHalf = kPacks / 2;
  if (thread_index() < kPacks) {
    const int own = thread_index() % kHalf + cluster_rank() * kHalf;
    Pack pack;
    std::memcpy(&pack, in + 4 * own, sizeof(pack));
    send_to_block(reinterpret_cast<Pack*>(row()) + own, thread_index() / kHalf, pack, barrier());
  }
  if (thread_index() == 0) barrier_arrive_expecting(barrier(), kRowBytes);
  if (!faulty) barrier_wait(barrier(), 0);
  out[thread_index()] = 2.0f * row()[kThreads - 1 - thread_index()];
  if (faulty) barrier_wait(barrier(), 0);
}

void send_before_start(bool faulty, const float* in, float* out) {
  set_up_barrier();
  cluster_arrive();
  if (!faulty) cluster_wait();
  if (thread_index() == 0) {
    Pack pack = {};
    send_to_block(reinterpret_cast<Pack*>(row()), 1 - cluster_rank(), pack, barrier());
    barrier_arrive_expecting(barrier(), sizeof(pack));
    barrier_wait(barrier(), 0);
  }
  if (faulty) cluster_wait();
  out[thread_index()] = 2.0f * in[kThreads - 1 - thread_index()];
}

void leave_before_arrival(bool faulty, const float* in, float* out) {
  set_up_barrier();
  cluster_arrive();
  cluster_wait();
  Pack pack = {};
  if (cluster_rank() == 1 && thread_index() == 0) {
    send_to_block(reinterpret_cast<Pack*>(row()), 0, pack, barrier());
  }
  out[thread_index()] = 2.0f * in[kThreads - 1 - thread_index()];
  if (faulty || cluster_rank() == 1) return;
  if (thread_index() == 0) barrier_arrive_expecting(barrier(), sizeof(pack));
  barrier_wait(barrier(), 0);
}

struct Example {
  const char* name;
  void (*kernel)(bool, const float*, float*);
  unsigned cluster;
  int shared_bytes;
};

constexpr Example kExamples[] = {
    {"reverse", reverse, 1, kRowBytes},
    {"diverge", diverge, 1, kRowBytes},
    {"use_before_arrival", use_before_arrival, 1, kRowBytes + 8},
    {"wait_for_too_many_bytes", wait_for_too_many_bytes, 1, kRowBytes + 8},
    {"overwrite_before_read", overwrite_before_read, 1, kRowBytes},
    {"store_without_fence", store_without_fence, 1, kRowBytes},
    {"write_beyond_shared", write_beyond_shared, 1, kRowBytes},
    {"exchange", exchange, 2, kRowBytes + 8},
    {"send_before_start", send_before_start, 2, kRowBytes + 8},
    {"leave_before_arrival", leave_before_arrival, 2, kRowBytes + 8},
};

}  // namespace

#pragma GCC visibility push(default)

// Runs an example on 64 numbers; it is to write twice the numbers in reverse. Returns "" or why the
// launch failed.
extern "C" const char* run_example(const char* name, bool faulty, const float* in, float* out) {
  for (const Example& example : kExamples) {
    if (std::strcmp(example.name, name) != 0) continue;
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {example.cluster, 1, 1};
    cudaLaunchConfig_t config;
    config.gridDim = example.cluster;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = static_cast<size_t>(example.shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, example.kernel, faulty, in, out);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  }
  return "no such example";
}
