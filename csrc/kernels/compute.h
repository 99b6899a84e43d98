/* zmoe: the large matmuls of a CPU node, and the vector operations between them.
 *
 * MLX builds the graph; on a CPU its matmuls are many times slower than the
 * memory, so they are done here.  Bottom up: thread pool (a node's threads), weight
 * (a matrix in the layout of its checkpoint, safetensors or MLX-quantised,
 * wherever it lies), linear and experts (all matmuls of one input, or of one
 * MoE layer, in one call), and the parts of a decoder layer in decoder.h.
 *
 * Return codes as in common/status.h.  Nothing is allocated after the *_create and
 * zmoe_thread_pool_reserve calls.  A row's result never depends on the number of threads, nor
 * on which other rows are in the call: not in a single bit.
 */
#ifndef ZMOE_COMPUTE_H
#define ZMOE_COMPUTE_H

#include "common/dtype.h"
#include "common/isa.h"
#include "common/reduce.h"
#include "common/status.h"

#define ZMOE_MAX_THREADS 256
#define ZMOE_MAX_WEIGHTS 8      /* of one zmoe_linear call */
#define ZMOE_MAX_COLUMNS 131072 /* of a weight */
#define ZMOE_ROW_BLOCK 128      /* rows of x that are worked on at a time */

/* ---- thread pool: the threads of a node, the caller being the first ---------------
 * One caller at a time.  A thread that waits, for the next call or within one,
 * spins for `spin_us`, then sleeps. */

typedef struct zmoe_thread_pool zmoe_thread_pool;

/* `cores[i]` is where thread i stays, -1 for anywhere; NULL pins none.  The
 * caller, thread 0, is never pinned. */
int zmoe_thread_pool_create(uint32_t threads, const int32_t *cores, uint32_t spin_us, zmoe_isa isa,
                            zmoe_thread_pool **out);
void zmoe_thread_pool_destroy(zmoe_thread_pool *pool);
/* Make room for calls that need up to `bytes` of working memory. */
int zmoe_thread_pool_reserve(zmoe_thread_pool *pool, size_t bytes);
/* Nanoseconds that the matmuls of this thread pool have taken, all told. */
uint64_t zmoe_thread_pool_matmul_ns(const zmoe_thread_pool *pool);

/* ---- weight: one matrix, (out_features, in_features), row-major ---------------------------- */

typedef enum zmoe_format {
  ZMOE_FORMAT_F32 = 0,
  ZMOE_FORMAT_F16 = 1,
  ZMOE_FORMAT_BF16 = 2,
  ZMOE_FORMAT_AFFINE = 3, /* MLX: w = q * scale + bias per group of a row */
  ZMOE_FORMAT_MXFP4 = 4,  /* e2m1, a power of two per group of 32 */
  ZMOE_FORMAT_NVFP4 = 5,  /* e2m1, an e4m3 per group of 16 */
  ZMOE_FORMAT_MXFP8 = 6,  /* e4m3, a power of two per group of 32 */
} zmoe_format;

typedef struct zmoe_weight {
  const void *data;   /* floats, or MLX's packed words; any alignment */
  const void *scales; /* (out_features, in_features / group): floats for affine, else bytes */
  const void *biases; /* affine: like scales */
  const void *bias;   /* (out_features), added to the matmul; or NULL */
  uint32_t out_features, in_features;
  uint32_t format;      /* zmoe_format */
  uint32_t bits, group; /* quantised formats; 0 otherwise */
  uint32_t scale_dtype; /* zmoe_dtype of an affine weight's scales and biases */
  uint32_t bias_dtype;  /* zmoe_dtype of bias */
} zmoe_weight;

/* ZMOE_OK, or ZMOE_EINVAL for a format, size or missing part that no kernel knows. */
int zmoe_weight_check(const zmoe_weight *weight);
/* Bytes of one row of data, and of one row of scales (0 where there are none). */
size_t zmoe_weight_row_bytes(const zmoe_weight *weight);
size_t zmoe_weight_scale_bytes(const zmoe_weight *weight);
/* Row `row` in f32, by plain C: what every kernel must agree with. */
int zmoe_weight_decode(const zmoe_weight *weight, uint32_t row, float *out);

/* ---- matmuls ---------------------------------------------------------------- */

typedef enum zmoe_precision {
  ZMOE_EXACT = 0, /* x as it is, f32 sums */
  ZMOE_INT8 = 1,  /* x in 8 bits per 32 elements where the weight is quantised */
} zmoe_precision;

/* ys[i] (rows, outs_i) = x (rows, in_features) * weights[i]^T + bias_i, rows of ys[i]
 * `strides[i]` elements apart.  All weights have the same `in_features`. */
int zmoe_linear(zmoe_thread_pool *pool, const zmoe_weight *const *weights, uint32_t n_weights,
                const void *x, zmoe_dtype x_dtype, uint32_t rows, void *const *ys,
                const size_t *strides, zmoe_dtype y_dtype, zmoe_precision precision);
/* Working memory that zmoe_linear needs for weights as wide as `in_features`. */
size_t zmoe_linear_scratch(uint32_t in_features);

typedef enum zmoe_activation {
  ZMOE_SILU = 0,           /* silu(gate) * up */
  ZMOE_GELU = 1,           /* gelu(gate) * up, erf */
  ZMOE_GELU_TANH = 2,      /* the same, tanh approximation */
  ZMOE_CLAMPED_SWIGLU = 3, /* gpt-oss: g * sigmoid(alpha g) * (u + 1), both clamped at limit */
  ZMOE_RELU2 = 4,          /* max(up, 0)^2, without gate */
  ZMOE_GELU_ONLY = 5,      /* gelu(up), erf, without gate */
  ZMOE_GELU_TANH_ONLY = 6,
} zmoe_activation;

/* A node's experts of one layer. */
typedef struct zmoe_expert_layer {
  const zmoe_weight *gate; /* [experts], NULL for activations without gate */
  const zmoe_weight *up;   /* [experts]: width -> hidden */
  const zmoe_weight *down; /* [experts]: hidden -> width */
  uint32_t experts;
  uint32_t activation; /* zmoe_activation */
  float alpha, limit;  /* of ZMOE_CLAMPED_SWIGLU */
} zmoe_expert_layer;

/* For each of `n_pairs` pairs (row of x, expert), ordered by row, the expert's
 * output; with pair_weights, out (rows, width) = per row the weighted sum in the
 * order of the experts' numbers, zeros for a row without; with pair_weights NULL, out
 * (n_pairs, width) = the outputs themselves. */
int zmoe_experts(zmoe_thread_pool *pool, const zmoe_expert_layer *layer, const void *x,
                 zmoe_dtype x_dtype, uint32_t rows, const int32_t *pair_rows,
                 const int32_t *pair_experts, const float *pair_weights, uint32_t n_pairs,
                 void *out, zmoe_dtype out_dtype, zmoe_precision precision);
/* out (n_pairs, out_features) = weights[expert] x[row] + bias: one matrix of experts alone. */
int zmoe_gather_linear(zmoe_thread_pool *pool, const zmoe_weight *weights, uint32_t n_experts,
                       const void *x, zmoe_dtype x_dtype, uint32_t rows, const int32_t *pair_rows,
                       const int32_t *pair_experts, uint32_t n_pairs, void *out,
                       zmoe_dtype out_dtype, zmoe_precision precision);
/* Working memory for the two calls above, for up to `pairs_per_row` pairs of any row. */
size_t zmoe_experts_scratch(uint32_t width, uint32_t hidden, uint32_t pairs_per_row);

#endif
