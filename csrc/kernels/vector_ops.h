/* Vector operations of a decoder layer, once per instruction set: on one row,
 * one head, some queries and a block of keys, or the outputs of an expert's matmul.
 *
 * They give the same bits everywhere: elements are rounded one by one, and a sum
 * has 16 lanes (element i in lane i % 16), added by halves, then what fills no lanes.
 * `score` and `add_values` sum in order by fused multiply-adds, which a CPU without
 * them (plain x86-64) rounds twice. */
#ifndef ZMOE_VECTOR_OPS_H
#define ZMOE_VECTOR_OPS_H

#include <float.h>

#include "decoder.h"

enum { ZMOE_SUM_LANES = 16, ZMOE_QUERIES = 8 };

/* A softmax that sees its scores block by block. */
typedef struct zmoe_softmax {
  float max, sum; /* of the scores so far; of exp(score - max) */
} zmoe_softmax;

/* The lowest number, not minus infinity: differences to it are never NaN. */
static inline zmoe_softmax zmoe_softmax_empty(void) {
  return (zmoe_softmax){-FLT_MAX, 0.0f};
}

#define ZMOE_CODES 4 /* stands for the dtype of integers of 8 bits, taken as they are */

/* A block of keys or of values of one head, `count` of which are looked at. */
typedef struct zmoe_head_block {
  const unsigned char *data;
  uintptr_t ahead; /* address of a block that will be wanted next, 0 for none */
  uint32_t dtype;  /* zmoe_dtype, or ZMOE_CODES */
  uint32_t dim, count;
  uint32_t stride; /* of values: elements from one to the next, `dim` of which are summed */
} zmoe_head_block;

/* A head's block is too short for the processor to guess what comes after it.  Into the second
 * level of its caches: a core has more reads of the memory in flight from there. */
static inline void zmoe_prefetch_range(uintptr_t address, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64)
    __builtin_prefetch((const void *)(address + i), 0, 2);
}

typedef struct zmoe_vector_ops {
  /* One row; `out` may be x itself. Any kind but ZMOE_NORM_NONE. */
  void (*norm)(const zmoe_norm *norm, const float *x, void *out, zmoe_dtype out_dtype);
  void (*clip)(float *x, uint32_t count, float limit);
  /* The first `dims` elements of a head by their angles. */
  void (*rotate)(float *x, const float *cosines, const float *sines, uint32_t dims,
                 uint32_t traditional);
  /* scores[i * ZMOE_KEY_BLOCK + j] = queries[i] . keys[:, j], keys (dim, ZMOE_KEY_BLOCK), i < n,
   * which is 1, 2, 4 or ZMOE_QUERIES; j < count rounded up to ZMOE_SUM_LANES */
  void (*score)(const float *const *queries, uint32_t n, const zmoe_head_block *keys,
                float *scores);
  /* scores[j] = exp(scores[j] - max), taken into `state`; what was made with its
   * earlier max is to be multiplied with the result: 1 for no scores. */
  float (*soften)(float *scores, uint32_t count, zmoe_softmax *state);
  /* sums[i * sum_stride + d] = sums[...] * corrections[i] + sum over j < count of
   * weights[i * ZMOE_KEY_BLOCK + j] * values[j][d], values (count, stride); d < dim; n as above */
  void (*add_values)(const float *weights, uint32_t n, const float *corrections,
                     const zmoe_head_block *values, float *sums, size_t sum_stride);
  /* out[i] = codes[i], integers of 8 bits, i < count rounded up to ZMOE_SUM_LANES */
  void (*widen)(const unsigned char *codes, size_t count, float *out);
  /* keys (dim, ZMOE_KEY_BLOCK) in f32 of the first `count` rows of `rows` (count, dim) */
  void (*turn)(const unsigned char *rows, zmoe_dtype dtype, uint32_t count, uint32_t dim,
               float *keys);
  /* x[i] = 1 / (1 + exp(-x[i])) */
  void (*sigmoid)(float *x, uint32_t count);
  /* A row of a delta net's state, `to` = decay * `from` + key * beta * (value - what the decayed
   * row has at the key); returns what it then has at the query. `to` may be `from`. */
  float (*delta)(const float *from, float *to, const float *key, const float *query, uint32_t dim,
                 float decay, float value, float beta);
  /* out[i] = activation(gate[i], up[i]); `gate` is unused where the activation has none. */
  void (*activate)(const zmoe_expert_layer *layer, const float *gate, const float *up,
                   uint32_t count, float *out);
} zmoe_vector_ops;

const zmoe_vector_ops *zmoe_vector_ops_for(zmoe_isa isa);

extern const zmoe_vector_ops zmoe_vector_ops_generic; /* NEON on Arm */
#if defined(__x86_64__)
extern const zmoe_vector_ops zmoe_vector_ops_avx2;
extern const zmoe_vector_ops zmoe_vector_ops_avx512;
#endif

#endif
