// The part of the CUDA runtime that csrc/cuda calls. Launches run at once, in the calling thread's
// time, on one of a few small devices.
#pragma once

#include <cstdlib>
#include <map>
#include <tuple>

#include "../device.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {

constexpr size_t kSharedBytesWithoutOptIn = 48 << 10;
constexpr size_t kReservedSharedBytes = 1 << 10;

struct Device {
  int major;
  int multiprocessors;
  int shared_bytes_per_block;
  int shared_bytes;
};

constexpr Device kDevices[] = {
    {9, 4, 227 << 10, 228 << 10},
    {9, 7, 227 << 10, 228 << 10},
    {8, 2, 163 << 10, 164 << 10},
    {10, 5, 227 << 10, 228 << 10},
};
constexpr int kNumDevices = sizeof(kDevices) / sizeof(Device);

inline int current_device = 0;
inline const Device& device() { return kDevices[current_device]; }
inline std::string last_failure;
inline std::map<const void*, size_t> allowed_shared_bytes;

template <class Kernel>
const void* key(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

inline size_t allowed_for(const void* kernel) {
  const auto found = allowed_shared_bytes.find(kernel);
  return found == allowed_shared_bytes.end() ? kSharedBytesWithoutOptIn : found->second;
}

inline unsigned cluster_size(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) return attribute.val.clusterDim.x;
  }
  return 1;
}

inline int blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  const int by_threads = 2048 / threads;
  const int by_shared =
      static_cast<int>(static_cast<size_t>(device().shared_bytes) / (shared_bytes + kReservedSharedBytes));
  return std::min(by_threads, by_shared);
}

}  // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::kNumDevices) return cudaErrorInvalidDevice;
  emulation::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device";
    default:
      return emulation::last_failure.c_str();
  }
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  const emulation::Device& device = emulation::kDevices[number];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_bytes;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_bytes_per_block;
      break;
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > emulation::device().shared_bytes_per_block) return cudaErrorInvalidValue;
  emulation::allowed_shared_bytes[emulation::key(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads,
                                                          size_t shared_bytes) {
  *blocks = emulation::blocks_per_multiprocessor(threads, shared_bytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*,
                                           const cudaLaunchConfig_t* config) {
  const int threads = static_cast<int>(config->blockDim.count());
  const int blocks = emulation::device().multiprocessors *
                     emulation::blocks_per_multiprocessor(threads, config->dynamicSmemBytes);
  *clusters = blocks / static_cast<int>(emulation::cluster_size(*config));
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned cluster = emulation::cluster_size(*config);
  const bool portable = cluster <= 8 && (cluster & (cluster - 1)) == 0;
  if (config->gridDim.count() == 0 || config->blockDim.count() > 1024 || !portable ||
      config->gridDim.x % cluster || (cluster > 1 && emulation::device().major < 9) ||
      config->dynamicSmemBytes > emulation::allowed_for(emulation::key(kernel))) {
    return cudaErrorInvalidValue;
  }
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  const emulation::LaunchShape shape = {config->gridDim, config->blockDim, cluster,
                                        config->dynamicSmemBytes};
  try {
    emulation::run_launch(shape, [&] { std::apply(kernel, values); });
  } catch (const std::exception& error) {
    emulation::last_failure = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
