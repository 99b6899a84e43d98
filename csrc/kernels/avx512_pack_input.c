/* x in the layouts of the AVX-512 kernels: floats in the order of values in avx512_codes.h,
 * integers of 8 bits as avx512_vnni.c reads them. */
#if defined(__x86_64__)
#include "avx512.h"

#include <string.h>

#include "thread_pool.h"

#define BF16 __attribute__((target(AVX512_FEATURES ",avx512bf16")))
#define BF16_INLINE                                                                                \
  static inline __attribute__((always_inline, target(AVX512_FEATURES ",avx512bf16")))

BF16 static __m512 rounded(__m512 x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

/* Of bf16 the sums of what the elements are rounded to: the codes' centre multiplies them. */
AVX512 static void sum_groups(const float *x, uint32_t in_features, uint32_t group, int bf16,
                              float *sums) {
  uint32_t groups = in_features / group;
  for (uint32_t g = 0; g < groups; g++) {
    __m512 sum = _mm512_setzero_ps();
    for (uint32_t k = 0; k < group; k += 16) {
      __m512 part = _mm512_loadu_ps(x + (size_t)g * group + k);
      sum = _mm512_add_ps(sum, bf16 ? rounded(part) : part);
    }
    sums[g] = _mm512_reduce_add_ps(sum);
  }
  for (uint32_t g = groups; g % 16 != 0; g++)
    sums[g] = 0;
}

/* ---- one block of codes ------------------------------------------------------------- */

/* Codes that lie `code` after the first of each word: for a block's value registers. */
AVX512_INLINE __m512 gather(const float *x, uint32_t per_word, uint32_t code) {
  uint32_t first[16];
  for (uint32_t l = 0; l < 16; l++)
    first[l] = per_word * lane_word(l);
  return _mm512_i32gather_ps(_mm512_loadu_si512(first), x + code, 4);
}

/* 256 elements: code by code, of the words of both registers of a block. */
AVX512 static void block_codes4(const float *x, float *to) {
  for (uint32_t i = 0; i < 16; i++)
    _mm512_storeu_ps(to + 16 * i, gather(x, 8, i / 8 * 16 + i % 8));
}

BF16_INLINE __m512i round_32(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Codes i and i + 4 of a word are neighbours.  32 elements are four words; first codes 0 and 4 of
 * each, then 1 and 5, ...; words of both registers of a block take turns, and 128-bit parts of four
 * such registers are exchanged. */
BF16 static void block_codes4_bf16(const float *x, uint16_t *to) {
  const uint16_t order[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                              2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
  __m512i index = _mm512_loadu_si512(order), v[8], u[4];
  for (int i = 0; i < 8; i++)
    v[i] = _mm512_permutexvar_epi16(
        index, round_32(_mm512_loadu_ps(x + 32 * i), _mm512_loadu_ps(x + 32 * i + 16)));
  for (int half = 0; half < 2; half++, to += 128) {
    for (int i = 0; i < 4; i++)
      u[i] =
          half == 0 ? _mm512_unpacklo_epi32(v[i], v[i + 4]) : _mm512_unpackhi_epi32(v[i], v[i + 4]);
    __m512i low01 = _mm512_shuffle_i32x4(u[0], u[1], 0x44),
            low23 = _mm512_shuffle_i32x4(u[2], u[3], 0x44);
    __m512i high01 = _mm512_shuffle_i32x4(u[0], u[1], 0xee),
            high23 = _mm512_shuffle_i32x4(u[2], u[3], 0xee);
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + 32, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + 64, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + 96, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

BF16 static void block_bf16(const float *x, uint16_t *to) {
  for (int i = 0; i < 4; i++)
    _mm512_storeu_si512(to + 32 * i,
                        round_32(_mm512_loadu_ps(x + 32 * i), _mm512_loadu_ps(x + 32 * i + 16)));
}

/* Word i of each four of both registers of a block, in turns. */
BF16 static void block_codes8_bf16(const float *x, uint16_t *to) {
  uint16_t words[32][4];
  block_bf16(x, words[0]);
  for (uint32_t i = 0; i < 32; i++)
    memcpy(to + 4 * i, words[i % 2 * 16 + i / 2 % 4 * 4 + i / 8], sizeof words[0]);
}

/* ---- one block in 8 bits ------------------------------------------------------------- */

/* 32 elements as integers, and their scale. */
AVX512_INLINE __m256i integers_32(const float *x, float *scale) {
  __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  __m512 inverse = _mm512_set1_ps(largest > 0x1p-120f ? 127.0f / largest : 0.0f);
  *scale = largest / 127.0f;
  __m128i low = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)));
  __m128i high = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, inverse)));
  return _mm256_set_m128i(high, low);
}

