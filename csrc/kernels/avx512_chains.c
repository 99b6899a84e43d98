/* Matmuls of 8-bit codes and mxfp8 with x in f32, AVX-512. */
#if defined(__x86_64__)
#define VEC_AVX512
#include "common/vec.h"

#include "avx512.h"
#include "unpacking.h"

#define LOW_BITS

KERNEL VEC load_some(const unsigned char *src, size_t i, uint32_t dtype, uint32_t count) {
  return load_floats(src, i, dtype, lanes16(count));
}

KERNEL void widen_bytes(const unsigned char *src, VEC values[2]) {
  for (int i = 0; i < 2; i++) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(src + 16 * i));
    values[i] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  }
}

/* As f16, 2^-8 of the values, unless they are NaN. */
KERNEL __m256i halves_of_fp8(const unsigned char *src) {
  __m256i half = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)src));
  return _mm256_and_si256(_mm256_slli_epi16(half, 7), _mm256_set1_epi16((short)0xbf80));
}

KERNEL VEC small_fp8_at(const unsigned char *src) {
  return _mm512_cvtph_ps(halves_of_fp8(src));
}

KERNEL VEC fp8_at(const unsigned char *src) {
  const __m256i largest = _mm256_set1_epi16(0x3f80);
  __m256i half = halves_of_fp8(src);
  __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest);
  return _mm512_cvtph_ps(_mm256_or_si256(half, nan)) * vec_splat(256.0f);
}

#include "f32_body.h"

void zmoe_avx512_dot_chains(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                            uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  dot_chains(w, xs, rows, first, last, scratch, ys);
}

void zmoe_avx512_pack_chains(const float *x, uint32_t in_features, float *to) {
  pack_chains(x, in_features, to);
}
#endif
