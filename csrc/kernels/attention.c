/* The attention of a decoder layer: norm, projections, heads, output, residual. */
#include "attention.h"

#include <string.h>

#include "decoder.h"

/* The memory of a call, for up to ZMOE_ROW_BLOCK rows at a time. */
struct memory {
  void *x;    /* (rows, width) of dtype: what the projections take */
  float *qkv; /* (rows, zmoe_qkv_width) */
  void *out;  /* (rows, heads, head_dim) of dtype: what the output projection takes */
  float *y;   /* (rows, width): what it gives */
  zmoe_piece *pieces;
};

/* ---- checks ------------------------------------------------------------------------ */

static int head_norm_fits(const zmoe_norm *norm, size_t head_dim, size_t heads) {
  return zmoe_norm_fits(norm, (uint32_t)head_dim) ||
         zmoe_norm_fits(norm, (uint32_t)(head_dim * heads));
}

static int shapes_fit(const zmoe_attention *a) {
  size_t out_features[] = {zmoe_queries_width(a), (size_t)a->kv_heads * a->head_dim,
                           (size_t)a->kv_heads * a->head_dim};
  uint32_t width = a->projections->in_features;
  if (a->n_projections == 1)
    out_features[0] = zmoe_qkv_width(a);
  for (uint32_t i = 0; i < a->n_projections; i++)
    if (zmoe_weight_check(&a->projections[i]) != ZMOE_OK ||
        a->projections[i].in_features != width || a->projections[i].out_features != out_features[i])
      return 0;
  return zmoe_weight_check(a->output) == ZMOE_OK && a->output->out_features == width &&
         a->output->in_features == (size_t)a->heads * a->head_dim &&
         zmoe_norm_fits(&a->input, width) &&
         head_norm_fits(&a->query_norm, a->head_dim, a->heads) &&
         head_norm_fits(&a->key_norm, a->head_dim, a->kv_heads);
}

static int is_known(const zmoe_attention *a) {
  return a->heads > 0 && a->kv_heads > 0 && a->heads % a->kv_heads == 0 && a->head_dim > 0 &&
         a->head_dim <= ZMOE_MAX_HEAD_DIM && a->heads <= ZMOE_MAX_COLUMNS &&
         a->rope_dims % 2 == 0 && a->rope_dims <= a->head_dim &&
         (a->n_projections == 1 || a->n_projections == 3) &&
         (a->is_gated == 0 || (a->is_gated == 1 && zmoe_norm_fits(&a->query_norm, a->head_dim))) &&
         (a->window == 0 ? a->keep == 0 : a->keep < a->window) &&
         zmoe_dtype_bytes((zmoe_dtype)a->dtype) != 0 && shapes_fit(a);
}

size_t zmoe_kv_head_bytes(uint32_t head_dim, zmoe_dtype dtype, uint32_t bits) {
  if (bits == 8)
    return ZMOE_KEY_BLOCK * (head_dim + sizeof(float));
  return bits == 0 ? ZMOE_KEY_BLOCK * head_dim * zmoe_dtype_bytes(dtype) : 0;
}

/* Whether all of a span's positions lie in blocks of the cache. */
static int span_fits(const zmoe_span *span, const zmoe_kv_cache *cache) {
  uint64_t end = (uint64_t)span->position + span->rows;
  if (end > (uint64_t)span->n_blocks * ZMOE_KEY_BLOCK)
    return 0;
  for (uint64_t i = 0; i * ZMOE_KEY_BLOCK < end; i++)
    if (span->blocks[i] >= cache->blocks)
      return 0;
  return 1;
}

int zmoe_spans_fit(const zmoe_span *spans, uint32_t n_spans, const zmoe_kv_cache *cache,
                   uint32_t *rows) {
  *rows = 0;
  for (uint32_t i = 0; i < n_spans; i++) {
    if (!span_fits(&spans[i], cache) || spans[i].rows > UINT32_MAX - *rows)
      return 0;
    *rows += spans[i].rows;
  }
  return 1;
}

