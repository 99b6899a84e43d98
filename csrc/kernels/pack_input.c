/* How x is packed for the kernels that have a layout of their own. */
#include <string.h>

#include "common/reduce_scalar.h"
#include "kernels.h"
#include "thread_pool.h"

/* ---- where the parts lie ------------------------------------------------------- */

int zmoe_layout_is_integer(zmoe_layout layout) {
  return layout == ZMOE_LAYOUT_CODES4_INT8 || layout == ZMOE_LAYOUT_CODES8_INT8 ||
         zmoe_layout_is_int22(layout);
}

static int is_code4(zmoe_layout layout) {
  return layout == ZMOE_LAYOUT_CODES4 || layout == ZMOE_LAYOUT_CODES4_BF16 ||
         layout == ZMOE_LAYOUT_CODES4_INT8 || layout == ZMOE_LAYOUT_CODES4_INT22;
}

static size_t element_bytes(zmoe_layout layout) {
  switch (layout) {
  case ZMOE_LAYOUT_BF16:
  case ZMOE_LAYOUT_CODES4_BF16:
  case ZMOE_LAYOUT_CODES8_BF16:
    return 2;
  case ZMOE_LAYOUT_CODES4_INT8:
  case ZMOE_LAYOUT_CODES8_INT8:
    return 1;
  case ZMOE_LAYOUT_CODES4_INT22:
  case ZMOE_LAYOUT_CODES8_INT22:
    return 3;
  default:
    return 4;
  }
}

/* A lane is a word of codes: eight of 4 bits, or four of 8. */
static uint32_t codes_per_lane(zmoe_layout layout) {
  return is_code4(layout) ? 8 : 4;
}

static size_t sums_bytes(uint32_t in_features) {
  return zmoe_round_up(in_features / 16, 16) * sizeof(float) + 64; /* the smallest group has 16 */
}

/* Of scales, and of offsets or rests. */
static size_t integer_bytes(zmoe_layout layout, uint32_t in_features) {
  if (!zmoe_layout_is_integer(layout))
    return 0;
  if (zmoe_layout_is_int22(layout))
    return sums_bytes(in_features);
  return zmoe_round_up(in_features, ZMOE_BLOCK) / codes_per_lane(layout) * sizeof(float);
}

size_t zmoe_packed_bytes(zmoe_layout layout, uint32_t in_features) {
  if (layout == ZMOE_LAYOUT_PLAIN)
    return 0;
  return sums_bytes(in_features) + 2 * integer_bytes(layout, in_features) +
         zmoe_round_up(in_features, 2 * ZMOE_BLOCK) * element_bytes(layout);
}

size_t zmoe_packed_most(uint32_t in_features) {
  size_t most = 0;
  for (int layout = ZMOE_LAYOUT_PLAIN; layout <= ZMOE_LAYOUT_CODES8_INT22; layout++) {
    size_t bytes = zmoe_packed_bytes((zmoe_layout)layout, in_features);
    most = bytes > most ? bytes : most;
  }
  return most;
}

zmoe_packed zmoe_packed_at(void *row, zmoe_layout layout, uint32_t in_features) {
  unsigned char *at = row;
  size_t bytes = integer_bytes(layout, in_features);
  zmoe_packed parts;
  parts.sums = (float *)(void *)at;
  at += sums_bytes(in_features);
  parts.scales = (float *)(void *)at;
  parts.offsets = (int32_t *)(void *)(at + bytes);
  parts.rests = (float *)(void *)(at + bytes);
  parts.elements = at + 2 * bytes;
  return parts;
}

/* Where float k of a block of 128 goes.  A 32-bit word holds eight 4-bit codes;
 * shifting all words by 4 i brings code i of each to the bottom. */
static uint32_t place_of(uint32_t k, zmoe_layout layout) {
  uint32_t word = k / 8, code = k % 8;
  switch (layout) {
  case ZMOE_LAYOUT_CODES4_BF16: /* register i < 4: codes i and i + 4 */
    return (code % 4) * 32 + word * 2 + code / 4;
  case ZMOE_LAYOUT_CODES8_BF16: /* of 64: even ones, then odd ones */
    return k / 64 * 64 + k % 2 * 32 + k % 64 / 2;
  default:
    return k;
  }
}

/* ---- sums of groups -------------------------------------------------------------- */

