// Which instruction set the row kernels run on.
#include <atomic>
#include <stdexcept>

#include "row_driver.h"

namespace onepass {
namespace {

// Best first.
std::vector<const RowKernels*> supported_kernels() {
  std::vector<const RowKernels*> supported;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) supported.push_back(&kRowKernelsAvx512);
  if (avx2) supported.push_back(&kRowKernelsAvx2);
#endif
  supported.push_back(&kRowKernelsBaseline);
  return supported;
}

std::atomic<const RowKernels*>& chosen() {
  static std::atomic<const RowKernels*> kernels{supported_kernels().front()};
  return kernels;
}

}  // namespace

const RowKernels& row_kernels() { return *chosen().load(); }

std::vector<std::string> supported_cpu_levels() {
  std::vector<std::string> names;
  for (const RowKernels* kernels : supported_kernels()) names.push_back(kernels->name);
  return names;
}

std::string cpu_level() { return row_kernels().name; }

void set_cpu_level(const std::string& name) {
  std::string known;
  for (const RowKernels* kernels : supported_kernels()) {
    if (name == kernels->name) return chosen().store(kernels);
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("cpu level: expected one of " + known + ", got '" + name + "'");
}

}  // namespace onepass
