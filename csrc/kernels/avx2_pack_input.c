/* x in integers for the AVX2 kernels, whose units of 4-bit codes are whole blocks; see avx2.c. */
#if defined(__x86_64__)
#define VEC_AVX2
#include "common/vec.h"

#include "avx2.h"
#include "thread_pool.h"

KERNEL VEC load_f32(const float *x) {
  return _mm256_loadu_ps(x);
}

KERNEL void sum_groups(const float *x, uint32_t in_features, uint32_t group, float *sums) {
  const uint32_t groups = in_features / group;
  for (uint32_t g = 0; g < groups; g++, x += group) {
    VEC sum = load_f32(x);
    for (uint32_t k = LANES; k < group; k += LANES)
      sum += load_f32(x + k);
    sums[g] = vec_fold(sum);
  }
  for (uint32_t g = groups; g % 16 != 0; g++)
    sums[g] = 0;
}

KERNEL float largest_of(const float *x, uint32_t count) {
  VEC values[ZMOE_BLOCK / LANES];
  memcpy(values, x, count * sizeof *x);
  return f32_of_bits(vec_largest(values, count / LANES));
}

/* The integers nearest to 32 elements times `inverse`. */
KERNEL void quantise(const float *x, float inverse, __m256i v[4]) {
  EACH(i, 4)
    v[i] = _mm256_cvtps_epi32(load_f32(x + LANES * i) * vec_splat(inverse));
}

/* 32 integers of 8 bits, in order. */
KERNEL __m256i narrow(const __m256i v[4]) {
  __m256i a = _mm256_packs_epi32(v[0], v[1]), b = _mm256_packs_epi32(v[2], v[3]);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* A block as a unit's codes are: of the words of each register the even codes, then the odd. */
KERNEL void store_block(const __m256i block[4], int8_t *to) {
  const __m256i parities = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0,
                                            2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  __m256i v[4], stored[4];
  EACH(i, 4)
    v[i] = _mm256_shuffle_epi8(block[i], parities);
  __m256i a = _mm256_permute2x128_si256(v[0], v[1], 0x20),
          b = _mm256_permute2x128_si256(v[2], v[3], 0x20);
  stored[0] = _mm256_unpacklo_epi32(a, b);
  stored[1] = _mm256_unpackhi_epi32(a, b);
  a = _mm256_permute2x128_si256(v[0], v[1], 0x31);
  b = _mm256_permute2x128_si256(v[2], v[3], 0x31);
  stored[2] = _mm256_unpacklo_epi32(a, b);
  stored[3] = _mm256_unpackhi_epi32(a, b);
  memcpy(to, stored, sizeof stored);
}

/* ---- 8 bits ------------------------------------------------------------------------- */

/* 32 elements, the largest of which is 127, and their scale. */
KERNEL __m256i pack_32(const float *x, float *scale) {
  __m256i v[4];
  float largest = largest_of(x, 32);
  quantise(x, largest > 0x1p-100f ? 127.0f / largest : 0.0f, v);
  *scale = largest / 127.0f;
  return narrow(v);
}

KERNEL __m256i sums_of_4(__m256i codes) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

KERNEL void store_offsets(__m256i sums, int centre, int32_t *to) {
  sums = _mm256_mullo_epi32(sums, _mm256_set1_epi32(-centre));
  memcpy(to, &sums, sizeof sums);
}

/* The scales and offsets of the unit's eight lanes. */
KERNEL void pack_codes4_int8(const zmoe_weight *w, const float *x, zmoe_packed to, size_t first) {
  const int affine = w->format == ZMOE_FORMAT_AFFINE;
  int8_t *elements = (int8_t *)to.elements + first;
  __m256i v[4], sum = _mm256_setzero_si256();
  float scales[LANES] = {0};
  EACH(i, 4)
    v[i] = pack_32(x + 32 * i, scales + i);
  store_block(v, elements);
  EACH(i, 4)
    sum = _mm256_add_epi32(sum, sums_of_4(load_bytes32(elements + 32 * i)));
  store_offsets(sum, affine ? ZMOE_CENTRE4 : ZMOE_CENTRE_FP4, to.offsets + first / 16);
  VEC each = load_f32(scales) * vec_splat(affine ? 1.0f : 0.5f);
  each = _mm256_permutevar8x32_ps(each, _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3));
  memcpy(to.scales + first / 16, &each, sizeof each);
}

