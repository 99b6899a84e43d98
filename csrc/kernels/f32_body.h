/* Matmuls with f32 sums, in the vectors of vec.h.  Before including this, a variant defines
 *   load_some(src, i, dtype, n)  LANES floats; those from n on are zero and not touched,
 *   widen_bytes(src, values)  CHAINS vectors of codes of 8 bits as floats,
 * and afterwards has pack_chains, for ZMOE_LAYOUT_CHAINS, F32_SUMS, and dot_codes8.
 *
 * `rows`, formats and groups are constants in each call of the inlined bodies,
 * so that choices vanish and sums stay in registers. */
#include "kernels.h"
#include "weight.h"

KERNEL VEC load_x(const float *x) {
  return vec_load((const unsigned char *)x, 0, ZMOE_F32);
}

/* The weight's rows from one on. */
struct outputs {
  const unsigned char *data, *scales, *biases;
  size_t row_bytes, scale_bytes;
};

KERNEL struct outputs outputs_at(const zmoe_weight *w, uint32_t o) {
  struct outputs out = {.row_bytes = zmoe_weight_row_bytes(w),
                        .scale_bytes = zmoe_weight_scale_bytes(w)};
  out.data = (const unsigned char *)w->data + o * out.row_bytes;
  if (w->scales != NULL)
    out.scales = (const unsigned char *)w->scales + o * out.scale_bytes;
  if (w->biases != NULL)
    out.biases = (const unsigned char *)w->biases + o * out.scale_bytes;
  return out;
}

/* ---- f32 -----------------------------------------------------------------------------
 * Floats, and codes of 8 bits, which take no longer to convert than to read.  Of DEPTH elements
 * one register in CHAINS is summed from zero, lane by lane, and these sums are added in order.
 * For a few rows the chains hide each other's latency, and the memory is read in order, one output
 * after the other.  For more, PANEL_OUTS outputs are decoded once for all, and rows and outputs
 * hide it: one chain at a time, which is why x is packed so. */

/* A group of codes is whole VALUES. */
enum { CHAINS = LANES == 16 ? 2 : 4, VALUES = CHAINS * LANES, DEPTH = 512 };
enum { PANEL_OUTS = 4, TILE_ROWS = 3 };
/* Memory that is read in order: farther ahead is slower. */
enum { NEAR_BYTES = 2048 };

/* Elements of a chain, zeros included, of `count` elements, at most DEPTH. */
KERNEL uint32_t chain_of(uint32_t count) {
  return (count + VALUES - 1) / VALUES * LANES;
}

/* DEPTH elements after the other, chain by chain. */
TARGET static void pack_chains(const float *x, uint32_t in_features, float *to) {
  for (uint32_t k = 0; k < in_features; k += DEPTH) {
    const uint32_t count = in_features - k < DEPTH ? in_features - k : DEPTH;
    for (uint32_t c = 0; c < CHAINS; c++)
      for (uint32_t i = LANES * c; i / VALUES * LANES < chain_of(count); i += VALUES, to += LANES) {
        VEC v = i < count ? load_some((const unsigned char *)x, k + i, ZMOE_F32, count - i)
                          : vec_splat(0.0f);
        memcpy(to, &v, sizeof v);
      }
  }
}

/* Scales and biases of DEPTH codes. */
struct groups {
  float scales[DEPTH / 32], biases[DEPTH / 32];
};

KERNEL void load_groups(const zmoe_weight *w, struct outputs out, const uint32_t group,
                        uint32_t begin, uint32_t count, struct groups *groups) {
  for (uint32_t i = 0; i < count / group; i += LANES) {
    const uint32_t g = begin / group + i, left = count / group - i;
    VEC scale = load_some(out.scales, g, w->scale_dtype, left);
    VEC bias = load_some(out.biases, g, w->scale_dtype, left);
    memcpy(groups->scales + i, &scale, sizeof scale);
    memcpy(groups->biases + i, &bias, sizeof bias);
  }
}

