/* Blocks of 8-bit integers (ZMOE_Q8), one at a time: the reference that the SIMD
 * variants must match.
 *
 * A block is a scale in bf16, then 32 int8; element = integer * scale, which is
 * exact in f32.  The scale is the largest magnitude / 127 rounded up, so that no
 * integer exceeds 127; bf16 has the range of f32, so it can neither overflow nor
 * vanish.  A block with an infinity or a NaN gets a NaN for scale and hence decodes
 * to NaN throughout; one whose scale would be subnormal becomes zeros. */
#ifndef ZMOE_BLOCK_SCALAR_H
#define ZMOE_BLOCK_SCALAR_H

#include "reduce_scalar.h"

#define ZMOE_ROUNDER 12582912.0f /* 1.5 * 2^23: adding it leaves no fraction */

/* Of a block whose largest |element| has these bits; 0 where the block is zeros. */
static inline float block_scale(uint32_t largest) {
  if (largest >= 0x7f800000u)
    return f32_of_bits(ZMOE_F32_NAN);
  float scale = f32_of_bits((bits_of_f32(f32_of_bits(largest) / 127.0f) + 0xffffu) & 0xffff0000u);
  return scale < 0x1p-126f ? 0.0f : scale;
}

/* What elements are multiplied with: 0 where the scale says it all. */
static inline float block_inverse(float scale) {
  return scale > 0 ? 1.0f / scale : 0.0f;
}

static inline void block_put_scale(unsigned char *block, float scale) {
  uint16_t half = (uint16_t)(bits_of_f32(scale) >> 16);
  memcpy(block, &half, sizeof half);
}

static inline float block_get_scale(const unsigned char *block) {
  return load_scalar(block, 0, ZMOE_BF16);
}

/* `count` elements of the b-th block of `src`, of any dtype. */
static inline void block_load_scalar(float *out, const unsigned char *src, size_t b,
                                     zmoe_dtype dtype, size_t count) {
  const unsigned char *block = src + b * ZMOE_Q8_BLOCK_BYTES;
  for (size_t i = 0; i < count; i++)
    out[i] = dtype == ZMOE_Q8 ? (float)(int8_t)block[2 + i] * block_get_scale(block)
                              : load_scalar(src, b * ZMOE_Q8_BLOCK + i, dtype);
}

static inline void block_store_scalar(unsigned char *dst, size_t b, zmoe_dtype dtype,
                                      const float *values, size_t count) {
  if (dtype != ZMOE_Q8) {
    for (size_t i = 0; i < count; i++)
      store_scalar(dst, b * ZMOE_Q8_BLOCK + i, dtype, values[i]);
    return;
  }
  unsigned char *block = dst + b * ZMOE_Q8_BLOCK_BYTES;
  uint32_t largest = 0;
  for (size_t i = 0; i < count; i++) {
    uint32_t magnitude = bits_of_f32(values[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  float scale = block_scale(largest), inverse = block_inverse(scale);
  block_put_scale(block, scale);
  memset(block + 2, 0, ZMOE_Q8_BLOCK);
  for (size_t i = 0; i < count && inverse != 0; i++)
    block[2 + i] = (unsigned char)(int8_t)(values[i] * inverse + ZMOE_ROUNDER - ZMOE_ROUNDER);
}

#endif
