#include "row_kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define ONEPASS_LEVEL kRowKernelsAvx2
#define ONEPASS_LEVEL_NAME "avx2"
#define ONEPASS_VECTOR_BYTES 32
#include "row_kernels_impl.h"
#endif
