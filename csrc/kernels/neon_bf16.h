/* Weights and x in the registers of NEON with BF16 and I8MM: how codes are
 * decoded, and where in x's layouts lies what they are multiplied with.  Include
 * after neon.h. */
#ifndef ZMOE_NEON_BF16_H
#define ZMOE_NEON_BF16_H

#include "neon.h"
#include "thread_pool.h"

enum product { HALVES, CODES4, CODES8, CODES4_INT8, CODES8_INT8 };

/* Constants of each inlined loop.  `pairs`: of rows of x. */
typedef struct kind {
  enum product product;
  int affine;
  uint32_t group, pairs;
} kind;

KERNEL int is_integer(kind t) {
  return t.product == CODES4_INT8 || t.product == CODES8_INT8;
}

/* Elements of a weight in 16 bytes, a unit; four are a line. */
KERNEL uint32_t unit_of(kind t) {
  if (t.product == HALVES)
    return 8;
  return t.product == CODES4 || t.product == CODES4_INT8 ? 32 : 16;
}

/* Elements, of a line, whose products share their scales; of x in 8 bits, its own too. */
KERNEL uint32_t part_of(kind t) {
  if (is_integer(t))
    return ZMOE_INT_GROUP;
  return t.product == HALVES || t.group > 4 * unit_of(t) ? 4 * unit_of(t) : t.group;
}

/* What must be added to a decoded value for the code. */
KERNEL float centre_of(kind t) {
  switch (t.product) {
  case CODES4:
    return t.affine ? -16 : 0;
  case CODES4_INT8:
    return t.affine ? ZMOE_CENTRE4 : 0;
  case CODES8_INT8:
    return ZMOE_CENTRE8;
  default:
    return 0;
  }
}

/* ---- decoding -------------------------------------------------------------------- */

/* Bytes of bf16, by code of 4 bits.  An affine one becomes 16 more than it is: all
 * high bytes are 0x41 then, and need no table. */
static const uint8_t low_affine[16] = {0x80, 0x88, 0x90, 0x98, 0xa0, 0xa8, 0xb0, 0xb8,
                                       0xc0, 0xc8, 0xd0, 0xd8, 0xe0, 0xe8, 0xf0, 0xf8};
static const uint8_t low_fp4[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
                                    0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
static const uint8_t high_fp4[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                     0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
/* By leading zeros of a code of 8 bits, whose first one bit is not stored: the high
 * byte, and whether the place of that bit has to change for the exponent's lowest. */
static const uint8_t high_8[16] = {0x43, 0x42, 0x42, 0x41, 0x41, 0x40, 0x40, 0x3f, 0};
static const uint8_t change_8[16] = {0x80, 0, 0x80, 0, 0x80, 0, 0x80, 0, 0};
/* For integers: a code minus the centre, or twice the fp4 value. */
static const int8_t byte_affine[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const int8_t byte_fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

KERNEL uint8x16_t look_up(const void *table, uint8x16_t index) {
  return vqtbl1q_u8(vld1q_u8(table), index);
}

/* The values in 16 bytes, in 1, 2 or 4 registers of bf16 or bytes. */
KERNEL uint32_t decode(kind t, uint8x16_t bytes, uint8x16_t values[4]) {
  const uint8x16_t codes[2] = {vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4)};
  switch (t.product) {
  case HALVES:
    values[0] = bytes;
    return 1;
  case CODES4:
    EACH(i, 2) {
      uint8x16_t low = look_up(t.affine ? low_affine : low_fp4, codes[i]);
      uint8x16_t high = t.affine ? vdupq_n_u8(0x41) : look_up(high_fp4, codes[i]);
      values[i] = vtrn1q_u8(low, high);
      values[i + 2] = vtrn2q_u8(low, high);
    }
    return 4;
  case CODES8: {
    uint8x16_t zeros = vclzq_u8(bytes), high = look_up(high_8, zeros);
    uint8x16_t low = vshlq_u8(bytes, vreinterpretq_s8_u8(zeros));
    low = veorq_u8(low, look_up(change_8, zeros));
    values[0] = vtrn1q_u8(low, high);
    values[1] = vtrn2q_u8(low, high);
    return 2;
  }
  case CODES4_INT8:
    EACH(i, 2)
      values[i] = look_up(t.affine ? byte_affine : byte_fp4, codes[i]);
    return 2;
  default:
    values[0] = veorq_u8(bytes, vdupq_n_u8(0x80));
    return 1;
  }
}

/* ---- multiplying ------------------------------------------------------------------- */

/* w has two outputs and x two rows, 8 bytes of each: four sums. */
KERNEL VEC multiply(kind t, VEC sum, uint8x16_t w, uint8x16_t x) {
  if (is_integer(t))
    return vreinterpretq_f32_s32(
        vmmlaq_s32(vreinterpretq_s32_f32(sum), vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x)));
  bfloat16x8_t a = vreinterpretq_bf16_u8(w), b = vreinterpretq_bf16_u8(x);
  return vbfmmlaq_f32(sum, a, b);
}

/* The low or high halves of two registers. */
KERNEL uint8x16_t halves_of(uint8x16_t a, uint8x16_t b, int high) {
  uint64x2_t c = vreinterpretq_u64_u8(a), d = vreinterpretq_u64_u8(b);
  return vreinterpretq_u8_u64(high ? vzip2q_u64(c, d) : vzip1q_u64(c, d));
}

/* ---- x --------------------------------------------------------------------------- */

/* Elements whose scales are converted, and pairs of rows brought together, at a time. */
enum { RUN = 1024, RUN_GROUPS = RUN / ZMOE_INT_GROUP };

/* The elements of a run, of pairs of rows in turns; of integers, the scale of each sum. */
struct inputs {
  const unsigned char *elements[2];
  float scales[2][RUN_GROUPS][4];
};

/* Where register i of x lies for the unit at element k of a line, in bytes from the
 * line's start on; see place_of in pack_input.c. */
KERNEL size_t place_in_line(kind t, size_t k, uint32_t i) {
  switch (t.product) {
  case HALVES:
    return 2 * k;
  case CODES8_INT8:
    return k;
  default:
    return 64 * i + (t.product == CODES8 ? k : k / 2);
  }
}

/* Elements [first, first + count) of pairs of rows, and the padding behind. */
KERNEL void take_turns(const kind t, const zmoe_packed x[ZMOE_DOT_ROWS], size_t first,
                       uint32_t count, unsigned char turns[2][4 * RUN], struct inputs *to) {
  const size_t item = is_integer(t) ? 1 : 2, lane = t.product == CODES4_INT8 ? 8 : 4;
  EACH(p, t.pairs) {
    const unsigned char *a = (const unsigned char *)x[2 * p].elements + item * first;
    const unsigned char *b = (const unsigned char *)x[2 * p + 1].elements + item * first;
    for (size_t i = 0; i < item * zmoe_round_up(count, ZMOE_BLOCK); i += 16) {
      uint8x16_t even = vld1q_u8(a + i), odd = vld1q_u8(b + i);
      vst1q_u8(turns[p] + 2 * i, halves_of(even, odd, 0));
      vst1q_u8(turns[p] + 2 * i + 16, halves_of(even, odd, 1));
    }
    to->elements[p] = turns[p];
    for (uint32_t k = 0; is_integer(t) && k < count; k += ZMOE_INT_GROUP)
      EACH(l, 4)
        to->scales[p][k / ZMOE_INT_GROUP][l] = x[2 * p + l % 2].scales[(first + k) / lane];
  }
}

#endif
