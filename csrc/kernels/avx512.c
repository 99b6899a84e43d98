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

AVX512_INLINE table table_of(const enum codes codes) {
  return _mm512_loadu_si512(is_affine(codes) ? zmoe_affine_values : zmoe_fp4_values);
}

/* Here codes are of 4 bits. */
AVX512_INLINE __m512i unpack(const enum codes codes, __m512i bytes, table values) {
  (void)codes, (void)values;
  return bytes;
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

AVX512 static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs,
                       uint32_t rows, uint32_t first, uint32_t last, void *scratch,
                       float *const *ys) {
  if (zmoe_layout_is_integer(layout)) /* without VNNI, AVX2 is as good */
    zmoe_kernels_avx2.dot(w, layout, xs, rows, first, last, scratch, ys);
  else if (layout == ZMOE_LAYOUT_CHAINS)
    zmoe_avx512_dot_chains(w, xs, rows, first, last, scratch, ys);
  else if (layout == ZMOE_LAYOUT_CODES4 && w->format == ZMOE_FORMAT_MXFP4)
    dot_codes(w, FP4, xs, rows, first, last, scratch, ys);
  else if (layout == ZMOE_LAYOUT_CODES4)
    dot_codes(w, CODES4, xs, rows, first, last, scratch, ys);
  else
    dot_plain(w, xs, rows, first, last, ys);
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  (void)x_dtype;
  if (w->format == ZMOE_FORMAT_MXFP4 || (w->format == ZMOE_FORMAT_AFFINE && w->bits == 4))
    return precision == ZMOE_INT8 ? ZMOE_LAYOUT_CODES4_INT8 : ZMOE_LAYOUT_CODES4;
  if (w->format == ZMOE_FORMAT_AFFINE && w->bits == 8 && precision == ZMOE_INT8)
    return ZMOE_LAYOUT_CODES8_INT8;
  return zmoe_is_float(w) || w->bits == 1 ? ZMOE_LAYOUT_PLAIN : ZMOE_LAYOUT_CHAINS;
}

static void pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  if (zmoe_layout_is_integer(layout))
    zmoe_kernels_avx2.pack_input(layout, w, x, row);
  else
    zmoe_avx512_pack_input(layout, w, x, row);
}

const zmoe_kernels zmoe_kernels_avx512 = {layout_for, pack_input, dot};
#endif
