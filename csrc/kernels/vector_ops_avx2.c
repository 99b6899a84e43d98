#if defined(__x86_64__)
#define VEC_AVX2
#define TABLE zmoe_vector_ops_avx2
#include "vector_ops_body.h"
#endif
