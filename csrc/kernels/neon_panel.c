/* GEMM, NEON. */
#if defined(__aarch64__)
#include "common/vec.h"

#include "neon.h"
#include "weight.h"

#define WORDS uint32x4_t

KERNEL WORDS load_row(const unsigned char *src, uint32_t words) {
  return vreinterpretq_u32_u8(load_bytes(src, 4 * (size_t)words));
}

KERNEL void transpose(WORDS v[4]) {
  WORDS a = vtrn1q_u32(v[0], v[1]), b = vtrn2q_u32(v[0], v[1]);
  WORDS c = vtrn1q_u32(v[2], v[3]), d = vtrn2q_u32(v[2], v[3]);
  v[0] = vcombine_u32(vget_low_u32(a), vget_low_u32(c));
  v[1] = vcombine_u32(vget_low_u32(b), vget_low_u32(d));
  v[2] = vcombine_u32(vget_high_u32(a), vget_high_u32(c));
  v[3] = vcombine_u32(vget_high_u32(b), vget_high_u32(d));
}

KERNEL VEC half_of(WORDS words, uint32_t format, int high) {
  if (format == ZMOE_FORMAT_BF16)
    return vreinterpretq_f32_u32(high ? vandq_u32(words, vdupq_n_u32(0xffff0000))
                                      : vshlq_n_u32(words, 16));
  uint16x4_t halves = high ? vshrn_n_u32(words, 16) : vmovn_u32(words);
  return vcvt_f32_f16(vreinterpret_f16_u16(halves));
}

/* An fp4 code is sign, exponent and fraction; in f16, at its places, it is 2^-14
 * times what it stands for, subnormals too. */
KERNEL VEC value_of(WORDS words, uint32_t i, uint32_t bits, int affine) {
  WORDS code = vshlq_u32(words, vdupq_n_s32(-(int32_t)(i * bits)));
  if (affine)
    return vcvtq_f32_u32(vandq_u32(code, vdupq_n_u32((1u << bits) - 1)));
  WORDS half = vorrq_u32(vandq_u32(vshlq_n_u32(code, 12), vdupq_n_u32(0x8000)),
                         vandq_u32(vshlq_n_u32(code, 9), vdupq_n_u32(0x0e00)));
  return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(half))) * vdupq_n_f32(0x1p14f);
}

#include "gemm_body.h"

void zmoe_neon_pack_panel(const zmoe_weight *w, uint32_t first, uint32_t last, uint32_t k0,
                          uint32_t k1, float *panel) {
  gemm_pack(w, first, last, k0, k1, panel);
}

void zmoe_neon_tile(const float *panel, uint32_t depth, const float *const *xs, uint32_t rows,
                    float *sums, int add) {
  gemm_tile(panel, depth, xs, rows, sums, add);
}
#endif
