/* Products in plain C: any format, any CPU.  Also how x is arranged for the
 * kernels that have a layout of their own. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#include "../reduce_scalar.h"
#include "team.h"
#include "weight.h"

enum { CHUNK = 512, LANES = 16 };

/* ---- x as other kernels want it --------------------------------------------- */

static size_t element_bytes(zmoe_layout layout) {
  switch (layout) {
  case ZMOE_LAYOUT_BF16:
  case ZMOE_LAYOUT_CODES4_BF16:
  case ZMOE_LAYOUT_CODES8_BF16:
    return 2;
  case ZMOE_LAYOUT_CODES4_INT8:
  case ZMOE_LAYOUT_CODES8_INT8:
    return 1;
  default:
    return 4;
  }
}

/* The int8 layouts have 16 lanes a register of codes: 128 of 4 bits, or 64 of 8. */
static size_t lanes_of(zmoe_layout layout, uint32_t ins) {
  size_t blocks = zmoe_round_up(ins, ZMOE_BLOCK) / ZMOE_BLOCK;
  if (layout == ZMOE_LAYOUT_CODES4_INT8)
    return blocks * 16;
  return layout == ZMOE_LAYOUT_CODES8_INT8 ? blocks * 32 : 0;
}

static size_t sums_bytes(uint32_t ins) {
  return zmoe_round_up(ins / 16, 16) * sizeof(float) + 64; /* the smallest group has 16 */
}

size_t zmoe_arranged_bytes(zmoe_layout layout, uint32_t ins) {
  if (layout == ZMOE_LAYOUT_PLAIN)
    return 0;
  return sums_bytes(ins) + lanes_of(layout, ins) * 8 +
         zmoe_round_up(ins, ZMOE_BLOCK) * element_bytes(layout);
}

zmoe_arranged zmoe_arranged_at(void *row, zmoe_layout layout, uint32_t ins) {
  unsigned char *at = row;
  size_t lanes = lanes_of(layout, ins);
  zmoe_arranged parts;
  parts.sums = (float *)(void *)at;
  at += sums_bytes(ins);
  parts.scales = (float *)(void *)at;
  at += lanes * sizeof(float);
  parts.offsets = (int32_t *)(void *)at;
  at += lanes * sizeof(int32_t);
  parts.elements = at;
  return parts;
}

