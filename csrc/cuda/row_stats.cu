// One thread block per row, one pass: each thread keeps the statistics of its columns, a fixed tree
// joins them. Which thread takes a column follows from the width alone, never from alignment.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "row_stats.h"

namespace onepass {
namespace {

constexpr int kThreadsPerRow = 512;
constexpr int kWarpSize = 32;
constexpr int kLoadBytes = 16;
constexpr unsigned kWholeWarp = 0xffffffffu;

using Stats = OnlineSoftmax<float>;

__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }

template <class Element>
struct alignas(kLoadBytes) Pack {
  static constexpr int kSize = kLoadBytes / sizeof(Element);
  Element x[kSize];
};

// Columns beyond the row are left unset; `count` says how many are in it.
template <class Element, bool kAligned>
__device__ Pack<Element> load_pack(const Element* from, int count) {
  if (kAligned && count == Pack<Element>::kSize) {
    return *reinterpret_cast<const Pack<Element>*>(from);
  }
  Pack<Element> pack;
#pragma unroll
  for (int i = 0; i < Pack<Element>::kSize; ++i) {
    if (i < count) pack.x[i] = from[i];
  }
  return pack;
}

// Products are rounded before the maximum is subtracted: z is float32 by contract.
__device__ float effective_logit(float x, float inv_temperature, float softcap) {
  if (softcap > 0.0f) x = __fmul_rn(softcap, tanhf(x / softcap));
  return __fmul_rn(inv_temperature, x);
}

// The maximum is over all columns; the sums leave the target out, unless it is NaN.
template <class Element, bool kAligned>
__device__ Stats thread_stats(const Element* row, int64_t width, int64_t target,
                              float inv_temperature, float softcap) {
  constexpr int kSize = Pack<Element>::kSize;
  Stats stats;
  for (int64_t start = int64_t{threadIdx.x} * kSize; start < width;
       start += int64_t{kThreadsPerRow} * kSize) {
    const int64_t left = width - start;
    const int count = left < kSize ? static_cast<int>(left) : kSize;
    const Pack<Element> pack = load_pack<Element, kAligned>(row + start, count);
    float z[kSize];
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      z[i] = i < count ? effective_logit(widen(pack.x[i]), inv_temperature, softcap) : -INFINITY;
      largest = fmaxf(largest, z[i]);
    }
    stats.raise_max(largest);
    const float base = stats.base();
    float sum = 0.0f, weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const bool left_out = start + i == target && !isnan(z[i]);
      const float exponent = left_out ? -INFINITY : z[i] - base;
      const float e = expf(exponent);
      sum += e;
      weighted += e == 0.0f ? 0.0f : exponent * e;
    }
    stats.add(sum, weighted);
  }
  return stats;
}

__device__ Stats from_lane_below(const Stats& stats, int distance) {
  Stats other;
  other.max = __shfl_down_sync(kWholeWarp, stats.max, distance);
  other.sum = __shfl_down_sync(kWholeWarp, stats.sum, distance);
  other.weighted = __shfl_down_sync(kWholeWarp, stats.weighted, distance);
  return other;
}

// The joined statistics of the block, in thread 0.
__device__ Stats block_stats(Stats stats) {
  constexpr int kWarps = kThreadsPerRow / kWarpSize;
  __shared__ float max[kWarps], sum[kWarps], weighted[kWarps];
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    stats.merge(from_lane_below(stats, distance));
  }
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // The row before may still be reading.
  __syncthreads();
  if (lane == 0) {
    max[warp] = stats.max;
    sum[warp] = stats.sum;
    weighted[warp] = stats.weighted;
  }
  __syncthreads();
  if (warp == 0) {
    stats = Stats();
    if (lane < kWarps) {
      stats.max = max[lane];
      stats.sum = sum[lane];
      stats.weighted = weighted[lane];
    }
    for (int distance = kWarps / 2; distance > 0; distance /= 2) {
      stats.merge(from_lane_below(stats, distance));
    }
  }
  return stats;
}

template <class Element, bool kAligned>
__global__ void __launch_bounds__(kThreadsPerRow)
    row_stats_kernel(LogitsView logits, const int64_t* token_ids, RowScale scale, float* stats) {
  const int64_t rows = logits.num_rows();
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const int64_t id = token_ids[n];
    Stats joined;
    joined.max = 0.0f;
    float target = 0.0f;
    if (id != kIgnoredId) {
      const Element* row = reinterpret_cast<const Element*>(logits.row(n));
      const float inv_temperature = scale.inv_temperature(n);
      joined = block_stats(
          thread_stats<Element, kAligned>(row, logits.width, id, inv_temperature, scale.softcap));
      if (isnan(joined.sum)) joined.max = NAN;
      if (id >= 0) target = effective_logit(widen(row[id]), inv_temperature, scale.softcap);
    }
    if (threadIdx.x == 0) {
      stats[n] = joined.max;
      stats[rows + n] = joined.sum;
      stats[2 * rows + n] = joined.weighted;
      stats[3 * rows + n] = target;
    }
  }
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Makes a device current and restores the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

bool rows_are_aligned(const LogitsView& logits) {
  const int64_t size = logits.element_size();
  return logits.data % kLoadBytes == 0 && logits.outer_stride * size % kLoadBytes == 0 &&
         logits.inner_stride * size % kLoadBytes == 0;
}

template <class Element>
void launch(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale, float* stats,
            cudaStream_t stream) {
  constexpr int64_t kLargestGrid = 0x7fffffff;
  const dim3 grid(static_cast<unsigned>(std::min(logits.num_rows(), kLargestGrid)));
  const auto kernel =
      rows_are_aligned(logits) ? row_stats_kernel<Element, true> : row_stats_kernel<Element, false>;
  kernel<<<grid, kThreadsPerRow, 0, stream>>>(logits, token_ids, scale, stats);
  check(cudaGetLastError(), "row_stats launch");
}

}  // namespace

void row_stats_cuda(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                    float* stats, int device, uintptr_t stream) {
  if (logits.num_rows() == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  switch (logits.dtype) {
    case DType::kFloat32:
      return launch<float>(logits, token_ids, scale, stats, cuda_stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(logits, token_ids, scale, stats, cuda_stream);
    case DType::kFloat16:
      return launch<__half>(logits, token_ids, scale, stats, cuda_stream);
  }
}

}  // namespace onepass
