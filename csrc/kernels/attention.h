/* Inside an attention step: the rows of one block, between their projections and
 * what goes into the output projection.
 *
 * The work is cut into units, some rows of one head of keys and all the queries
 * that share it, and a unit into ranges of keys where there are too few units for
 * many threads.  The cuts depend on the shape alone, and each part is computed by
 * one thread in a fixed order, so the number of threads changes nothing. */
#ifndef ZMOE_ATTENTION_H
#define ZMOE_ATTENTION_H

#include "kernels.h"
#include "layer.h"

enum {
  ZMOE_UNIT_VECTORS = 128, /* queries of a unit: a block of keys is made f32 once for all */
  ZMOE_GEMV_VECTORS = 4,   /* up to here keys and values are used as they lie in the cache */
  ZMOE_RANGE_KEYS = 512,   /* the least that is worth a task of its own */
  ZMOE_PARTS = 32,         /* so many are enough for the threads */
  ZMOE_KEY_BLOCK = 64,     /* keys that are looked at at a time */
};

typedef struct zmoe_attend {
  const zmoe_attention *attention;
  const zmoe_vector_ops *ops;
  const zmoe_kernels *kernels;
  zmoe_isa isa;
  zmoe_dtype dtype;
  const zmoe_kv_cache *cache;
  const float *cosines, *sines; /* of the block's rows */
  uint32_t rows, position;      /* of the first row: keys before it */
  float *qkv;                   /* (rows, (heads + 2 kv_heads) * head_dim) */
  unsigned char *out;           /* (rows, heads * head_dim) of dtype */

  uint32_t group, unit_rows, row_units, ranges;
  int gemv;
  uint32_t padded;       /* head_dim, to whole panels */
  float *sums;           /* [part][vector of the unit][padded], in two layouts */
  zmoe_softmax *softmax; /* [part][vector of the unit] */
  float *panels;         /* [thread]: a block of keys and of values; unused for few vectors */
  size_t floats_per_thread;
  zmoe_tasks row_tasks, head_tasks, part_tasks, unit_tasks;
} zmoe_attend;

/* One unit and range: rows [first, end) of the block, keys [key, key_end). */
typedef struct zmoe_part {
  uint32_t kv_head, first, end, vectors;
  uint32_t key, key_end;
  float *sums;
  zmoe_softmax *softmax;
} zmoe_part;

static inline uint32_t zmoe_min(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}

static inline size_t zmoe_qkv_width(const zmoe_attention *a) {
  return ((size_t)a->heads + 2 * (size_t)a->kv_heads) * a->head_dim;
}

/* Vector v of a part is head `v % group` of row `v / group`. */
static inline const float *zmoe_query(const zmoe_attend *job, const zmoe_part *part, uint32_t v) {
  const zmoe_attention *a = job->attention;
  size_t head = (size_t)part->kv_head * job->group + v % job->group;
  return job->qkv + (part->first + v / job->group) * zmoe_qkv_width(a) + head * a->head_dim;
}

/* Which of the `count` keys from `key` on row `row` sees: [*from, *to). */
static inline void zmoe_visible(const zmoe_attend *job, uint32_t row, uint32_t key, uint32_t count,
                                uint32_t *from, uint32_t *to) {
  uint32_t end = job->position + row + 1, window = job->attention->window;
  uint32_t begin = window != 0 && end > window ? end - window : 0;
  *from = begin > key ? zmoe_min(begin - key, count) : 0;
  *to = end > key ? zmoe_min(end - key, count) : 0;
  if (*from > *to)
    *from = *to;
}

static inline zmoe_head_rows zmoe_cached(const zmoe_attend *job, const void *data, uint32_t kv_head,
                                         uint32_t key, uint32_t count) {
  uint32_t dim = job->attention->head_dim;
  size_t at = ((size_t)kv_head * job->cache->capacity + key) * dim * zmoe_dtype_bytes(job->dtype);
  return (zmoe_head_rows){(const unsigned char *)data + at, 0, job->dtype, dim, count};
}

/* How the block is cut, by its shape: units, ranges, layouts. */
void zmoe_attend_plan(zmoe_attend *job);
/* Sums of a unit's vectors and their softmaxes that any block may need. */
size_t zmoe_attend_vectors(const zmoe_attention *attention);
size_t zmoe_attend_panel_floats(const zmoe_attention *attention);

/* The work of all threads: heads made ready, keys and values appended, attended. */
zmoe_thread_fn zmoe_attend_work;

/* Where the keys are that this thread will probably look at after those before
 * `key`: of the same part, or of the one that is to be taken next; 0 for none. */
uintptr_t zmoe_attend_next(const zmoe_attend *job, const zmoe_part *part, uint32_t key);

/* The two ways through a part's keys. */
void zmoe_attend_gemv(const zmoe_attend *job, const zmoe_part *part);
void zmoe_attend_gemm(const zmoe_attend *job, const zmoe_part *part, float *panels);

#endif
