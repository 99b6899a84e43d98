/* Matmuls with f32 sums, in the vectors of vec.h.  Before including this, a variant defines
 *   load_some(src, i, dtype, n)  LANES floats; those from n on are zero and not touched,
 *   load_e8m0(src, n)     LANES scales, likewise,
 *   widen_bytes(src, values)  CHAINS vectors of codes of 8 bits as floats,
 *   fp8_at(src), small_fp8_at(src)  LANES values of e4m3; of those, where no one is NaN, 2^-8,
 * without LOW_BITS, which says that codes of fewer bits do not come here,
 *   widen_packed(u, src, c)  vector c of so many of fewer bits, by struct unpacking,
 *   fp4_at(src)           LANES values of e2m1,
 *   place_in_window(bits, c, byte)  where it has a byte of VALUES codes before it shuffles,
 * and afterwards has pack_chains, for ZMOE_LAYOUT_CHAINS, F32_SUMS, and dot_chains, unless OTHERS
 * names a table that has them.
 *
 * `rows` and all but the packed formats are constants in each call of the inlined bodies,
 * so that choices vanish and sums stay in registers. */
#include "kernels.h"
#include "unpacking.h"
#include "weight.h"

KERNEL VEC load_x(const float *x) {
  return vec_load((const unsigned char *)x, 0, ZMOE_F32);
}

/* ---- f32 -----------------------------------------------------------------------------
 * Floats, and the codes that take no longer to convert than to read, or that nothing else can.  Of
 * DEPTH elements one register in CHAINS is summed from zero, lane by lane, and these sums are added
 * in order.  For a few rows the chains hide each other's latency, and the memory is read in order,
 * one output after the other.  For more, PANEL_OUTS outputs are decoded once for all, and rows and
 * outputs hide it: one chain at a time, which is why x is packed so. */

/* A group of codes is whole VALUES, or of nvfp4 whole LANES. */
enum { DEPTH = 512, PANEL_OUTS = 4, TILE_ROWS = 3 };

/* What a weight holds: `format` as zmoe_format has it, or PACKED for affine codes of less than 8
 * bits; a group is 1 << group_shift codes. */
enum { PACKED = 16 };
typedef struct kind {
  uint32_t format, bits, group_shift;
  const struct unpacking *unpacking; /* of PACKED */
  int regular;                       /* of mxfp8, as make_regular has it */
} kind;

KERNEL int has_biases(kind t) {
  return t.format == ZMOE_FORMAT_AFFINE || t.format == PACKED;
}

KERNEL int has_groups(kind t) {
  return t.format > ZMOE_FORMAT_BF16;
}

KERNEL size_t bytes_of(kind t, size_t elements) {
  return elements * t.bits / 8;
}

/* Codes that take longer to decode than to read: fetching them farther ahead is slower. */
enum { NEAR_BYTES = 2048 };

/* Elements of a chain, zeros included, of `count` elements, at most DEPTH. */
KERNEL uint32_t chain_of(uint32_t count) {
  return (count + VALUES - 1) / VALUES * LANES;
}

#ifndef OTHERS
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

#endif

/* Scales and biases of DEPTH codes. */
struct groups {
  float scales[DEPTH / 16], biases[DEPTH / 16];
};

KERNEL VEC scales_at(const zmoe_weight *w, kind t, const unsigned char *scales, size_t g,
                     uint32_t count) {
  if (has_biases(t))
    return load_some(scales, g, w->scale_dtype, count);
  if (t.format != ZMOE_FORMAT_NVFP4)
    return load_e8m0(scales + g, count);
  unsigned char bytes[LANES] = {0};
  memcpy(bytes, scales + g, count < LANES ? count : LANES);
  return fp8_at(bytes);
}

KERNEL void load_groups(const zmoe_weight *w, kind t, struct zmoe_outputs out, uint32_t begin,
                        uint32_t count, struct groups *groups) {
  const uint32_t first = begin >> t.group_shift, n = count >> t.group_shift;
  for (uint32_t i = 0; i < n; i += LANES) {
    VEC scale = scales_at(w, t, out.scales, first + i, n - i);
    memcpy(groups->scales + i, &scale, sizeof scale);
    if (!has_biases(t))
      continue;
    VEC bias = load_some(out.biases, first + i, w->scale_dtype, n - i);
    memcpy(groups->biases + i, &bias, sizeof bias);
  }
}

/* Whether no one of `count` codes of mxfp8 is NaN, and 256 times each of their scales is finite; if
 * so the scales become that. */
