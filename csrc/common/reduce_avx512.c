/* The sum of partial outputs with AVX-512. */
#include "reduce_variants.h"

#ifdef ZMOE_X86
#define VEC_AVX512
#include "reduce_body.h"

TARGET size_t zmoe_reduce_avx512(unsigned char *out, zmoe_dtype out_dtype,
                                 const unsigned char *const *parts, uint32_t n_parts,
                                 zmoe_dtype part_dtype, size_t count) {
  return reduce_dispatch(out, out_dtype, parts, n_parts, part_dtype, count);
}
#endif
