/* The sum of partial outputs with AVX-512F.  Its bf16 instructions are not
 * used: they flush subnormals, which the other variants keep. */
#include "reduce_scalar.h"
#include "reduce_variants.h"

#ifdef ZMOE_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f")))
#define KERNEL static inline __attribute__((always_inline, target("avx512f")))
#define VEC __m512
#define LANES 16

KERNEL VEC vec_add(VEC a, VEC b) {
  return _mm512_add_ps(a, b);
}

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

#include "reduce_body.h"

TARGET size_t zmoe_reduce_avx512(unsigned char *out, zmoe_dtype out_dtype,
                                 const unsigned char *const *parts, uint32_t n_parts,
                                 zmoe_dtype part_dtype, size_t count) {
  return reduce_dispatch(out, out_dtype, parts, n_parts, part_dtype, count);
}
#endif
