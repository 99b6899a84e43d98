/* GEMV of 4-bit codes, and of 8-bit x, AVX2 with VNNI; all else as AVX2 has it. */
#if defined(__x86_64__)
#include "kernels.h"

#ifdef ZMOE_AVX_VNNI
#define TABLE zmoe_kernels_avx_vnni
#define OTHERS zmoe_kernels_avx2
#define VEC_AVX2
#include "common/vec.h"

#undef TARGET
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define DOT4
KERNEL __m256i dot4(__m256i sum, __m256i a, __m256i b) {
  return _mm256_dpbusd_avx_epi32(sum, a, b);
}

#include "avx2_gemv.h"
#endif
#endif
