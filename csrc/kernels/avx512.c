/* GEMV and GEMM, AVX-512: f32 sums of whatever the weights decode to.
 *
 * `rows` and the format are constants in each call of the inlined bodies, so
 * that sums stay in registers. */
#if defined(__x86_64__)
#define INLINE AVX512_INLINE
#define ELEMENTS 16
#include "avx512.h"

/* ---- floats ------------------------------------------------------------------ */

/* Adds 16 elements from k on, those outside `lanes` zero and not touched. */
AVX512_INLINE void add_floats(const unsigned char *data, size_t row_bytes, uint32_t format,
                              size_t k, __mmask16 lanes, const void *const *xs, const uint32_t rows,
                              const uint32_t n_out, __m512 sum[ZMOE_DOT_ROWS][ZMOE_DOT_ROWS]) {
  __m512 value[ZMOE_DOT_ROWS];
  EACH(j, n_out)
    value[j] = load_floats(data + j * row_bytes, k, format, lanes);
  EACH(r, rows) {
    __m512 x = _mm512_maskz_loadu_ps(lanes, (const float *)xs[r] + k);
    EACH(j, n_out)
      sum[r][j] = _mm512_fmadd_ps(value[j], x, sum[r][j]);
  }
}

AVX512_INLINE void dot_outputs_f32(const zmoe_weight *w, uint32_t format, const void *const *xs,
                                   const uint32_t rows, const uint32_t n_out, uint32_t o,
                                   float *const *ys, uint32_t y) {
  const size_t item = format == ZMOE_F32 ? 4 : 2, in_features = w->in_features,
               row_bytes = in_features * item,
               ahead = zmoe_rows_ahead(row_bytes, n_out) * row_bytes;
  const unsigned char *data = zmoe_row(w, o);
  __m512 sum[ZMOE_DOT_ROWS][ZMOE_DOT_ROWS];
  EACH(r, rows)
    EACH(j, n_out)
      sum[r][j] = _mm512_setzero_ps();
  size_t k = 0;
  for (; k + 32 <= in_features; k += 32) {
    EACH(j, n_out)
      for (size_t line = 0; line < 32 * item; line += 64)
        prefetch_line(data + j * row_bytes + k * item + line + ahead);
    EACH(i, 2)
      add_floats(data, row_bytes, format, k + 16 * i, 0xffff, xs, rows, n_out, sum);
  }
  for (; k < in_features; k += 16)
    add_floats(data, row_bytes, format, k, lanes16((uint32_t)(in_features - k)), xs, rows, n_out,
               sum);
  store_sums(rows, n_out, n_out, sum, ys, y);
}

AVX512_INLINE void dot_floats(const zmoe_weight *w, uint32_t format, const void *const *xs,
                              const uint32_t rows, uint32_t first, uint32_t last,
                              float *const *ys) {
  uint32_t o = first;
  for (; o + 4 <= last; o += 4)
    dot_outputs_f32(w, format, xs, rows, 4, o, ys, o - first);
  for (; o < last; o++)
    dot_outputs_f32(w, format, xs, rows, 1, o, ys, o - first);
}

/* ---- codes ------------------------------------------------------------------------- */

AVX512_INLINE zmoe_layout layout_of(const enum codes codes) {
  (void)codes;
  return ZMOE_LAYOUT_CODES4;
}

typedef __m512i table;

/* Bits above a code's own have no meaning. */
AVX512_INLINE table table_of(const enum codes codes) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if (!is_affine(codes))
    return _mm512_loadu_si512(zmoe_fp4_values);
  __m512i code = _mm512_and_si512(first, _mm512_set1_epi32((1 << bits_of(codes)) - 1));
  return _mm512_castps_si512(_mm512_cvtepi32_ps(code));
}

/* Where `places` has ones, the bits `left` places to the right. */
AVX512_INLINE __m512i move_up(__m512i v, int places, uint32_t left) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(places), _mm512_slli_epi32(v, left), v, 0xca);
}

/* Eight codes of 3 bits are brought into a word, or four of 2 into half of one; then the upper half
 * of what is together moves to where it belongs, down to single codes.  Bits above a code's own
 * have no meaning. */