KERNEL int make_regular(const unsigned char *codes, uint32_t count, struct groups *groups) {
  uint8_t found = 0;
  for (uint32_t i = 0; i < count; i++)
    found |= (codes[i] & 0x7f) == 0x7f;
  for (uint32_t g = 0; g < count / 32; g++)
    found |= !(groups->scales[g] < 0x1p120f);
  for (uint32_t g = 0; g < count / 32 && !found; g++)
    groups->scales[g] *= 256.0f;
  return !found;
}

#ifndef LOW_BITS
KERNEL void plan_unpacking(uint32_t bits, struct unpacking *u) {
  u->bits = bits;
  u->mask = (1 << bits) - 1;
  for (uint32_t i = 0; i < VALUES; i++) {
    const uint32_t first = i * bits / 8, last = (i * bits + bits - 1) / 8;
    u->shifts[i] = (int32_t)(i * bits % 8);
    u->bytes[i][0] = place_in_window(bits, i / LANES, first);
    u->bytes[i][1] = place_in_window(bits, i / LANES, last);
    u->bytes[i][2] = u->bytes[i][3] = 128;
  }
}
#endif

/* VALUES elements from k on, those from `count` on zero and not touched; codes are of group g of
 * what was loaded, and those that follow. */
KERNEL void load_values(kind t, const unsigned char *data, size_t k, uint32_t count,
                        const struct groups *groups, uint32_t g, VEC values[CHAINS]) {
  const unsigned char *at = data + bytes_of(t, k);
  if (t.format == ZMOE_FORMAT_AFFINE)
    widen_bytes(at, values);
  EACH(c, CHAINS)
    if (LANES * c >= count)
      values[c] = vec_splat(0.0f);
    else if (!has_groups(t))
      values[c] = count < VALUES ? load_some(data, k + LANES * c, t.format, count - LANES * c)
                                 : vec_load(data, k + LANES * c, (zmoe_dtype)t.format);
    else if (t.format == ZMOE_FORMAT_MXFP8)
      values[c] = (t.regular ? small_fp8_at(at + LANES * c) : fp8_at(at + LANES * c)) *
                  vec_splat(groups->scales[g]);
#ifndef LOW_BITS
    else if (t.format == PACKED)
      values[c] = widen_packed(t.unpacking, at, c);
    else if (t.format == ZMOE_FORMAT_NVFP4)
      values[c] = fp4_at(at + bytes_of(t, LANES * c)) *
                  vec_splat(groups->scales[g + (LANES * c >> t.group_shift)]);
#endif
  if (has_biases(t))
    EACH(c, CHAINS)
      values[c] = vec_fma(values[c], vec_splat(groups->scales[g]), vec_splat(groups->biases[g]));
}

/* Fewer elements of x than VALUES, and zeros. */
KERNEL void load_last(const float *x, size_t k, uint32_t count, VEC values[CHAINS]) {
  EACH(c, CHAINS)
    values[c] = LANES * c < count ? load_some((const unsigned char *)x, k + LANES * c, ZMOE_F32,
                                              count - LANES * c)
                                  : vec_splat(0.0f);
}

/* Adds `count` elements from `begin` on. */
KERNEL void add_chunk(kind t, const unsigned char *data, const struct groups *groups, size_t begin,
                      const uint32_t count, zmoe_layout layout, const float *const *x,
                      const uint32_t rows, VEC sum[TILE_ROWS]) {
  const uint32_t plain = layout == ZMOE_LAYOUT_PLAIN, chain = plain ? LANES : chain_of(count);
  VEC part[TILE_ROWS][CHAINS], values[CHAINS];
  EACH(r, rows)
    EACH(c, CHAINS)
      part[r][c] = vec_splat(0.0f);
  uint32_t i = 0, at = 0;
  data += bytes_of(t, begin);
  _Pragma("GCC unroll 2") for (; i + VALUES <= count; i += VALUES, at += plain ? VALUES : LANES) {
    for (uint32_t line = 0; line < bytes_of(t, VALUES); line += 64)
      if (has_groups(t))
        __builtin_prefetch(data + line + NEAR_BYTES);
      else
        zmoe_prefetch(data + line);
    load_values(t, data, 0, VALUES, groups, i >> t.group_shift, values);
    data += bytes_of(t, VALUES);
    EACH(c, CHAINS)
      EACH(r, rows)
        part[r][c] = vec_fma(values[c], load_x(x[r] + begin + at + c * chain), part[r][c]);
  }
  if (i < count && (!has_groups(t) || t.format == ZMOE_FORMAT_NVFP4)) {
    VEC other[CHAINS];
    load_values(t, data, 0, count - i, groups, i >> t.group_shift, values);
    EACH(r, rows) {
      load_last(x[r], begin + i, plain ? count - i : 0, other);
      EACH(c, CHAINS)
        part[r][c] = vec_fma(values[c], plain ? other[c] : load_x(x[r] + begin + at + c * chain),
                             part[r][c]);
    }
  }
  EACH(c, CHAINS)
    EACH(r, rows)
      sum[r] = sum[r] + part[r][c];
}

