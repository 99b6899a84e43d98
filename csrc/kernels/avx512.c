/* GEMV, AVX-512: f32 sums of whatever the weights decode to.
 *
 * `rows` and the format are constants in each call of the inlined bodies, so
 * that sums stay in registers. */
#if defined(__x86_64__)
#include "avx512.h"

/* ---- floats ------------------------------------------------------------------ */

AVX512_INLINE void dot_floats(const zmoe_weight *w, uint32_t format, const void *const *xs,
                              uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  uint32_t in_features = w->in_features;
  const size_t item = format == ZMOE_F32 ? 4 : 2;
  for (uint32_t o = first; o < last; o++) {
    const unsigned char *data = zmoe_row(w, o);
    __m512 even[ZMOE_DOT_ROWS], odd[ZMOE_DOT_ROWS];
    for (uint32_t r = 0; r < rows; r++)
      even[r] = odd[r] = _mm512_setzero_ps();
    uint32_t k = 0;
    for (; k + 32 <= in_features; k += 32) {
      prefetch_lines(data + k * item, format == ZMOE_F32 ? 2 : 1);
      __m512 a = load_floats(data, k, format, 0xffff);
      __m512 b = load_floats(data, k + 16, format, 0xffff);
      for (uint32_t r = 0; r < rows; r++) {
        const float *x = xs[r];
        even[r] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x + k), even[r]);
        odd[r] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x + k + 16), odd[r]);
      }
    }
    for (; k < in_features; k += 16) {
      __mmask16 lanes = lanes16(in_features - k);
      __m512 a = load_floats(data, k, format, lanes);
      for (uint32_t r = 0; r < rows; r++)
        even[r] =
            _mm512_fmadd_ps(a, _mm512_maskz_loadu_ps(lanes, (const float *)xs[r] + k), even[r]);
    }
    for (uint32_t r = 0; r < rows; r++)
      ys[r][o - first] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
  }
}

/* ---- codes of 4 bits ------------------------------------------------------------ */

/* Scales come 16 at a time; `per_block` of them belong to a block of 128 codes. */
AVX512_INLINE void dot_codes4(const zmoe_weight *w, uint32_t per_block, const void *const *xs,
                              uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  uint32_t groups = w->in_features / w->group;
  int affine = w->format == ZMOE_FORMAT_AFFINE;
  __m512 table = _mm512_loadu_ps(zmoe_code_values(w));
  __m512i first_lanes = scale_lanes(8, w->group);
  const size_t row_bytes = zmoe_weight_row_bytes(w);
  const uint32_t skipped = zmoe_rows_ahead(row_bytes, 1);
  zmoe_packed x[ZMOE_DOT_ROWS];
  for (uint32_t r = 0; r < rows; r++)
    x[r] = zmoe_packed_at((void *)xs[r], ZMOE_LAYOUT_CODES4, w->in_features);
  for (uint32_t o = first; o < last; o++) {
    const unsigned char *data = zmoe_row(w, o), *scales = zmoe_row_scales(w, o);
    const unsigned char *biases = affine ? zmoe_row_biases(w, o) : NULL;
    prefetch_scales(w, o + skipped, zmoe_weight_scale_bytes(w));
    __m512 sum[ZMOE_DOT_ROWS];
    for (uint32_t r = 0; r < rows; r++)
      sum[r] = _mm512_setzero_ps();
    for (uint32_t g = 0; g < groups; g += 16) {
      __mmask16 lanes = lanes16(groups - g);
      __m512 scale = load_scales(w, scales, g, lanes);
      if (affine) {
        __m512 bias = load_floats(biases, g, w->scale_dtype, lanes);
        for (uint32_t r = 0; r < rows; r++)
          sum[r] = _mm512_fmadd_ps(bias, _mm512_loadu_ps(x[r].sums + g), sum[r]);
      }
      __m512i at = first_lanes;
      uint32_t begin = g * w->group, end = begin + 16 * w->group;
      end = end < w->in_features ? end : w->in_features;
      for (uint32_t k = begin; k < end; k += ZMOE_BLOCK) {
        __mmask16 words = lanes16((end - k) / 8);
        _mm_prefetch((const char *)data + k / 2 + skipped * row_bytes, _MM_HINT_T0);
        __m512i code = _mm512_maskz_loadu_epi32(words, data + k / 2);
        __m512 part[ZMOE_DOT_ROWS];
        for (uint32_t i = 0; i < 8; i++) {
          __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4 * i), table);
          for (uint32_t r = 0; r < rows; r++) {
            __m512 other = _mm512_loadu_ps((const float *)x[r].elements + k + 16 * i);
            part[r] = i == 0 ? _mm512_mul_ps(value, other) : _mm512_fmadd_ps(value, other, part[r]);
          }
        }
        __m512 spread = _mm512_permutexvar_ps(at, scale);
        at = _mm512_add_epi32(at, _mm512_set1_epi32((int)per_block));
        for (uint32_t r = 0; r < rows; r++)
          sum[r] = _mm512_fmadd_ps(part[r], spread, sum[r]);
      }
    }
    for (uint32_t r = 0; r < rows; r++)
      ys[r][o - first] = _mm512_reduce_add_ps(sum[r]);
  }
}

