/* One element at a time: the reference that the SIMD variants must match.
 *
 * Every NaN that is computed or converted becomes the one quiet NaN 0x7fc00000
 * (0x7e00 in f16, 0x7fc0 in bf16): which of two NaNs an addition hands on
 * differs between CPUs, and nodes must agree bit for bit.  Loads and stores go
 * through memcpy, since libzmq's receive buffers are not aligned. */
#ifndef ZMOE_REDUCE_SCALAR_H
#define ZMOE_REDUCE_SCALAR_H

#include <string.h>

#include "common/reduce.h"

#define ZMOE_F32_NAN 0x7fc00000u

static inline float f32_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of_f32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float f32_of_f16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  uint32_t exponent = (half >> 10) & 0x1fu, fraction = half & 0x3ffu;
  if (exponent == 0x1f) /* infinity and NaN */
    return f32_of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0)
    return f32_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  float tiny = (float)fraction * 0x1p-24f; /* zero and subnormals: exact */
  return sign ? -tiny : tiny;
}

static inline uint16_t f16_of_f32(float value) {
  uint32_t bits = bits_of_f32(value);
  uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) /* 65520 and more, and infinity */
    return sign | 0x7c00u;
  if (magnitude < 0x38800000u) { /* below 2^-14: a multiple of 2^-24 */
    if (magnitude < 0x33000000u) /* below 2^-25 */
      return sign;
    uint32_t shift = 126 - (magnitude >> 23);
    uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t half = 1u << (shift - 1), rest = fraction & ((1u << shift) - 1);
    uint32_t kept = fraction >> shift;
    return (uint16_t)(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
  }
  uint32_t kept = magnitude - (112u << 23);
  return (uint16_t)(sign | (kept + 0xfffu + (kept >> 13 & 1)) >> 13);
}

static inline uint16_t bf16_of_f32(float value) {
  uint32_t bits = bits_of_f32(value);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static inline float load_scalar(const unsigned char *src, size_t i, zmoe_dtype dtype) {
  if (dtype == ZMOE_F32) {
    float value;
    memcpy(&value, src + 4 * i, sizeof value);
    return value;
  }
  uint16_t half;
  memcpy(&half, src + 2 * i, sizeof half);
  return dtype == ZMOE_F16 ? f32_of_f16(half) : f32_of_bits((uint32_t)half << 16);
}

static inline void store_scalar(unsigned char *dst, size_t i, zmoe_dtype dtype, float value) {
  if (value != value)
    value = f32_of_bits(ZMOE_F32_NAN);
  if (dtype == ZMOE_F32) {
    memcpy(dst + 4 * i, &value, sizeof value);
    return;
  }
  uint16_t half = 0x7e00u;
  if (dtype == ZMOE_BF16)
    half = bf16_of_f32(value);
  else if (value == value)
    half = f16_of_f32(value);
  memcpy(dst + 2 * i, &half, sizeof half);
}

#endif
