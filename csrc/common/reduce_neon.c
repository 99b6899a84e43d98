/* The sum of partial outputs with NEON, which every 64-bit Arm CPU has. */
#include "reduce_variants.h"

#ifdef ZMOE_ARM64
#include "reduce_body.h"

size_t zmoe_reduce_neon(unsigned char *out, zmoe_dtype out_dtype, const unsigned char *const *parts,
                        uint32_t n_parts, zmoe_dtype part_dtype, size_t count) {
  return reduce_dispatch(out, out_dtype, parts, n_parts, part_dtype, count);
}
#endif
