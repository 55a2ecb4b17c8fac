#include "row_kernels.h"

#if defined(__x86_64__)
// GCC 12 sees its own _mm512_undefined_ps() as uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define ONEPASS_LEVEL kRowKernelsAvx512
#define ONEPASS_LEVEL_NAME "avx512"
#define ONEPASS_VECTOR_BYTES 64
#include "row_kernels_impl.h"
#endif
