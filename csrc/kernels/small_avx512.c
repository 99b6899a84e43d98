#if defined(__x86_64__)
#define VEC_AVX512
#define SMALL zmoe_small_avx512
#include "small_body.h"
#endif
