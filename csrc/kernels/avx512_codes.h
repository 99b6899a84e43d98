/* GEMV and GEMM of codes of 4 and 8 bits, AVX-512.  Before including this, a variant defines
 * INLINE and ELEMENTS, how many of x are in a register, and
 *   layout_of(codes)      the layout of x,
 *   table, table_of(w, codes), value_of(codes, words, i, table)  value i of BLOCK_VALUES, from
 *                         the two registers of a block,
 *   lane_code(codes, lane)  the first code in a block that belongs to `lane` of a value,
 *   panel_rows(codes)     from how many rows on decoding once pays for storing what it gives,
 *   multiply_add(sum, value, x)   adds the products of ELEMENTS elements, lane by lane;
 * and afterwards calls dot_codes.
 *
 * A block is 128 bytes of codes, in two registers whose words are exchanged so that, lane by
 * lane, all of it belongs to one group: its products share a scale.  Each sum starts with what
 * x's sums add by an affine weight's biases, and goes on block by block.
 *
 * A few rows are multiplied with each value as it is decoded; of more, PANEL_OUTS outputs are
 * decoded once for all.  `rows` and `codes` are constants in each call of the inlined bodies, so
 * that sums stay in registers. */
#include "thread_pool.h"

/* Codes in a block, and registers of values. */
#define BLOCK_CODES(codes) (1024 / bits_of(codes))
#define BLOCK_VALUES(codes) (BLOCK_CODES(codes) / ELEMENTS)
#define EACH_VALUE(i, count) _Pragma("GCC unroll 16") for (uint32_t i = 0; i < (count); i++)

enum { TILE_ROWS = 6, TILE_OUTS = 2, PANEL_OUTS = 4, PANEL_DEPTH = 32 * ELEMENTS };

/* The registers of a block; even lanes are of the first 64 bytes. */
INLINE void load_block(const unsigned char *at, uint32_t bytes, __m512i words[2]) {
  __m512i a, b;
  if (bytes >= 128) {
    a = _mm512_loadu_si512(at);
    b = _mm512_loadu_si512(at + 64);
  } else {
    a = _mm512_maskz_loadu_epi32(lanes16(bytes / 4), at);
    b = _mm512_maskz_loadu_epi32(bytes > 64 ? lanes16(bytes / 4 - 16) : 0, at + 64);
  }
  words[0] = _mm512_unpacklo_epi32(a, b);
  words[1] = _mm512_unpackhi_epi32(a, b);
}

/* Which of 16 scales each lane of a run's first block has. */
INLINE __m512i block_lanes(const zmoe_weight *w, const enum codes codes) {
  uint32_t lanes[16];
  for (uint32_t l = 0; l < 16; l++)
    lanes[l] = lane_code(codes, l) / w->group;
  return _mm512_loadu_si512(lanes);
}

/* The weight's rows from one on. */
struct outputs {
  const unsigned char *data, *scales, *biases;
  size_t row_bytes, scale_bytes;
};

INLINE struct outputs outputs_at(const zmoe_weight *w, uint32_t o) {
  struct outputs out = {.row_bytes = zmoe_weight_row_bytes(w),
                        .scale_bytes = zmoe_weight_scale_bytes(w)};
  out.data = (const unsigned char *)w->data + o * out.row_bytes;
  out.scales = (const unsigned char *)w->scales + o * out.scale_bytes;
  if (w->biases != NULL)
    out.biases = (const unsigned char *)w->biases + o * out.scale_bytes;
  return out;
}

INLINE void pass_outputs(struct outputs *out, uint32_t count) {
  out->data += count * out->row_bytes;
  out->scales += count * out->scale_bytes;
  if (out->biases != NULL)
    out->biases += count * out->scale_bytes;
}

/* What x's sums add to `n_out` outputs, of which `there` are there. */
INLINE void start_sums(const zmoe_weight *w, const enum codes codes, struct outputs out,
                       const zmoe_packed *x, const uint32_t rows, const uint32_t n_out,
                       uint32_t there, __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS]) {
  const uint32_t groups = w->in_features / w->group;
  EACH(r, rows)
    EACH(j, n_out)
      sum[r][j] = _mm512_setzero_ps();
  for (uint32_t g = 0; g < groups && codes != FP4; g += 16)
    EACH(j, n_out) {
      const size_t row = (j < there ? j : there - 1) * out.scale_bytes;
      __m512 bias = load_floats(out.biases + row, g, w->scale_dtype, lanes16(groups - g));
      EACH(r, rows)
        sum[r][j] = _mm512_fmadd_ps(bias, _mm512_loadu_ps(x[r].sums + g), sum[r][j]);
    }
}

