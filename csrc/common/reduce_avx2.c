/* The sum of partial outputs with AVX2 and F16C. */
#include "reduce_variants.h"

#ifdef ZMOE_X86
#define VEC_AVX2
#include "reduce_body.h"

TARGET size_t zmoe_reduce_avx2(unsigned char *out, zmoe_dtype out_dtype,
                               const unsigned char *const *parts, uint32_t n_parts,
                               zmoe_dtype part_dtype, size_t count) {
  return reduce_dispatch(out, out_dtype, parts, n_parts, part_dtype, count);
}
#endif