static void sum_groups(const float *x, uint32_t ins, uint32_t group, float *sums) {
  uint32_t groups = ins / group;
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

/* Where element k of a block of 128 goes.  A 32-bit word holds eight 4-bit
 * codes; shifting all words by 4 i brings code i of each to the bottom. */
static uint32_t place_of_code4(uint32_t k, zmoe_layout layout) {
  uint32_t word = k / 8, code = k % 8;
  if (layout == ZMOE_LAYOUT_CODES4) /* register i: code i of all 16 words */
    return code * 16 + word;
  if (layout == ZMOE_LAYOUT_CODES4_BF16) /* register i < 4: codes i and i + 4 */
    return (code % 4) * 32 + word * 2 + code / 4;
  return (code % 2) * 64 + word * 4 + code / 2; /* int8: even codes, then odd ones */
}

static void store_element(zmoe_layout layout, void *elements, size_t place, float value) {
  if (element_bytes(layout) == 2)
    ((uint16_t *)elements)[place] = bf16_of_f32(value);
  else
    ((float *)elements)[place] = value;
}

static int is_code4(zmoe_layout layout) {
  return layout == ZMOE_LAYOUT_CODES4 || layout == ZMOE_LAYOUT_CODES4_BF16 ||
         layout == ZMOE_LAYOUT_CODES4_INT8;
}

/* x in 8 bits: per group of 32 the scale largest / 127; lane by lane, since a
 * register's sums are scaled lane by lane.  The code of an fp4 value is twice
 * it plus 12, so that it has no sign: the offset takes the 12 back. */
static void arrange_int8(zmoe_layout layout, const zmoe_weight *w, const float *x,
                         zmoe_arranged to) {
  uint32_t ins = w->ins, padded = (uint32_t)zmoe_round_up(ins, ZMOE_BLOCK);
  uint32_t per_lane = layout == ZMOE_LAYOUT_CODES4_INT8 ? 8 : 4;
  int fp4 = w->format != ZMOE_FORMAT_AFFINE;
  int8_t *elements = to.elements;
  memset(elements, 0, padded);
  for (uint32_t first = 0; first < padded; first += ZMOE_INT8_GROUP) {
    float largest = 0;
    for (uint32_t k = first; k < first + ZMOE_INT8_GROUP && k < ins; k++)
      largest = fmaxf(largest, fabsf(x[k]));
    float scale = largest / 127.0f, inverse = largest > 0x1p-120f ? 127.0f / largest : 0.0f;
    for (uint32_t lane = first / per_lane; lane < (first + ZMOE_INT8_GROUP) / per_lane; lane++) {
      int32_t sum = 0;
      for (uint32_t k = lane * per_lane; k < (lane + 1) * per_lane && k < ins; k++) {
        int8_t code = (int8_t)lrintf(x[k] * inverse);
        uint32_t place = is_code4(layout) ? place_of_code4(k % ZMOE_BLOCK, layout) : k % ZMOE_BLOCK;
        elements[k / ZMOE_BLOCK * ZMOE_BLOCK + place] = code;
        sum += code;
      }
      to.scales[lane] = fp4 ? scale * 0.5f : scale;
      to.offsets[lane] = fp4 ? -12 * sum : 0;
    }
  }
}

void zmoe_generic_arrange(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  zmoe_arranged to = zmoe_arranged_at(row, layout, w->ins);
  if (w->group != 0)
    sum_groups(x, w->ins, w->group, to.sums);
  if (layout == ZMOE_LAYOUT_CODES4_INT8 || layout == ZMOE_LAYOUT_CODES8_INT8) {
    arrange_int8(layout, w, x, to);
    return;
  }
  memset(to.elements, 0, zmoe_round_up(w->ins, ZMOE_BLOCK) * element_bytes(layout));
  for (uint32_t k = 0; k < w->ins; k++) {
    uint32_t block = k / ZMOE_BLOCK * ZMOE_BLOCK, place = k % ZMOE_BLOCK;
    if (is_code4(layout))
      place = place_of_code4(place, layout);
    else if (layout == ZMOE_LAYOUT_CODES8_BF16) /* of 64: even ones, then odd ones */
      place = place / 64 * 64 + place % 2 * 32 + place % 64 / 2;
    store_element(layout, to.elements, block + place, x[k]);
  }
}

/* ---- few rows ------------------------------------------------------------------ */

static float dot_plain(const float *restrict a, const float *restrict b, uint32_t count) {
  float lanes[LANES] = {0}, sum = 0;
  uint32_t k = 0;
  for (; k + LANES <= count; k += LANES)
    for (uint32_t l = 0; l < LANES; l++)
      lanes[l] += a[k + l] * b[k + l];
  for (; k < count; k++)
    sum += a[k] * b[k];
  for (uint32_t l = 0; l < LANES; l++)
    sum += lanes[l];
  return sum;
}

void zmoe_generic_dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs,
                      uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  (void)layout; /* always plain */
  float decoded[CHUNK];
  for (uint32_t o = first; o < last; o++) {
    float sums[ZMOE_DOT_ROWS] = {0};
    for (uint32_t k = 0; k < w->ins; k += CHUNK) {
      uint32_t end = w->ins - k < CHUNK ? w->ins : k + CHUNK;
      zmoe_decode_range(w, o, k, end, decoded);
      for (uint32_t r = 0; r < rows; r++)
        sums[r] += dot_plain(decoded, (const float *)xs[r] + k, end - k);
    }
    for (uint32_t r = 0; r < rows; r++)
      ys[r][o - first] = sums[r];
  }
}

/* ---- many rows ----------------------------------------------------------------- */

void zmoe_generic_pack(const zmoe_weight *w, uint32_t first, uint32_t last, uint32_t k0,
                       uint32_t k1, float *panel) {
  float decoded[ZMOE_DEPTH];
  uint32_t depth = k1 - k0;
  if (last - first < ZMOE_PANEL)
    memset(panel, 0, (size_t)depth * ZMOE_PANEL * sizeof(float));
  for (uint32_t o = first; o < last; o++) {
    zmoe_decode_range(w, o, k0, k1, decoded);
    for (uint32_t k = 0; k < depth; k++)
      panel[(size_t)k * ZMOE_PANEL + (o - first)] = decoded[k];
  }
}

static void generic_tile(const float *panel, uint32_t depth, const float *const *xs, uint32_t rows,
                         float *sums, int add) {
  for (uint32_t r = 0; r < rows; r++) {
    float *restrict sum = sums + (size_t)r * ZMOE_PANEL;
    if (!add)
      memset(sum, 0, ZMOE_PANEL * sizeof(float));
    for (uint32_t k = 0; k < depth; k++)
      for (uint32_t o = 0; o < ZMOE_PANEL; o++)
        sum[o] += xs[r][k] * panel[(size_t)k * ZMOE_PANEL + o];
  }
}

static zmoe_layout plain_layout(const zmoe_weight *w, zmoe_dtype x_dtype,
                                zmoe_precision precision) {
  (void)w, (void)x_dtype, (void)precision;
  return ZMOE_LAYOUT_PLAIN;
}

const zmoe_kernels zmoe_kernels_generic = {plain_layout, zmoe_generic_arrange, zmoe_generic_dot,
                                           zmoe_generic_pack, generic_tile};
