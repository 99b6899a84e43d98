#if defined(__x86_64__)
#define VEC_AVX2
#define SMALL zmoe_small_avx2
#include "small_body.h"
#endif
