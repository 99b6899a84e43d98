/* GEMV, AVX2 with FMA. */
#if defined(__x86_64__)
#define TABLE zmoe_kernels_avx2
#define VEC_AVX2
#include "common/vec.h"

#include "avx2_gemv.h"
#endif
