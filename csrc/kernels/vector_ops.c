/* Vector operations with what every CPU has, and which variant runs. */
#define TABLE zmoe_vector_ops_generic
#include "vector_ops_body.h"

const zmoe_vector_ops *zmoe_vector_ops_for(zmoe_isa isa) {
#if defined(__x86_64__)
  if (isa == ZMOE_ISA_AVX2)
    return &zmoe_vector_ops_avx2;
  if (isa == ZMOE_ISA_AVX512 || isa == ZMOE_ISA_AVX512_BF16)
    return &zmoe_vector_ops_avx512;
#endif
  (void)isa;
  return &zmoe_vector_ops_generic;
}
