/* The stages of an attention step between its two matmuls. */
#include "attention.h"

#include <string.h>

#include "matmul.h"

/* ---- the cuts --------------------------------------------------------------------- */

static uint32_t unit_vectors(const zmoe_attention *a) {
  uint32_t group = a->heads / a->kv_heads;
  return group > ZMOE_UNIT_VECTORS ? group : ZMOE_UNIT_VECTORS / group * group;
}

size_t zmoe_attend_vectors(const zmoe_attention *a) {
  uint32_t unit_rows = unit_vectors(a) / (a->heads / a->kv_heads);
  size_t all = zmoe_round_up(ZMOE_ROW_BLOCK, unit_rows) * a->heads;
  size_t in_ranges = (size_t)ZMOE_PARTS * unit_vectors(a);
  return all > in_ranges ? all : in_ranges;
}

void zmoe_attend_plan(zmoe_attend *job) {
  const zmoe_attention *a = job->attention;
  job->group = a->heads / a->kv_heads;
  job->unit_rows = unit_vectors(a) / job->group;
  if (job->unit_rows > job->rows)
    job->unit_rows = job->rows;
  job->row_units = (job->rows + job->unit_rows - 1) / job->unit_rows;
  uint32_t from, to, keys = job->position + job->rows;
  zmoe_visible(job, 0, 0, keys, &from, &to);
  job->ranges =
      zmoe_min((keys - from) / ZMOE_RANGE_KEYS, ZMOE_PARTS / a->kv_heads / job->row_units);
  if (job->ranges == 0)
    job->ranges = 1;
  job->gemv = job->unit_rows * job->group <= ZMOE_GEMV_VECTORS;
  job->padded = (uint32_t)zmoe_round_up(a->head_dim, ZMOE_PANEL);
}

static uint32_t parts_of(const zmoe_attend *job) {
  return job->row_units * job->attention->kv_heads * job->ranges;
}

static zmoe_part part_at(const zmoe_attend *job, uint32_t index) {
  uint32_t unit = index / job->ranges, range = index % job->ranges;
  uint32_t kv_heads = job->attention->kv_heads, from, to;
  zmoe_part part = {.kv_head = unit % kv_heads, .first = unit / kv_heads * job->unit_rows};
  part.end = zmoe_min(part.first + job->unit_rows, job->rows);
  part.vectors = (part.end - part.first) * job->group;
  uint32_t keys = job->position + part.end; /* what its last row sees, and its first from `from` */
  zmoe_visible(job, part.first, 0, keys, &from, &to);
  uint32_t size = (keys - from + job->ranges - 1) / job->ranges;
  part.key = zmoe_min(from + range * size, keys);
  part.key_end = zmoe_min(part.key + size, keys);
  size_t vector = (size_t)index * job->unit_rows * job->group;
  part.sums = job->sums + vector * job->padded;
  part.softmax = job->softmax + vector;
  return part;
}

uintptr_t zmoe_attend_next(const zmoe_attend *job, const zmoe_part *part, uint32_t key) {
  const void *keys = job->cache->keys;
  if (key < part->key_end)
    return (uintptr_t)zmoe_cached(job, keys, part->kv_head, key, 0).data;
  uint32_t index = atomic_load_explicit(&job->part_tasks.next, memory_order_relaxed);
  if (index >= parts_of(job))
    return 0;
  zmoe_part next = part_at(job, index);
  return (uintptr_t)zmoe_cached(job, keys, next.kv_head, next.key, 0).data;
}

/* ---- heads, ready for the scores ----------------------------------------------------- */

static int is_per_head(const zmoe_norm *norm, uint32_t head_dim) {
  return norm->kind != ZMOE_NORM_NONE && norm->width == head_dim;
}

static int is_whole(const zmoe_norm *norm, uint32_t head_dim) {
  return norm->kind != ZMOE_NORM_NONE && norm->width != head_dim;
}

/* What concerns all heads of a row together. */
static void prepare_rows(zmoe_attend *job) {
  const zmoe_attention *a = job->attention;
  size_t width = zmoe_qkv_width(a);
  for (uint32_t r; (r = zmoe_take(&job->row_tasks)) < job->rows;) {
    float *row = job->qkv + r * width, *keys = row + (size_t)a->heads * a->head_dim;
    if (a->clip > 0.0f)
      job->ops->clip(row, (uint32_t)width, a->clip);
    if (is_whole(&a->query_norm, a->head_dim))
      job->ops->norm(&a->query_norm, row, row, ZMOE_F32);
    if (is_whole(&a->key_norm, a->head_dim))
      job->ops->norm(&a->key_norm, keys, keys, ZMOE_F32);
  }
}

static void prepare_head(const zmoe_attend *job, const zmoe_norm *norm, uint32_t row, float *head) {
  const zmoe_attention *a = job->attention;
  size_t at = (size_t)row * (a->rope_dims / 2);
  if (is_per_head(norm, a->head_dim))
    job->ops->norm(norm, head, head, ZMOE_F32);
  if (a->rope_dims > 0)
    job->ops->rotate(head, job->cosines + at, job->sines + at, a->rope_dims, a->rope_traditional);
}

static void append(const zmoe_attend *job, void *data, uint32_t kv_head, uint32_t row,
                   const float *head) {
  zmoe_head_rows to = zmoe_cached(job, data, kv_head, job->position + row, 1);
  (void)zmoe_convert((unsigned char *)to.data, job->dtype, head, ZMOE_F32, to.dim, job->isa);
}

