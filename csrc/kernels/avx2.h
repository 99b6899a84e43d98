/* What the AVX2 kernels share: loads that never pass the end, and scales. */
#ifndef ZMOE_AVX2_H
#define ZMOE_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "../reduce_scalar.h"
#include "kernels.h"
#include "weight.h"

#define AVX2_FEATURES "avx2,fma,f16c"
#define AVX2 __attribute__((target(AVX2_FEATURES)))
#define AVX2_INLINE static inline __attribute__((always_inline, target(AVX2_FEATURES)))

AVX2_INLINE __m256i load_bytes32(const void *src) {
  return _mm256_loadu_si256((const __m256i *)src);
}

AVX2_INLINE __m128i load_bytes16(const void *src) {
  return _mm_loadu_si128((const __m128i *)src);
}

/* The `count` lowest of eight words, for a masked load. */
AVX2_INLINE __m256i lanes8(uint32_t count) {
  __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), numbers);
}

/* Eight words, those from `count` on zero and not touched. */
AVX2_INLINE __m256i load_words8(const unsigned char *src, uint32_t count) {
  if (count >= 8)
    return load_bytes32(src);
  return _mm256_maskload_epi32((const int *)(const void *)src, lanes8(count));
}

AVX2_INLINE __m256 widen_halves(__m128i halves, uint32_t dtype) {
  if (dtype == ZMOE_F16)
    return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* Eight floats from element i on. */
AVX2_INLINE __m256 load_floats(const unsigned char *src, size_t i, uint32_t dtype) {
  if (dtype == ZMOE_F32)
    return _mm256_loadu_ps((const float *)(const void *)(src + 4 * i));
  return widen_halves(load_bytes16(src + 2 * i), dtype);
}

/* The same, those from `count` on zero and not touched. */
AVX2_INLINE __m256 load_some_floats(const unsigned char *src, size_t i, uint32_t dtype,
                                    uint32_t count) {
  if (count >= 8)
    return load_floats(src, i, dtype);
  if (dtype == ZMOE_F32)
    return _mm256_castsi256_ps(load_words8(src + 4 * i, count));
  uint16_t halves[8] = {0};
  memcpy(halves, src + 2 * i, 2 * (size_t)count);
  return widen_halves(load_bytes16(halves), dtype);
}

/* Powers of two: the exponent of f32, but 0 is 2^-127 and 255 is NaN. */
AVX2_INLINE __m256 load_e8m0(const unsigned char *src, uint32_t count) {
  uint64_t bytes = 0;
  if (count >= 8)
    memcpy(&bytes, src, 8);
  else
    memcpy(&bytes, src, count);
  __m256i code = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
  __m256i zero = _mm256_cmpeq_epi32(code, _mm256_setzero_si256());
  __m256i nan = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(255));
  __m256i bits = _mm256_slli_epi32(code, 23);
  bits = _mm256_or_si256(bits, _mm256_and_si256(zero, _mm256_set1_epi32(0x400000)));
  bits = _mm256_or_si256(bits, _mm256_and_si256(nan, _mm256_set1_epi32(0x400000)));
  return _mm256_castsi256_ps(bits);
}

AVX2_INLINE float sum_lanes(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

void zmoe_avx2_pack(const zmoe_weight *w, uint32_t first, uint32_t last, uint32_t k0, uint32_t k1,
                    float *panel);
void zmoe_avx2_tile(const float *panel, uint32_t depth, const float *const *xs, uint32_t rows,
                    float *sums, int add);

#endif