/* The sum of all, in each lane. */
AVX512_INLINE __m128i sum_32(__m256i integers) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), integers);
  __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
  return _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1));
}

/* What avx512_vnni.c multiplies with a block of codes: of each 32 elements in 16 bytes the even
 * ones, or the first, and in as many, 64 bytes on, the others; four times their scale and offset.
 */
AVX512 static void block_int8(const zmoe_weight *w, const float *x, zmoe_packed to, size_t first) {
  const int affine = w->format == ZMOE_FORMAT_AFFINE;
  const __m128i centre = _mm_set1_epi32(!affine        ? -ZMOE_CENTRE_FP4
                                        : w->bits == 4 ? -ZMOE_CENTRE4
                                                       : -ZMOE_CENTRE8);
  __m128i *elements = (__m128i *)(void *)((int8_t *)to.elements + first);
  for (size_t i = 0; i < 4; i++) {
    const size_t lane = first / 8 + 4 * i;
    float scale;
    const __m256i integers = integers_32(x + 32 * i, &scale);
    __m128i parts[2] = {_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1)};
    if (w->bits == 4) {
      parts[0] = _mm256_cvtepi16_epi8(integers);
      parts[1] = _mm256_cvtepi16_epi8(_mm256_srli_epi16(integers, 8));
    }
    _mm_storeu_si128(elements + i, parts[0]);
    _mm_storeu_si128(elements + 4 + i, parts[1]);
    _mm_storeu_ps(to.scales + lane, _mm_set1_ps(affine ? scale : scale * 0.5f));
    _mm_storeu_si128((__m128i *)(void *)(to.offsets + lane),
                     _mm_mullo_epi32(sum_32(integers), centre));
  }
}

static void block(zmoe_layout layout, const zmoe_weight *w, const float *x, zmoe_packed to,
                  size_t first) {
  void *elements = to.elements;
  switch (layout) {
  case ZMOE_LAYOUT_CODES4_INT8:
  case ZMOE_LAYOUT_CODES8_INT8:
    block_int8(w, x, to, first);
    return;
  case ZMOE_LAYOUT_CODES8_BF16:
    block_codes8_bf16(x, (uint16_t *)elements + first);
    return;
  case ZMOE_LAYOUT_CODES4:
    block_codes4(x, (float *)elements + first);
    return;
  case ZMOE_LAYOUT_CODES4_BF16:
    block_codes4_bf16(x, (uint16_t *)elements + first);
    return;
  default: /* ZMOE_LAYOUT_BF16 */
    block_bf16(x, (uint16_t *)elements + first);
  }
}

void zmoe_avx512_pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  zmoe_packed to = zmoe_packed_at(row, layout, w->in_features);
  if (zmoe_layout_is_int22(layout)) {
    zmoe_kernels_avx2.pack_input(layout, w, x, row);
    return;
  }
  if (layout == ZMOE_LAYOUT_CHAINS) {
    zmoe_avx512_pack_chains(x, w->in_features, to.elements);
    return;
  }
  if (w->group != 0)
    sum_groups(x, w->in_features, w->group,
               layout == ZMOE_LAYOUT_CODES4_BF16 || layout == ZMOE_LAYOUT_CODES8_BF16, to.sums);
  const uint32_t step = layout == ZMOE_LAYOUT_CODES4 || layout == ZMOE_LAYOUT_CODES4_BF16
                            ? 2 * ZMOE_BLOCK
                            : ZMOE_BLOCK;
  uint32_t k = 0;
  for (; k + step <= w->in_features; k += step)
    block(layout, w, x + k, to, k);
  if (k < w->in_features) {
    float padded[2 * ZMOE_BLOCK] = {0};
    memcpy(padded, x + k, (w->in_features - k) * sizeof *x);
    block(layout, w, padded, to, k);
  }
}
#endif
