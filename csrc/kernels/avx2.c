/* AVX2, for now the generic kernels. */
#if defined(__x86_64__)
#include "kernels.h"
static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  (void)w, (void)x_dtype, (void)precision;
  return ZMOE_LAYOUT_PLAIN;
}
static void tile(const float *panel, uint32_t depth, const float *const *xs, uint32_t rows,
                 float *sums, int add) {
  zmoe_kernels_generic.tile(panel, depth, xs, rows, sums, add);
}
const zmoe_kernels zmoe_kernels_avx2 = {layout_for, zmoe_generic_arrange, zmoe_generic_dot,
                                        zmoe_generic_pack, tile};
#endif
