/* GEMV and GEMM of codes, AVX-512.  Before including this, a variant defines
 * INLINE and ELEMENTS, how many of x are in a register, and
 *   layout_of(codes)      the layout of x,
 *   table, table_of(codes)   what it looks up,
 *   unpack(codes, bytes, table)   64 bytes of codes of 4 or 8 bits, from those of bits_of(codes),
 *   value_of(codes, words, i, table)  value i of BLOCK_VALUES, from the two registers of a block,
 *   lane_code(codes, lane)  the first code in a block that belongs to `lane` of a value,
 *   panel_rows(codes)     from how many rows on decoding once pays for storing what it gives,
 *   multiply_add(sum, value, x)   adds the products of ELEMENTS elements, lane by lane;
 * and afterwards calls dot_codes.
 *
 * A block is 128 bytes of codes, once they are unpacked, in two registers whose words are exchanged
 * so that, lane by lane, all of it belongs to one group: its products share a scale.  (Of NVFP4,
 * whose groups are half as long, all of a register does.)  Each sum starts with what x's sums add
 * by an affine weight's biases, and goes on block by block.
 *
 * A few rows are multiplied with each value as it is decoded; of more, PANEL_OUTS outputs are
 * decoded once for all.  `rows` and `codes` are constants in each call of the inlined bodies, so
 * that sums stay in registers. */
#include "thread_pool.h"

/* Codes in a block, the bytes that they take in memory, registers of values, and parts that may
 * differ in scale. */
#define BLOCK_CODES(codes) (1024 / unpacked_bits(codes))
#define BLOCK_BYTES(codes) (BLOCK_CODES(codes) * bits_of(codes) / 8)
#define BLOCK_VALUES(codes) (BLOCK_CODES(codes) / ELEMENTS)
#define BLOCK_PARTS(codes) ((codes) == NVFP4 ? 2u : 1u)
#define EACH_VALUE(i, count) _Pragma("GCC unroll 16") for (uint32_t i = 0; i < (count); i++)

enum { TILE_ROWS = 6, TILE_OUTS = 2, PANEL_OUTS = 4, PANEL_DEPTH = 32 * ELEMENTS };

/* The registers of a block; even lanes are of its first half. */
INLINE void load_block(const enum codes codes, const unsigned char *at, const table t,
                       __m512i words[2]) {
  const uint32_t half = BLOCK_BYTES(codes) / 2;
  const __mmask64 bytes = ~(__mmask64)0 >> (64 - half);
  __m512i v[2];
  EACH(i, 2)
    v[i] = half == 64 ? _mm512_loadu_si512(at + 64 * i)
                      : unpack(codes, _mm512_maskz_loadu_epi8(bytes, at + i * half), t);
  words[0] = _mm512_unpacklo_epi32(v[0], v[1]);
  words[1] = _mm512_unpackhi_epi32(v[0], v[1]);
}

/* Where `n_out` blocks that are not whole, but `bytes` bytes, are read: copies, and zeros. */
struct last_blocks {
  __m512i v[ZMOE_DOT_ROWS][2];
};

INLINE void copy_last(const unsigned char *from, size_t row_bytes, const uint32_t n_out,
                      uint32_t bytes, struct last_blocks *to) {
  EACH(i, 2) {
    const uint32_t n = bytes <= 64 * i ? 0 : bytes - 64 * i;
    const __mmask64 there = n == 0 ? 0 : ~(__mmask64)0 >> (n < 64 ? 64 - n : 0);
    EACH(j, n_out)
      to->v[j][i] = _mm512_maskz_loadu_epi8(there, from + j * row_bytes + 64 * i);
  }
}

INLINE void prefetch_block(const enum codes codes, const unsigned char *at) {
  for (uint32_t i = 0; i < BLOCK_BYTES(codes); i += 64)
    prefetch_line(at + i);
}

/* Which of 16 scales each lane of a run's first block has; a group is a power of two. */
INLINE __m512i block_lanes(const zmoe_weight *w, const enum codes codes) {
  uint32_t lanes[16];
  EACH_VALUE(l, 16)
    lanes[l] = lane_code(codes, l);
  return _mm512_srl_epi32(_mm512_loadu_si512(lanes),
                          _mm_cvtsi32_si128(__builtin_ctz((unsigned)w->group)));
}

