/* One call for the experts of a layer, between its planning (experts.c) and its
 * work (experts_work.c). */
#ifndef ZMOE_EXPERTS_H
#define ZMOE_EXPERTS_H

#include "matmul.h"
#include "thread_pool.h"
#include "vector_ops.h"

/* The pairs of one expert: [begin, end) of the sorted ones. */
struct zmoe_group {
  uint32_t expert, begin, end;
};

struct zmoe_experts_own {
  zmoe_scratch scratch;
  float up[ZMOE_SUMS], gate[ZMOE_SUMS], total[ZMOE_SUMS];
};
_Static_assert(sizeof(struct zmoe_experts_own) <= ZMOE_THREAD_SCRATCH, "a pool reserves as much");

struct zmoe_experts_job {
  const zmoe_kernels *kernels;
  const zmoe_vector_ops *ops;
  zmoe_isa isa;
  const zmoe_expert_layer *layer;
  zmoe_precision precision;
  const void *x;
  zmoe_dtype x_dtype, out_dtype;
  uint32_t threads, rows, n_pairs, n_groups;
  uint32_t width, hidden;
  const int32_t *pair_rows;
  const float *pair_weights;
  uint32_t first_pair, first_row; /* of this block */
  uint32_t *order;                /* [n_pairs]: pairs by expert, then as given */
  struct zmoe_group *groups;
  void **x_packed; /* [rows] */
  float *copies;
  zmoe_rows in, mid; /* [n_pairs], sorted: x of each pair; its activation */
  float *activations;
  struct zmoe_experts_own *own; /* [threads] */
  void *out;
  zmoe_tasks take_tasks, up_tasks, mid_tasks, down_tasks;
};

/* Gate, up, activation, down, weighted and summed; or `up` alone, stored as it is. */
zmoe_thread_fn zmoe_experts_work, zmoe_gather_work;

#endif