/* ---- codes of 8 bits ------------------------------------------------------------ */

AVX512_INLINE void dot_codes8(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                              uint32_t first, uint32_t last, float *const *ys) {
  uint32_t groups = w->in_features / w->group, group = w->group;
  const size_t row_bytes = zmoe_weight_row_bytes(w);
  const uint32_t skipped = zmoe_rows_ahead(row_bytes, 1);
  zmoe_packed x[ZMOE_DOT_ROWS];
  for (uint32_t r = 0; r < rows; r++)
    x[r] = zmoe_packed_at((void *)xs[r], ZMOE_LAYOUT_CODES8, w->in_features);
  for (uint32_t o = first; o < last; o++) {
    const unsigned char *data = zmoe_row(w, o), *scales = zmoe_row_scales(w, o);
    const unsigned char *biases = zmoe_row_biases(w, o);
    prefetch_scales(w, o + skipped, zmoe_weight_scale_bytes(w));
    __m512 sum[ZMOE_DOT_ROWS];
    for (uint32_t r = 0; r < rows; r++)
      sum[r] = _mm512_setzero_ps();
    for (uint32_t g = 0; g < groups; g += 16) {
      uint32_t count = groups - g < 16 ? groups - g : 16;
      __m512 scale = load_floats(scales, g, w->scale_dtype, lanes16(count));
      __m512 bias = load_floats(biases, g, w->scale_dtype, lanes16(count));
      for (uint32_t r = 0; r < rows; r++)
        sum[r] = _mm512_fmadd_ps(bias, _mm512_loadu_ps(x[r].sums + g), sum[r]);
      for (uint32_t i = 0; i < count; i++) {
        uint32_t begin = (g + i) * group;
        __m512 part[ZMOE_DOT_ROWS];
        for (uint32_t r = 0; r < rows; r++)
          part[r] = _mm512_setzero_ps();
        for (uint32_t k = begin; k < begin + group; k += 16) {
          if (k % 64 == 0)
            _mm_prefetch((const char *)data + k + skipped * row_bytes, _MM_HINT_T0);
          __m128i code = _mm_loadu_si128((const __m128i *)(const void *)(data + k));
          __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(code));
          for (uint32_t r = 0; r < rows; r++)
            part[r] =
                _mm512_fmadd_ps(value, _mm512_loadu_ps((const float *)x[r].elements + k), part[r]);
        }
        __m512 spread = _mm512_permutexvar_ps(_mm512_set1_epi32((int)i), scale);
        for (uint32_t r = 0; r < rows; r++)
          sum[r] = _mm512_fmadd_ps(part[r], spread, sum[r]);
      }
    }
    for (uint32_t r = 0; r < rows; r++)
      ys[r][o - first] = _mm512_reduce_add_ps(sum[r]);
  }
}

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

AVX512 void zmoe_avx512_dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs,
                            uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  if (zmoe_layout_is_integer(layout)) /* without VNNI, AVX2 is as good */
    zmoe_kernels_avx2.dot(w, layout, xs, rows, first, last, ys);
  else if (layout == ZMOE_LAYOUT_CODES8)
    ZMOE_BY_ROWS(dot_codes8, w);
  else if (layout == ZMOE_LAYOUT_CODES4 && w->group == 32)
    ZMOE_BY_ROWS(dot_codes4, w, 4);
  else if (layout == ZMOE_LAYOUT_CODES4 && w->group == 64)
    ZMOE_BY_ROWS(dot_codes4, w, 2);
  else if (layout == ZMOE_LAYOUT_CODES4)
    ZMOE_BY_ROWS(dot_codes4, w, 1);
  else
    dot_plain(w, xs, rows, first, last, ys);
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  (void)x_dtype;
  if (w->format == ZMOE_FORMAT_MXFP4 || (w->format == ZMOE_FORMAT_AFFINE && w->bits == 4))
    return precision == ZMOE_INT8 ? ZMOE_LAYOUT_CODES4_INT8 : ZMOE_LAYOUT_CODES4;
  if (w->format == ZMOE_FORMAT_AFFINE && w->bits == 8)
    return precision == ZMOE_INT8 ? ZMOE_LAYOUT_CODES8_INT8 : ZMOE_LAYOUT_CODES8;
  return ZMOE_LAYOUT_PLAIN;
}

const zmoe_kernels zmoe_kernels_avx512 = {layout_for, zmoe_avx512_pack_input, zmoe_avx512_dot,
                                          zmoe_avx512_pack_panel, zmoe_avx512_tile};
#endif