/* What x's sums add to `n_out` outputs, of which `there` are there. */
INLINE void start_sums(const zmoe_weight *w, const enum codes codes, struct zmoe_outputs out,
                       const zmoe_packed *x, const uint32_t rows, const uint32_t n_out,
                       uint32_t there, __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS]) {
  const uint32_t groups = w->in_features / w->group;
  EACH(r, rows)
    EACH(j, n_out)
      sum[r][j] = _mm512_setzero_ps();
  for (uint32_t g = 0; g < groups && is_affine(codes); g += 16)
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

/* Adds part p of the BLOCK_PARTS of a block: in one chain of products for each row and output, x's
 * elements loaded once for all outputs. */
INLINE void add_part(const enum codes codes, const uint32_t p, __m512i words[ZMOE_DOT_ROWS][2],
                     const table t, const __m512 factor[ZMOE_DOT_ROWS],
                     const char *const elements[TILE_ROWS], const uint32_t rows,
                     const uint32_t n_out, __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS]) {
  const uint32_t n_values = BLOCK_VALUES(codes) / BLOCK_PARTS(codes), first = p * n_values;
  __m512i value[ZMOE_DOT_ROWS];
  __m512 part[TILE_ROWS][ZMOE_DOT_ROWS];
  EACH(r, rows)
    EACH(j, n_out)
      part[r][j] = _mm512_setzero_ps();
  EACH_VALUE(i, n_values) {
    EACH(j, n_out)
      value[j] = value_of(codes, words[j], first + i, t);
    EACH(r, rows)
      EACH(j, n_out)
        part[r][j] = multiply_add(part[r][j], value[j], elements[r] + 64 * (first + i));
  }
  EACH(r, rows)
    EACH(j, n_out)
      sum[r][j] = _mm512_fmadd_ps(part[r][j], factor[j], sum[r][j]);
}

/* Adds a block of `n_out` outputs. */
INLINE void add_block(const enum codes codes, const unsigned char *from, size_t row_bytes,
                      const table t, const __m512 factor[2][ZMOE_DOT_ROWS],
                      const char *const elements[TILE_ROWS], const uint32_t rows,
                      const uint32_t n_out, __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS]) {
  __m512i words[ZMOE_DOT_ROWS][2];
  EACH(j, n_out)
    load_block(codes, from + j * row_bytes, t, words[j]);
  add_part(codes, 0, words, t, factor[0], elements, rows, n_out, sum);
  if (BLOCK_PARTS(codes) == 2)
    add_part(codes, 1, words, t, factor[1], elements, rows, n_out, sum);
}

/* `n_out` outputs, all of whose sums stay in registers; the first `wanted` are stored.  Those from
 * `later` on are fetched. */
INLINE void dot_outputs(const zmoe_weight *w, const enum codes codes, const table t,
                        const __m512i first_lanes, struct zmoe_outputs later,
                        struct zmoe_outputs out, const zmoe_packed *x, const uint32_t rows,
                        const uint32_t n_out, uint32_t wanted, float *const *ys, uint32_t y) {
  const uint32_t in_features = w->in_features, groups = in_features / w->group;
  const __m512i per_block = _mm512_set1_epi32((int)(BLOCK_CODES(codes) / w->group));
  __m512 sum[TILE_ROWS][ZMOE_DOT_ROWS], scale[ZMOE_DOT_ROWS], factor[2][ZMOE_DOT_ROWS];
  const char *elements[TILE_ROWS];
  struct last_blocks last;
  /* As many outputs later on, in the order of memory: two cores read faster so than where each
   * output's next block is fetched with its block. */
  const unsigned char *ahead = later.data;
  EACH(r, rows)
    elements[r] = x[r].elements;
  EACH(j, n_out) {
    prefetch_line(later.scales + j * later.scale_bytes);
    if (is_affine(codes))
      prefetch_line(later.biases + j * later.scale_bytes);
  }
  start_sums(w, codes, out, x, rows, n_out, n_out, sum);
  for (uint32_t g = 0; g < groups; g += 16) {
    EACH(j, n_out)
      scale[j] = load_scales(w, codes, out.scales + j * out.scale_bytes, g, groups - g);
    uint32_t at = g * w->group, end = at + 16 * w->group;
    end = end < in_features ? end : in_features;
    __m512i lanes = first_lanes;
    for (; at < end; at += BLOCK_CODES(codes)) {
      const unsigned char *from = out.data + at * bits_of(codes) / 8;
      EACH(j, n_out) {
        factor[0][j] = _mm512_permutexvar_ps(lanes, scale[j]);
        if (codes == NVFP4)
          factor[1][j] =
              _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(1)), scale[j]);
        prefetch_block(codes, ahead);
        ahead += BLOCK_BYTES(codes);
      }
      size_t row_bytes = out.row_bytes;
      if (at + BLOCK_CODES(codes) > end) {
        copy_last(from, row_bytes, n_out, (end - at) * bits_of(codes) / 8, &last);
        from = (const unsigned char *)last.v;
        row_bytes = sizeof last.v[0];
      }
      add_block(codes, from, row_bytes, t, factor, elements, rows, n_out, sum);
      EACH(r, rows)
        elements[r] += 64 * BLOCK_VALUES(codes);
      lanes = _mm512_add_epi32(lanes, per_block);
    }
  }
  store_sums(rows, n_out, wanted, sum, ys, y);
}

