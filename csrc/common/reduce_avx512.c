/* The sum of partial outputs with AVX-512. */
#if defined(__x86_64__)
#define VEC_AVX512
#define REDUCE zmoe_reduce_avx512
#include "reduce_body.h"
#endif
