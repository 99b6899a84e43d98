/* Matmuls, in the vectors of vec.h: the loops that AVX2 and NEON share.  Before
 * including this, a variant defines what f32_body.h needs, CODES, a register of 4 * LANES bytes of
 * codes, UNIT, how many of them are multiplied at a time, and
 *   load_codes(src, n)    n words of codes; those from n on are zero and not touched,
 *   load_unit(t, src, codes)  a unit's codes in 2 * UNIT registers, one code a byte, without sign
 *                         (fp4: twice the value plus 12),
 *   times_int8(codes, x, k, i)  their products with x from element k + i on, lane by lane; k is a
 *                         multiple of ZMOE_BLOCK,
 *   add_int22(t, codes, x, k, i, scales, lanes, sum)  adds the same to sum, times their scales,
 *   bytes_times_int8(bytes, x, k)  products of 8-bit codes,
 *   lanes, lanes_of(group), spread(scales, lanes)  the scale of each lane of a unit, from the first
 *                         of its groups and of 3 more,
 *   pack_integers(layout, w, x, row)  packs x for codes,
 * with LOW_BITS load_unit and add_int22 for affine codes of 2 to 6 bits, and of nvfp4,
 * and afterwards makes a table of `gemv_layout`, `gemv_pack_input` and `gemv_dot`.
 *
 * `rows` and formats are constants in each call of the inlined bodies,
 * so that choices vanish and sums stay in registers. */
#include "f32_body.h"

/* ---- integers ---------------------------------------------------------------------
 * Here x is integers, and so are products and sums: converting that many
 * codes to floats would take longer than reading them.  Each row of one output at a time. */

/* Scales that are converted at a time, and outputs of one row, which hide what each has to wait for
 * besides its units. */
enum { SCALES = 64, FEW_OUTS = 2 };

/* Codes in a unit. */
KERNEL uint32_t unit_codes(form t) {
  if (t.layout == ZMOE_LAYOUT_CODES8_INT8)
    return 4 * LANES;
  if (t.layout == ZMOE_LAYOUT_CODES8_INT22)
    return 8 * LANES;
  return 8 * LANES * UNIT;
}

struct scales {
  float of[ZMOE_DOT_ROWS][SCALES + LANES]; /* as many more as `spread` may read */
};

/* The scales of groups [g, g + count), times those that rows of x in 22 bits have
 * of their own; and what the sums of x add. */
KERNEL void start_groups(const zmoe_weight *w, form t, uint32_t g, uint32_t count,
                         const zmoe_packed *x, const uint32_t rows, struct zmoe_outputs out,
                         struct scales *each, VEC sum[ZMOE_DOT_ROWS]) {
  const int int22 = zmoe_layout_is_int22(t.layout), affine = t.format == ZMOE_FORMAT_AFFINE;
  for (uint32_t i = 0; i < count; i += LANES) {
    VEC scale = scales_at(w, (kind){.format = t.format}, out.scales, g + i, count - i);
    if (affine) {
      VEC bias = load_some(out.biases, g + i, w->scale_dtype, count - i);
      if (!int22)
        bias = vec_fma(scale, vec_splat(t.bits == 4 ? ZMOE_CENTRE4 : ZMOE_CENTRE8), bias);
      EACH(r, rows)
        sum[r] = vec_fma(bias, load_x(x[r].sums + g + i), sum[r]);
    }
    EACH(r, rows) {
      VEC own = scale;
      if (int22) {
        sum[r] = vec_fma(scale, load_x(x[r].rests + g + i), sum[r]);
        own = scale * load_x(x[r].scales + g + i);
      }
      memcpy(each->of[r] + i, &own, sizeof own);
    }
  }
}

/* Adds a unit of codes, those from element k + i on, k a multiple of ZMOE_BLOCK, which lie at
 * `src` and the first of which is of group g in `each`. */
KERNEL void add_unit(form t, const unsigned char *src, size_t k, uint32_t i, const zmoe_packed *x,
                     const uint32_t rows, const struct scales *each, uint32_t g, lanes l,
                     VEC sum[ZMOE_DOT_ROWS]) {
  CODES codes[2 * UNIT];
  if (t.layout == ZMOE_LAYOUT_CODES8_INT8)
    codes[0] = load_codes(src, LANES);
  else
    load_unit(t, src, codes);
  EACH(r, rows)
    if (t.layout == ZMOE_LAYOUT_CODES8_INT8)
      sum[r] = vec_fma(bytes_times_int8(codes[0], &x[r], k + i), vec_splat(each->of[r][g]), sum[r]);
    else if (t.layout == ZMOE_LAYOUT_CODES4_INT8)
      sum[r] = vec_fma(times_int8(codes, &x[r], k, i), spread(each->of[r] + g, l), sum[r]);
    else
      sum[r] = add_int22(t, codes, &x[r], k, i, each->of[r] + g, l, sum[r]);
}

