/* One vector of f32 in AVX-512; see vec.h.  Its bf16 instructions are not used:
 * they flush subnormals, which the other variants keep. */
#include <immintrin.h>

#include "avx512_target.h"

#define TARGET AVX512_WIDE
#define KERNEL static inline __attribute__((always_inline)) TARGET
#define VEC __m512
#define LANES 16

KERNEL VEC vec_load(const unsigned char *src, size_t i, zmoe_dtype dtype) {
  if (dtype == ZMOE_F32)
    return _mm512_loadu_ps(src + 4 * i);
  __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)(src + 2 * i));
  if (dtype == ZMOE_F16)
    return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

KERNEL __m256i bf16_of_vec(VEC v) {
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

KERNEL void vec_store(unsigned char *dst, size_t i, zmoe_dtype dtype, VEC v) {
  VEC nan = _mm512_castsi512_ps(_mm512_set1_epi32((int)ZMOE_F32_NAN));
  v = _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
  if (dtype == ZMOE_F32) {
    _mm512_storeu_ps(dst + 4 * i, v);
    return;
  }
  __m256i half = dtype == ZMOE_F16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : bf16_of_vec(v);
  _mm256_storeu_si256((__m256i *)(void *)(dst + 2 * i), half);
}

KERNEL VEC vec_splat(float value) {
  return _mm512_set1_ps(value);
}

KERNEL VEC vec_fma(VEC a, VEC b, VEC c) {
  return _mm512_fmadd_ps(a, b, c);
}

KERNEL VEC vec_max(VEC a, VEC b) {
  return _mm512_max_ps(a, b);
}

KERNEL float vec_most(VEC v) {
  return _mm512_reduce_max_ps(v);
}

KERNEL void vec_load_pair(const unsigned char *src, VEC *even, VEC *odd) {
  __m512i both = _mm512_loadu_si512(src);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000u)));
}

KERNEL void vec_zip(VEC *even, VEC *odd) {
  __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  VEC a = *even, b = *odd;
  *even = _mm512_permutex2var_ps(a, low, b);
  *odd = _mm512_permutex2var_ps(a, high, b);
}

KERNEL void vec_unzip(VEC *low, VEC *high) {
  __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  VEC a = *low, b = *high;
  *low = _mm512_permutex2var_ps(a, even, b);
  *high = _mm512_permutex2var_ps(a, odd, b);
}

KERNEL float vec_fold(VEC v) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

KERNEL VEC vec_load8(const unsigned char *src) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)src)));
}

KERNEL void vec_store8(unsigned char *dst, VEC v) {
  _mm_storeu_si128((void *)dst, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

KERNEL uint32_t vec_largest(const VEC *v, size_t count) {
  __m512i most = _mm512_setzero_si512(), sign = _mm512_set1_epi32(0x7fffffff);
  for (size_t i = 0; i < count; i++)
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(v[i]), sign));
  return (uint32_t)_mm512_reduce_max_epi32(most);
}
