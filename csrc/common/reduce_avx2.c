/* The sum of partial outputs with AVX2 and F16C. */
#if defined(__x86_64__)
#define VEC_AVX2
#define REDUCE zmoe_reduce_avx2
#include "reduce_body.h"
#endif