static void prepare_heads(zmoe_attend *job) {
  const zmoe_attention *a = job->attention;
  size_t dim = a->head_dim, width = zmoe_qkv_width(a);
  for (uint32_t task; (task = zmoe_take(&job->head_tasks)) < job->rows * a->kv_heads;) {
    uint32_t row = task / a->kv_heads, kv_head = task % a->kv_heads;
    float *queries = job->qkv + row * width + (size_t)kv_head * job->group * dim;
    float *key = job->qkv + row * width + ((size_t)a->heads + kv_head) * dim;
    for (uint32_t i = 0; i < job->group; i++)
      prepare_head(job, &a->query_norm, row, queries + i * dim);
    for (size_t d = 0; d < job->group * dim; d++)
      queries[d] *= a->scale;
    prepare_head(job, &a->key_norm, row, key);
    append(job, job->cache->keys, kv_head, row, key);
    append(job, job->cache->values, kv_head, row, key + a->kv_heads * dim);
  }
}

/* ---- out of a unit's parts ------------------------------------------------------------- */

/* Where element d of a vector's sum is: few vectors lie one after the other, many
 * in panels. */
static size_t place(const zmoe_attend *job, const zmoe_part *part, uint32_t vector, uint32_t d) {
  if (job->gemv)
    return (size_t)vector * job->padded + d;
  return ((size_t)(d / ZMOE_PANEL) * part->vectors + vector) * ZMOE_PANEL + d % ZMOE_PANEL;
}

/* Adds factor * the sum of a vector to `out`. */
static void add_sum(const zmoe_attend *job, const zmoe_part *part, uint32_t vector, float factor,
                    float *out) {
  for (uint32_t first = 0; first < job->padded; first += ZMOE_PANEL) {
    const float *sums = part->sums + place(job, part, vector, first);
    for (uint32_t d = 0; d < ZMOE_PANEL; d++)
      out[first + d] += factor * sums[d];
  }
}

/* One vector of a unit whose softmax the ranges share. */
static void finish_vector(const zmoe_attend *job, const zmoe_part *parts, uint32_t vector) {
  const zmoe_attention *a = job->attention;
  float out[ZMOE_MAX_HEAD_DIM], factors[ZMOE_PARTS] = {1}, sum = 0;
  memset(out, 0, job->padded * sizeof *out);
  if (job->ranges > 1) {
    zmoe_softmax all = zmoe_softmax_empty();
    for (uint32_t i = 0; i < job->ranges; i++)
      factors[i] = parts[i].softmax[vector].max;
    (void)job->ops->soften(factors, job->ranges, &all);
  }
  for (uint32_t i = 0; i < job->ranges; i++)
    sum += factors[i] * parts[i].softmax[vector].sum;
  for (uint32_t i = 0; i < job->ranges; i++)
    add_sum(job, &parts[i], vector, factors[i] / sum, out);
  size_t head = (size_t)parts->kv_head * job->group + vector % job->group;
  size_t row = parts->first + vector / job->group;
  size_t at = (row * a->heads + head) * a->head_dim;
  (void)zmoe_convert(job->out + at * zmoe_dtype_bytes(job->dtype), job->dtype, out, ZMOE_F32,
                     a->head_dim, job->isa);
}

static void finish_unit(const zmoe_attend *job, uint32_t unit) {
  zmoe_part parts[ZMOE_PARTS];
  for (uint32_t i = 0; i < job->ranges; i++)
    parts[i] = part_at(job, unit * job->ranges + i);
  for (uint32_t v = 0; v < parts->vectors; v++)
    finish_vector(job, parts, v);
}

/* ---- the stages ------------------------------------------------------------------------- */

/* A sink is a score that only the sum knows. */
static void begin_part(const zmoe_attend *job, const zmoe_part *part, int is_first) {
  const float *sinks = job->attention->sinks;
  memset(part->sums, 0, (size_t)part->vectors * job->padded * sizeof *part->sums);
  for (uint32_t v = 0; v < part->vectors; v++) {
    part->softmax[v] = zmoe_softmax_empty();
    if (sinks != NULL && is_first)
      part->softmax[v] = (zmoe_softmax){sinks[part->kv_head * job->group + v % job->group], 1.0f};
  }
}

static void attend(zmoe_attend *job, uint32_t thread) {
  float *panels = job->panels + thread * job->floats_per_thread;
  for (uint32_t index; (index = zmoe_take(&job->part_tasks)) < parts_of(job);) {
    zmoe_part part = part_at(job, index);
    begin_part(job, &part, index % job->ranges == 0);
    if (job->gemv)
      zmoe_attend_gemv(job, &part);
    else
      zmoe_attend_gemm(job, &part, panels);
    if (job->ranges == 1)
      finish_unit(job, index);
  }
}

void zmoe_attend_work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  zmoe_attend *job = argument;
  const zmoe_attention *a = job->attention;
  if (a->clip > 0.0f || is_whole(&a->query_norm, a->head_dim) ||
      is_whole(&a->key_norm, a->head_dim)) {
    prepare_rows(job);
    zmoe_thread_pool_barrier(pool);
  }
  prepare_heads(job);
  zmoe_thread_pool_barrier(pool);
  attend(job, thread);
  if (job->ranges == 1)
    return;
  zmoe_thread_pool_barrier(pool);
  for (uint32_t unit; (unit = zmoe_take(&job->unit_tasks)) < job->row_units * a->kv_heads;)
    finish_unit(job, unit);
}
