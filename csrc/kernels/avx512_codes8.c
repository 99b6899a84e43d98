/* Matmuls of codes of 8 bits with x in f32, AVX-512. */
#if defined(__x86_64__)
#define VEC_AVX512
#include "common/vec.h"

#include "avx512.h"

KERNEL VEC load_some(const unsigned char *src, size_t i, uint32_t dtype, uint32_t count) {
  return load_floats(src, i, dtype, lanes16(count));
}

KERNEL void widen_bytes(const unsigned char *src, VEC values[2]) {
  for (int i = 0; i < 2; i++) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(src + 16 * i));
    values[i] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  }
}

#include "f32_body.h"

void zmoe_avx512_dot_codes8(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                            uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  dot_codes8(w, xs, rows, first, last, scratch, ys);
}

void zmoe_avx512_pack_chains(const float *x, uint32_t in_features, float *to) {
  pack_chains(x, in_features, to);
}
#endif
