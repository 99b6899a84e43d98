/* Many rows, AVX2: weights into panels, and the product of panels. */
#if defined(__x86_64__)
#include "avx2.h"

/* ---- transposing ---------------------------------------------------------------- */

/* Eight registers of eight words, in place: word j of register i for word i of j. */
AVX2_INLINE void transpose8(__m256i v[8]) {
  __m256i t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    v[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    __m256i low = v[i], high = v[i + 4];
    v[i] = _mm256_permute2x128_si256(low, high, 0x20);
    v[i + 4] = _mm256_permute2x128_si256(low, high, 0x31);
  }
}

/* Words [word, word + 8) of eight outputs from `first` on, one register per
 * word; what lies beyond `outs` outputs or `words` words is zero. */
AVX2_INLINE void load_words(const zmoe_weight *w, uint32_t first, uint32_t outs, size_t word,
                            uint32_t words, __m256i v[8]) {
  size_t row_bytes = zmoe_weight_row_bytes(w);
  const unsigned char *data = (const unsigned char *)w->data + first * row_bytes + word * 4;
  for (uint32_t i = 0; i < 8; i++)
    v[i] = i < outs ? load_words8(data + i * row_bytes, words) : _mm256_setzero_si256();
  transpose8(v);
}

/* ---- formats ---------------------------------------------------------------------
 * Each packs eight outputs into a quarter of the panel. */

AVX2_INLINE void store_column(float *panel, uint32_t k, __m256 value) {
  _mm256_storeu_ps(panel + (size_t)k * ZMOE_PANEL, value);
}

AVX2 static void pack_f32(const zmoe_weight *w, uint32_t first, uint32_t outs, uint32_t k0,
                          uint32_t k1, float *panel) {
  __m256i v[8];
  for (uint32_t k = k0; k < k1; k += 8) {
    uint32_t words = k1 - k < 8 ? k1 - k : 8;
    load_words(w, first, outs, k, words, v);
    for (uint32_t j = 0; j < words; j++)
      store_column(panel, k - k0 + j, _mm256_castsi256_ps(v[j]));
  }
}

/* The low or, `high`, the high 16 bits of each word. */
AVX2_INLINE __m256 half_of(__m256i word, uint32_t format, int high) {
  if (format == ZMOE_FORMAT_BF16)
    return _mm256_castsi256_ps(high ? _mm256_and_si256(word, _mm256_set1_epi32((int)0xffff0000))
                                    : _mm256_slli_epi32(word, 16));
  word = high ? _mm256_srli_epi32(word, 16) : _mm256_and_si256(word, _mm256_set1_epi32(0xffff));
  __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(word, word), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
}

/* Two elements a word; rows of an odd length start in the middle of one, and
 * are left to the generic way. */
AVX2_INLINE void pack_halves(const zmoe_weight *w, uint32_t format, uint32_t first, uint32_t outs,
                             uint32_t k0, uint32_t k1, float *panel) {
  __m256i v[8];
  for (uint32_t k = k0; k < k1; k += 16) {
    uint32_t words = k1 - k < 16 ? (k1 - k) / 2 : 8;
    load_words(w, first, outs, k / 2, words, v);
    for (uint32_t j = 0; j < words; j++) {
      store_column(panel, k - k0 + 2 * j, half_of(v[j], format, 0));
      store_column(panel, k - k0 + 2 * j + 1, half_of(v[j], format, 1));
    }
  }
}

AVX2 static void pack_bf16(const zmoe_weight *w, uint32_t first, uint32_t outs, uint32_t k0,
                           uint32_t k1, float *panel) {
  pack_halves(w, ZMOE_FORMAT_BF16, first, outs, k0, k1, panel);
}

AVX2 static void pack_f16(const zmoe_weight *w, uint32_t first, uint32_t outs, uint32_t k0,
                          uint32_t k1, float *panel) {
  pack_halves(w, ZMOE_FORMAT_F16, first, outs, k0, k1, panel);
}

/* The scale and bias of eight outputs for one group. */
AVX2_INLINE void load_group(const zmoe_weight *w, uint32_t first, uint32_t outs, uint32_t group,
                            __m256 *scale, __m256 *bias) {
  float scales[8] = {0}, biases[8] = {0};
  for (uint32_t i = 0; i < outs; i++) {
    const unsigned char *at = zmoe_row_scales(w, first + i);
    if (w->format == ZMOE_FORMAT_AFFINE) {
      scales[i] = load_scalar(at, group, (zmoe_dtype)w->scale_dtype);
      biases[i] = load_scalar(zmoe_row_biases(w, first + i), group, (zmoe_dtype)w->scale_dtype);
    } else {
      scales[i] = _mm256_cvtss_f32(load_e8m0(at + group, 1));
    }
  }
  *scale = _mm256_loadu_ps(scales);
  *bias = _mm256_loadu_ps(biases);
}

/* Code i of each word as a float.  Of an fp4 code the low three bits choose
 * the magnitude, and the highest is the sign. */
AVX2_INLINE __m256 value_of(__m256i word, uint32_t i, uint32_t bits, int affine) {
  __m256i code = _mm256_srli_epi32(word, (int)(i * bits));
  if (affine)
    return _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1)));
  __m256 magnitude = _mm256_permutevar8x32_ps(_mm256_loadu_ps(zmoe_fp4_values), code);
  __m256i sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32(INT32_MIN));
  return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
}

