// What tests set: the order of threads and the device that launches see.
#include <cuda_runtime.h>

#pragma GCC visibility push(default)
extern "C" {

void emulation_set_seed(uint64_t seed) { emulation::set_seed(seed); }

void emulation_set_device(int major, int minor, int multiprocessors) {
  emulation::device.major = major;
  emulation::device.minor = minor;
  emulation::device.multiprocessors = multiprocessors;
  const bool hopper = major >= 9;
  emulation::device.shared_bytes_per_block = (hopper ? 227 : 163) << 10;
  emulation::device.shared_bytes = (hopper ? 228 : 164) << 10;
  emulation::allowed_shared_bytes.clear();
}
}
