/* Rows of x, ready for the kernels, and their matmul by a part of a weight. */
#ifndef ZMOE_MATMUL_H
#define ZMOE_MATMUL_H

#include "kernels.h"
#include "thread_pool.h"

enum { ZMOE_SUMS = ZMOE_ROW_BLOCK * ZMOE_PANEL }; /* floats that a matmul of one panel takes */

/* Rows as the kernels see them; a matmul may take any run of them. */
typedef struct zmoe_rows {
  const float **plain; /* [rows]: in f32, in order */
  void **packed;       /* [rows]: in `layout`; NULL for one that is not finite, which no
                        * layout but the plain one holds; unused when `layout` is plain */
  zmoe_layout layout;
} zmoe_rows;

/* sums[r][o - first] of rows [begin, end), at most ZMOE_ROW_BLOCK, and outputs
 * [first, last), at most ZMOE_PANEL. */
void zmoe_matmul(const zmoe_kernels *kernels, const zmoe_weight *w, const zmoe_rows *x,
                 uint32_t begin, uint32_t end, uint32_t first, uint32_t last, zmoe_scratch *scratch,
                 float *sums);
/* Adds w's own bias, if it has one, to `rows` rows of sums. */
void zmoe_add_bias(const zmoe_weight *w, uint32_t rows, uint32_t first, uint32_t last, float *sums);

/* Row `row` of x (rows, in_features) in f32: where it is if x is f32 and aligned, else in
 * `copies` (rows, in_features), once zmoe_widen has put it there. */
int zmoe_is_plain(const void *x, zmoe_dtype dtype);
const float *zmoe_plain_row(const void *x, zmoe_dtype dtype, uint32_t row, uint32_t in_features,
                            const float *copies);
void zmoe_widen(const void *x, zmoe_dtype dtype, uint32_t row, uint32_t in_features, float *copies,
                zmoe_isa isa);
int zmoe_is_finite(const float *x, uint32_t count);

static inline uint32_t zmoe_panels(uint32_t out_features) {
  return (out_features + ZMOE_PANEL - 1) / ZMOE_PANEL;
}

static inline uint32_t zmoe_panel_end(uint32_t first, uint32_t out_features) {
  return out_features - first < ZMOE_PANEL ? out_features : first + ZMOE_PANEL;
}

#endif
