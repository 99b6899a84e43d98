/* GEMV, NEON as every 64-bit Arm CPU has it. */
#if defined(__aarch64__)
#define TABLE zmoe_kernels_neon
#include "common/vec.h"

#include "neon_gemv.h"
#endif