AVX2_INLINE void pack_codes(const zmoe_weight *w, uint32_t bits, int affine, uint32_t first,
                            uint32_t outs, uint32_t k0, uint32_t k1, float *panel) {
  uint32_t per_word = 32 / bits, loaded = UINT32_MAX;
  __m256 scale = _mm256_setzero_ps(), bias = scale;
  __m256i v[8];
  for (uint32_t k = k0; k < k1; k += 8 * per_word) {
    uint32_t words = (k1 - k) / per_word < 8 ? (k1 - k) / per_word : 8;
    load_words(w, first, outs, k / per_word, words, v);
    for (uint32_t j = 0; j < words; j++) {
      uint32_t element = k + j * per_word;
      if (element / w->group != loaded) {
        loaded = element / w->group;
        load_group(w, first, outs, loaded, &scale, &bias);
      }
      for (uint32_t i = 0; i < per_word; i++)
        store_column(panel, element - k0 + i,
                     _mm256_fmadd_ps(value_of(v[j], i, bits, affine), scale, bias));
    }
  }
}

AVX2 static void pack_codes4(const zmoe_weight *w, uint32_t first, uint32_t outs, uint32_t k0,
                             uint32_t k1, float *panel) {
  pack_codes(w, 4, 1, first, outs, k0, k1, panel);
}

AVX2 static void pack_fp4(const zmoe_weight *w, uint32_t first, uint32_t outs, uint32_t k0,
                          uint32_t k1, float *panel) {
  pack_codes(w, 4, 0, first, outs, k0, k1, panel);
}

AVX2 static void pack_codes8(const zmoe_weight *w, uint32_t first, uint32_t outs, uint32_t k0,
                             uint32_t k1, float *panel) {
  pack_codes(w, 8, 1, first, outs, k0, k1, panel);
}

typedef void pack_quarter(const zmoe_weight *w, uint32_t first, uint32_t outs, uint32_t k0,
                          uint32_t k1, float *panel);

static pack_quarter *packer_of(const zmoe_weight *w) {
  int even = w->ins % 2 == 0;
  switch (w->format) {
  case ZMOE_FORMAT_F32:
    return pack_f32;
  case ZMOE_FORMAT_F16:
    return even ? pack_f16 : NULL;
  case ZMOE_FORMAT_BF16:
    return even ? pack_bf16 : NULL;
  case ZMOE_FORMAT_MXFP4:
    return pack_fp4;
  case ZMOE_FORMAT_AFFINE:
    if (w->bits == 4)
      return pack_codes4;
    return w->bits == 8 ? pack_codes8 : NULL;
  }
  return NULL;
}

void zmoe_avx2_pack(const zmoe_weight *w, uint32_t first, uint32_t last, uint32_t k0, uint32_t k1,
                    float *panel) {
  pack_quarter *pack = packer_of(w);
  if (pack == NULL) {
    zmoe_generic_pack(w, first, last, k0, k1, panel);
    return;
  }
  for (uint32_t at = 0; at < ZMOE_PANEL; at += 8) {
    uint32_t left = last > first + at ? last - first - at : 0;
    pack(w, first + at, left < 8 ? left : 8, k0, k1, panel + at);
  }
}

/* ---- the product of a panel --------------------------------------------------------- */

/* 16 outputs: two registers a row, so that six rows leave room for the panel. */
AVX2_INLINE void tile_rows(const float *panel, uint32_t depth, const float *const *xs,
                           const uint32_t rows, float *sums, int add) {
  __m256 low[6], high[6];
  for (uint32_t r = 0; r < rows; r++) {
    low[r] = add ? _mm256_loadu_ps(sums + r * ZMOE_PANEL) : _mm256_setzero_ps();
    high[r] = add ? _mm256_loadu_ps(sums + r * ZMOE_PANEL + 8) : _mm256_setzero_ps();
  }
  for (uint32_t k = 0; k < depth; k++) {
    __m256 a = _mm256_loadu_ps(panel + (size_t)k * ZMOE_PANEL);
    __m256 b = _mm256_loadu_ps(panel + (size_t)k * ZMOE_PANEL + 8);
    for (uint32_t r = 0; r < rows; r++) {
      __m256 x = _mm256_broadcast_ss(xs[r] + k);
      low[r] = _mm256_fmadd_ps(x, a, low[r]);
      high[r] = _mm256_fmadd_ps(x, b, high[r]);
    }
  }
  for (uint32_t r = 0; r < rows; r++) {
    _mm256_storeu_ps(sums + r * ZMOE_PANEL, low[r]);
    _mm256_storeu_ps(sums + r * ZMOE_PANEL + 8, high[r]);
  }
}

AVX2 static void tile_half(const float *panel, uint32_t depth, const float *const *xs,
                           uint32_t rows, float *sums, int add) {
  for (; rows >= 6; rows -= 6, xs += 6, sums += 6 * ZMOE_PANEL)
    tile_rows(panel, depth, xs, 6, sums, add);
  if (rows >= 4) {
    tile_rows(panel, depth, xs, 4, sums, add);
    rows -= 4, xs += 4, sums += 4 * ZMOE_PANEL;
  }
  if (rows >= 2) {
    tile_rows(panel, depth, xs, 2, sums, add);
    rows -= 2, xs += 2, sums += 2 * ZMOE_PANEL;
  }
  if (rows >= 1)
    tile_rows(panel, depth, xs, 1, sums, add);
}

void zmoe_avx2_tile(const float *panel, uint32_t depth, const float *const *xs, uint32_t rows,
                    float *sums, int add) {
  tile_half(panel, depth, xs, rows, sums, add);
  tile_half(panel + ZMOE_PANEL / 2, depth, xs, rows, sums + ZMOE_PANEL / 2, add);
}
#endif
