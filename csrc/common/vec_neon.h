/* One vector of f32 in NEON; see vec.h. */
#include <arm_neon.h>

#define TARGET
#define KERNEL static inline __attribute__((always_inline)) TARGET
#define VEC float32x4_t
#define LANES 4

KERNEL VEC vec_load(const unsigned char *src, size_t i, zmoe_dtype dtype) {
  if (dtype == ZMOE_F32)
    return vreinterpretq_f32_u8(vld1q_u8(src + 4 * i));
  uint8x8_t bytes = vld1_u8(src + 2 * i);
  if (dtype == ZMOE_F16)
    return vcvt_f32_f16(vreinterpret_f16_u8(bytes));
  return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(bytes), 16));
}

KERNEL uint8x8_t bf16_of_vec(VEC v) {
  uint32x4_t bits = vreinterpretq_u32_f32(v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  bits = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vreinterpret_u8_u16(vshrn_n_u32(bits, 16));
}

KERNEL void vec_store(unsigned char *dst, size_t i, zmoe_dtype dtype, VEC v) {
  VEC nan = vreinterpretq_f32_u32(vdupq_n_u32(ZMOE_F32_NAN));
  v = vbslq_f32(vceqq_f32(v, v), v, nan);
  if (dtype == ZMOE_F32) {
    vst1q_u8(dst + 4 * i, vreinterpretq_u8_f32(v));
    return;
  }
  uint8x8_t half = dtype == ZMOE_F16 ? vreinterpret_u8_f16(vcvt_f16_f32(v)) : bf16_of_vec(v);
  vst1_u8(dst + 2 * i, half);
}

KERNEL VEC vec_splat(float value) {
  return vdupq_n_f32(value);
}

KERNEL VEC vec_fma(VEC a, VEC b, VEC c) {
  return vfmaq_f32(c, a, b);
}

KERNEL VEC vec_max(VEC a, VEC b) {
  return vbslq_f32(vcgtq_f32(a, b), a, b);
}

KERNEL float vec_most(VEC v) {
  return vmaxvq_f32(v);
}

KERNEL void vec_load_pair(const unsigned char *src, VEC *even, VEC *odd) {
  uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8(src));
  *even = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
  *odd = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000u)));
}

KERNEL void vec_zip(VEC *even, VEC *odd) {
  VEC a = *even, b = *odd;
  *even = vzip1q_f32(a, b);
  *odd = vzip2q_f32(a, b);
}

KERNEL void vec_unzip(VEC *low, VEC *high) {
  VEC a = *low, b = *high;
  *low = vuzp1q_f32(a, b);
  *high = vuzp2q_f32(a, b);
}

KERNEL float vec_fold(VEC v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

KERNEL VEC vec_load8(const unsigned char *src) {
  uint32_t four;
  memcpy(&four, src, sizeof four);
  int16x8_t halves = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves)));
}

KERNEL void vec_store8(unsigned char *dst, VEC v) {
  int16x4_t halves = vmovn_s32(vcvtnq_s32_f32(v));
  int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
  uint32_t four = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
  memcpy(dst, &four, sizeof four);
}

KERNEL uint32_t vec_largest(const VEC *v, size_t count) {
  uint32x4_t most = vdupq_n_u32(0);
  for (size_t i = 0; i < count; i++)
    most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(v[i]), vdupq_n_u32(0x7fffffff)));
  return vmaxvq_u32(most);
}
