// What tests set.
#include "scheduler.h"

#pragma GCC visibility push(default)

extern "C" void emulation_set_seed(uint64_t seed) { emulation::set_seed(seed); }
