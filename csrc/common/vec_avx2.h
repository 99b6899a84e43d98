/* One vector of f32 in AVX2, FMA and F16C; see vec.h. */
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define KERNEL static inline __attribute__((always_inline)) TARGET
#define VEC __m256
#define LANES 8

KERNEL VEC vec_load(const unsigned char *src, size_t i, zmoe_dtype dtype) {
  if (dtype == ZMOE_F32)
    return _mm256_loadu_ps((const float *)(const void *)(src + 4 * i));
  __m128i half = _mm_loadu_si128((const __m128i *)(const void *)(src + 2 * i));
  if (dtype == ZMOE_F16)
    return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

KERNEL __m128i bf16_of_vec(VEC v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  bits = _mm256_srli_epi32(bits, 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  return _mm256_castsi256_si128(packed);
}

KERNEL void vec_store(unsigned char *dst, size_t i, zmoe_dtype dtype, VEC v) {
  VEC nan = _mm256_castsi256_ps(_mm256_set1_epi32((int)ZMOE_F32_NAN));
  v = _mm256_blendv_ps(v, nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  if (dtype == ZMOE_F32) {
    _mm256_storeu_ps((float *)(void *)(dst + 4 * i), v);
    return;
  }
  __m128i half = dtype == ZMOE_F16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : bf16_of_vec(v);
  _mm_storeu_si128((__m128i *)(void *)(dst + 2 * i), half);
}

KERNEL VEC vec_splat(float value) {
  return _mm256_set1_ps(value);
}

KERNEL VEC vec_fma(VEC a, VEC b, VEC c) {
  return _mm256_fmadd_ps(a, b, c);
}

KERNEL VEC vec_max(VEC a, VEC b) {
  return _mm256_max_ps(a, b);
}

KERNEL float vec_most(VEC v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

KERNEL void vec_load_pair(const unsigned char *src, VEC *even, VEC *odd) {
  __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)src);
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000u)));
}

KERNEL void vec_zip(VEC *even, VEC *odd) {
  VEC low = _mm256_unpacklo_ps(*even, *odd), high = _mm256_unpackhi_ps(*even, *odd);
  *even = _mm256_permute2f128_ps(low, high, 0x20);
  *odd = _mm256_permute2f128_ps(low, high, 0x31);
}

KERNEL void vec_unzip(VEC *low, VEC *high) {
  VEC outer = _mm256_permute2f128_ps(*low, *high, 0x20);
  VEC inner = _mm256_permute2f128_ps(*low, *high, 0x31);
  *low = _mm256_shuffle_ps(outer, inner, 0x88);
  *high = _mm256_shuffle_ps(outer, inner, 0xdd);
}

KERNEL float vec_fold(VEC v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

KERNEL VEC vec_load8(const unsigned char *src) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)src)));
}

KERNEL void vec_store8(unsigned char *dst, VEC v) {
  __m256i words = _mm256_cvtps_epi32(v);
  __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64((void *)dst, _mm_packs_epi16(halves, halves));
}

KERNEL uint32_t vec_largest(const VEC *v, size_t count) {
  __m256i most = _mm256_setzero_si256(), sign = _mm256_set1_epi32(0x7fffffff);
  for (size_t i = 0; i < count; i++)
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), sign));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return (uint32_t)_mm_cvtsi128_si32(four);
}
