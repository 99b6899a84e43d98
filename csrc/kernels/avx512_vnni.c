/* GEMV and GEMM, AVX-512 with VNNI: codes and x in 8 bits are multiplied as integers; all else as
 * AVX-512 has it.
 *
 * A sum has four parts.  Of each CHUNK groups, part p adds the biases of groups p, p + 4, ..., and
 * then the products of their runs p, p + 4, ... of ZMOE_INT_GROUP codes, each of which is summed as
 * integers.  In the end the sum is (0 + 2) + (1 + 3).
 *
 * With a few rows, a register has the parts of four outputs, and codes are multiplied as they are
 * decoded.  For more, a panel of codes is decoded once, and a register has a part of 16 outputs. */
#if defined(__x86_64__)
#include "avx512.h"

#include "thread_pool.h"

#define VNNI __attribute__((target(AVX512_FEATURES ",avx512vnni")))
#define VNNI_INLINE                                                                                \
  static inline __attribute__((always_inline, target(AVX512_FEATURES ",avx512vnni")))
#define EACH_OF_16(i) _Pragma("GCC unroll 16") for (uint32_t i = 0; i < 16; i++)

enum { PARTS = 4, CHUNK = 16, FEW_ROWS = 4, FEW_OUTS = 4 };
enum { DEPTH = 512, PANEL_ROWS = 8, PANEL_OUTS = 32, TILE_ROWS = 6 };

/* ---- exchanging -------------------------------------------------------------------- */

/* Within each 128 bits, word j of register i becomes word i of register j. */
VNNI_INLINE void exchange_words(__m512i v[4]) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]),
                c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}

/* Of four registers, `step` apart, 128 bits j of i become 128 bits i of j. */
VNNI_INLINE void exchange_quarters(__m512i *v, const uint32_t step) {
  __m512i *const v0 = v, *const v1 = v + step, *const v2 = v + 2 * step, *const v3 = v + 3 * step;
  const __m512i a = _mm512_shuffle_i32x4(*v0, *v1, 0x88), b = _mm512_shuffle_i32x4(*v0, *v1, 0xdd),
                c = _mm512_shuffle_i32x4(*v2, *v3, 0x88), d = _mm512_shuffle_i32x4(*v2, *v3, 0xdd);
  *v0 = _mm512_shuffle_i32x4(a, c, 0x88);
  *v1 = _mm512_shuffle_i32x4(b, d, 0x88);
  *v2 = _mm512_shuffle_i32x4(a, c, 0xdd);
  *v3 = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/* Word j of register i becomes word i of register j. */
VNNI_INLINE void transpose(__m512i v[16]) {
  EACH(i, 4)
    exchange_words(v + 4 * i);
  EACH(i, 4)
    exchange_quarters(v + i, 4);
}

/* ---- codes ------------------------------------------------------------------------- */

/* As unsigned bytes twice the fp4 value plus 12; an affine code is itself. */
static const uint8_t byte_of_fp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* The bytes of 4-bit codes: of even ones, and of odd ones. */
VNNI_INLINE void split(const enum codes codes, __m512i words, __m512i values[2]) {
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)byte_of_fp4));
  values[0] = _mm512_and_si512(words, _mm512_set1_epi8(15));
  values[1] = _mm512_and_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi8(15));
  EACH(i, 2)
    if (codes == FP4)
      values[i] = _mm512_shuffle_epi8(table, values[i]);
}

CODES_INLINE uint32_t words_of(const enum codes codes, uint32_t count) {
  return count * bits_of(codes) / 32;
}

/* What x's sums are multiplied with, where the codes are centred; see kernels.h. */
VNNI_INLINE __m512 centred(const enum codes codes, __m512 scale, __m512 bias) {
  return _mm512_fmadd_ps(scale, _mm512_set1_ps(codes == CODES4 ? ZMOE_CENTRE4 : ZMOE_CENTRE8),
                         bias);
}

/* ---- few rows ---------------------------------------------------------------------- */

/* A block is 128 codes, of which those in `words` are there: in each 128 bits a run. */
VNNI_INLINE void load_block(const enum codes codes, const unsigned char *at, __mmask32 words,
                            __m512i values[2]) {
  const __m512i first = _mm512_maskz_loadu_epi32((__mmask16)words, at);
  if (codes != CODES8) {
    split(codes, first, values);
    return;
  }
  const __m512i v[2] = {first, _mm512_maskz_loadu_epi32((__mmask16)(words >> 16), at + 64)};
  values[0] = _mm512_shuffle_i32x4(v[0], v[1], 0x88);
  values[1] = _mm512_shuffle_i32x4(v[0], v[1], 0xdd);
}

