/* Loads with NEON that never pass the end.  Include after vec.h. */
#ifndef ZMOE_NEON_H
#define ZMOE_NEON_H

#include "kernels.h"

/* 16 bytes, those from `count` on zero and not touched. */
KERNEL uint8x16_t load_bytes(const unsigned char *src, size_t count) {
  if (count >= 16)
    return vld1q_u8(src);
  unsigned char bytes[16] = {0};
  memcpy(bytes, src, count);
  return vld1q_u8(bytes);
}

/* Four floats from element i on, those from `count` on zero and not touched. */
KERNEL VEC load_some(const unsigned char *src, size_t i, uint32_t dtype, uint32_t count) {
  if (count >= 4)
    return vec_load(src, i, (zmoe_dtype)dtype);
  size_t item = dtype == ZMOE_F32 ? 4 : 2;
  unsigned char bytes[16] = {0};
  memcpy(bytes, src + item * i, item * count);
  return vec_load(bytes, 0, (zmoe_dtype)dtype);
}

/* Four powers of two: the exponent of f32, but 0 is 2^-127 and 255 is NaN. */
KERNEL VEC load_e8m0(const unsigned char *src, uint32_t count) {
  uint32_t bytes = 0;
  memcpy(&bytes, src, count < 4 ? count : 4);
  uint8x8_t narrow = vcreate_u8(bytes);
  uint32x4_t code = vmovl_u16(vget_low_u16(vmovl_u8(narrow)));
  uint32x4_t odd = vorrq_u32(vceqq_u32(code, vdupq_n_u32(0)), vceqq_u32(code, vdupq_n_u32(255)));
  odd = vandq_u32(odd, vdupq_n_u32(0x400000));
  return vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32(code, 23), odd));
}

#endif
