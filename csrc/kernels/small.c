/* The small operations with what every CPU has, and which variant runs. */
#define SMALL zmoe_small_generic
#include "small_body.h"

const zmoe_small *zmoe_small_for(zmoe_isa isa) {
#if defined(__x86_64__)
  if (isa == ZMOE_ISA_AVX2)
    return &zmoe_small_avx2;
  if (isa == ZMOE_ISA_AVX512 || isa == ZMOE_ISA_AVX512_BF16)
    return &zmoe_small_avx512;
#endif
  (void)isa;
  return &zmoe_small_generic;
}
