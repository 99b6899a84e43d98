/* GEMV, in the vectors of vec.h: the loops that AVX2 and NEON share.  Before
 * including this, a variant defines CODES, a register of 4 * LANES bytes of
 * codes, and
 *   load_some(src, i, dtype, n), load_e8m0(src, n)  LANES floats, or scales; those
 *                         from n on are zero and not touched,
 *   load_codes(src, n)    n words of codes, likewise,
 *   split(bytes, affine, codes)  the codes in the low halves of bytes, and in the
 *                         high ones, without sign (fp4: twice the value plus 12),
 *   times_int8(codes, x, elements, lane), times_int22(codes, elements)
 *                         their products with x, lane by lane,
 *   bytes_times_int8(bytes, x, k)  the same of 8-bit codes,
 *   widen_bytes(src, values)  four vectors of codes as floats,
 *   spread(scales, two)   the first scale in all lanes, or two, of half each,
 * and afterwards makes a table of `gemv_layout` and `gemv_dot`.
 *
 * `rows`, formats and groups are constants in each call of the inlined bodies,
 * so that choices vanish and sums stay in registers. */
#include "kernels.h"
#include "weight.h"

KERNEL VEC load_x(const float *x) {
  return vec_load((const unsigned char *)x, 0, ZMOE_F32);
}

/* ---- floats ------------------------------------------------------------------ */

enum { MOST_OUTS = 4, STEP = 32 };

/* `n_out` outputs from o on: several hide the latency of each sum, and share the loads of x. */
KERNEL void dot_outputs(const zmoe_weight *w, uint32_t format, const void *const *xs,
                        const uint32_t rows, const uint32_t n_out, uint32_t o, uint32_t first,
                        float *const *ys) {
  const size_t in_features = w->in_features, item = format == ZMOE_FORMAT_F32 ? 4 : 2,
               row_bytes = in_features * item,
               ahead = zmoe_rows_ahead(row_bytes, n_out) * row_bytes;
  const unsigned char *data = zmoe_row(w, o);
  VEC sum[ZMOE_DOT_ROWS][MOST_OUTS], value[MOST_OUTS];
  EACH(r, rows)
    EACH(j, n_out)
      sum[r][j] = vec_splat(0.0f);
  size_t k = 0;
  for (; k + STEP <= in_features; k += STEP) {
    EACH(j, n_out)
      for (size_t line = 0; line < STEP * item; line += 64)
        __builtin_prefetch(data + j * row_bytes + k * item + line + ahead);
    EACH(c, STEP / LANES) {
      EACH(j, n_out)
        value[j] = vec_load(data + j * row_bytes, k + LANES * c, (zmoe_dtype)format);
      EACH(r, rows) {
        VEC x = load_x((const float *)xs[r] + k + LANES * c);
        EACH(j, n_out)
          sum[r][j] = vec_fma(value[j], x, sum[r][j]);
      }
    }
  }
  for (; k < in_features; k += LANES) {
    uint32_t left = (uint32_t)(in_features - k);
    EACH(j, n_out)
      value[j] = load_some(data + j * row_bytes, k, format, left);
    EACH(r, rows) {
      VEC x = load_some(xs[r], k, ZMOE_F32, left);
      EACH(j, n_out)
        sum[r][j] = vec_fma(value[j], x, sum[r][j]);
    }
  }
  EACH(r, rows)
    EACH(j, n_out)
      ys[r][o + j - first] = vec_fold(sum[r][j]);
}

KERNEL void dot_floats(const zmoe_weight *w, uint32_t format, const void *const *xs,
                       const uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  const uint32_t n_out = rows <= 2 ? MOST_OUTS : 2;
  uint32_t o = first;
  for (; o + n_out <= last; o += n_out)
    dot_outputs(w, format, xs, rows, n_out, o, first, ys);
  for (; o < last; o++)
    dot_outputs(w, format, xs, rows, 1, o, first, ys);
}

/* ---- codes ------------------------------------------------------------------------
 * For 4 bits x is integers, and so are products and sums: converting that many
 * codes to floats would take longer than reading them.  Of 8 bits it doesn't. */

enum product { CODES4_INT8, CODES4_INT22, CODES8, CODES8_INT8 };

/* Scales that are converted at a time. */
enum { SCALES = 64 };

/* The row of one output. */
struct output {
  const unsigned char *data, *scales, *biases;
};

/* The scales of groups [g, g + count), times those that rows of x in 22 bits have
 * of their own; and what the sums of x add. */