KERNEL void dot_few(const zmoe_weight *w, kind t, zmoe_layout layout, const float *const *x,
                    const uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  struct zmoe_outputs out = zmoe_outputs_at(w, first);
  for (uint32_t o = first; o < last; o++, out = zmoe_pass_outputs(out, 1)) {
    VEC sum[TILE_ROWS];
    EACH(r, rows)
      sum[r] = vec_splat(0.0f);
    for (uint32_t begin = 0; begin < w->in_features; begin += DEPTH) {
      const uint32_t left = w->in_features - begin;
      struct groups groups;
      if (has_groups(t))
        load_groups(w, t, out, begin, left < DEPTH ? left : DEPTH, &groups);
      kind regular = t;
      regular.regular = 1;
      if (t.format == ZMOE_FORMAT_MXFP8 &&
          make_regular(out.data + begin, left < DEPTH ? left : DEPTH, &groups))
        add_chunk(regular, out.data, &groups, begin, left < DEPTH ? left : DEPTH, layout, x, rows,
                  sum);
      else if (t.format == ZMOE_FORMAT_AFFINE && left >= DEPTH) /* each scale's place is constant */
        add_chunk(t, out.data, &groups, begin, DEPTH, layout, x, rows, sum);
      else
        add_chunk(t, out.data, &groups, begin, left < DEPTH ? left : DEPTH, layout, x, rows, sum);
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
KERNEL void decode_output(const zmoe_weight *w, kind t, struct zmoe_outputs out, size_t begin,
                          uint32_t count, float *to) {
  const uint32_t chain = chain_of(count);
  const unsigned char *next = out.data + bytes_of(t, begin + count);
  if (begin + count == w->in_features)
    next = out.data + PANEL_OUTS * out.row_bytes;
  struct groups groups;
  if (has_groups(t))
    load_groups(w, t, out, (uint32_t)begin, count, &groups);
  for (uint32_t i = 0; i < count; i += VALUES, to += LANES) {
    VEC values[CHAINS];
    for (uint32_t line = 0; line < bytes_of(t, VALUES); line += 64)
      __builtin_prefetch(next + bytes_of(t, i) + line);
    if (has_biases(t) || i + VALUES <= count)
      load_values(t, out.data, begin + i, VALUES, &groups, i >> t.group_shift, values);
    else
      load_values(t, out.data, begin + i, count - i, &groups, i >> t.group_shift, values);
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

#ifndef OTHERS
/* Whatever the panel was decoded from, once for all formats. */
TARGET static void dot_3_rows(struct panel *panel, uint32_t chain, const float *const *x,
                              size_t begin, uint32_t r0, int ahead) {
  dot_tile(panel, chain, x, begin, r0, TILE_ROWS, ahead);
}

TARGET static void dot_2_rows(struct panel *panel, uint32_t chain, const float *const *x,
                              size_t begin, uint32_t r0) {
  dot_tile(panel, chain, x, begin, r0, 2, 0);
}

/* More than TILE_ROWS rows: threes, and one or two twos. */
KERNEL void dot_many(const zmoe_weight *w, kind t, const float *const *x, uint32_t rows,
                     uint32_t first, uint32_t last, struct panel *panel, float *const *ys) {
  struct zmoe_outputs out = zmoe_outputs_at(w, first);
  for (uint32_t o = first; o < last; o += PANEL_OUTS, out = zmoe_pass_outputs(out, PANEL_OUTS)) {
    const uint32_t n_out = last - o < PANEL_OUTS ? last - o : PANEL_OUTS;
    memset(panel->sums, 0, rows * sizeof *panel->sums);
    for (uint32_t begin = 0; begin < w->in_features; begin += DEPTH) {
      const uint32_t left = w->in_features - begin, count = left < DEPTH ? left : DEPTH;
      for (uint32_t j = 0; j < PANEL_OUTS; j++) /* the last again where there are no more */
        decode_output(w, t, zmoe_pass_outputs(out, j < n_out ? j : n_out - 1), begin, count,
                      panel->values[j]);
      const uint32_t chain = chain_of(count);
      uint32_t r = 0;
      for (; r + TILE_ROWS <= rows && rows - r != 4; r += TILE_ROWS)
        dot_3_rows(panel, chain, x, begin, r, r + 2 * TILE_ROWS <= rows);
      for (; r < rows; r += 2)
        dot_2_rows(panel, chain, x, begin, r);
    }
    for (uint32_t r = 0; r < rows; r++)
      for (uint32_t j = 0; j < n_out; j++)
        ys[r][o - first + j] = vec_fold(panel->sums[r][j]);
  }
}

/* Rows that are not packed, which are rare or of a format that is decoded before, by a few. */
KERNEL void dot_f32_sums(const zmoe_weight *w, kind t, zmoe_layout layout, const void *const *xs,
                         uint32_t rows, uint32_t first, uint32_t last, void *scratch,
                         float *const *ys) {
  const float *rows_of_x[ZMOE_ROW_BLOCK], *const *x = rows_of_x;
  for (uint32_t r = 0; r < rows; r++)
    rows_of_x[r] = layout == ZMOE_LAYOUT_PLAIN
                       ? xs[r]
                       : zmoe_packed_at((void *)xs[r], layout, w->in_features).elements;
  if (layout != ZMOE_LAYOUT_PLAIN && rows > TILE_ROWS) {
    dot_many(w, t, x, rows, first, last, scratch, ys);
    return;
  }
  for (; rows >= TILE_ROWS; rows -= TILE_ROWS, x += TILE_ROWS, ys += TILE_ROWS)
    dot_few(w, t, layout, x, TILE_ROWS, first, last, ys);
  if (rows == 2)
    dot_few(w, t, layout, x, 2, first, last, ys);
  else if (rows == 1)
    dot_few(w, t, layout, x, 1, first, last, ys);
}

#endif

/* ---- formats -------------------------------------------------------------------- */

#define DOT(name, body)                                                                            \
  TARGET static void name(const zmoe_weight *w, const void *const *xs, uint32_t rows,              \
                          uint32_t first, uint32_t last, void *scratch, float *const *ys) {        \
    (void)scratch;                                                                                 \
    body;                                                                                          \
  }
#ifndef OTHERS
#define F32_SUMS(layout, ...)                                                                      \
  dot_f32_sums(w, (kind){__VA_ARGS__, 0}, layout, xs, rows, first, last, scratch, ys)
#define CODES_DOT(name, ...) DOT(name, F32_SUMS(ZMOE_LAYOUT_CHAINS, __VA_ARGS__))

CODES_DOT(dot_codes8_32, ZMOE_FORMAT_AFFINE, 8, 5, NULL)
CODES_DOT(dot_codes8_64, ZMOE_FORMAT_AFFINE, 8, 6, NULL)
CODES_DOT(dot_codes8_128, ZMOE_FORMAT_AFFINE, 8, 7, NULL)
CODES_DOT(dot_fp8, ZMOE_FORMAT_MXFP8, 8, 5, NULL)
#ifndef LOW_BITS
CODES_DOT(dot_nvfp4, ZMOE_FORMAT_NVFP4, 4, 4, NULL)
DOT(dot_packed, struct unpacking u; plan_unpacking(w->bits, &u);
    F32_SUMS(ZMOE_LAYOUT_CHAINS, PACKED, w->bits, (uint32_t)__builtin_ctz(w->group), &u))
#endif

/* Codes in ZMOE_LAYOUT_CHAINS. */
static void dot_chains(const zmoe_weight *w, const void *const *xs, uint32_t rows, uint32_t first,
                       uint32_t last, void *scratch, float *const *ys) {
  if (w->format == ZMOE_FORMAT_MXFP8)
    dot_fp8(w, xs, rows, first, last, scratch, ys);
#ifndef LOW_BITS
  else if (w->format == ZMOE_FORMAT_NVFP4)
    dot_nvfp4(w, xs, rows, first, last, scratch, ys);
  else if (w->bits != 8)
    dot_packed(w, xs, rows, first, last, scratch, ys);
#endif
  else if (w->group == 32)
    dot_codes8_32(w, xs, rows, first, last, scratch, ys);
  else if (w->group == 64)
    dot_codes8_64(w, xs, rows, first, last, scratch, ys);
  else
    dot_codes8_128(w, xs, rows, first, last, scratch, ys);
}
#endif