static void sum_groups(const float *x, uint32_t in_features, uint32_t group, float *sums) {
  enum { LANES = 16 };
  uint32_t groups = in_features / group;
  for (uint32_t g = 0; g < groups; g++) {
    float lanes[LANES] = {0};
    for (uint32_t k = 0; k < group; k += LANES)
      for (uint32_t l = 0; l < LANES; l++)
        lanes[l] += x[g * group + k + l];
    float sum = 0;
    for (uint32_t l = 0; l < LANES; l++)
      sum += lanes[l];
    sums[g] = sum;
  }
  for (uint32_t g = groups; g % 16 != 0; g++)
    sums[g] = 0;
}

/* ---- floats ------------------------------------------------------------------------ */

static void pack_input_f32(const uint8_t *places, const float *x, uint32_t in_features, float *to) {
  for (uint32_t k = 0; k < in_features; k++)
    to[k / ZMOE_BLOCK * ZMOE_BLOCK + places[k % ZMOE_BLOCK]] = x[k];
}

static void pack_input_bf16(const uint8_t *places, const float *x, uint32_t in_features,
                            uint16_t *to) {
  for (uint32_t k = 0; k < in_features; k++)
    to[k / ZMOE_BLOCK * ZMOE_BLOCK + places[k % ZMOE_BLOCK]] = bf16_of_f32(x[k]);
}

/* ---- integers ---------------------------------------------------------------------- */