/* The sums of each 128 bits of four outputs. */
VNNI_INLINE __m512i sum_words(const __m512i v[FEW_OUTS]) {
  const __m512i ab =
      _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i cd =
      _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

/* Four numbers, each four times. */
VNNI_INLINE __m512 four_times(const float *at) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(at)));
}

/* Adds what x's sums are multiplied with by CHUNK groups from g on, and gets their scales: those of
 * groups 4 i and on in register i, group by group of four outputs. */
VNNI_INLINE void start_chunk(const zmoe_weight *w, const enum codes codes, struct zmoe_outputs out,
                             uint32_t g, const zmoe_packed *x, const uint32_t rows,
                             __m512 scale[PARTS], __m512 sum[FEW_ROWS]) {
  const uint32_t left = w->in_features / w->group - g;
  __m512 bias[PARTS];
  EACH(i, FEW_OUTS) {
    scale[i] = load_scales(w, codes, out.scales + i * out.scale_bytes, g, left);
    if (is_affine(codes))
      bias[i] =
          centred(codes, scale[i],
                  load_floats(out.biases + i * out.scale_bytes, g, w->scale_dtype, lanes16(left)));
  }
  exchange_words((__m512i *)scale);
  exchange_quarters((__m512i *)scale, 1);
  if (!is_affine(codes))
    return;
  exchange_words((__m512i *)bias);
  exchange_quarters((__m512i *)bias, 1);
  EACH(i, PARTS)
    EACH(r, rows)
      sum[r] = _mm512_fmadd_ps(bias[i], four_times(x[r].sums + g + PARTS * i), sum[r]);
}

/* Adds the block from k on. */
VNNI_INLINE void add_block(const __m512i values[FEW_OUTS][2], __m512 factor, const zmoe_packed *x,
                           uint32_t k, const uint32_t rows, __m512 sum[FEW_ROWS]) {
  EACH(r, rows) {
    const int8_t *elements = (const int8_t *)x[r].elements + k;
    const __m512i of_x[2] = {_mm512_loadu_si512(elements), _mm512_loadu_si512(elements + 64)};
    __m512i run[FEW_OUTS];
    EACH(i, FEW_OUTS) {
      run[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), values[i][0], of_x[0]);
      run[i] = _mm512_dpbusd_epi32(run[i], values[i][1], of_x[1]);
    }
    const __m512i centred =
        _mm512_add_epi32(sum_words(run), _mm512_loadu_si512(x[r].offsets + k / 8));
    const __m512 part =
        _mm512_mul_ps(_mm512_cvtepi32_ps(centred), _mm512_loadu_ps(x[r].scales + k / 8));
    sum[r] = _mm512_fmadd_ps(part, factor, sum[r]);
  }
}

/* Four outputs; the first `wanted` are stored.  Those from `later` on are fetched. */
VNNI_INLINE void dot_outputs(const zmoe_weight *w, const enum codes codes,
                             struct zmoe_outputs later, struct zmoe_outputs out,
                             const zmoe_packed *x, const uint32_t rows, uint32_t wanted,
                             float *const *ys, uint32_t y) {
  const uint32_t group_bits = (uint32_t)__builtin_ctz((unsigned)w->group);
  const uint32_t in_features = w->in_features, chunk = (uint32_t)CHUNK << group_bits;
  const __m512i codes_before =
      _mm512_setr_epi32(0, 0, 0, 0, 32, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 96);
  const __m512i output = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 1, 2, 3));
  const unsigned char *ahead = later.data;
  __m512 sum[FEW_ROWS], scale[PARTS];
  EACH(i, FEW_OUTS) {
    prefetch_line(later.scales + i * later.scale_bytes);
    if (is_affine(codes))
      prefetch_line(later.biases + i * later.scale_bytes);
  }
  EACH(r, rows)
    sum[r] = _mm512_setzero_ps();
  for (uint32_t k = 0; k < in_features; k += ZMOE_BLOCK) {
    if (k % chunk == 0)
      start_chunk(w, codes, out, k >> group_bits, x, rows, scale, sum);
    const uint32_t words = words_of(codes, in_features - k), g = k % chunk >> group_bits;
    const __mmask32 there = words < 32 ? (1u << words) - 1 : ~0u;
    __m512i values[FEW_OUTS][2];
    EACH(i, FEW_OUTS) {
      for (uint32_t word = 0; word < words_of(codes, ZMOE_BLOCK); word += 16, ahead += 64)
        prefetch_line(ahead);
      load_block(codes, out.data + i * out.row_bytes + k * bits_of(codes) / 8, there, values[i]);
    }
    const __m512i group = _mm512_srl_epi32(
        _mm512_add_epi32(codes_before, _mm512_set1_epi32((int)(k % chunk % (4 * w->group)))),
        _mm_cvtsi32_si128((int)group_bits));
    const __m512 factor = _mm512_permutexvar_ps(
        _mm512_add_epi32(_mm512_slli_epi32(group, 2), output), scale[g / PARTS]);
    add_block(values, factor, x, k, rows, sum);
  }
  EACH(r, rows) {
    const __m128 four = add_quarters(sum[r]);
    if (wanted == FEW_OUTS)
      _mm_storeu_ps(ys[r] + y, four);
    else
      _mm_store_ss(ys[r] + y, four);
  }
}