AVX512_INLINE __m512i unpack(const enum codes codes, __m512i bytes, table values) {
  (void)values;
  if (codes == CODES2) {
    bytes = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes));
  } else if (codes == CODES3) {
    const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    const __m512i words =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    bytes = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, bytes), words);
    bytes = move_up(bytes, (int)0xffff0000, 4);
  }
  const uint32_t unused = 4 - bits_of(codes);
  if (unused == 0)
    return bytes;
  bytes = move_up(bytes, (int)0xff00ff00, 2 * unused);
  return move_up(bytes, (int)0xf0f0f0f0, unused);
}

AVX512_INLINE __m512 multiply_add(__m512 sum, __m512i value, const void *x) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(value), _mm512_loadu_ps(x), sum);
}

/* Code i % 8 of each word. */
AVX512_INLINE __m512i value_of(const enum codes codes, const __m512i words[2], uint32_t i,
                               table values) {
  (void)codes;
  return _mm512_permutexvar_epi32(_mm512_srli_epi32(words[i / 8], i % 8 * 4), values);
}

CODES_INLINE uint32_t lane_code(const enum codes codes, uint32_t lane) {
  (void)codes;
  return 8 * lane_word(lane);
}

/* Storing 16 floats takes as long as decoding them. */
AVX512_INLINE uint32_t panel_rows(const enum codes codes) {
  (void)codes;
  return ZMOE_ROW_BLOCK + 1;
}

#include "avx512_codes.h"

/* ---- which one -------------------------------------------------------------------- */

AVX512 static void dot_plain(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                             uint32_t first, uint32_t last, float *const *ys) {
  switch (w->format) {
  case ZMOE_FORMAT_F32:
    ZMOE_BY_ROWS(dot_floats, w, ZMOE_F32);
    return;
  case ZMOE_FORMAT_F16:
    ZMOE_BY_ROWS(dot_floats, w, ZMOE_F16);
    return;
  default:
    ZMOE_BY_ROWS(dot_floats, w, ZMOE_BF16);
  }
}

AVX512 static void dot_codes4(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                              uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  switch (codes_of(w)) {
  case CODES2:
    dot_codes(w, CODES2, xs, rows, first, last, scratch, ys);
    return;
  case CODES3:
    dot_codes(w, CODES3, xs, rows, first, last, scratch, ys);
    return;
  case CODES4:
    dot_codes(w, CODES4, xs, rows, first, last, scratch, ys);
    return;
  case FP4:
    dot_codes(w, FP4, xs, rows, first, last, scratch, ys);
    return;
  default:
    dot_codes(w, NVFP4, xs, rows, first, last, scratch, ys);
  }
}

AVX512 static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs,
                       uint32_t rows, uint32_t first, uint32_t last, void *scratch,
                       float *const *ys) {
  if (zmoe_layout_is_integer(layout)) /* without VNNI, AVX2 is as good */
    zmoe_kernels_avx2.dot(w, layout, xs, rows, first, last, scratch, ys);
  else if (layout == ZMOE_LAYOUT_CHAINS)
    zmoe_avx512_dot_chains(w, xs, rows, first, last, scratch, ys);
  else if (layout == ZMOE_LAYOUT_CODES4)
    dot_codes4(w, xs, rows, first, last, scratch, ys);
  else
    dot_plain(w, xs, rows, first, last, ys);
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  (void)x_dtype;
  if (zmoe_is_float(w) || w->bits == 1)
    return ZMOE_LAYOUT_PLAIN;
  const enum codes codes = codes_of(w);
  if (precision == ZMOE_INT8 && (codes == CODES4 || codes == FP4))
    return ZMOE_LAYOUT_CODES4_INT8;
  if (precision == ZMOE_INT8 && codes == CODES8)
    return ZMOE_LAYOUT_CODES8_INT8;
  if (codes == CODES5 || codes == CODES6)
    return ZMOE_LAYOUT_CODES8_INT22;
  return unpacked_bits(codes) == 4 ? ZMOE_LAYOUT_CODES4 : ZMOE_LAYOUT_CHAINS;
}

static void pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  if (zmoe_layout_is_integer(layout))
    zmoe_kernels_avx2.pack_input(layout, w, x, row);
  else
    zmoe_avx512_pack_input(layout, w, x, row);
}

const zmoe_kernels zmoe_kernels_avx512 = {layout_for, pack_input, dot};
#endif