/* ---- few rows ---------------------------------------------------------------------- */

/* Outputs at a time: as many as leave all sums in registers. */
INLINE uint32_t few_outs(const uint32_t rows) {
  return rows == 1 ? 4 : 2;
}

/* Of so many rows those of the next tile: no tile is much smaller than another, since decoding
 * costs each as much as two rows do. */
static inline uint32_t tile_rows(uint32_t rows) {
  uint32_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  return (rows + tiles - 1) / tiles;
}

/* Adds a block of `n_out` outputs, of which `bytes` bytes are there: in one chain of products for
 * each row and output, x's elements loaded once for all outputs. */
INLINE void add_block(const enum codes codes, const unsigned char *from, size_t row_bytes,
                      uint32_t bytes, const table t, const __m512 factor[ZMOE_DOT_ROWS],
                      const char *const elements[TILE_ROWS], const uint32_t rows,
                      const uint32_t n_out, __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS]) {
  const uint32_t n_values = BLOCK_VALUES(codes);
  __m512i words[ZMOE_DOT_ROWS][2], value[ZMOE_DOT_ROWS];
  __m512 part[TILE_ROWS][ZMOE_DOT_ROWS];
  EACH(j, n_out)
    load_block(from + j * row_bytes, bytes, words[j]);
  EACH(r, rows)
    EACH(j, n_out)
      part[r][j] = _mm512_setzero_ps();
  EACH_VALUE(i, n_values) {
    EACH(j, n_out)
      value[j] = value_of(codes, words[j], i, t);
    EACH(r, rows)
      EACH(j, n_out)
        part[r][j] = multiply_add(part[r][j], value[j], elements[r] + 64 * i);
  }
  EACH(r, rows)
    EACH(j, n_out)
      sum[r][j] = _mm512_fmadd_ps(part[r][j], factor[j], sum[r][j]);
}

/* `n_out` outputs, all of whose sums stay in registers. */
INLINE void dot_outputs(const zmoe_weight *w, const enum codes codes, const table t,
                        const __m512i first_lanes, size_t skipped, struct outputs out,
                        const zmoe_packed *x, const uint32_t rows, const uint32_t n_out,
                        float *const *ys, uint32_t y) {
  const uint32_t in_features = w->in_features, groups = in_features / w->group;
  const __m512i per_block = _mm512_set1_epi32((int)(BLOCK_CODES(codes) / w->group));
  __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS], scale[ZMOE_DOT_ROWS], factor[ZMOE_DOT_ROWS];
  const char *elements[TILE_ROWS];
  EACH(r, rows)
    elements[r] = x[r].elements;
  EACH(j, n_out) {
    prefetch_line(out.scales + (skipped + j) * out.scale_bytes);
    if (codes != FP4)
      prefetch_line(out.biases + (skipped + j) * out.scale_bytes);
  }
  start_sums(w, codes, out, x, rows, n_out, n_out, sum);
  for (uint32_t g = 0; g < groups; g += 16) {
    EACH(j, n_out)
      scale[j] = load_scales(w, out.scales + j * out.scale_bytes, g, lanes16(groups - g));
    uint32_t at = g * w->group, end = at + 16 * w->group;
    end = end < in_features ? end : in_features;
    __m512i lanes = first_lanes;
    for (; at < end; at += BLOCK_CODES(codes)) {
      const unsigned char *from = out.data + at * bits_of(codes) / 8;
      EACH(j, n_out) {
        factor[j] = _mm512_permutexvar_ps(lanes, scale[j]);
        prefetch_line(from + (skipped + j) * out.row_bytes);
        prefetch_line(from + (skipped + j) * out.row_bytes + 64);
      }
      if (at + BLOCK_CODES(codes) <= end)
        add_block(codes, from, out.row_bytes, 128, t, factor, elements, rows, n_out, sum);
      else
        add_block(codes, from, out.row_bytes, (end - at) * bits_of(codes) / 8, t, factor, elements,
                  rows, n_out, sum);
      EACH(r, rows)
        elements[r] += 64 * BLOCK_VALUES(codes);
      lanes = _mm512_add_epi32(lanes, per_block);
    }
  }
  store_sums(rows, n_out, sum, ys, y);
}