static float largest_of(const float *x, uint32_t count) {
  int32_t largest = 0; /* of positive floats the bits are in order, too */
  for (uint32_t k = 0; k < count; k++) {
    int32_t bits = (int32_t)(bits_of_f32(x[k]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  return f32_of_bits((uint32_t)largest);
}

/* The integer nearest to x, of at most 22 bits. */
static inline int32_t nearest(float x) {
  const float round = 0x1.8p23f;
  return (int32_t)(bits_of_f32(x + round) - bits_of_f32(round));
}

static int32_t centre_of(const zmoe_weight *w) {
  return w->format == ZMOE_FORMAT_AFFINE ? 1 << (w->bits - 1) : ZMOE_CENTRE_FP4;
}

static float unit_of(const zmoe_weight *w) {
  return w->format == ZMOE_FORMAT_AFFINE ? 1.0f : 0.5f;
}

static void quantise(const float *x, float inverse, int32_t v[ZMOE_INT_GROUP]) {
  for (uint32_t k = 0; k < ZMOE_INT_GROUP; k++)
    v[k] = nearest(x[k] * inverse);
}

/* 32 integers of a block for 4-bit codes.  A byte has an even code in its low
 * half and an odd one in the high half; so first even elements, then odd ones. */
static void split_parities(const int8_t v[ZMOE_INT_GROUP], int8_t *to) {
  for (uint32_t k = 0; k < ZMOE_INT_GROUP / 2; k++) {
    to[k] = v[2 * k];
    to[ZMOE_BLOCK / 2 + k] = v[2 * k + 1];
  }
}

static int8_t *block_at(void *elements, uint32_t k, uint32_t planes) {
  return (int8_t *)elements + (size_t)k / ZMOE_BLOCK * ZMOE_BLOCK * planes + k % ZMOE_BLOCK / 2;
}

/* 32 elements in 8 bits: the largest is 127. */
static void pack_input_int8(zmoe_layout layout, const zmoe_weight *w, const float *x,
                            uint32_t first, zmoe_packed to) {
  uint32_t per_lane = codes_per_lane(layout), lane = first / per_lane;
  float largest = largest_of(x + first, ZMOE_INT_GROUP);
  int32_t v[ZMOE_INT_GROUP];
  int8_t bytes[ZMOE_INT_GROUP];
  quantise(x + first, largest > 0x1p-100f ? 127.0f / largest : 0.0f, v);
  for (uint32_t k = 0; k < ZMOE_INT_GROUP; k++)
    bytes[k] = (int8_t)v[k];
  if (layout == ZMOE_LAYOUT_CODES8_INT8)
    memcpy((int8_t *)to.elements + first, bytes, sizeof bytes);
  else
    split_parities(bytes, block_at(to.elements, first, 1));
  for (uint32_t k = 0; k < ZMOE_INT_GROUP; k += per_lane, lane++) {
    int32_t sum = 0;
    for (uint32_t i = 0; i < per_lane; i++)
      sum += v[k + i];
    to.scales[lane] = largest / 127.0f * unit_of(w);
    to.offsets[lane] = -centre_of(w) * sum;
  }
}

/* v = low + 2^8 middle - 2^15 high; the sign because 2^15 is no int16, but -2^15 is. */
static void store_digits(const int32_t v[ZMOE_INT_GROUP], int8_t *to) {
  int8_t high[ZMOE_INT_GROUP], middle[ZMOE_INT_GROUP], low[ZMOE_INT_GROUP];
  for (uint32_t k = 0; k < ZMOE_INT_GROUP; k++) {
    int32_t last = (v[k] & 255) - (v[k] & 128) * 2, rest = (v[k] - last) / 256;
    int32_t next = (rest & 127) - (rest & 64) * 2;
    low[k] = (int8_t)last;
    middle[k] = (int8_t)next;
    high[k] = (int8_t)((next - rest) / 128);
  }
  split_parities(high, to);
  split_parities(middle, to + ZMOE_BLOCK);
  split_parities(low, to + 2 * ZMOE_BLOCK);
}

/* A power of two, so that a bf16 element of at least 2^-14 of the largest is
 * kept as it is. */
float zmoe_scale_int22(float largest, float *inverse) {
  const float limit = 127 << 15;
  *inverse = 0.0f;
  if (largest < 0x1p-100f)
    return 1.0f;
  float scale = f32_of_bits(((bits_of_f32(largest) >> 23) - 21) << 23);
  scale = largest > scale * limit ? scale * 2.0f : scale;
  *inverse = 1.0f / scale;
  return scale;
}

void zmoe_finish_int22(const zmoe_weight *w, int32_t sum, float scale, size_t g, zmoe_packed to) {
  float rounded = (float)sum * scale, centre = (float)centre_of(w);
  to.scales[g] = scale * unit_of(w);
  to.rests[g] = w->format == ZMOE_FORMAT_AFFINE ? (to.sums[g] - rounded) * centre
                                                : -rounded * centre * unit_of(w);
}

/* A group in 22 bits. */
static void pack_input_int22(const zmoe_weight *w, const float *x, uint32_t first, zmoe_packed to) {
  float inverse, scale = zmoe_scale_int22(largest_of(x + first, w->group), &inverse);
  int32_t sum = 0;
  for (uint32_t k = first; k < first + w->group; k += ZMOE_INT_GROUP) {
    int32_t v[ZMOE_INT_GROUP];
    quantise(x + k, inverse, v);
    store_digits(v, block_at(to.elements, k, 3));
    for (uint32_t i = 0; i < ZMOE_INT_GROUP; i++)
      sum += v[i];
  }
  zmoe_finish_int22(w, sum, scale, first / w->group, to);
}

static void pack_input_integers(zmoe_layout layout, const zmoe_weight *w, const float *x,
                                zmoe_packed to) {
  memset(to.scales, 0, 2 * integer_bytes(layout, w->in_features)); /* beyond `in_features`, too */
  if (layout == ZMOE_LAYOUT_CODES4_INT22) {
    for (uint32_t k = 0; k < w->in_features; k += w->group)
      pack_input_int22(w, x, k, to);
  } else {
    for (uint32_t k = 0; k < w->in_features; k += ZMOE_INT_GROUP)
      pack_input_int8(layout, w, x, k, to);
  }
}

void zmoe_generic_pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  zmoe_packed to = zmoe_packed_at(row, layout, w->in_features);
  if (w->group != 0)
    sum_groups(x, w->in_features, w->group, to.sums);
  memset(to.elements, 0, zmoe_round_up(w->in_features, ZMOE_BLOCK) * element_bytes(layout));
  if (zmoe_layout_is_integer(layout)) {
    pack_input_integers(layout, w, x, to);
    return;
  }
  uint8_t places[ZMOE_BLOCK];
  for (uint32_t k = 0; k < ZMOE_BLOCK; k++)
    places[k] = (uint8_t)place_of(k, layout);
  if (element_bytes(layout) == 2)
    pack_input_bf16(places, x, w->in_features, to.elements);
  else
    pack_input_f32(places, x, w->in_features, to.elements);
}
