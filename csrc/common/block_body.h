/* Sums that read or write blocks of 8-bit integers, in SIMD; see block_scalar.h. */
#include "block_scalar.h"
#include "vec.h"

enum { VECS = ZMOE_Q8_BLOCK / LANES };

KERNEL void block_load(VEC out[VECS], const unsigned char *src, size_t b, zmoe_dtype dtype) {
  if (dtype != ZMOE_Q8) {
    for (size_t i = 0; i < VECS; i++)
      out[i] = vec_load(src, b * ZMOE_Q8_BLOCK + i * LANES, dtype);
    return;
  }
  const unsigned char *block = src + b * ZMOE_Q8_BLOCK_BYTES;
  VEC scale = vec_splat(block_get_scale(block));
  for (size_t i = 0; i < VECS; i++)
    out[i] = vec_load8(block + 2 + i * LANES) * scale;
}

KERNEL void block_store(unsigned char *dst, size_t b, zmoe_dtype dtype, const VEC v[VECS]) {
  if (dtype != ZMOE_Q8) {
    for (size_t i = 0; i < VECS; i++)
      vec_store(dst, b * ZMOE_Q8_BLOCK + i * LANES, dtype, v[i]);
    return;
  }
  unsigned char *block = dst + b * ZMOE_Q8_BLOCK_BYTES;
  float scale = block_scale(vec_largest(v, VECS)), inverse = block_inverse(scale);
  block_put_scale(block, scale);
  if (inverse == 0) {
    memset(block + 2, 0, ZMOE_Q8_BLOCK);
    return;
  }
  VEC factor = vec_splat(inverse);
  for (size_t i = 0; i < VECS; i++)
    vec_store8(block + 2 + i * LANES, v[i] * factor);
}

/* Returns how many elements that are. */
KERNEL size_t blocks_body(unsigned char *out, zmoe_dtype out_dtype,
                          const unsigned char *const *parts, uint32_t n_parts,
                          zmoe_dtype part_dtype, size_t blocks) {
  for (size_t b = 0; b < blocks; b++) {
    VEC sum[VECS], part[VECS];
    block_load(sum, parts[0], b, part_dtype);
    for (uint32_t p = 1; p < n_parts; p++) {
      block_load(part, parts[p], b, part_dtype);
      for (size_t i = 0; i < VECS; i++)
        sum[i] = sum[i] + part[i];
    }
    block_store(out, b, out_dtype, sum);
  }
  return blocks * ZMOE_Q8_BLOCK;
}
