/* Matmuls, in the vectors of vec.h: the loops that AVX2 and NEON share.  Before
 * including this, a variant defines what f32_body.h needs, CODES, a register of 4 * LANES bytes of
 * codes, UNIT, how many of them are multiplied at a time, and
 *   load_codes(src, n)    n words of codes; those from n on are zero and not touched,
 *   load_unit(src, n, affine, codes)  n words of 4-bit codes in 2 * UNIT registers, one code a
 *                         byte, without sign (fp4: twice the value plus 12),
 *   times_int8(codes, x, k, i), times_int22(codes, x, k, i)
 *                         their products with x from element k + i on, lane by lane; k is a
 *                         multiple of ZMOE_BLOCK,
 *   bytes_times_int8(bytes, x, k)  the same of 8-bit codes,
 *   spread(scales, group) the scale of each lane of a unit, from the first of its groups,
 *   pack_integers(layout, w, x, row)  packs x for codes,
 * and afterwards makes a table of `gemv_layout`, `gemv_pack_input` and `gemv_dot`.
 *
 * `rows`, formats and groups are constants in each call of the inlined bodies,
 * so that choices vanish and sums stay in registers. */
#include "f32_body.h"

/* ---- integers ---------------------------------------------------------------------
 * For 4 bits x is integers, and so are products and sums: converting that many
 * codes to floats would take longer than reading them.  Each row of one output at a time. */

enum product { CODES4_INT8, CODES4_INT22, CODES8_INT8 };

/* Scales that are converted at a time. */
enum { SCALES = 64 };

/* The scales of groups [g, g + count), times those that rows of x in 22 bits have
 * of their own; and what the sums of x add. */
KERNEL void start_groups(const zmoe_weight *w, enum product product, int affine, uint32_t g,
                         uint32_t count, const zmoe_packed *x, const uint32_t rows,
                         struct outputs out, float each[ZMOE_DOT_ROWS][SCALES],
                         VEC sum[ZMOE_DOT_ROWS]) {
  const float centre = product == CODES4_INT8 ? ZMOE_CENTRE4 : ZMOE_CENTRE8;
  for (uint32_t i = 0; i < count; i += LANES) {
    VEC scale = affine ? load_some(out.scales, g + i, w->scale_dtype, count - i)
                       : load_e8m0(out.scales + g + i, count - i);
    if (affine) {
      VEC bias = load_some(out.biases, g + i, w->scale_dtype, count - i);
      if (product != CODES4_INT22)
        bias = vec_fma(scale, vec_splat(centre), bias);
      EACH(r, rows)
        sum[r] = vec_fma(bias, load_x(x[r].sums + g + i), sum[r]);
    }
    EACH(r, rows) {
      VEC own = scale;
      if (product == CODES4_INT22) {
        sum[r] = vec_fma(scale, load_x(x[r].rests + g + i), sum[r]);
        own = scale * load_x(x[r].scales + g + i);
      }
      memcpy(each[r] + i, &own, sizeof own);
    }
  }
}

/* Adds `words` words of codes, those from element k + i on, k a multiple of ZMOE_BLOCK.
 * `at`: k's group in `each`. */
KERNEL void add_codes(enum product product, int affine, const uint32_t group, size_t k, uint32_t i,
                      uint32_t words, const zmoe_packed *x, const uint32_t rows, struct outputs out,
                      float each[ZMOE_DOT_ROWS][SCALES], uint32_t at, VEC sum[ZMOE_DOT_ROWS]) {
  const uint32_t g = at + i / group;
  CODES codes[2 * UNIT];
  if (product == CODES8_INT8)
    codes[0] = load_codes(out.data + k + i, LANES);
  else
    load_unit(out.data + (k + i) / 2, words, affine, codes);
  EACH(r, rows)
    if (product == CODES8_INT8)
      sum[r] = vec_fma(bytes_times_int8(codes[0], &x[r], k + i), vec_splat(each[r][g]), sum[r]);
    else if (product == CODES4_INT8)
      sum[r] = vec_fma(times_int8(codes, &x[r], k, i), spread(each[r] + g, group), sum[r]);
    else
      sum[r] = vec_fma(times_int22(codes, &x[r], k, i), spread(each[r] + g, group), sum[r]);
}

KERNEL void add_groups(const zmoe_weight *w, enum product product, int affine, const uint32_t group,
                       uint32_t g, uint32_t count, const zmoe_packed *x, const uint32_t rows,
                       struct outputs out, VEC sum[ZMOE_DOT_ROWS]) {
  const uint32_t bits = product == CODES8_INT8 ? 8 : 4, per_word = 32 / bits;
  const uint32_t step = (bits == 4 ? UNIT : 1) * LANES * per_word;
  float each[ZMOE_DOT_ROWS][SCALES];
  start_groups(w, product, affine, g, count, x, rows, out, each, sum);
  size_t k = (size_t)g * group, end = k + (size_t)count * group;
  uint32_t at = 0;
  for (; k + ZMOE_BLOCK <= end; k += ZMOE_BLOCK, at += ZMOE_BLOCK / group) {
    for (uint32_t i = 0; i < ZMOE_BLOCK * bits / 8; i += 64)
      zmoe_prefetch(out.data + k * bits / 8 + i);
    for (uint32_t i = 0; i < ZMOE_BLOCK; i += step)
      add_codes(product, affine, group, k, i, step / per_word, x, rows, out, each, at, sum);
  }
  for (uint32_t i = 0; k + i < end; i += step)
    add_codes(product, affine, group, k, i, (uint32_t)(end - k - i) / per_word, x, rows, out, each,
              at, sum);
}

