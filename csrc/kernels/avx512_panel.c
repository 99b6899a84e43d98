/* GEMM, AVX-512: weights into panels, and the product of panels. */
#if defined(__x86_64__)
#include "avx512.h"

#include <string.h>

#include "thread_pool.h"

/* ---- transposing ---------------------------------------------------------------- */

/* 16 registers of 16 words, in place: word j of register i for word i of j. */
AVX512_INLINE void transpose16(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

/* Words [word, word + 16) of 16 outputs from `first` on, one register per word;
 * what lies beyond `n_out` outputs or `words` words is zero. */
AVX512_INLINE void load_words(const zmoe_weight *w, uint32_t first, uint32_t n_out, size_t word,
                              uint32_t words, __m512i v[16]) {
  size_t row_bytes = zmoe_weight_row_bytes(w);
  const unsigned char *data = (const unsigned char *)w->data + first * row_bytes + word * 4;
  __mmask16 lanes = lanes16(words);
  for (uint32_t i = 0; i < 16; i++)
    v[i] =
        i < n_out ? _mm512_maskz_loadu_epi32(lanes, data + i * row_bytes) : _mm512_setzero_si512();
  transpose16(v);
}

/* ---- formats ---------------------------------------------------------------------
 * Each packs 16 outputs into one half of the panel. */

AVX512_INLINE void store_column(float *panel, uint32_t k, __m512 value) {
  _mm512_storeu_ps(panel + (size_t)k * ZMOE_PANEL, value);
}

AVX512 static void pack_f32(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,
                            uint32_t k1, float *panel) {
  __m512i v[16];
  for (uint32_t k = k0; k < k1; k += 16) {
    uint32_t words = k1 - k < 16 ? k1 - k : 16;
    load_words(w, first, n_out, k, words, v);
    for (uint32_t j = 0; j < words; j++)
      store_column(panel, k - k0 + j, _mm512_castsi512_ps(v[j]));
  }
}

AVX512_INLINE __m512 low_half(__m512i word, uint32_t format) {
  if (format == ZMOE_FORMAT_BF16)
    return _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(word));
}

AVX512_INLINE __m512 high_half(__m512i word, uint32_t format) {
  if (format == ZMOE_FORMAT_BF16)
    return _mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32((int)0xffff0000)));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16)));
}

/* Two elements a word; rows of an odd length start in the middle of one, and
 * are left to the generic way. */
AVX512_INLINE void pack_halves(const zmoe_weight *w, uint32_t format, uint32_t first,
                               uint32_t n_out, uint32_t k0, uint32_t k1, float *panel) {
  __m512i v[16];
  for (uint32_t k = k0; k < k1; k += 32) {
    uint32_t words = k1 - k < 32 ? (k1 - k) / 2 : 16;
    load_words(w, first, n_out, k / 2, words, v);
    for (uint32_t j = 0; j < words; j++) {
      store_column(panel, k - k0 + 2 * j, low_half(v[j], format));
      store_column(panel, k - k0 + 2 * j + 1, high_half(v[j], format));
    }
  }
}

AVX512 static void pack_bf16(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,
                             uint32_t k1, float *panel) {
  pack_halves(w, ZMOE_FORMAT_BF16, first, n_out, k0, k1, panel);
}

AVX512 static void pack_f16(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,
                            uint32_t k1, float *panel) {
  pack_halves(w, ZMOE_FORMAT_F16, first, n_out, k0, k1, panel);
}

/* The scale and bias of 16 outputs for one group. */
AVX512_INLINE void load_group(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t group,
                              __m512 *scale, __m512 *bias) {
  float scales[16] = {0}, biases[16] = {0};
  for (uint32_t i = 0; i < n_out; i++) {
    const unsigned char *at = zmoe_row_scales(w, first + i);
    if (w->format == ZMOE_FORMAT_AFFINE) {
      scales[i] = load_scalar(at, group, (zmoe_dtype)w->scale_dtype);
      biases[i] = load_scalar(zmoe_row_biases(w, first + i), group, (zmoe_dtype)w->scale_dtype);
    } else {
      scales[i] = _mm512_cvtss_f32(load_e8m0(at + group, 1));
    }
  }
  *scale = _mm512_loadu_ps(scales);
  *bias = _mm512_loadu_ps(biases);
}

