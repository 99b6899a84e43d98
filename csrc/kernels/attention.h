/* Inside an attention step: some rows of its spans, between their projections and
 * what goes into the output projection.
 *
 * The work is cut into units, a few rows of one span by one head of keys, with all
 * the queries that share it.  A unit's keys are looked at in blocks, and their sums are
 * put together range by range, at borders fixed by position: the cut into units, and
 * whether one thread takes a unit or one of its ranges, changes nothing. */
#ifndef ZMOE_ATTENTION_H
#define ZMOE_ATTENTION_H

#include "layer.h"

enum {
  ZMOE_UNIT_VECTORS = 64,   /* queries of a unit: a block of keys is made f32 once for all */
  ZMOE_UNIT_ROWS = 32,      /* at most: two units' keys share no cache line of 16-bit elements */
  ZMOE_DIRECT_VECTORS = 8,  /* up to here f16 and 8 bits are used as they lie in the cache */
  ZMOE_RANGE_KEYS = 512,    /* of a range, the least that is worth a task of its own */
  ZMOE_SPLIT_RANGES = 256,  /* with more, a unit is one task */
  ZMOE_UNITS_PER_THREAD = 4 /* so many share the work well, and are not split */
};

/* Rows [first, first + rows) of the call, all of `span`. */
typedef struct zmoe_piece {
  const zmoe_span *span;
  uint32_t first, rows, position; /* of the first row */
} zmoe_piece;

typedef struct zmoe_attend {
  const zmoe_attention *attention;
  const zmoe_vector_ops *ops;
  zmoe_isa isa;
  zmoe_dtype dtype;
  const zmoe_kv_cache *cache;
  const float *cosines, *sines; /* by position */
  const zmoe_piece *pieces;
  uint32_t n_pieces, rows;
  float *qkv;         /* (rows, row_width): zmoe_queries_width, and what comes after that */
  unsigned char *out; /* out_dim elements of dtype of each head, `out_row` and `out_head` apart */
  size_t row_width, out_row, out_head;
  uint32_t out_dim;
  /* 1: a block has one head, (64, head_dim), which is the keys and the values of all */
  uint32_t is_latent;

  uint32_t group, padded; /* queries per head of keys; head_dim, to whole vectors */
  uint32_t vectors;       /* queries of the largest unit */
  size_t head_bytes;      /* of keys, or of values, in a block */
  float *own;             /* [thread]: see zmoe_attend_own_floats */
  size_t own_floats;
  uint32_t ranges; /* of each unit, where units are split; else 0 */
  float *sums;     /* [unit][range]: zmoe_sums of `vectors` */
  zmoe_tasks row_tasks, head_tasks, part_tasks, unit_tasks;
} zmoe_attend;

/* The sums of some vectors over some keys, and their softmaxes. */
typedef struct zmoe_sums {
  float *sums; /* [vector][padded] */
  zmoe_softmax *softmax;
} zmoe_sums;

static inline uint32_t zmoe_min(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}

/* From a head's query to the next one's: its gate lies between them. */
static inline size_t zmoe_query_stride(const zmoe_attention *a) {
  return (1 + (size_t)a->is_gated) * a->head_dim;
}

/* Of zmoe_attention's projections: of the queries with their gates, and of all. */
static inline size_t zmoe_queries_width(const zmoe_attention *a) {
  return a->heads * zmoe_query_stride(a);
}

static inline size_t zmoe_qkv_width(const zmoe_attention *a) {
  return zmoe_queries_width(a) + 2 * (size_t)a->kv_heads * a->head_dim;
}

/* Vector v of a piece is head `v % group` of row `v / group`. */
static inline float *zmoe_query(const zmoe_attend *job, const zmoe_piece *piece, uint32_t kv_head,
                                uint32_t v) {
  size_t at = (piece->first + v / job->group) * job->row_width;
  size_t head = (size_t)kv_head * job->group + v % job->group;
  return job->qkv + at + head * zmoe_query_stride(job->attention);
}

/* The first key of the window of the row at `position`: it sees all from there on, up to itself,
 * and the first `keep`. */
static inline uint32_t zmoe_window_begin(const zmoe_attention *a, uint32_t position) {
  return a->window != 0 && position >= a->window ? position + 1 - a->window + a->keep : 0;
}

/* A head's keys, or values, of the block that holds `key`. */
static inline unsigned char *zmoe_cached(const zmoe_attend *job, void *data, const zmoe_span *span,
                                         uint32_t kv_head, uint32_t key) {
  size_t block = span->blocks[key / ZMOE_KEY_BLOCK];
  if (!job->is_latent)
    block = block * job->attention->kv_heads + kv_head;
  return (unsigned char *)data + block * job->head_bytes;
}

/* The scales that follow such keys or values, by position; NULL where there are none. */
static inline float *zmoe_scales(const zmoe_attend *job, unsigned char *cached) {
  size_t codes = (size_t)ZMOE_KEY_BLOCK * job->attention->head_dim;
  return job->cache->bits == 0 ? NULL : (float *)(void *)(cached + codes);
}

/* Cuts rows [first, first + rows) of the spans into pieces, at most one per row; how many. */
uint32_t zmoe_attend_cut(const zmoe_attention *a, const zmoe_span *spans, uint32_t first,
                         uint32_t rows, zmoe_piece *pieces);
/* Sizes, by the pieces, and whether units are split into ranges, as where they are too few for
 * the threads; returns how many floats of `sums` that takes, 0 where it does not split. */
size_t zmoe_attend_plan(zmoe_attend *job, uint32_t threads);
size_t zmoe_attend_most_sums(const zmoe_attention *a); /* that it ever needs */
size_t zmoe_attend_own_floats(const zmoe_attention *a);

/* Takes its own memory of what zmoe_attend_bytes has said, and runs `fn` on all threads. */
void zmoe_attend_run(zmoe_thread_pool *pool, zmoe_attend *job, zmoe_thread_fn *fn);
size_t zmoe_attend_bytes(const zmoe_attention *a, size_t threads);
/* The work of all threads: heads made ready, keys and values written, attended. */
zmoe_thread_fn zmoe_attend_work;
/* The last part of it, where queries, keys and values are there. */
void zmoe_attend_sums(zmoe_thread_pool *pool, zmoe_attend *job, uint32_t thread);

/* ---- what kinds of attention share ------------------------------------------------------ */

/* Whether all spans lie in blocks of the cache; `rows` are those of all. */
int zmoe_spans_fit(const zmoe_span *spans, uint32_t n_spans, const zmoe_kv_cache *cache,
                   uint32_t *rows);
/* h (rows, width) += x (rows, in_features) of `dtype` * output^T, by way of y (rows, width). */
int zmoe_add_output(zmoe_thread_pool *pool, const zmoe_weight *output, const void *x,
                    zmoe_dtype dtype, uint32_t rows, float *y, float *h, zmoe_precision precision);

/* Sums over keys [key, key_end), within one range, from nothing.  `panels` are for a block of
 * keys and one of values in f32; `ahead` is the address of the keys that are wanted next, or 0. */
void zmoe_attend_keys(const zmoe_attend *job, const zmoe_piece *piece, uint32_t kv_head,
                      uint32_t key, uint32_t key_end, uintptr_t ahead, const zmoe_sums *to,
                      float *panels);

#endif
