/* Products in plain C: any format, any CPU. */
#include "kernels.h"

#include <string.h>

#include "weight.h"

enum { LANES = 16 };

/* ---- GEMV ------------------------------------------------------------------------- */

static float dot_plain(const float *restrict a, const float *restrict b, uint32_t count) {
  float lanes[LANES] = {0}, sum = 0;
  uint32_t k = 0;
  for (; k + LANES <= count; k += LANES)
    for (uint32_t l = 0; l < LANES; l++)
      lanes[l] += a[k + l] * b[k + l];
  for (; k < count; k++)
    sum += a[k] * b[k];
  for (uint32_t l = 0; l < LANES; l++)
    sum += lanes[l];
  return sum;
}

static void generic_dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs,
                        uint32_t rows, uint32_t first, uint32_t last, void *scratch,
                        float *const *ys) {
  (void)layout, (void)scratch; /* always plain, and w f32 */
  for (uint32_t o = first; o < last; o++)
    for (uint32_t r = 0; r < rows; r++)
      ys[r][o - first] = dot_plain((const float *)w->data + (size_t)o * w->in_features,
                                   (const float *)xs[r], w->in_features);
}

static zmoe_layout plain_layout(const zmoe_weight *w, zmoe_dtype x_dtype,
                                zmoe_precision precision) {
  (void)w, (void)x_dtype, (void)precision;
  return ZMOE_LAYOUT_PLAIN;
}

const zmoe_kernels zmoe_kernels_generic = {plain_layout, zmoe_generic_pack_input, generic_dot};