/* VALUES elements from k on; codes are of group g of what was loaded. */
KERNEL void load_values(uint32_t format, const unsigned char *data, size_t k,
                        const struct groups *groups, uint32_t g, VEC values[CHAINS]) {
  if (format != ZMOE_FORMAT_AFFINE) {
    EACH(c, CHAINS)
      values[c] = vec_load(data, k + LANES * c, (zmoe_dtype)format);
    return;
  }
  VEC scale = vec_splat(groups->scales[g]), bias = vec_splat(groups->biases[g]);
  widen_bytes(data + k, values);
  EACH(c, CHAINS)
    values[c] = vec_fma(values[c], scale, bias);
}

/* The same of the last `count`, fewer: floats, since a group is whole VALUES. */
KERNEL void load_last(uint32_t format, const unsigned char *data, size_t k, uint32_t count,
                      VEC values[CHAINS]) {
  EACH(c, CHAINS)
    values[c] = LANES * c < count ? load_some(data, k + LANES * c, format, count - LANES * c)
                                  : vec_splat(0.0f);
}

KERNEL uint32_t item_bytes(uint32_t format) {
  return format == ZMOE_FORMAT_AFFINE ? 1 : format == ZMOE_FORMAT_F32 ? 4 : 2;
}

/* Adds `count` elements from `begin` on. */
KERNEL void add_chunk(uint32_t format, const uint32_t group, const unsigned char *data,
                      const struct groups *groups, size_t begin, const uint32_t count,
                      zmoe_layout layout, const float *const *x, const uint32_t rows,
                      VEC sum[TILE_ROWS]) {
  const uint32_t plain = layout == ZMOE_LAYOUT_PLAIN, chain = plain ? LANES : chain_of(count);
  VEC part[TILE_ROWS][CHAINS], values[CHAINS];
  EACH(r, rows)
    EACH(c, CHAINS)
      part[r][c] = vec_splat(0.0f);
  uint32_t i = 0, at = 0;
  for (; i + VALUES <= count; i += VALUES, at += plain ? VALUES : LANES) {
    for (uint32_t line = 0; line < VALUES * item_bytes(format); line += 64)
      __builtin_prefetch(data + (begin + i) * item_bytes(format) + line + NEAR_BYTES);
    load_values(format, data, begin + i, groups, i / group, values);
    EACH(c, CHAINS)
      EACH(r, rows)
        part[r][c] = vec_fma(values[c], load_x(x[r] + begin + at + c * chain), part[r][c]);
  }
  if (i < count && format != ZMOE_FORMAT_AFFINE) {
    VEC other[CHAINS];
    load_last(format, data, begin + i, count - i, values);
    EACH(r, rows) {
      load_last(ZMOE_F32, (const unsigned char *)x[r], begin + i, plain ? count - i : 0, other);
      EACH(c, CHAINS)
        part[r][c] = vec_fma(values[c], plain ? other[c] : load_x(x[r] + begin + at + c * chain),
                             part[r][c]);
    }
  }
  EACH(c, CHAINS)
    EACH(r, rows)
      sum[r] = sum[r] + part[r][c];
}

KERNEL void dot_few(const zmoe_weight *w, uint32_t format, const uint32_t group, zmoe_layout layout,
                    const float *const *x, const uint32_t rows, uint32_t first, uint32_t last,
                    float *const *ys) {
  for (uint32_t o = first; o < last; o++) {
    const struct outputs out = outputs_at(w, o);
    VEC sum[TILE_ROWS];
    EACH(r, rows)
      sum[r] = vec_splat(0.0f);
    for (uint32_t begin = 0; begin < w->in_features; begin += DEPTH) {
      const uint32_t left = w->in_features - begin;
      struct groups groups;
      if (format == ZMOE_FORMAT_AFFINE)
        load_groups(w, out, group, begin, left < DEPTH ? left : DEPTH, &groups);
      if (format == ZMOE_FORMAT_AFFINE && left >= DEPTH) /* each scale's place is a constant */
        add_chunk(format, group, out.data, &groups, begin, DEPTH, layout, x, rows, sum);
      else
        add_chunk(format, group, out.data, &groups, begin, left < DEPTH ? left : DEPTH, layout, x,
                  rows, sum);
    }
    EACH(r, rows)
      ys[r][o - first] = vec_fold(sum[r]);
  }
}

