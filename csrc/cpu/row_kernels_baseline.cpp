// x86-64 without extensions, or the NEON that every aarch64 has.
#include "row_kernels.h"

#define ONEPASS_LEVEL kRowKernelsBaseline
#define ONEPASS_LEVEL_NAME "baseline"
#define ONEPASS_VECTOR_BYTES 16
#include "row_kernels_impl.h"
