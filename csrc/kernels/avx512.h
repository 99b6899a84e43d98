/* What the AVX-512 variants share: loads, scales, and the frame of a dot. */
#ifndef ZMOE_AVX512_H
#define ZMOE_AVX512_H

#include <immintrin.h>
#include <math.h>

#include "common/avx512_target.h"
#include "common/reduce_scalar.h"
#include "kernels.h"
#include "weight.h"

#define AVX512 __attribute__((target(AVX512_FEATURES)))
#define AVX512_INLINE static inline __attribute__((always_inline, target(AVX512_FEATURES)))

/* The `count` lowest lanes of 16. */
AVX512_INLINE __mmask16 lanes16(uint32_t count) {
  return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
}

/* 16 floats from element i on, those outside `lanes` zero. */
AVX512_INLINE __m512 load_floats(const unsigned char *src, size_t i, uint32_t dtype,
                                 __mmask16 lanes) {
  if (dtype == ZMOE_F32)
    return _mm512_maskz_loadu_ps(lanes, src + 4 * i);
  __m256i half = _mm256_maskz_loadu_epi16(lanes, src + 2 * i);
  if (dtype == ZMOE_F16)
    return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Powers of two, those from `count` on zero: the exponent of f32, but 0 is 2^-127 and 255 is NaN.
 */
AVX512_INLINE __m512 load_e8m0(const unsigned char *src, uint32_t count) {
  const __mmask16 lanes = lanes16(count);
  __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, src));
  __m512i bits = _mm512_slli_epi32(code, 23);
  __mmask16 zero = _mm512_mask_cmpeq_epi32_mask(lanes, code, _mm512_setzero_si512());
  bits = _mm512_mask_mov_epi32(bits, zero, _mm512_set1_epi32(0x400000));
  __mmask16 nan = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
}

/* The e4m3 numbers in the lowest 8 bits of each lane, whose other bits are zero.  Multiplying
 * brings the exponent to its place, and subnormal numbers with it. */
AVX512_INLINE __m512 f32_of_e4m3(__m512i code) {
  __m512i size = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
  __mmask16 nan = _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(0x7f));
  __m512 value =
      _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(size, 20)), _mm512_set1_ps(0x1p120f));
  __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(0x7f), code), 24);
  value = _mm512_or_ps(value, _mm512_castsi512_ps(sign));
  return _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(NAN));
}

/* What the codes of a weight stand for.  Affine ones have as many bits as their name says. */
#define CODES_INLINE static inline __attribute__((always_inline))
enum codes { CODES2 = 2, CODES3, CODES4, CODES5, CODES6, CODES8 = 8, FP4, NVFP4, FP8 };

CODES_INLINE int is_affine(const enum codes codes) {
  return codes <= CODES8;
}

CODES_INLINE uint32_t bits_of(const enum codes codes) {
  return is_affine(codes) ? (uint32_t)codes : codes == FP8 ? 8 : 4;
}

/* Bits that a code takes in the registers of a block of avx512_codes.h. */
CODES_INLINE uint32_t unpacked_bits(const enum codes codes) {
  return bits_of(codes) <= 4 ? 4 : 8;
}

static inline enum codes codes_of(const zmoe_weight *w) {
  if (w->format == ZMOE_FORMAT_AFFINE)
    return (enum codes)w->bits;
  return w->format == ZMOE_FORMAT_MXFP4 ? FP4 : w->format == ZMOE_FORMAT_NVFP4 ? NVFP4 : FP8;
}

/* The scales of 16 groups from group g on, of which `count` are there. */
AVX512_INLINE __m512 load_scales(const zmoe_weight *w, const enum codes codes,
                                 const unsigned char *scales, uint32_t g, uint32_t count) {
  if (is_affine(codes))
    return load_floats(scales, g, w->scale_dtype, lanes16(count));
  if (codes == NVFP4)
    return f32_of_e4m3(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes16(count), scales + g)));
  return load_e8m0(scales + g, count);
}

/* Of the 32 words in a block of avx512_codes.h, the one in a lane of its first register. */
static inline uint32_t lane_word(uint32_t lane) {
  return lane % 2 * 16 + lane / 4 * 4 + lane % 4 / 2;
}

/* ---- prefetching -------------------------------------------------------------------
 * The processor's own does not follow several outputs and their scales at a time.  Into
 * the second cache: a core waits for few lines of the first at once, by which a long way to
 * memory (230 ns beside busy neighbours) would allow a third of its speed. */

AVX512_INLINE void prefetch_line(const unsigned char *at) {
  _mm_prefetch((const char *)at, _MM_HINT_T1);
}

/* The scales and biases of output o, which may lie beyond the last. */
AVX512_INLINE void prefetch_scales(const zmoe_weight *w, size_t o, size_t scale_bytes) {
  prefetch_line((const unsigned char *)w->scales + o * scale_bytes);
  if (w->biases != NULL)
    prefetch_line((const unsigned char *)w->biases + o * scale_bytes);
}

/* ---- folding ---------------------------------------------------------------------------- */

/* The sum of the four quarters of a register. */
AVX512_INLINE __m128 add_quarters(__m512 v) {
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* The sums of the lanes of four registers at once. */
AVX512_INLINE __m128 reduce_4(const __m512 v[4]) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  __m512d low = _mm512_castps_pd(ab), high = _mm512_castps_pd(cd);
  return add_quarters(_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(low, high))));
}

/* `rows` x `n_out` sums, of which the first `there` of each row are there, into ys, from y on. */
AVX512_INLINE void store_sums(const uint32_t rows, const uint32_t n_out, uint32_t there,
                              __m512 sum[][ZMOE_DOT_ROWS], float *const *ys, uint32_t y) {
  const uint32_t n = rows * n_out;
  EACH(q, (n + 3) / 4) {
    __m512 four[4];
    float folded[4];
    EACH(i, 4) {
      const uint32_t at = 4 * q + i < n ? 4 * q + i : 0;
      four[i] = sum[at / n_out][at % n_out];
    }
    if (n_out == 4 && there == 4) {
      _mm_storeu_ps(ys[q] + y, reduce_4(four));
      continue;
    }
    _mm_storeu_ps(folded, reduce_4(four));
    for (uint32_t i = 0; i < 4 && 4 * q + i < n; i++)
      if ((4 * q + i) % n_out < there)
        ys[(4 * q + i) / n_out][y + (4 * q + i) % n_out] = folded[i];
  }
}

void zmoe_avx512_dot_chains(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                            uint32_t first, uint32_t last, void *scratch, float *const *ys);
void zmoe_avx512_pack_chains(const float *x, uint32_t in_features, float *to);
void zmoe_avx512_pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row);

#endif