VNNI_INLINE void dot_few(const zmoe_weight *w, const enum codes codes, const zmoe_packed *x,
                         const uint32_t rows, uint32_t first, uint32_t last,
                         const zmoe_scratch *scratch, float *const *ys) {
  const zmoe_weight *next = scratch->next;
  struct zmoe_outputs out = zmoe_outputs_at(w, first);
  uint32_t n = last - first, skipped = zmoe_rows_ahead(out.row_bytes, FEW_OUTS);
  skipped = skipped < n ? skipped : n;
  struct zmoe_outputs later = zmoe_pass_outputs(out, skipped);
  for (uint32_t y = 0, wanted; n > 0; n -= wanted, y += wanted) {
    if (n == skipped && next != NULL && next->format == w->format)
      later = zmoe_outputs_at(next, scratch->next_output);
    struct zmoe_outputs now = out;
    wanted = FEW_OUTS;
    if (n < (uint32_t)FEW_OUTS) { /* one, so many times, as code for fewer would seldom run */
      wanted = 1;
      now.row_bytes = now.scale_bytes = 0;
    }
    dot_outputs(w, codes, later, now, x, rows, wanted, ys, y);
    out = zmoe_pass_outputs(out, wanted);
    later = zmoe_pass_outputs(later, wanted);
  }
}

VNNI_INLINE void dot_tiles(const zmoe_weight *w, const enum codes codes, const zmoe_packed *x,
                           uint32_t rows, uint32_t first, uint32_t last,
                           const zmoe_scratch *scratch, float *const *ys) {
  for (; rows >= FEW_ROWS; rows -= FEW_ROWS, x += FEW_ROWS, ys += FEW_ROWS)
    dot_few(w, codes, x, FEW_ROWS, first, last, scratch, ys);
  if (rows == 3)
    dot_few(w, codes, x, 3, first, last, scratch, ys);
  else if (rows == 2)
    dot_few(w, codes, x, 2, first, last, scratch, ys);
  else if (rows == 1)
    dot_few(w, codes, x, 1, first, last, scratch, ys);
}

/* ---- many rows --------------------------------------------------------------------- */

/* Of PANEL_OUTS outputs and DEPTH codes the words of bytes, of each run its even codes, or its
 * first, and then the others; and what multiplies runs and x's sums, by group of a chunk.  Of each
 * row the parts of its sums.  A register has 16 outputs. */
struct panel {
  __m512i words[DEPTH / 4][2];
  __m512 scales[16][2], biases[16][2];
  __m512 sums[ZMOE_ROW_BLOCK][PARTS][2];
};
_Static_assert(sizeof(struct panel) <= ZMOE_PANEL_BYTES, "a panel fits a thread's scratch");

#define RUN_WORDS (ZMOE_INT_GROUP / 4u)