INLINE void dot_few(const zmoe_weight *w, const enum codes codes, const table t,
                    const void *const *xs, const uint32_t rows, uint32_t first, uint32_t last,
                    float *const *ys) {
  const uint32_t n_out = few_outs(rows), n = last - first;
  const __m512i lanes = block_lanes(w, codes);
  struct outputs out = outputs_at(w, first);
  const size_t skipped = zmoe_rows_ahead(out.row_bytes, n_out);
  zmoe_packed x[TILE_ROWS];
  EACH(r, rows)
    x[r] = zmoe_packed_at((void *)xs[r], layout_of(codes), w->in_features);
  uint32_t y = 0;
  for (; y + n_out <= n; y += n_out, pass_outputs(&out, n_out))
    dot_outputs(w, codes, t, lanes, skipped, out, x, rows, n_out, ys, y);
  for (; y < n; y++, pass_outputs(&out, 1))
    dot_outputs(w, codes, t, lanes, skipped, out, x, rows, 1, ys, y);
}

INLINE void dot_tiles(const zmoe_weight *w, const enum codes codes, const table t,
                      const void *const *xs, uint32_t rows, uint32_t first, uint32_t last,
                      float *const *ys) {
#define TILE(rows)                                                                                 \
  case rows:                                                                                       \
    dot_few(w, codes, t, xs, rows, first, last, ys);                                               \
    break
  for (uint32_t n; rows > 0; rows -= n, xs += n, ys += n) {
    n = tile_rows(rows);
    switch (n) {
      TILE(1);
      TILE(2);
      TILE(3);
      TILE(4);
      TILE(5);
      TILE(6);
    }
  }
#undef TILE
}

/* ---- many rows ----------------------------------------------------------------------- */

/* Of PANEL_OUTS outputs the values of PANEL_DEPTH codes and the scales of each block; of up to
 * ZMOE_ROW_BLOCK rows the sums that go on with the next codes. */
struct panel {
  __m512i values[PANEL_OUTS][PANEL_DEPTH / ELEMENTS];
  __m512 factors[PANEL_OUTS][PANEL_DEPTH / 128];
  __m512 sums[ZMOE_ROW_BLOCK][PANEL_OUTS];
};
_Static_assert(sizeof(struct panel) <= ZMOE_PANEL_BYTES, "a panel fits a thread's scratch");

/* Codes [begin, end) of one output, the panel's j. */
INLINE void decode_output(const zmoe_weight *w, const enum codes codes, const table t,
                          const unsigned char *data, const unsigned char *scales, size_t ahead,
                          uint32_t begin, uint32_t end, struct panel *panel, uint32_t j) {
  const uint32_t groups = w->in_features / w->group, n_values = BLOCK_VALUES(codes);
  const __m512i per_block = _mm512_set1_epi32((int)(BLOCK_CODES(codes) / w->group));
  const __m512i first_lanes = block_lanes(w, codes);
  __m512i *values = panel->values[j], lanes = first_lanes;
  __m512 *factor = panel->factors[j], scale = _mm512_setzero_ps();
  for (uint32_t at = begin; at < end; at += BLOCK_CODES(codes), values += n_values) {
    const uint32_t g = at / w->group, bytes = (end - at) * bits_of(codes) / 8;
    const unsigned char *from = data + at * bits_of(codes) / 8;
    __m512i words[2];
    prefetch_line(from + ahead);
    prefetch_line(from + ahead + 64);
    if ((at - begin) % (16 * w->group) == 0) {
      scale = load_scales(w, scales, g, lanes16(groups - g));
      lanes = first_lanes;
    }
    load_block(from, bytes, words);
    EACH_VALUE(i, n_values)
    values[i] = value_of(codes, words, i, t);
    *factor++ = _mm512_permutexvar_ps(lanes, scale);
    lanes = _mm512_add_epi32(lanes, per_block);
  }
}

