/* GEMV, NEON.  Before including this, after vec.h, define TABLE, the name of the
 * table of kernels, and, where there is dotprod, DOT4 and
 *   dot4(sum, a, b)  lane l of sum + a[4 l] b[4 l] + ... + a[4 l + 3] b[4 l + 3]. */
#include "neon.h"
#include "unpacking.h"

#define CODES int8x16_t
#define UNIT 1

#ifndef DOT4
/* Two products of bytes, even of -128 and 127, fit 16 bits. */
KERNEL int32x4_t dot4(int32x4_t sum, int8x16_t a, int8x16_t b) {
  int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
}
#endif

KERNEL CODES load_codes(const unsigned char *src, uint32_t count) {
  return vreinterpretq_s8_u8(load_bytes(src, 4 * (size_t)count));
}

KERNEL void load_unit(form t, const unsigned char *src, CODES codes[2]) {
  const int affine = t.format == ZMOE_FORMAT_AFFINE;
  static const int8_t fp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  uint8x16_t bytes = vreinterpretq_u8_s8(load_codes(src, LANES));
  uint8x16_t low = vandq_u8(bytes, vdupq_n_u8(15)), high = vshrq_n_u8(bytes, 4);
  codes[0] = affine ? vreinterpretq_s8_u8(low) : vqtbl1q_s8(vld1q_s8(fp4), low);
  codes[1] = affine ? vreinterpretq_s8_u8(high) : vqtbl1q_s8(vld1q_s8(fp4), high);
}

KERNEL int32x4_t times_plane(int32x4_t sum, const CODES codes[2], const int8_t *elements) {
  sum = dot4(sum, codes[0], vld1q_s8(elements));
  return dot4(sum, codes[1], vld1q_s8(elements + 64));
}

KERNEL VEC times_int8(const CODES codes[2], const zmoe_packed *x, size_t k, uint32_t i) {
  const size_t lane = (k + i) / 8;
  const int8_t *elements = (const int8_t *)x->elements + k + i / 2;
  int32x4_t sum = times_plane(vld1q_s32(x->offsets + lane), codes, elements);
  return vcvtq_f32_s32(sum) * vld1q_f32(x->scales + lane);
}

typedef int lanes;

KERNEL lanes lanes_of(uint32_t group) {
  (void)group; /* a register of codes has one */
  return 0;
}

KERNEL VEC spread(const float *scales, lanes l) {
  (void)l;
  return vld1q_dup_f32(scales);
}

KERNEL VEC add_int22(form t, const CODES codes[2], const zmoe_packed *x, size_t k, uint32_t i,
                     const float *scales, lanes l, VEC all) {
  (void)t;
  const int8_t *elements = (const int8_t *)x->elements + 3 * k + i / 2;
  int32x4_t zero = vdupq_n_s32(0), sum = times_plane(zero, codes, elements);
  sum = vsubq_s32(zero, vshlq_n_s32(sum, 7));
  sum = vshlq_n_s32(times_plane(sum, codes, elements + ZMOE_BLOCK), 8);
  sum = times_plane(sum, codes, elements + 2 * ZMOE_BLOCK);
  return vec_fma(vcvtq_f32_s32(sum), spread(scales, l), all);
}

/* Here codes have a sign, and that takes the centre off: no offset. */
KERNEL VEC bytes_times_int8(CODES bytes, const zmoe_packed *x, size_t k) {
  CODES centred = veorq_s8(bytes, vdupq_n_s8(INT8_MIN));
  int32x4_t sum = dot4(vdupq_n_s32(0), centred, vld1q_s8((const int8_t *)x->elements + k));
  return vcvtq_f32_s32(sum) * vld1q_f32(x->scales + k / 4);
}

KERNEL void widen_bytes(const unsigned char *src, VEC values[4]) {
  uint8x16_t bytes = vld1q_u8(src);
  uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  values[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(low)));
  values[1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(low)));
  values[2] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(high)));
  values[3] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)));
}

/* The bytes of a window are those of two loads, which may overlap. */
KERNEL uint32_t half_window(uint32_t bits) {
  return packed_bytes(bits) < 8 ? 4 : 8;
}

KERNEL uint8_t place_in_window(uint32_t bits, uint32_t c, uint32_t byte) {
  (void)c;
  const uint32_t half = half_window(bits);
  return (uint8_t)(byte < half ? byte : byte + 2 * half - packed_bytes(bits));
}

KERNEL VEC widen_packed(const struct unpacking *u, const unsigned char *src, uint32_t c) {
  const uint32_t half = half_window(u->bits);
  const unsigned char *end = src + packed_bytes(u->bits);
  uint8_t window[16] = {0};
  memcpy(window, src, half == 8 ? 8 : 4);
  if (half == 8)
    memcpy(window + 8, end - 8, 8);
  else
    memcpy(window + 4, end - 4, 4);
  uint8x16_t words = vqtbl1q_u8(vld1q_u8(window), vld1q_u8(u->bytes[LANES * c]));
  uint32x4_t codes =
      vshlq_u32(vreinterpretq_u32_u8(words), vnegq_s32(vld1q_s32(u->shifts + LANES * c)));
  return vcvtq_f32_u32(vandq_u32(codes, vdupq_n_u32((uint32_t)u->mask)));
}

/* Bytes of twice the values, at the top of each lane. */
KERNEL VEC fp4_at(const unsigned char *src) {
  static const int8_t doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  static const int32_t shifts[4] = {24, 20, 16, 12};
  uint16_t word;
  memcpy(&word, src, sizeof word);
  uint32x4_t codes = vshlq_u32(vdupq_n_u32(word), vld1q_s32(shifts));
  uint8x16_t index =
      vandq_u8(vreinterpretq_u8_u32(codes), vreinterpretq_u8_u32(vdupq_n_u32(15u << 24)));
  return vcvtq_n_f32_s32(vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(doubled), index)), 25);
}

/* As f16, 2^-8 of the values, unless they are NaN. */
KERNEL int16x4_t halves_of_fp8(const unsigned char *src) {
  uint32_t four;
  memcpy(&four, src, sizeof four);
  int16x4_t half = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))));
  return vand_s16(vshl_n_s16(half, 7), vdup_n_s16((int16_t)0xbf80));
}

KERNEL VEC small_fp8_at(const unsigned char *src) {
  return vcvt_f32_f16(vreinterpret_f16_s16(halves_of_fp8(src)));
}

KERNEL VEC fp8_at(const unsigned char *src) {
  const int16x4_t largest = vdup_n_s16(0x3f80);
  int16x4_t half = halves_of_fp8(src);
  uint16x4_t nan = vceq_s16(vand_s16(half, largest), largest);
  return vcvt_f32_f16(vreinterpret_f16_u16(vorr_u16(vreinterpret_u16_s16(half), nan))) *
         vec_splat(256.0f);
}

static void pack_integers(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  zmoe_generic_pack_input(layout, w, x, row);
}

#include "gemv_body.h"

const zmoe_kernels TABLE = {gemv_layout, gemv_pack_input, gemv_dot};
