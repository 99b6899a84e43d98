/* GEMV of codes with x in 22 bits, for AVX-512 with VNNI in registers of 256 bits: layout_for in
 * avx512_vnni.c says of which. */
#if defined(__x86_64__)
#define TABLE zmoe_kernels_vnni256
#define OTHERS zmoe_kernels_avx2
#define VEC_AVX2
#include "common/vec.h"

#undef TARGET
#define TARGET __attribute__((target("avx2,fma,f16c,avx512vl,avx512vnni")))
#define DOT4
KERNEL __m256i dot4(__m256i sum, __m256i a, __m256i b) {
  return _mm256_dpbusd_epi32(sum, a, b);
}

#include "avx2_gemv.h"
#endif