KERNEL void add_groups(const zmoe_weight *w, form t, uint32_t g, uint32_t count,
                       const zmoe_packed *x, const uint32_t rows, struct zmoe_outputs out,
                       const uint32_t outs, VEC sum[][ZMOE_DOT_ROWS]) {
  const uint32_t unit = unit_codes(t), unit_bytes = unit * t.bits / 8;
  const uint32_t shift = (uint32_t)__builtin_ctz(w->group), per_block = ZMOE_BLOCK >> shift;
  const lanes l = lanes_of(w->group);
  struct scales each[FEW_OUTS];
  EACH(j, outs)
    start_groups(w, t, g, count, x, rows, zmoe_pass_outputs(out, j), &each[j], sum[j]);
  size_t k = (size_t)g << shift, end = k + ((size_t)count << shift);
  uint32_t at = 0;
  const unsigned char *src = out.data + k * t.bits / 8;
  for (; k + ZMOE_BLOCK <= end; k += ZMOE_BLOCK, at += per_block) {
    EACH(j, outs)
      for (uint32_t i = 0; i < ZMOE_BLOCK * t.bits / 8; i += 64)
        zmoe_prefetch(src + j * out.row_bytes + i);
    for (uint32_t i = 0; i < ZMOE_BLOCK; i += unit)
      EACH(j, outs)
        add_unit(t, src + j * out.row_bytes + i * t.bits / 8, k, i, x, rows, &each[j],
                 at + (i >> shift), l, sum[j]);
    src += ZMOE_BLOCK * t.bits / 8;
  }
  for (uint32_t i = 0; k + i < end; i += unit, src += unit_bytes) {
    const size_t bytes = (end - k - i) * t.bits / 8;
    EACH(j, outs) {
      unsigned char padded[ZMOE_BLOCK] = {0};
      const unsigned char *from = src + j * out.row_bytes;
      from = bytes < unit_bytes ? memcpy(padded, from, bytes) : from;
      add_unit(t, from, k, i, x, rows, &each[j], at + (i >> shift), l, sum[j]);
    }
  }
}

KERNEL void dot_integers(const zmoe_weight *w, form t, const void *const *xs, const uint32_t rows,
                         uint32_t first, uint32_t last, float *const *ys) {
  const uint32_t groups = w->in_features / w->group;
  zmoe_packed x[ZMOE_DOT_ROWS];
  EACH(r, rows)
    x[r] = zmoe_packed_at((void *)xs[r], t.layout, w->in_features);
  const uint32_t outs = rows == 1 ? FEW_OUTS : 1;
  struct zmoe_outputs out = zmoe_outputs_at(w, first);
  for (uint32_t o = first; o < last; o += outs, out = zmoe_pass_outputs(out, outs)) {
    VEC sum[FEW_OUTS][ZMOE_DOT_ROWS];
    EACH(j, outs)
      EACH(r, rows)
        sum[j][r] = vec_splat(0.0f);
    if (o + outs > last) /* the last one, twice */
      out.row_bytes = out.scale_bytes = 0;
    for (uint32_t g = 0; g < groups; g += SCALES)
      add_groups(w, t, g, groups - g < SCALES ? groups - g : SCALES, x, rows, out, outs, sum);
    EACH(j, outs)
      EACH(r, rows)
        if (o + j < last)
          ys[r][o - first + j] = vec_fold(sum[j][r]);
  }
}

/* ---- which one -------------------------------------------------------------------- */

#define INTEGERS(...) ZMOE_BY_ROWS(dot_integers, w, ((form){__VA_ARGS__}))
#define AFFINE8(bits)                                                                              \
  do {                                                                                             \
    if (w->group == 32)                                                                            \
      INTEGERS(ZMOE_LAYOUT_CODES8_INT22, ZMOE_FORMAT_AFFINE, bits, 1);                             \
    else                                                                                           \
      INTEGERS(ZMOE_LAYOUT_CODES8_INT22, ZMOE_FORMAT_AFFINE, bits, 0);                             \
  } while (0)

DOT(dot_codes4, INTEGERS(ZMOE_LAYOUT_CODES4_INT22, ZMOE_FORMAT_AFFINE, 4, 0))
DOT(dot_fp4, INTEGERS(ZMOE_LAYOUT_CODES4_INT22, ZMOE_FORMAT_MXFP4, 4, 0))
#ifdef LOW_BITS
DOT(dot_codes2, INTEGERS(ZMOE_LAYOUT_CODES4_INT22, ZMOE_FORMAT_AFFINE, 2, 0))
DOT(dot_codes3, INTEGERS(ZMOE_LAYOUT_CODES4_INT22, ZMOE_FORMAT_AFFINE, 3, 0))
DOT(dot_codes5, AFFINE8(5))
DOT(dot_codes6, AFFINE8(6))
DOT(dot_nvfp4_int22, INTEGERS(ZMOE_LAYOUT_CODES4_INT22, ZMOE_FORMAT_NVFP4, 4, 0))
#endif
DOT(dot_codes4_int8, INTEGERS(ZMOE_LAYOUT_CODES4_INT8, ZMOE_FORMAT_AFFINE, 4, 0))
DOT(dot_fp4_int8, INTEGERS(ZMOE_LAYOUT_CODES4_INT8, ZMOE_FORMAT_MXFP4, 4, 0))
DOT(dot_codes8_int8, INTEGERS(ZMOE_LAYOUT_CODES8_INT8, ZMOE_FORMAT_AFFINE, 8, 0))

typedef void matmul(const zmoe_weight *w, const void *const *xs, uint32_t rows, uint32_t first,
                    uint32_t last, void *scratch, float *const *ys);

static matmul *matmul_of_integers(const zmoe_weight *w, zmoe_layout layout) {
  int affine = w->format == ZMOE_FORMAT_AFFINE;
#ifdef LOW_BITS
  if (w->format == ZMOE_FORMAT_NVFP4)
    return dot_nvfp4_int22;
  switch (w->bits) {
  case 2:
    return dot_codes2;
  case 3:
    return dot_codes3;
  case 5:
    return dot_codes5;
  case 6:
    return dot_codes6;
  }
#endif
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
#ifdef LOW_BITS
  if (w->bits == 2 || w->bits == 3 || w->format == ZMOE_FORMAT_NVFP4)
    return ZMOE_LAYOUT_CODES4_INT22;
  if (w->bits == 5 || w->bits == 6)
    return ZMOE_LAYOUT_CODES8_INT22;
#endif
  return w->bits == 1 ? ZMOE_LAYOUT_PLAIN : ZMOE_LAYOUT_CHAINS;
}