KERNEL void load_groups(const zmoe_weight *w, enum product product, int affine, uint32_t g,
                        uint32_t count, const zmoe_packed *x, const uint32_t rows,
                        struct output out, float each[ZMOE_DOT_ROWS][SCALES],
                        VEC sum[ZMOE_DOT_ROWS]) {
  const float centre = product == CODES4_INT8 ? ZMOE_CENTRE4 : ZMOE_CENTRE8;
  for (uint32_t i = 0; i < count; i += LANES) {
    VEC scale = affine ? load_some(out.scales, g + i, w->scale_dtype, count - i)
                       : load_e8m0(out.scales + g + i, count - i);
    if (affine) {
      VEC bias = load_some(out.biases, g + i, w->scale_dtype, count - i);
      if (product == CODES4_INT8 || product == CODES8_INT8)
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

/* Codes of 8 bits as floats. */
KERNEL void block_floats(const unsigned char *data, const zmoe_packed *x, size_t k,
                         const uint32_t rows, VEC part[ZMOE_DOT_ROWS]) {
  VEC values[4];
  widen_bytes(data + k, values);
  EACH(i, 4)
    EACH(r, rows) {
      VEC other = load_x((const float *)x[r].elements + k + LANES * i);
      if (i == 0)
        part[r] = values[0] * other;
      else
        part[r] = vec_fma(values[i], other, part[r]);
    }
}

/* Codes of 4 bits from element k + in_block on, k a multiple of ZMOE_BLOCK. */
KERNEL VEC block_integers(enum product product, const CODES codes[2], const zmoe_packed *x,
                          size_t k, size_t in_block) {
  const int8_t *elements = x->elements;
  if (product == CODES4_INT8)
    return times_int8(codes, x, elements + k + in_block / 2, (k + in_block) / 8);
  return times_int22(codes, elements + 3 * k + in_block / 2);
}

/* Adds one register of codes: those from element k + in_block on, of 4 bits no
 * more than `left`; others come in whole registers.  `at`: k's group in `each`. */
KERNEL void add_block(enum product product, int affine, const uint32_t group, size_t k,
                      uint32_t in_block, size_t left, const zmoe_packed *x, const uint32_t rows,
                      struct output out, float each[ZMOE_DOT_ROWS][SCALES], uint32_t at,
                      VEC sum[ZMOE_DOT_ROWS]) {
  VEC part[ZMOE_DOT_ROWS];
  if (product == CODES8) {
    block_floats(out.data, x, k + in_block, rows, part);
  } else if (product == CODES8_INT8) {
    CODES bytes = load_codes(out.data + k + in_block, LANES);
    EACH(r, rows)
      part[r] = bytes_times_int8(bytes, &x[r], k + in_block);
  } else {
    CODES codes[2];
    split(load_codes(out.data + (k + in_block) / 2, (uint32_t)left / 8), affine, codes);
    EACH(r, rows)
      part[r] = block_integers(product, codes, &x[r], k, in_block);
  }
  int two = group < 8 * LANES && (product == CODES4_INT8 || product == CODES4_INT22);
  EACH(r, rows)
    sum[r] = vec_fma(part[r], spread(each[r] + at + in_block / group, two), sum[r]);
}

KERNEL void add_groups(const zmoe_weight *w, enum product product, int affine, const uint32_t group,
                       uint32_t g, uint32_t count, const zmoe_packed *x, const uint32_t rows,
                       struct output out, VEC sum[ZMOE_DOT_ROWS]) {
  const uint32_t bits = product == CODES8 || product == CODES8_INT8 ? 8 : 4;
  const uint32_t step = 32 * LANES / bits;
  float each[ZMOE_DOT_ROWS][SCALES];
  load_groups(w, product, affine, g, count, x, rows, out, each, sum);
  size_t k = (size_t)g * group, end = k + (size_t)count * group;
  uint32_t at = 0;
  for (; k + ZMOE_BLOCK <= end; k += ZMOE_BLOCK, at += ZMOE_BLOCK / group) {
    for (uint32_t i = 0; i < ZMOE_BLOCK * bits / 8; i += 64)
      zmoe_prefetch(out.data + k * bits / 8 + i);
    for (uint32_t i = 0; i < ZMOE_BLOCK; i += step)
      add_block(product, affine, group, k, i, step, x, rows, out, each, at, sum);
  }
  for (uint32_t i = 0; k + i < end; i += step)
    add_block(product, affine, group, k, i, end - k - i, x, rows, out, each, at, sum);
}

KERNEL void dot_codes(const zmoe_weight *w, enum product product, zmoe_layout layout, int affine,
                      const uint32_t group, const void *const *xs, const uint32_t rows,
                      uint32_t first, uint32_t last, float *const *ys) {
  const uint32_t groups = w->in_features / group;
  const size_t row_bytes = zmoe_weight_row_bytes(w), scale_bytes = zmoe_weight_scale_bytes(w);
  zmoe_packed x[ZMOE_DOT_ROWS];
  EACH(r, rows)
    x[r] = zmoe_packed_at((void *)xs[r], layout, w->in_features);
  struct output out;
  out.data = zmoe_row(w, first);
  out.scales = zmoe_row_scales(w, first);
  out.biases = affine ? zmoe_row_biases(w, first) : out.scales;
  for (uint32_t o = first; o < last; o++) {
    VEC sum[ZMOE_DOT_ROWS];
    EACH(r, rows)
      sum[r] = vec_splat(0.0f);
    for (uint32_t g = 0; g < groups; g += SCALES)
      add_groups(w, product, affine, group, g, groups - g < SCALES ? groups - g : SCALES, x, rows,
                 out, sum);
    EACH(r, rows)
      ys[r][o - first] = vec_fold(sum[r]);
    out.data += row_bytes, out.scales += scale_bytes, out.biases += scale_bytes;
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
#define DOT(name, body)                                                                            \
  TARGET static void name(const zmoe_weight *w, const void *const *xs, uint32_t rows,              \
                          uint32_t first, uint32_t last, float *const *ys) {                       \
    body;                                                                                          \
  }

DOT(dot_f32, ZMOE_BY_ROWS(dot_floats, w, ZMOE_F32))
DOT(dot_f16, ZMOE_BY_ROWS(dot_floats, w, ZMOE_F16))
DOT(dot_bf16, ZMOE_BY_ROWS(dot_floats, w, ZMOE_BF16))
DOT(dot_codes4, GROUPS(CODES4_INT22, ZMOE_LAYOUT_CODES4_INT22))
DOT(dot_fp4, ZMOE_BY_ROWS(dot_codes, w, CODES4_INT22, ZMOE_LAYOUT_CODES4_INT22, 0, 32))
DOT(dot_codes8, GROUPS(CODES8, ZMOE_LAYOUT_CODES8))
DOT(dot_codes4_int8, GROUPS(CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8))
DOT(dot_fp4_int8, ZMOE_BY_ROWS(dot_codes, w, CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8, 0, 32))
DOT(dot_codes8_int8, GROUPS(CODES8_INT8, ZMOE_LAYOUT_CODES8_INT8))

static void gemv_dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                     uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  (void)scratch;
  int affine = w->format == ZMOE_FORMAT_AFFINE;
  if (layout == ZMOE_LAYOUT_CODES4_INT22)
    (affine ? dot_codes4 : dot_fp4)(w, xs, rows, first, last, ys);
  else if (layout == ZMOE_LAYOUT_CODES4_INT8)
    (affine ? dot_codes4_int8 : dot_fp4_int8)(w, xs, rows, first, last, ys);
  else if (layout == ZMOE_LAYOUT_CODES8)
    dot_codes8(w, xs, rows, first, last, ys);
  else if (layout == ZMOE_LAYOUT_CODES8_INT8)
    dot_codes8_int8(w, xs, rows, first, last, ys);
  else if (w->format == ZMOE_FORMAT_F32)
    dot_f32(w, xs, rows, first, last, ys);
  else if (w->format == ZMOE_FORMAT_F16)
    dot_f16(w, xs, rows, first, last, ys);
  else
    dot_bf16(w, xs, rows, first, last, ys);
}

static zmoe_layout gemv_layout(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  (void)x_dtype;
  if (w->format == ZMOE_FORMAT_MXFP4 || (w->format == ZMOE_FORMAT_AFFINE && w->bits == 4))
    return precision == ZMOE_INT8 ? ZMOE_LAYOUT_CODES4_INT8 : ZMOE_LAYOUT_CODES4_INT22;
  if (w->format == ZMOE_FORMAT_AFFINE && w->bits == 8)
    return precision == ZMOE_INT8 ? ZMOE_LAYOUT_CODES8_INT8 : ZMOE_LAYOUT_CODES8;
  return ZMOE_LAYOUT_PLAIN;
}