/* bits 4 (a table of values) or 8 (the codes themselves). */
AVX512_INLINE void pack_codes(const zmoe_weight *w, uint32_t bits, uint32_t first, uint32_t n_out,
                              uint32_t k0, uint32_t k1, float *panel) {
  uint32_t per_word = 32 / bits;
  __m512 table = _mm512_loadu_ps(zmoe_code_values(w));
  __m512 scale = _mm512_setzero_ps(), bias = scale;
  __m512i v[16];
  uint32_t loaded = UINT32_MAX;
  for (uint32_t k = k0; k < k1; k += 16 * per_word) {
    uint32_t words = (k1 - k) / per_word < 16 ? (k1 - k) / per_word : 16;
    load_words(w, first, n_out, k / per_word, words, v);
    for (uint32_t j = 0; j < words; j++) {
      uint32_t element = k + j * per_word;
      if (element / w->group != loaded) {
        loaded = element / w->group;
        load_group(w, first, n_out, loaded, &scale, &bias);
      }
      for (uint32_t i = 0; i < per_word; i++) {
        __m512i code = _mm512_srli_epi32(v[j], i * bits);
        __m512 value = bits == 4
                           ? _mm512_permutexvar_ps(code, table)
                           : _mm512_cvtepi32_ps(_mm512_and_si512(code, _mm512_set1_epi32(255)));
        /* Rounded twice, as zmoe_weight_decode does it. */
        store_column(panel, element - k0 + i, _mm512_add_ps(_mm512_mul_ps(value, scale), bias));
      }
    }
  }
}

AVX512 static void pack_codes4(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,
                               uint32_t k1, float *panel) {
  pack_codes(w, 4, first, n_out, k0, k1, panel);
}

AVX512 static void pack_codes8(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,
                               uint32_t k1, float *panel) {
  pack_codes(w, 8, first, n_out, k0, k1, panel);
}

typedef void pack_half(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,
                       uint32_t k1, float *panel);

static pack_half *packer_of(const zmoe_weight *w) {
  int even = w->in_features % 2 == 0;
  switch (w->format) {
  case ZMOE_FORMAT_F32:
    return pack_f32;
  case ZMOE_FORMAT_F16:
    return even ? pack_f16 : NULL;
  case ZMOE_FORMAT_BF16:
    return even ? pack_bf16 : NULL;
  case ZMOE_FORMAT_MXFP4:
    return pack_codes4;
  case ZMOE_FORMAT_AFFINE:
    return w->bits == 4 ? pack_codes4 : w->bits == 8 ? pack_codes8 : NULL;
  }
  return NULL;
}

AVX512 void zmoe_avx512_pack_panel(const zmoe_weight *w, uint32_t first, uint32_t last, uint32_t k0,
                                   uint32_t k1, float *panel) {
  pack_half *pack = packer_of(w);
  if (pack == NULL) {
    zmoe_generic_pack_panel(w, first, last, k0, k1, panel);
    return;
  }
  for (uint32_t half = 0; half < 2; half++) {
    uint32_t from = first + 16 * half, left = last > from ? last - from : 0;
    pack(w, from, left < 16 ? left : 16, k0, k1, panel + 16 * half);
  }
}

/* ---- the product of a panel --------------------------------------------------------- */

AVX512_INLINE void tile_rows(const float *panel, uint32_t depth, const float *const *xs,
                             uint32_t rows, float *sums, int add) {
  __m512 low[ZMOE_TILE_ROWS], high[ZMOE_TILE_ROWS];
  for (uint32_t r = 0; r < rows; r++) {
    low[r] = add ? _mm512_loadu_ps(sums + r * ZMOE_PANEL) : _mm512_setzero_ps();
    high[r] = add ? _mm512_loadu_ps(sums + r * ZMOE_PANEL + 16) : _mm512_setzero_ps();
  }
  for (uint32_t k = 0; k < depth; k++) {
    __m512 a = _mm512_loadu_ps(panel + (size_t)k * ZMOE_PANEL);
    __m512 b = _mm512_loadu_ps(panel + (size_t)k * ZMOE_PANEL + 16);
    for (uint32_t r = 0; r < rows; r++) {
      __m512 x = _mm512_set1_ps(xs[r][k]);
      low[r] = _mm512_fmadd_ps(x, a, low[r]);
      high[r] = _mm512_fmadd_ps(x, b, high[r]);
    }
  }
  for (uint32_t r = 0; r < rows; r++) {
    _mm512_storeu_ps(sums + r * ZMOE_PANEL, low[r]);
    _mm512_storeu_ps(sums + r * ZMOE_PANEL + 16, high[r]);
  }
}

AVX512 void zmoe_avx512_tile(const float *panel, uint32_t depth, const float *const *xs,
                             uint32_t rows, float *sums, int add) {
  for (; rows >= 12; rows -= 12, xs += 12, sums += 12 * ZMOE_PANEL)
    tile_rows(panel, depth, xs, 12, sums, add);
  for (; rows >= 4; rows -= 4, xs += 4, sums += 4 * ZMOE_PANEL)
    tile_rows(panel, depth, xs, 4, sums, add);
  for (; rows >= 1; rows--, xs++, sums += ZMOE_PANEL)
    tile_rows(panel, depth, xs, 1, sums, add);
}
#endif