KERNEL void dot_codes(const zmoe_weight *w, enum product product, zmoe_layout layout, int affine,
                      const uint32_t group, const void *const *xs, const uint32_t rows,
                      uint32_t first, uint32_t last, float *const *ys) {
  const uint32_t groups = w->in_features / group;
  zmoe_packed x[ZMOE_DOT_ROWS];
  EACH(r, rows)
    x[r] = zmoe_packed_at((void *)xs[r], layout, w->in_features);
  struct outputs out = outputs_at(w, first);
  for (uint32_t o = first; o < last; o++, out = outputs_after(out, 1)) {
    VEC sum[ZMOE_DOT_ROWS];
    EACH(r, rows)
      sum[r] = vec_splat(0.0f);
    for (uint32_t g = 0; g < groups; g += SCALES)
      add_groups(w, product, affine, group, g, groups - g < SCALES ? groups - g : SCALES, x, rows,
                 out, sum);
    EACH(r, rows)
      ys[r][o - first] = vec_fold(sum[r]);
  }
}

/* ---- which one -------------------------------------------------------------------- */

#define GROUPS(product, layout)                                                                    \
  do {                                                                                             \
    if (w->group == 32)                                                                            \
      ZMOE_BY_ROWS(dot_codes, w, product, layout, 1, 32);                                          \
    else if (w->group == 64)                                                                       \
      ZMOE_BY_ROWS(dot_codes, w, product, layout, 1, 64);                                          \
    else                                                                                           \
      ZMOE_BY_ROWS(dot_codes, w, product, layout, 1, 128);                                         \
  } while (0)

DOT(dot_codes4, GROUPS(CODES4_INT22, ZMOE_LAYOUT_CODES4_INT22))
DOT(dot_fp4, ZMOE_BY_ROWS(dot_codes, w, CODES4_INT22, ZMOE_LAYOUT_CODES4_INT22, 0, 32))
DOT(dot_codes4_int8, GROUPS(CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8))
DOT(dot_fp4_int8, ZMOE_BY_ROWS(dot_codes, w, CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8, 0, 32))
DOT(dot_codes8_int8, GROUPS(CODES8_INT8, ZMOE_LAYOUT_CODES8_INT8))

typedef void matmul(const zmoe_weight *w, const void *const *xs, uint32_t rows, uint32_t first,
                    uint32_t last, void *scratch, float *const *ys);

static matmul *matmul_of_integers(const zmoe_weight *w, zmoe_layout layout) {
  int affine = w->format == ZMOE_FORMAT_AFFINE;
  if (layout == ZMOE_LAYOUT_CODES4_INT22)
    return affine ? dot_codes4 : dot_fp4;
  if (layout == ZMOE_LAYOUT_CODES4_INT8)
    return affine ? dot_codes4_int8 : dot_fp4_int8;
  return dot_codes8_int8;
}

#ifdef OTHERS
static void dot_others(const zmoe_weight *w, zmoe_layout layout, const void *const *xs,
                       uint32_t rows, uint32_t first, uint32_t last, void *scratch,
                       float *const *ys) {
  OTHERS.dot(w, layout, xs, rows, first, last, scratch, ys);
}

static void pack_others(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  OTHERS.pack_input(layout, w, x, row);
}
#else
#define FLOATS(name, format, bits)                                                                 \
  DOT(name, F32_SUMS(ZMOE_LAYOUT_CHAINS, format, bits, 0, NULL))                                   \
  DOT(name##_plain, F32_SUMS(ZMOE_LAYOUT_PLAIN, format, bits, 0, NULL))

FLOATS(dot_f32, ZMOE_FORMAT_F32, 32)
FLOATS(dot_f16, ZMOE_FORMAT_F16, 16)
FLOATS(dot_bf16, ZMOE_FORMAT_BF16, 16)

static void dot_others(const zmoe_weight *w, zmoe_layout layout, const void *const *xs,
                       uint32_t rows, uint32_t first, uint32_t last, void *scratch,
                       float *const *ys) {
  static matmul *const floats[2][3] = {{dot_f32, dot_f16, dot_bf16},
                                       {dot_f32_plain, dot_f16_plain, dot_bf16_plain}};
  if (zmoe_is_float(w))
    floats[layout == ZMOE_LAYOUT_PLAIN][w->format](w, xs, rows, first, last, scratch, ys);
  else
    dot_chains(w, xs, rows, first, last, scratch, ys);
}

static void pack_others(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  pack_chains(x, w->in_features, zmoe_packed_at(row, layout, w->in_features).elements);
}
#endif

static void gemv_dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                     uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  if (zmoe_layout_is_integer(layout))
    matmul_of_integers(w, layout)(w, xs, rows, first, last, scratch, ys);
  else
    dot_others(w, layout, xs, rows, first, last, scratch, ys);
}

static void gemv_pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  if (zmoe_layout_is_integer(layout))
    pack_integers(layout, w, x, row);
  else
    pack_others(layout, w, x, row);
}

static zmoe_layout gemv_layout(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  (void)x_dtype;
  if (w->format == ZMOE_FORMAT_MXFP4 || (w->format == ZMOE_FORMAT_AFFINE && w->bits == 4))
    return precision == ZMOE_INT8 ? ZMOE_LAYOUT_CODES4_INT8 : ZMOE_LAYOUT_CODES4_INT22;
  if (w->format == ZMOE_FORMAT_AFFINE && w->bits == 8 && precision == ZMOE_INT8)
    return ZMOE_LAYOUT_CODES8_INT8;
  return w->bits == 1 ? ZMOE_LAYOUT_PLAIN : ZMOE_LAYOUT_CHAINS;
}