/* Of PANEL_OUTS outputs DEPTH elements, chain by chain; of all rows the sums so far. */
struct panel {
  VEC sums[ZMOE_ROW_BLOCK][PANEL_OUTS];
  float values[PANEL_OUTS][DEPTH];
};
_Static_assert(sizeof(struct panel) <= ZMOE_PANEL_BYTES, "a panel fits a thread's scratch");

/* `count` elements of an output from `begin` on; fetches what the panel will hold next. */
KERNEL void decode_output(const zmoe_weight *w, uint32_t format, const uint32_t group,
                          struct outputs out, size_t begin, uint32_t count, float *to) {
  const uint32_t chain = chain_of(count), item = item_bytes(format);
  const unsigned char *next = out.data + (begin + count) * item;
  if (begin + count == w->in_features)
    next = out.data + PANEL_OUTS * out.row_bytes;
  struct groups groups;
  if (format == ZMOE_FORMAT_AFFINE)
    load_groups(w, out, group, (uint32_t)begin, count, &groups);
  for (uint32_t i = 0; i < count; i += VALUES, to += LANES) {
    VEC values[CHAINS];
    for (uint32_t line = 0; line < VALUES * item; line += 64)
      __builtin_prefetch(next + i * item + line);
    if (format == ZMOE_FORMAT_AFFINE || i + VALUES <= count)
      load_values(format, out.data, begin + i, &groups, i / group, values);
    else
      load_last(format, out.data, begin + i, count - i, values);
    EACH(c, CHAINS)
      memcpy(to + c * chain, &values[c], sizeof values[c]);
  }
}

/* Adds `chain` elements of each chain, from x's element `begin` on, to the sums of `rows` rows;
 * with `ahead` fetches the next rows of x, which the processor by itself would begin to read too
 * late. */
KERNEL void dot_tile(struct panel *panel, uint32_t chain, const float *const *x, size_t begin,
                     uint32_t r0, const uint32_t rows, int ahead) {
  const float *values = panel->values[0];
  x += r0;
  for (uint32_t c = 0; c < CHAINS; c++, begin += chain) {
    VEC part[TILE_ROWS][PANEL_OUTS], other[TILE_ROWS];
    EACH(r, rows)
      EACH(j, PANEL_OUTS)
        part[r][j] = vec_splat(0.0f);
    _Pragma("GCC unroll 2") for (uint32_t i = 0; i < chain; i += LANES, values += LANES) {
      EACH(r, rows) {
        other[r] = load_x(x[r] + begin + i);
        if (ahead && i * sizeof(float) % 64 == 0)
          __builtin_prefetch(x[rows + r] + begin + i);
      }
      EACH(j, PANEL_OUTS) {
        VEC value = load_x(values + j * DEPTH);
        EACH(r, rows)
          part[r][j] = vec_fma(value, other[r], part[r][j]);
      }
    }
    EACH(r, rows)
      EACH(j, PANEL_OUTS)
        panel->sums[r0 + r][j] = panel->sums[r0 + r][j] + part[r][j];
  }
}

