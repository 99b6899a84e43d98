/* Loads with AVX2 that never pass the end.  Include after vec.h. */
#ifndef ZMOE_AVX2_H
#define ZMOE_AVX2_H

#include "kernels.h"

KERNEL __m256i load_bytes32(const void *src) {
  return _mm256_loadu_si256((const __m256i *)src);
}

/* Eight words, those from `count` on zero and not touched. */
KERNEL __m256i load_codes(const unsigned char *src, uint32_t count) {
  if (count >= 8)
    return load_bytes32(src);
  __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), numbers);
  return _mm256_maskload_epi32((const int *)(const void *)src, lanes);
}

/* Eight floats from element i on, those from `count` on zero and not touched. */
KERNEL VEC load_some(const unsigned char *src, size_t i, uint32_t dtype, uint32_t count) {
  if (count >= 8)
    return vec_load(src, i, (zmoe_dtype)dtype);
  if (dtype == ZMOE_F32)
    return _mm256_castsi256_ps(load_codes(src + 4 * i, count));
  unsigned char halves[16] = {0};
  memcpy(halves, src + 2 * i, 2 * (size_t)count);
  return vec_load(halves, 0, (zmoe_dtype)dtype);
}

/* Eight powers of two: the exponent of f32, but 0 is 2^-127 and 255 is NaN. */
KERNEL VEC load_e8m0(const unsigned char *src, uint32_t count) {
  uint64_t bytes = 0;
  if (count >= 8)
    memcpy(&bytes, src, 8);
  else
    memcpy(&bytes, src, count);
  __m256i code = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
  __m256i odd = _mm256_or_si256(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()),
                                _mm256_cmpeq_epi32(code, _mm256_set1_epi32(255)));
  odd = _mm256_and_si256(odd, _mm256_set1_epi32(0x400000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(code, 23), odd));
}

void zmoe_avx2_pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row);

#endif
