/* GEMM, AVX2 with FMA. */
#if defined(__x86_64__)
#define VEC_AVX2
#include "common/vec.h"

#include "avx2.h"
#include "weight.h"

#define WORDS __m256i

KERNEL WORDS load_row(const unsigned char *src, uint32_t words) {
  return load_codes(src, words);
}

KERNEL void transpose(WORDS v[8]) {
  WORDS t[8];
  EACH(i, 4) {
    t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  EACH(i, 2) {
    v[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  EACH(i, 4) {
    WORDS low = v[i], high = v[i + 4];
    v[i] = _mm256_permute2x128_si256(low, high, 0x20);
    v[i + 4] = _mm256_permute2x128_si256(low, high, 0x31);
  }
}

KERNEL VEC half_of(WORDS words, uint32_t format, int high) {
  if (format == ZMOE_FORMAT_BF16)
    return _mm256_castsi256_ps(high ? _mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000))
                                    : _mm256_slli_epi32(words, 16));
  words = high ? _mm256_srli_epi32(words, 16) : _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
  __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
}

/* Of an fp4 code the low three bits choose the magnitude, the highest is the sign. */
KERNEL VEC value_of(WORDS words, uint32_t i, uint32_t bits, int affine) {
  __m256i code = _mm256_srli_epi32(words, (int)(i * bits));
  if (affine)
    return _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1)));
  VEC magnitude = _mm256_permutevar8x32_ps(_mm256_loadu_ps(zmoe_fp4_values), code);
  __m256i sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32(INT32_MIN));
  return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
}

#include "gemm_body.h"

void zmoe_avx2_pack_panel(const zmoe_weight *w, uint32_t first, uint32_t last, uint32_t k0,
                          uint32_t k1, float *panel) {
  gemm_pack(w, first, last, k0, k1, panel);
}

void zmoe_avx2_tile(const float *panel, uint32_t depth, const float *const *xs, uint32_t rows,
                    float *sums, int add) {
  gemm_tile(panel, depth, xs, rows, sums, add);
}
#endif