static int check(const zmoe_attention *a, const zmoe_kv_cache *cache, const zmoe_span *spans,
                 uint32_t n_spans, const float *cosines, const float *sines, uint32_t *rows) {
  if (!is_known(a) || zmoe_kv_head_bytes(a->head_dim, (zmoe_dtype)a->dtype, cache->bits) == 0 ||
      (a->rope_dims > 0 && (cosines == NULL || sines == NULL)))
    return ZMOE_EINVAL;
  return zmoe_spans_fit(spans, n_spans, cache, rows) ? ZMOE_OK : ZMOE_EINVAL;
}

/* ---- memory ------------------------------------------------------------------------ */

static uint32_t widest(const zmoe_attention *a) {
  return a->output->in_features > a->output->out_features ? a->output->in_features
                                                          : a->output->out_features;
}

/* For the heads: what all threads have of their own, and sums of ranges. */
size_t zmoe_attend_bytes(const zmoe_attention *a, size_t threads) {
  return (threads * zmoe_attend_own_floats(a) + zmoe_attend_most_sums(a)) * sizeof(float) + 64;
}

/* Takes all that the call needs, or finds out that there is too little. */
static int take_memory(zmoe_thread_pool *pool, const zmoe_attention *a, uint32_t rows,
                       struct memory *m) {
  size_t item = zmoe_dtype_bytes((zmoe_dtype)a->dtype), n = zmoe_min(rows, ZMOE_ROW_BLOCK);
  m->x = zmoe_thread_pool_scratch(pool, n * a->output->out_features * item);
  m->qkv = zmoe_thread_pool_scratch(pool, n * zmoe_qkv_width(a) * sizeof *m->qkv);
  m->out = zmoe_thread_pool_scratch(pool, n * a->output->in_features * item);
  m->y = zmoe_thread_pool_scratch(pool, n * a->output->out_features * sizeof *m->y);
  m->pieces = zmoe_thread_pool_scratch(pool, n * sizeof *m->pieces);
  size_t mark = zmoe_thread_pool_mark(pool), threads = zmoe_thread_pool_threads(pool);
  const void *attend = zmoe_thread_pool_scratch(pool, zmoe_attend_bytes(a, threads));
  zmoe_thread_pool_release(pool, mark);
  int all = m->x != NULL && m->qkv != NULL && m->out != NULL && m->y != NULL && m->pieces != NULL;
  return all && attend != NULL && zmoe_linear_has_room(pool, widest(a)) ? ZMOE_OK : ZMOE_ENOMEM;
}

size_t zmoe_attention_scratch(const zmoe_attention *a, uint32_t threads) {
  size_t item = zmoe_dtype_bytes((zmoe_dtype)a->dtype);
  size_t row = a->output->out_features * (item + sizeof(float)) +
               zmoe_qkv_width(a) * sizeof(float) + a->output->in_features * item +
               sizeof(zmoe_piece);
  return ZMOE_ROW_BLOCK * row + zmoe_attend_bytes(a, threads) + 8 * 64 +
         zmoe_linear_scratch(widest(a));
}

/* ---- the parts of a step -------------------------------------------------------------- */

static int project(zmoe_thread_pool *pool, const zmoe_attention *a, const struct memory *m,
                   uint32_t rows, zmoe_precision precision) {
  const zmoe_weight *weights[3];
  void *ys[3];
  size_t strides[3], at = 0;
  for (uint32_t i = 0; i < a->n_projections; i++) {
    weights[i] = &a->projections[i];
    ys[i] = m->qkv + at;
    strides[i] = zmoe_qkv_width(a);
    at += a->projections[i].out_features;
  }
  return zmoe_linear(pool, weights, a->n_projections, m->x, (zmoe_dtype)a->dtype, rows, ys, strides,
                     ZMOE_F32, precision);
}