/* The codes from k on, of which `left` are there, of 16 outputs: the first or second of a panel. */
VNNI_INLINE void decode(const zmoe_weight *w, const enum codes codes, struct zmoe_outputs out,
                        uint32_t k, uint32_t left, struct panel *panel, uint32_t half) {
  const uint32_t g = k / w->group, groups = w->in_features / w->group - g;
  const uint32_t step = 512 / bits_of(codes);
  const unsigned char *data = out.data + k * bits_of(codes) / 8;
  __m512i v[16], (*run)[2] = panel->words;
  for (uint32_t at = 0; at < left; at += step, data += 64) {
    EACH_OF_16(i) {
      v[i] =
          _mm512_maskz_loadu_epi32(lanes16(words_of(codes, left - at)), data + i * out.row_bytes);
      prefetch_line(data + (PANEL_OUTS + i) * out.row_bytes);
    }
    transpose(v);
    if (codes == CODES8) {
      EACH_OF_16(i)
        run[i][half] = v[i];
      run += 16;
      continue;
    }
    for (uint32_t i = 0; i < 16; i += 4, run += RUN_WORDS)
      EACH(j, 4) {
        __m512i values[2];
        split(codes, v[i + j], values);
        run[j][half] = values[0];
        run[4 + j][half] = values[1];
      }
  }
  if (g % CHUNK != 0)
    return;
  EACH_OF_16(i)
    v[i] = (__m512i)load_scales(w, codes, out.scales + i * out.scale_bytes, g, groups);
  transpose(v);
  EACH_OF_16(i)
    panel->scales[i][half] = (__m512)v[i];
  if (!is_affine(codes))
    return;
  EACH_OF_16(i)
    v[i] =
        (__m512i)load_floats(out.biases + i * out.scale_bytes, g, w->scale_dtype, lanes16(groups));
  transpose(v);
  EACH_OF_16(i)
    panel->biases[i][half] = centred(codes, panel->scales[i][half], (__m512)v[i]);
}

#define DECODE(codes)                                                                              \
  VNNI static void decode_##codes(const zmoe_weight *w, struct zmoe_outputs out, uint32_t k,       \
                                  uint32_t left, struct panel *panel, uint32_t half) {             \
    decode(w, codes, out, k, left, panel, half);                                                   \
  }
DECODE(CODES4)
DECODE(CODES8)
DECODE(FP4)

VNNI_INLINE __m512i load_word(const int8_t *at) {
  return _mm512_set1_epi32(_mm_cvtsi128_si32(_mm_loadu_si32(at)));
}

/* Of the panel's sums with some rows part p. */
VNNI_INLINE void add_part(const zmoe_weight *w, const struct panel *panel, const zmoe_packed *x,
                          uint32_t k, uint32_t left, const uint32_t rows, uint32_t p,
                          __m512 (*sums)[PARTS][2]) {
  const uint32_t group_bits = (uint32_t)__builtin_ctz((unsigned)w->group);
  const uint32_t of_chunk = k % ((uint32_t)CHUNK << group_bits);
  const int8_t *elements[TILE_ROWS];
  __m512 sum[TILE_ROWS][2];
  EACH(r, rows) {
    elements[r] = (const int8_t *)x[r].elements + k + 16 * p;
    EACH(h, 2)
      sum[r][h] = k == 0 ? _mm512_setzero_ps() : sums[r][p][h];
  }
  for (uint32_t g = p; w->biases != NULL && of_chunk == 0 && g < CHUNK; g += PARTS)
    EACH(r, rows) {
      const __m512 of_x = _mm512_set1_ps(x[r].sums[(k >> group_bits) + g]);
      EACH(h, 2)
        sum[r][h] = _mm512_fmadd_ps(panel->biases[g][h], of_x, sum[r][h]);
    }
  for (uint32_t at = 0; at < left; at += ZMOE_BLOCK) {
    const uint32_t lane = (k + at) / 8 + 4 * p;
    const uint32_t g = (of_chunk + at + ZMOE_INT_GROUP * p) >> group_bits;
    const __m512i(*words)[2] = panel->words + at / 4 + RUN_WORDS * p;
    __m512i run[TILE_ROWS][2];
    EACH(r, rows)
      EACH(h, 2)
        run[r][h] = _mm512_set1_epi32(x[r].offsets[lane]);
    EACH(j, RUN_WORDS)
      EACH(r, rows) {
        const __m512i word = load_word(elements[r] + at + j / 4 * 64 + j % 4 * 4);
        EACH(h, 2)
          run[r][h] = _mm512_dpbusd_epi32(run[r][h], words[j][h], word);
      }
    EACH(r, rows) {
      const __m512 of_x = _mm512_set1_ps(x[r].scales[lane]);
      EACH(h, 2) {
        const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(run[r][h]), of_x);
        sum[r][h] = _mm512_fmadd_ps(part, panel->scales[g][h], sum[r][h]);
      }
    }
  }
  EACH(r, rows)
    EACH(h, 2)
      sums[r][p][h] = sum[r][h];
}

#define ADD_ROWS(rows)                                                                             \
  VNNI static void add_rows_##rows(const zmoe_weight *w, const struct panel *panel,                \
                                   const zmoe_packed *x, uint32_t k, uint32_t left,                \
                                   __m512(*sums)[PARTS][2]) {                                      \
    for (uint32_t p = 0; p < PARTS; p++)                                                           \
      add_part(w, panel, x, k, left, rows, p, sums);                                               \
  }