/* `blocks` blocks of TILE_OUTS outputs from the panel's j on. */
INLINE void add_tile(const enum codes codes, const struct panel *panel, uint32_t blocks, uint32_t j,
                     const zmoe_packed *x, size_t at, const uint32_t rows,
                     __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS]) {
  const uint32_t n_values = BLOCK_VALUES(codes);
  const char *elements[ZMOE_DOT_ROWS];
  EACH(r, rows)
    elements[r] = (const char *)x[r].elements + at * (64 / ELEMENTS);
  for (uint32_t b = 0; b < blocks; b++) {
    __m512 part[ZMOE_DOT_ROWS][TILE_OUTS];
    EACH(r, rows)
      EACH(o, TILE_OUTS)
        part[r][o] = _mm512_setzero_ps();
    EACH(i, n_values) {
      __m512i value[TILE_OUTS];
      EACH(o, TILE_OUTS)
        value[o] = panel->values[j + o][b * n_values + i];
      EACH(r, rows)
        EACH(o, TILE_OUTS)
          part[r][o] = multiply_add(part[r][o], value[o], elements[r] + i * 64);
    }
    EACH(r, rows) {
      elements[r] += 64 * n_values;
      EACH(o, TILE_OUTS)
        sum[r][o] = _mm512_fmadd_ps(part[r][o], panel->factors[j + o][b], sum[r][o]);
    }
  }
}

/* Codes [begin, end) of a panel, whose first `n_out` outputs are there. */
INLINE void dot_tile(const zmoe_weight *w, const enum codes codes, struct panel *panel,
                     uint32_t begin, uint32_t end, struct outputs out, uint32_t n_out,
                     const zmoe_packed *x, const uint32_t rows, __m512 (*kept)[PANEL_OUTS],
                     float *const *ys, uint32_t y) {
  const uint32_t blocks = (end - begin + BLOCK_CODES(codes) - 1) / BLOCK_CODES(codes);
  for (uint32_t j = 0; j < n_out; j += TILE_OUTS) {
    __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS];
    if (begin == 0)
      start_sums(w, codes, out, x, rows, TILE_OUTS, n_out - j, sum);
    else
      EACH(r, rows)
        EACH(i, TILE_OUTS)
          sum[r][i] = kept[r][j + i];
    add_tile(codes, panel, blocks, j, x, begin, rows, sum);
    if (end < w->in_features)
      EACH(r, rows)
        EACH(i, TILE_OUTS)
          kept[r][j + i] = sum[r][i];
    else if (j + 1 < n_out)
      store_sums(rows, TILE_OUTS, sum, ys, y + j);
    else
      store_sums(rows, 1, sum, ys, y + j);
    pass_outputs(&out, TILE_OUTS);
  }
}

INLINE void dot_many(const zmoe_weight *w, const enum codes codes, const table t,
                     const void *const *xs, uint32_t rows, uint32_t first, uint32_t last,
                     struct panel *panel, float *const *ys) {
  zmoe_packed x[ZMOE_ROW_BLOCK];
  for (uint32_t r = 0; r < rows; r++)
    x[r] = zmoe_packed_at((void *)xs[r], layout_of(codes), w->in_features);
  for (uint32_t o = first; o < last; o += PANEL_OUTS) {
    const struct outputs out = outputs_at(w, o);
    const uint32_t n_out = last - o < PANEL_OUTS ? last - o : PANEL_OUTS;
    const size_t skipped = zmoe_rows_ahead(out.row_bytes, PANEL_OUTS);
    for (uint32_t begin = 0; begin < w->in_features; begin += PANEL_DEPTH) {
      uint32_t end = w->in_features - begin < PANEL_DEPTH ? w->in_features : begin + PANEL_DEPTH;
      for (uint32_t j = 0; j < n_out + n_out % TILE_OUTS; j++) {
        const size_t row = j < n_out ? j : n_out - 1;
        decode_output(w, codes, t, out.data + row * out.row_bytes,
                      out.scales + row * out.scale_bytes, skipped * out.row_bytes, begin, end,
                      panel, j);
      }
      uint32_t r = 0;
#define TILE(rows)                                                                                 \
  dot_tile(w, codes, panel, begin, end, out, n_out, x + r, rows, panel->sums + r, ys + r, o - first)
      for (; r + 4 <= rows; r += 4)
        TILE(4);
      if (rows - r == 3)
        TILE(3);
      else if (rows - r == 2)
        TILE(2);
      else if (rows - r == 1)
        TILE(1);
#undef TILE
    }
  }
}

/* ---- which one -------------------------------------------------------------------- */

INLINE void dot_codes(const zmoe_weight *w, const enum codes codes, const void *const *xs,
                      uint32_t rows, uint32_t first, uint32_t last, void *scratch,
                      float *const *ys) {
  const table t = table_of(w, codes);
  if (rows >= panel_rows(codes))
    dot_many(w, codes, t, xs, rows, first, last, scratch, ys);
  else
    dot_tiles(w, codes, t, xs, rows, first, last, ys);
}
