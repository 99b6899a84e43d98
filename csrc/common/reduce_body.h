/* The loops that the SIMD variants share, each with its own vectors (vec.h).
 * Before including this, define REDUCE, the function's name.
 *
 * The dtypes are constants in each call below, so that the compiler removes
 * the choice from the loops.  Four vectors at a time hide the latency of the
 * additions, whose order is fixed. */
#include "block_body.h"
#include "reduce_variants.h"

KERNEL size_t reduce_body(unsigned char *out, zmoe_dtype out_dtype,
                          const unsigned char *const *parts, uint32_t n_parts,
                          zmoe_dtype part_dtype, size_t count) {
  size_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    VEC a = vec_load(parts[0], i, part_dtype);
    VEC b = vec_load(parts[0], i + LANES, part_dtype);
    VEC c = vec_load(parts[0], i + 2 * LANES, part_dtype);
    VEC d = vec_load(parts[0], i + 3 * LANES, part_dtype);
    for (uint32_t p = 1; p < n_parts; p++) {
      a = a + vec_load(parts[p], i, part_dtype);
      b = b + vec_load(parts[p], i + LANES, part_dtype);
      c = c + vec_load(parts[p], i + 2 * LANES, part_dtype);
      d = d + vec_load(parts[p], i + 3 * LANES, part_dtype);
    }
    vec_store(out, i, out_dtype, a);
    vec_store(out, i + LANES, out_dtype, b);
    vec_store(out, i + 2 * LANES, out_dtype, c);
    vec_store(out, i + 3 * LANES, out_dtype, d);
  }
  for (; i + LANES <= count; i += LANES) {
    VEC a = vec_load(parts[0], i, part_dtype);
    for (uint32_t p = 1; p < n_parts; p++)
      a = a + vec_load(parts[p], i, part_dtype);
    vec_store(out, i, out_dtype, a);
  }
  return i;
}

/* The same for two dtypes that are constants. */
KERNEL size_t reduce_rows(unsigned char *out, zmoe_dtype out_dtype,
                          const unsigned char *const *parts, uint32_t n_parts,
                          zmoe_dtype part_dtype, size_t count) {
  if (out_dtype == ZMOE_Q8 || part_dtype == ZMOE_Q8)
    return blocks_body(out, out_dtype, parts, n_parts, part_dtype, count / ZMOE_Q8_BLOCK);
  return reduce_body(out, out_dtype, parts, n_parts, part_dtype, count);
}

KERNEL size_t reduce_to(unsigned char *out, zmoe_dtype out_dtype, const unsigned char *const *parts,
                        uint32_t n_parts, zmoe_dtype part_dtype, size_t count) {
  switch (part_dtype) {
  case ZMOE_F32:
    return reduce_rows(out, out_dtype, parts, n_parts, ZMOE_F32, count);
  case ZMOE_F16:
    return reduce_rows(out, out_dtype, parts, n_parts, ZMOE_F16, count);
  case ZMOE_BF16:
    return reduce_rows(out, out_dtype, parts, n_parts, ZMOE_BF16, count);
  }
  return reduce_rows(out, out_dtype, parts, n_parts, ZMOE_Q8, count);
}

TARGET size_t REDUCE(unsigned char *out, zmoe_dtype out_dtype, const unsigned char *const *parts,
                     uint32_t n_parts, zmoe_dtype part_dtype, size_t count) {
  switch (out_dtype) {
  case ZMOE_F32:
    return reduce_to(out, ZMOE_F32, parts, n_parts, part_dtype, count);
  case ZMOE_F16:
    return reduce_to(out, ZMOE_F16, parts, n_parts, part_dtype, count);
  case ZMOE_BF16:
    return reduce_to(out, ZMOE_BF16, parts, n_parts, part_dtype, count);
  }
  return reduce_to(out, ZMOE_Q8, parts, n_parts, part_dtype, count);
}