/* More than TILE_ROWS rows: threes, and one or two twos. */
KERNEL void dot_many(const zmoe_weight *w, uint32_t format, const uint32_t group,
                     const float *const *x, uint32_t rows, uint32_t first, uint32_t last,
                     struct panel *panel, float *const *ys) {
  for (uint32_t o = first; o < last; o += PANEL_OUTS) {
    const uint32_t n_out = last - o < PANEL_OUTS ? last - o : PANEL_OUTS;
    memset(panel->sums, 0, rows * sizeof *panel->sums);
    for (uint32_t begin = 0; begin < w->in_features; begin += DEPTH) {
      const uint32_t left = w->in_features - begin, count = left < DEPTH ? left : DEPTH;
      for (uint32_t j = 0; j < PANEL_OUTS; j++) /* the last again where there are no more */
        decode_output(w, format, group, outputs_at(w, o + (j < n_out ? j : n_out - 1)), begin,
                      count, panel->values[j]);
      const uint32_t chain = chain_of(count);
      uint32_t r = 0;
      for (; r + TILE_ROWS <= rows && rows - r != 4; r += TILE_ROWS)
        dot_tile(panel, chain, x, begin, r, TILE_ROWS, r + 2 * TILE_ROWS <= rows);
      for (; r < rows; r += 2)
        dot_tile(panel, chain, x, begin, r, 2, 0);
    }
    for (uint32_t r = 0; r < rows; r++)
      for (uint32_t j = 0; j < n_out; j++)
        ys[r][o - first + j] = vec_fold(panel->sums[r][j]);
  }
}

/* Rows that are not packed, which are rare or of a format that is decoded before, by a few. */
KERNEL void dot_f32_sums(const zmoe_weight *w, uint32_t format, const uint32_t group,
                         zmoe_layout layout, const void *const *xs, uint32_t rows, uint32_t first,
                         uint32_t last, void *scratch, float *const *ys) {
  const float *rows_of_x[ZMOE_ROW_BLOCK], *const *x = rows_of_x;
  for (uint32_t r = 0; r < rows; r++)
    rows_of_x[r] = layout == ZMOE_LAYOUT_PLAIN
                       ? xs[r]
                       : zmoe_packed_at((void *)xs[r], layout, w->in_features).elements;
  if (layout != ZMOE_LAYOUT_PLAIN && rows > TILE_ROWS) {
    dot_many(w, format, group, x, rows, first, last, scratch, ys);
    return;
  }
  for (; rows >= TILE_ROWS; rows -= TILE_ROWS, x += TILE_ROWS, ys += TILE_ROWS)
    dot_few(w, format, group, layout, x, TILE_ROWS, first, last, ys);
  if (rows == 2)
    dot_few(w, format, group, layout, x, 2, first, last, ys);
  else if (rows == 1)
    dot_few(w, format, group, layout, x, 1, first, last, ys);
}

/* ---- formats -------------------------------------------------------------------- */

#define DOT(name, body)                                                                            \
  TARGET static void name(const zmoe_weight *w, const void *const *xs, uint32_t rows,              \
                          uint32_t first, uint32_t last, void *scratch, float *const *ys) {        \
    (void)scratch;                                                                                 \
    body;                                                                                          \
  }
#define F32_SUMS(format, group, layout)                                                            \
  dot_f32_sums(w, format, group, layout, xs, rows, first, last, scratch, ys)
DOT(dot_codes8_32, F32_SUMS(ZMOE_FORMAT_AFFINE, 32, ZMOE_LAYOUT_CHAINS))
DOT(dot_codes8_64, F32_SUMS(ZMOE_FORMAT_AFFINE, 64, ZMOE_LAYOUT_CHAINS))
DOT(dot_codes8_128, F32_SUMS(ZMOE_FORMAT_AFFINE, 128, ZMOE_LAYOUT_CHAINS))

static void dot_codes8(const zmoe_weight *w, const void *const *xs, uint32_t rows, uint32_t first,
                       uint32_t last, void *scratch, float *const *ys) {
  if (w->group == 32)
    dot_codes8_32(w, xs, rows, first, last, scratch, ys);
  else if (w->group == 64)
    dot_codes8_64(w, xs, rows, first, last, scratch, ys);
  else
    dot_codes8_128(w, xs, rows, first, last, scratch, ys);
}
