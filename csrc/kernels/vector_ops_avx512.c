#if defined(__x86_64__)
#define VEC_AVX512
#define TABLE zmoe_vector_ops_avx512
#include "vector_ops_body.h"
#endif
