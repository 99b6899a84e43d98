/* The matmul of some rows with one panel of a weight, by whichever way is faster. */
#include "matmul.h"

#include <string.h>

#include "common/reduce_scalar.h"
#include "weight.h"

static const zmoe_kernels *const VARIANTS[ZMOE_ISAS] = {
    [ZMOE_ISA_GENERIC] = &zmoe_kernels_generic,
#if defined(__x86_64__)
    [ZMOE_ISA_AVX2] = &zmoe_kernels_avx2,
    [ZMOE_ISA_AVX512] = &zmoe_kernels_avx512,
    [ZMOE_ISA_AVX512_BF16] = &zmoe_kernels_avx512_bf16,
#elif defined(__aarch64__)
    [ZMOE_ISA_NEON] = &zmoe_kernels_neon,
    [ZMOE_ISA_NEON_DOT] = &zmoe_kernels_neon_dot,
#ifdef ZMOE_NEON_BF16
    [ZMOE_ISA_NEON_BF16] = &zmoe_kernels_neon_bf16,
#endif
#endif
};

const zmoe_kernels *zmoe_kernels_for(zmoe_isa isa) {
  return ZMOE_VARIANT(VARIANTS, isa);
}

static void gemv(const zmoe_kernels *kernels, const zmoe_weight *w, const zmoe_rows *x,
                 uint32_t begin, uint32_t end, uint32_t first, uint32_t last, float *sums) {
  int plain = x->layout == ZMOE_LAYOUT_PLAIN;
  for (uint32_t r = begin; r < end; r += ZMOE_DOT_ROWS) {
    uint32_t rows = end - r < ZMOE_DOT_ROWS ? end - r : ZMOE_DOT_ROWS;
    const void *xs[ZMOE_DOT_ROWS];
    float *ys[ZMOE_DOT_ROWS];
    for (uint32_t i = 0; i < rows; i++) {
      xs[i] = plain ? (const void *)x->plain[r + i] : x->packed[r + i];
      ys[i] = sums + (size_t)(r + i - begin) * ZMOE_PANEL;
    }
    kernels->dot(w, x->layout, xs, rows, first, last, ys);
  }
}

static void gemm(const zmoe_kernels *kernels, const zmoe_weight *w, const zmoe_rows *x,
                 uint32_t begin, uint32_t end, uint32_t first, uint32_t last, float *panel,
                 float *sums) {
  for (uint32_t k = 0; k < w->in_features; k += ZMOE_DEPTH) {
    uint32_t k_end = w->in_features - k < ZMOE_DEPTH ? w->in_features : k + ZMOE_DEPTH;
    kernels->pack_panel(w, first, last, k, k_end, panel);
    for (uint32_t r = begin; r < end; r += ZMOE_TILE_ROWS) {
      uint32_t rows = end - r < ZMOE_TILE_ROWS ? end - r : ZMOE_TILE_ROWS;
      const float *xs[ZMOE_TILE_ROWS];
      for (uint32_t i = 0; i < rows; i++)
        xs[i] = x->plain[r + i] + k;
      kernels->tile(panel, k_end - k, xs, rows, sums + (size_t)(r - begin) * ZMOE_PANEL, k > 0);
    }
  }
}

void zmoe_matmul(const zmoe_kernels *kernels, const zmoe_weight *w, const zmoe_rows *x,
                 uint32_t begin, uint32_t end, uint32_t first, uint32_t last, float *panel,
                 float *sums) {
  if (end - begin <= zmoe_gemv_rows(x->layout))
    gemv(kernels, w, x, begin, end, first, last, sums);
  else
    gemm(kernels, w, x, begin, end, first, last, panel, sums);
}

void zmoe_add_bias(const zmoe_weight *w, uint32_t rows, uint32_t first, uint32_t last,
                   float *sums) {
  if (w->bias == NULL)
    return;
  float bias[ZMOE_PANEL];
  for (uint32_t o = first; o < last; o++)
    bias[o - first] = load_scalar(w->bias, o, (zmoe_dtype)w->bias_dtype);
  for (uint32_t r = 0; r < rows; r++)
    for (uint32_t o = 0; o < last - first; o++)
      sums[(size_t)r * ZMOE_PANEL + o] += bias[o];
}

int zmoe_is_plain(const void *x, zmoe_dtype dtype) {
  return dtype == ZMOE_F32 && (uintptr_t)x % sizeof(float) == 0;
}

const float *zmoe_plain_row(const void *x, zmoe_dtype dtype, uint32_t row, uint32_t in_features,
                            const float *copies) {
  return (zmoe_is_plain(x, dtype) ? (const float *)x : copies) + (size_t)row * in_features;
}

void zmoe_widen(const void *x, zmoe_dtype dtype, uint32_t row, uint32_t in_features, float *copies,
                zmoe_isa isa) {
  size_t at = (size_t)row * in_features;
  if (!zmoe_is_plain(x, dtype))
    (void)zmoe_convert(copies + at, ZMOE_F32,
                       (const unsigned char *)x + at * zmoe_dtype_bytes(dtype), dtype, in_features,
                       isa);
}

int zmoe_is_finite(const float *x, uint32_t count) {
  uint32_t found = 0;
  for (uint32_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    found |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !found;
}