INLINE void dot_few(const zmoe_weight *w, const enum codes codes, const table t,
                    const void *const *xs, const uint32_t rows, uint32_t first, uint32_t last,
                    const zmoe_scratch *scratch, float *const *ys) {
  const zmoe_weight *next = scratch->next;
  const uint32_t n_out = few_outs(rows), n = last - first;
  const __m512i lanes = block_lanes(w, codes);
  struct zmoe_outputs out = zmoe_outputs_at(w, first);
  uint32_t skipped = zmoe_rows_ahead(out.row_bytes, n_out);
  skipped = skipped < n ? skipped : n;
  struct zmoe_outputs later = zmoe_pass_outputs(out, skipped);
  zmoe_packed x[TILE_ROWS];
  EACH(r, rows)
    x[r] = zmoe_packed_at((void *)xs[r], layout_of(codes), w->in_features);
  for (uint32_t y = 0, wanted; y < n; y += wanted) {
    if (y + skipped == n && next != NULL && next->format == w->format)
      later = zmoe_outputs_at(next, scratch->next_output);
    struct zmoe_outputs now = out;
    wanted = n_out;
    if (y + n_out > n) { /* one, so many times, as code for fewer would seldom run */
      wanted = 1;
      now.row_bytes = now.scale_bytes = 0;
    }
    dot_outputs(w, codes, t, lanes, later, now, x, rows, n_out, wanted, ys, y);
    out = zmoe_pass_outputs(out, wanted);
    later = zmoe_pass_outputs(later, wanted);
  }
}

INLINE void dot_tiles(const zmoe_weight *w, const enum codes codes, const table t,
                      const void *const *xs, uint32_t rows, uint32_t first, uint32_t last,
                      const zmoe_scratch *scratch, float *const *ys) {
#define TILE(rows)                                                                                 \
  case rows:                                                                                       \
    dot_few(w, codes, t, xs, rows, first, last, scratch, ys);                                      \
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
    const uint32_t g = at / w->group;
    const unsigned char *from = data + at * bits_of(codes) / 8;
    struct last_blocks last;
    __m512i words[2];
    prefetch_block(codes, from + ahead);
    if ((at - begin) % (16 * w->group) == 0) {
      scale = load_scales(w, codes, scales, g, groups - g);
      lanes = first_lanes;
    }
    if (at + BLOCK_CODES(codes) > end) {
      copy_last(from, 0, 1, (end - at) * bits_of(codes) / 8, &last);
      from = (const unsigned char *)last.v;
    }
    load_block(codes, from, t, words);
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
                     uint32_t begin, uint32_t end, struct zmoe_outputs out, uint32_t n_out,
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
    else
      store_sums(rows, TILE_OUTS, n_out - j, sum, ys, y + j);
    out = zmoe_pass_outputs(out, TILE_OUTS);
  }
}

INLINE void dot_many(const zmoe_weight *w, const enum codes codes, const table t,
                     const void *const *xs, uint32_t rows, uint32_t first, uint32_t last,
                     struct panel *panel, float *const *ys) {
  zmoe_packed x[ZMOE_ROW_BLOCK];
  for (uint32_t r = 0; r < rows; r++)
    x[r] = zmoe_packed_at((void *)xs[r], layout_of(codes), w->in_features);
  for (uint32_t o = first; o < last; o += PANEL_OUTS) {
    const struct zmoe_outputs out = zmoe_outputs_at(w, o);
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
  const table t = table_of(codes);
  if (rows >= panel_rows(codes))
    dot_many(w, codes, t, xs, rows, first, last, scratch, ys);
  else
    dot_tiles(w, codes, t, xs, rows, first, last, scratch, ys);
}