ADD_ROWS(4)
ADD_ROWS(5)
ADD_ROWS(6)

/* Of so many rows those of the next tile: of eight or more at least four. */
static uint32_t tile_rows(uint32_t rows) {
  const uint32_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  return (rows + tiles - 1) / tiles;
}

/* PANEL_OUTS outputs from o on with at least PANEL_ROWS rows. */
VNNI static void dot_panel(const zmoe_weight *w, const zmoe_packed *x, uint32_t rows, uint32_t o,
                           struct panel *panel, float *const *ys) {
  const enum codes codes = codes_of(w);
  for (uint32_t k = 0; k < w->in_features; k += DEPTH) {
    const uint32_t left = w->in_features - k < DEPTH ? w->in_features - k : DEPTH;
    for (uint32_t half = 0; half < 2; half++) {
      const struct zmoe_outputs out = zmoe_outputs_at(w, o + 16 * half);
      if (codes == CODES4)
        decode_CODES4(w, out, k, left, panel, half);
      else if (codes == CODES8)
        decode_CODES8(w, out, k, left, panel, half);
      else
        decode_FP4(w, out, k, left, panel, half);
    }
    for (uint32_t r = 0, n; r < rows; r += n) {
      n = tile_rows(rows - r);
      if (n == 6)
        add_rows_6(w, panel, x + r, k, left, panel->sums + r);
      else if (n == 5)
        add_rows_5(w, panel, x + r, k, left, panel->sums + r);
      else
        add_rows_4(w, panel, x + r, k, left, panel->sums + r);
    }
  }
  for (uint32_t r = 0; r < rows; r++)
    EACH(h, 2) {
      const __m512(*part)[2] = panel->sums[r];
      _mm512_storeu_ps(ys[r] + 16 * h, _mm512_add_ps(_mm512_add_ps(part[0][h], part[2][h]),
                                                     _mm512_add_ps(part[1][h], part[3][h])));
    }
}

/* ---- which one -------------------------------------------------------------------- */

VNNI_INLINE void dot_int8(const zmoe_weight *w, const enum codes codes, const void *const *xs,
                          uint32_t rows, uint32_t first, uint32_t last, zmoe_scratch *scratch,
                          float *const *ys) {
  const zmoe_layout layout = codes == CODES8 ? ZMOE_LAYOUT_CODES8_INT8 : ZMOE_LAYOUT_CODES4_INT8;
  zmoe_packed x[ZMOE_ROW_BLOCK];
  for (uint32_t r = 0; r < rows; r++)
    x[r] = zmoe_packed_at((void *)xs[r], layout, w->in_features);
  if (rows >= PANEL_ROWS && last - first == PANEL_OUTS)
    dot_panel(w, x, rows, first, (struct panel *)(void *)scratch->panel, ys);
  else
    dot_tiles(w, codes, x, rows, first, last, scratch, ys);
}

#define DOT(codes)                                                                                 \
  VNNI static void dot_##codes(const zmoe_weight *w, const void *const *xs, uint32_t rows,         \
                               uint32_t first, uint32_t last, zmoe_scratch *scratch,               \
                               float *const *ys) {                                                 \
    dot_int8(w, codes, xs, rows, first, last, scratch, ys);                                        \
  }
DOT(CODES4)
DOT(CODES8)
DOT(FP4)

static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  if (layout == ZMOE_LAYOUT_CODES8_INT8)
    dot_CODES8(w, xs, rows, first, last, scratch, ys);
  else if (layout == ZMOE_LAYOUT_CODES4_INT8)
    (codes_of(w) == FP4 ? dot_FP4 : dot_CODES4)(w, xs, rows, first, last, scratch, ys);
  else if (zmoe_layout_is_int22(layout))
    zmoe_kernels_vnni256.dot(w, layout, xs, rows, first, last, scratch, ys);
  else
    zmoe_kernels_avx512.dot(w, layout, xs, rows, first, last, scratch, ys);
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  const zmoe_layout layout = zmoe_kernels_avx512.layout(w, x_dtype, precision);
  if (layout != ZMOE_LAYOUT_CODES4 || codes_of(w) == CODES4 || codes_of(w) == FP4)
    return layout; /* read from memory, these two are faster as floats in registers of 512 bits */
  return ZMOE_LAYOUT_CODES4_INT22;
}

const zmoe_kernels zmoe_kernels_avx512_vnni = {layout_for, zmoe_avx512_pack_input, dot};
#endif
