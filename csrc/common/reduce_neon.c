/* The sum of partial outputs with NEON, which every 64-bit Arm CPU has. */
#if defined(__aarch64__)
#define REDUCE zmoe_reduce_neon
#include "reduce_body.h"
#endif
