/* GEMV, NEON with dotprod. */
#if defined(__aarch64__)
#define TABLE zmoe_kernels_neon_dot
#include "common/vec.h"

/* Before 16, clang has the intrinsic only where the whole file may use it; without
 * it the table is slower, not wrong. */
#if !defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD)
#define DOT4
#undef TARGET
#ifdef __clang__
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
KERNEL int32x4_t dot4(int32x4_t sum, int8x16_t a, int8x16_t b) {
  return vdotq_s32(sum, a, b);
}
#endif

#include "neon_gemv.h"
#endif
