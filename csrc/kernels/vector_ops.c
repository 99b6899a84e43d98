/* Vector operations with what every CPU has, and which variant runs. */
#define TABLE zmoe_vector_ops_generic
#include "vector_ops_body.h"

static const zmoe_vector_ops *const VARIANTS[ZMOE_ISAS] = {
    [ZMOE_ISA_GENERIC] = &zmoe_vector_ops_generic,
#if defined(__x86_64__)
    [ZMOE_ISA_AVX2] = &zmoe_vector_ops_avx2,
    [ZMOE_ISA_AVX512] = &zmoe_vector_ops_avx512,
#endif
};

const zmoe_vector_ops *zmoe_vector_ops_for(zmoe_isa isa) {
  return ZMOE_VARIANT(VARIANTS, isa);
}
