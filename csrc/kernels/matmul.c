/* The matmul of some rows with one panel of a weight. */
#include "matmul.h"

#include <string.h>

#include "common/reduce_scalar.h"
#include "weight.h"

static const zmoe_kernels *const VARIANTS[ZMOE_ISAS] = {
    [ZMOE_ISA_GENERIC] = &zmoe_kernels_generic,
#if defined(__x86_64__)
    [ZMOE_ISA_AVX2] = &zmoe_kernels_avx2,
#ifdef ZMOE_AVX_VNNI
    [ZMOE_ISA_AVX_VNNI] = &zmoe_kernels_avx_vnni,
#endif
    [ZMOE_ISA_AVX512] = &zmoe_kernels_avx512,
    [ZMOE_ISA_AVX512_VNNI] = &zmoe_kernels_avx512_vnni,
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

/* Of a weight that the kernels do not read: a part is decoded, and multiplied with all rows. */
static void dot_decoded(const zmoe_kernels *kernels, const zmoe_weight *w, const void *const *xs,
                        uint32_t rows, uint32_t first, uint32_t last, float *panel,
                        float *const *ys) {
  enum { OUTS = 4, DEPTH = ZMOE_PANEL_BYTES / 4 / OUTS };
  float sums[ZMOE_ROW_BLOCK][OUTS], *to[ZMOE_ROW_BLOCK];
  const void *from[ZMOE_ROW_BLOCK];
  for (uint32_t o = first; o < last; o += OUTS)
    for (uint32_t k = 0; k < w->in_features; k += DEPTH) {
      uint32_t outs = last - o < OUTS ? last - o : OUTS;
      uint32_t depth = w->in_features - k < DEPTH ? w->in_features - k : DEPTH;
      zmoe_weight part = {.data = panel, .out_features = outs, .in_features = depth};
      for (uint32_t i = 0; i < outs; i++)
        zmoe_decode_range(w, o + i, k, k + depth, panel + (size_t)i * depth);
      for (uint32_t r = 0; r < rows; r++) {
        from[r] = (const float *)xs[r] + k;
        to[r] = k == 0 ? ys[r] + (o - first) : sums[r];
      }
      kernels->dot(&part, ZMOE_LAYOUT_PLAIN, from, rows, 0, outs, NULL, to);
      for (uint32_t r = 0; r < rows && k > 0; r++)
        for (uint32_t i = 0; i < outs; i++)
          ys[r][o - first + i] += sums[r][i];
    }
}

/* Every row in the layout of its own, never in one that another row needs: its sums
 * must not depend on its neighbours. */
void zmoe_matmul(const zmoe_kernels *kernels, const zmoe_weight *w, const zmoe_rows *x,
                 uint32_t begin, uint32_t end, uint32_t first, uint32_t last, zmoe_scratch *scratch,
                 float *sums) {
  float *panel = (float *)(void *)scratch->panel;
  const void *packed[ZMOE_ROW_BLOCK], *plain[ZMOE_ROW_BLOCK];
  float *packed_ys[ZMOE_ROW_BLOCK], *plain_ys[ZMOE_ROW_BLOCK];
  uint32_t n_packed = 0, n_plain = 0;
  for (uint32_t r = begin; r < end; r++) {
    float *y = sums + (size_t)(r - begin) * ZMOE_PANEL;
    if (x->layout != ZMOE_LAYOUT_PLAIN && x->packed[r] != NULL) {
      packed_ys[n_packed] = y;
      packed[n_packed++] = x->packed[r];
    } else {
      plain_ys[n_plain] = y;
      plain[n_plain++] = x->plain[r];
    }
  }
  if (n_packed > 0)
    kernels->dot(w, x->layout, packed, n_packed, first, last, scratch, packed_ys);
  if (n_plain > 0 && zmoe_is_float(w) && kernels != &zmoe_kernels_generic)
    kernels->dot(w, ZMOE_LAYOUT_PLAIN, plain, n_plain, first, last, scratch, plain_ys);
  else if (n_plain > 0)
    dot_decoded(kernels, w, plain, n_plain, first, last, panel, plain_ys);
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