void zmoe_attend_run(zmoe_thread_pool *pool, zmoe_attend *job, zmoe_thread_fn *fn) {
  uint32_t threads = zmoe_thread_pool_threads(pool);
  size_t mark = zmoe_thread_pool_mark(pool), floats = zmoe_attend_plan(job, threads);
  job->own_floats = zmoe_attend_own_floats(job->attention);
  job->own = zmoe_thread_pool_scratch(pool, threads * job->own_floats * sizeof *job->own);
  job->sums = zmoe_thread_pool_scratch(pool, floats * sizeof *job->sums);
  zmoe_thread_pool_run(pool, fn, job);
  zmoe_thread_pool_release(pool, mark);
}

int zmoe_add_output(zmoe_thread_pool *pool, const zmoe_weight *output, const void *x,
                    zmoe_dtype dtype, uint32_t rows, float *y, float *h, zmoe_precision precision) {
  void *ys[] = {y};
  const size_t strides[] = {output->out_features};
  int status = zmoe_linear(pool, &output, 1, x, dtype, rows, ys, strides, ZMOE_F32, precision);
  if (status == ZMOE_OK)
    zmoe_add_rows(pool, y, rows, output->out_features, h);
  return status;
}

/* ---- the call ---------------------------------------------------------------------------- */

/* Rows [first, first + rows), at most ZMOE_ROW_BLOCK: each sees those before it in the cache. */
static int step_block(zmoe_thread_pool *pool, const zmoe_attention *a, zmoe_attend *job,
                      const zmoe_span *spans, uint32_t first, uint32_t rows, float *h,
                      const struct memory *m, zmoe_precision precision) {
  h += (size_t)first * a->output->out_features;
  zmoe_norm_all(pool, &a->input, a->output->out_features, h, rows, m->x, (zmoe_dtype)a->dtype);
  int status = project(pool, a, m, rows, precision);
  if (status != ZMOE_OK)
    return status;
  job->rows = rows;
  job->n_pieces = zmoe_attend_cut(a, spans, first, rows, m->pieces);
  zmoe_attend_run(pool, job, zmoe_attend_work);
  return zmoe_add_output(pool, a->output, m->out, (zmoe_dtype)a->dtype, rows, m->y, h, precision);
}

int zmoe_attention_step(zmoe_thread_pool *pool, const zmoe_attention *attention,
                        const zmoe_kv_cache *cache, const zmoe_span *spans, uint32_t n_spans,
                        const float *cosines, const float *sines, float *h,
                        zmoe_precision precision) {
  uint32_t rows;
  int status = check(attention, cache, spans, n_spans, cosines, sines, &rows);
  if (status != ZMOE_OK || rows == 0)
    return status;
  size_t mark = zmoe_thread_pool_mark(pool);
  struct memory memory;
  status = take_memory(pool, attention, rows, &memory);
  for (uint32_t first = 0; first < rows && status == ZMOE_OK; first += ZMOE_ROW_BLOCK) {
    zmoe_attend job = {.attention = attention,
                       .ops = zmoe_vector_ops_for(zmoe_thread_pool_isa(pool)),
                       .isa = zmoe_thread_pool_isa(pool),
                       .dtype = (zmoe_dtype)attention->dtype,
                       .cache = cache,
                       .cosines = cosines,
                       .sines = sines,
                       .pieces = memory.pieces,
                       .qkv = memory.qkv,
                       .row_width = zmoe_qkv_width(attention),
                       .out = memory.out,
                       .out_row = (size_t)attention->heads * attention->head_dim,
                       .out_head = attention->head_dim,
                       .out_dim = attention->head_dim};
    status = step_block(pool, attention, &job, spans, first, zmoe_min(rows - first, ZMOE_ROW_BLOCK),
                        h, &memory, precision);
  }
  zmoe_thread_pool_release(pool, mark);
  return status;
}
