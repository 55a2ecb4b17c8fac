// What every launch shares: errors in words, the device made current, limits asked for once.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "plan.h"

namespace onepass {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // Errors of a launch stay behind and would be reported again by the next caller's check.
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current and restores the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "asking for the current CUDA device");
    check_cuda(cudaSetDevice(device), "making the CUDA device of the logits current");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// A device, made current for as long as this lives, and the stream that its work goes to.
struct Launcher {
  DeviceGuard guard;
  int device;
  cudaStream_t stream;
  const char* what;  // the operation, for errors

  Launcher(int device, uintptr_t stream, const char* what)
      : guard(device),
        device(device),
        stream(reinterpret_cast<cudaStream_t>(stream)),
        what(what) {}

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), what);
    return value;
  }

  DeviceLimits limits() const {
    return {attribute(cudaDevAttrComputeCapabilityMajor),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  }

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), int blocks, size_t shared_bytes,
           const Arguments&... arguments) const {
    if (blocks == 0) return;
    launch(kernel, blocks, shared_bytes, nullptr, 0, arguments...);
  }

  // As many clusters as the device holds at a time, but no more than `most`.
  template <class... Parameters, class... Arguments>
  void run_clusters(void (*kernel)(Parameters...), int most, int cluster_blocks,
                    size_t shared_bytes, const Arguments&... arguments) const {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(cluster_blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    const int held = clusters_held(reinterpret_cast<const void*>(kernel), cluster, shared_bytes);
    launch(kernel, (most < held ? most : held) * cluster_blocks, shared_bytes, &cluster, 1,
           arguments...);
  }

 private:
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int blocks, size_t shared_bytes,
              cudaLaunchAttribute* attributes, int num_attributes,
              const Arguments&... arguments) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = static_cast<unsigned>(num_attributes);
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
  }

  // Asked for once a kernel, device, cluster and size; allows the kernel that much shared memory.
  int clusters_held(const void* kernel, cudaLaunchAttribute cluster, size_t shared_bytes) const {
    using Key = std::tuple<const void*, int, unsigned, size_t>;
    static std::map<Key, int> known;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const Key key = {kernel, device, cluster.val.clusterDim.x, shared_bytes};
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    // All that a block can have, so that no order of calls ever lowers it.
    const int allowed = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed), what);
    // Otherwise the driver may leave shared memory for one block only, and the rest to the cache.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               what);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster.val.clusterDim.x);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int held = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&held, kernel, &config), what);
    if (held == 0) {
      throw std::runtime_error(std::string(what) + ": expected room for a cluster of " +
                               std::to_string(cluster.val.clusterDim.x) + " blocks on the GPU");
    }
    return known[key] = held;
  }
};

}  // namespace onepass