KERNEL void pack_codes8_int8(const float *x, zmoe_packed to, size_t first) {
  for (size_t k = first; k < first + ZMOE_BLOCK; k += 32, x += 32) {
    float scale;
    __m256i v = pack_32(x, &scale);
    VEC each = vec_splat(scale);
    memcpy((int8_t *)to.elements + k, &v, sizeof v);
    memcpy(to.scales + k / 4, &each, sizeof each);
    store_offsets(sums_of_4(v), ZMOE_CENTRE8, to.offsets + k / 4);
  }
}

/* ---- 22 bits ------------------------------------------------------------------------ */

/* v = low + 2^8 middle - 2^15 high; see pack_input.c. */
KERNEL void split_digits(const __m256i v[4], __m256i *high, __m256i *middle, __m256i *low) {
  __m256i digits[3][4];
  EACH(i, 4) {
    __m256i last = _mm256_srai_epi32(_mm256_slli_epi32(v[i], 24), 24);
    __m256i rest = _mm256_srai_epi32(_mm256_sub_epi32(v[i], last), 8);
    __m256i next = _mm256_srai_epi32(_mm256_slli_epi32(rest, 25), 25);
    digits[0][i] = _mm256_srai_epi32(_mm256_sub_epi32(next, rest), 7);
    digits[1][i] = next;
    digits[2][i] = last;
  }
  *high = narrow(digits[0]);
  *middle = narrow(digits[1]);
  *low = narrow(digits[2]);
}

KERNEL void pack_int22(zmoe_layout layout, const zmoe_weight *w, const float *x, zmoe_packed to,
                       size_t first) {
  __m256i v[ZMOE_BLOCK / LANES], planes[3][ZMOE_BLOCK / 32];
  for (uint32_t k = 0; k < ZMOE_BLOCK; k += w->group) {
    const size_t g = (first + k) / w->group;
    float inverse, scale = zmoe_scale_int22(largest_of(x + k, w->group), &inverse);
    __m256i sum = _mm256_setzero_si256();
    for (uint32_t i = k / LANES; i < (k + w->group) / LANES; i++) {
      v[i] = _mm256_cvtps_epi32(load_f32(x + LANES * i) * vec_splat(inverse));
      sum = _mm256_add_epi32(sum, v[i]);
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    if (first + k < w->in_features)
      zmoe_finish_int22(w, _mm_cvtsi128_si32(four), scale, g, to);
  }
  EACH(i, 4)
    split_digits(v + 4 * i, &planes[0][i], &planes[1][i], &planes[2][i]);
  EACH(i, 3) {
    int8_t *plane = (int8_t *)to.elements + 3 * first + i * ZMOE_BLOCK;
    if (layout == ZMOE_LAYOUT_CODES4_INT22)
      store_block(planes[i], plane);
    else
      memcpy(plane, planes[i], sizeof planes[i]);
  }
}

/* ---- which one ---------------------------------------------------------------------- */

KERNEL void pack_block(zmoe_layout layout, const zmoe_weight *w, const float *x, zmoe_packed to,
                       size_t first) {
  if (zmoe_layout_is_int22(layout))
    pack_int22(layout, w, x, to, first);
  else if (layout == ZMOE_LAYOUT_CODES4_INT8)
    pack_codes4_int8(w, x, to, first);
  else /* ZMOE_LAYOUT_CODES8_INT8 */
    pack_codes8_int8(x, to, first);
}

TARGET void zmoe_avx2_pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x,
                                 void *row) {
  zmoe_packed to = zmoe_packed_at(row, layout, w->in_features);
  sum_groups(x, w->in_features, w->group, to.sums);
  if (zmoe_layout_is_int22(layout)) /* beyond the last group, too */
    memset(to.scales, 0, (size_t)((unsigned char *)to.elements - (unsigned char *)to.scales));
  uint32_t k = 0;
  for (; k + ZMOE_BLOCK <= w->in_features; k += ZMOE_BLOCK)
    pack_block(layout, w, x + k, to, k);
  if (k < w->in_features) {
    float padded[ZMOE_BLOCK] = {0};
    memcpy(padded, x + k, (w->in_features - k) * sizeof *x);
    pack_block(layout, w, padded, to, k);
  }
}
#endif
