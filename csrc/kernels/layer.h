/* What the calls of decoder.h share. */
#ifndef ZMOE_LAYER_H
#define ZMOE_LAYER_H

#include "decoder.h"
#include "thread_pool.h"
#include "vector_ops.h"

/* Whether `norm` knows its kind and, unless it is none, has that width. */
int zmoe_norm_fits(const zmoe_norm *norm, uint32_t width);
/* One row of the norm's width. */
void zmoe_norm_row(const zmoe_vector_ops *ops, const zmoe_norm *norm, uint32_t width,
                   const float *x, void *out, zmoe_dtype out_dtype, zmoe_isa isa);
/* out (rows, width) of `out_dtype` = norm(x (rows, width)), of a norm that fits the width. */
void zmoe_norm_all(zmoe_thread_pool *pool, const zmoe_norm *norm, uint32_t width, const float *x,
                   uint32_t rows, void *out, zmoe_dtype out_dtype);
/* Whether a zmoe_linear call of that width finds its working memory: asked before
 * anything is written. */
int zmoe_linear_has_room(zmoe_thread_pool *pool, uint32_t in_features);

/* h (rows, width) += y, alike. */
void zmoe_add_rows(zmoe_thread_pool *pool, const float *y, uint32_t rows, uint32_t width, float *h);

/* Runs `fn` on the whole thread pool, or on the caller alone where there is too little
 * to share: waking helpers takes longer than a row. */
static inline void zmoe_run_rows(zmoe_thread_pool *pool, zmoe_thread_fn *fn, void *job,
                                 uint32_t rows) {
  if (rows > 1)
    zmoe_thread_pool_run(pool, fn, job);
  else
    fn(pool, job, 0);
}

#endif
