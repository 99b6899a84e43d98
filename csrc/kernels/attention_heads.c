/* The stages of an attention step between its two matmuls. */
#include <string.h>

#include "attention.h"
#include "common/reduce_scalar.h"

/* ---- the cuts --------------------------------------------------------------------- */

static uint32_t group_of(const zmoe_attention *a) {
  return a->heads / a->kv_heads;
}

static uint32_t unit_rows(const zmoe_attention *a) {
  uint32_t rows = ZMOE_UNIT_VECTORS / group_of(a);
  return rows < 1 ? 1 : zmoe_min(rows, ZMOE_UNIT_ROWS);
}

/* Floats of the sums of `vectors` over one range, their softmaxes included. */
static size_t sums_floats(const zmoe_attention *a, size_t vectors) {
  size_t padded = zmoe_round_up(a->head_dim, ZMOE_SUM_LANES);
  return zmoe_round_up(vectors * (padded + sizeof(zmoe_softmax) / sizeof(float)), 16);
}

/* Set number `i` of a unit's sums in `memory`. */
static zmoe_sums sums_at(const zmoe_attend *job, float *memory, size_t i) {
  float *sums = memory + i * sums_floats(job->attention, job->vectors);
  return (zmoe_sums){sums, (zmoe_softmax *)(void *)(sums + (size_t)job->vectors * job->padded)};
}

static float *panels_of(const zmoe_attend *job, float *own) {
  return own + 2 * sums_floats(job->attention, job->vectors);
}

/* Of each thread: the sums over one range and over those before, keys and values in f32. */
size_t zmoe_attend_own_floats(const zmoe_attention *a) {
  size_t vectors = (size_t)unit_rows(a) * group_of(a);
  size_t floats = 2 * sums_floats(a, vectors) + 2 * (size_t)ZMOE_KEY_BLOCK * a->head_dim;
  return zmoe_round_up(floats, 64 / sizeof(float));
}

size_t zmoe_attend_most_sums(const zmoe_attention *a) {
  return ZMOE_SPLIT_RANGES * sums_floats(a, a->heads);
}

uint32_t zmoe_attend_cut(const zmoe_attention *a, const zmoe_span *spans, uint32_t first,
                         uint32_t rows, zmoe_piece *pieces) {
  uint32_t n = 0, at = 0, most = unit_rows(a);
  while (at + spans->rows <= first)
    at += spans++->rows;
  for (uint32_t row = first; row < first + rows;) {
    uint32_t position = spans->position + (row - at);
    uint32_t count = zmoe_min(most - position % most, at + spans->rows - row);
    count = zmoe_min(count, first + rows - row);
    pieces[n++] = (zmoe_piece){spans, row - first, count, position};
    row += count;
    while (row < first + rows && row >= at + spans->rows)
      at += spans++->rows;
  }
  return n;
}

/* The ranges that any row of a piece sees, those between the first keys and the window left
 * out: `skipped` of them after the first. */
static uint32_t ranges_of(const zmoe_attend *job, const zmoe_piece *piece, uint32_t *skipped) {
  uint32_t begin = zmoe_window_begin(job->attention, piece->position) / ZMOE_RANGE_KEYS;
  uint32_t end = (piece->position + piece->rows - 1) / ZMOE_RANGE_KEYS + 1;
  uint32_t kept = begin > 0 && job->attention->keep > 0;
  *skipped = begin - kept;
  return end - begin + kept;
}

size_t zmoe_attend_plan(zmoe_attend *job, uint32_t threads) {
  const zmoe_attention *a = job->attention;
  uint32_t units = job->n_pieces * a->kv_heads, rows = 0, most = 0, skipped;
  for (uint32_t i = 0; i < job->n_pieces; i++) {
    uint32_t ranges = ranges_of(job, &job->pieces[i], &skipped);
    most = ranges > most ? ranges : most;
    rows = job->pieces[i].rows > rows ? job->pieces[i].rows : rows;
  }
  job->group = group_of(a);
  job->padded = (uint32_t)zmoe_round_up(a->head_dim, ZMOE_SUM_LANES);
  job->vectors = rows * job->group;
  job->head_bytes = zmoe_kv_head_bytes(a->head_dim, job->dtype, job->cache->bits);
  size_t floats = (size_t)units * most * sums_floats(a, job->vectors);
  int is_split = threads > 1 && most > 1 && units < ZMOE_UNITS_PER_THREAD * threads &&
                 floats <= zmoe_attend_most_sums(a);
  job->ranges = is_split ? most : 0;
  return is_split ? floats : 0;
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
    float *row = job->qkv + r * width, *keys = row + zmoe_queries_width(a);
    if (a->clip > 0.0f)
      job->ops->clip(row, (uint32_t)width, a->clip);
    if (is_whole(&a->query_norm, a->head_dim))
      job->ops->norm(&a->query_norm, row, row, ZMOE_F32);
    if (is_whole(&a->key_norm, a->head_dim))
      job->ops->norm(&a->key_norm, keys, keys, ZMOE_F32);
  }
}

static void prepare_head(const zmoe_attend *job, const zmoe_norm *norm, uint32_t position,
                         float *head) {
  const zmoe_attention *a = job->attention;
  size_t at = (size_t)position * (a->rope_dims / 2);
  if (is_per_head(norm, a->head_dim))
    job->ops->norm(norm, head, head, ZMOE_F32);
  if (a->rope_dims > 0)
    job->ops->rotate(head, job->cosines + at, job->sines + at, a->rope_dims, a->rope_traditional);
}

/* A head in integers of 8 bits; returns their scale, which is no number if an element is none. */
static float encode(const float *x, uint32_t dim, signed char *codes) {
  uint32_t most = 0; /* the largest magnitude, as bits: a NaN is larger than infinity */
  for (uint32_t d = 0; d < dim; d++) {
    uint32_t magnitude = bits_of_f32(x[d]) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  float scale = f32_of_bits(most) / 127.0f, nearest = 0x1.8p23f; /* whose last bit is 1 */
  int is_normal = scale >= FLT_MIN && scale <= FLT_MAX;
  for (uint32_t d = 0; d < dim; d++)
    codes[d] = is_normal ? (signed char)(x[d] / scale + nearest - nearest) : 0;
  return scale;
}

static void write_codes(const zmoe_attend *job, unsigned char *keys, unsigned char *values,
                        uint32_t position, const float *key, const float *value) {
  uint32_t dim = job->attention->head_dim;
  signed char codes[ZMOE_MAX_HEAD_DIM];
  zmoe_scales(job, keys)[position] = encode(key, dim, codes);
  for (uint32_t d = 0; d < dim; d++)
    keys[d * ZMOE_KEY_BLOCK + position] = (unsigned char)codes[d];
  zmoe_scales(job, values)[position] = encode(value, dim, codes);
  memcpy(values + (size_t)position * dim, codes, dim);
}

/* Column `column` of a block of keys. */
static void write_key(const zmoe_attend *job, void *block, uint32_t column, const float *key) {
  uint32_t dim = job->attention->head_dim;
  union {
    uint32_t words[ZMOE_MAX_HEAD_DIM];
    uint16_t halves[ZMOE_MAX_HEAD_DIM];
  } rounded;
  (void)zmoe_convert(&rounded, job->dtype, key, ZMOE_F32, dim, job->isa);
  if (job->dtype == ZMOE_F32)
    for (uint32_t d = 0; d < dim; d++)
      ((uint32_t *)block)[d * ZMOE_KEY_BLOCK + column] = rounded.words[d];
  else
    for (uint32_t d = 0; d < dim; d++)
      ((uint16_t *)block)[d * ZMOE_KEY_BLOCK + column] = rounded.halves[d];
}

static void write_value(const zmoe_attend *job, unsigned char *block, uint32_t row,
                        const float *value) {
  uint32_t dim = job->attention->head_dim;
  size_t at = (size_t)row * dim * zmoe_dtype_bytes(job->dtype);
  (void)zmoe_convert(block + at, job->dtype, value, ZMOE_F32, dim, job->isa);
}

static void prepare_unit(const zmoe_attend *job, const zmoe_piece *piece, uint32_t kv_head) {
  const zmoe_attention *a = job->attention;
  size_t dim = a->head_dim;
  for (uint32_t r = 0; r < piece->rows; r++) {
    uint32_t position = piece->position + r, column = position % ZMOE_KEY_BLOCK;
    float *queries = zmoe_query(job, piece, kv_head, r * job->group);
    float *row = job->qkv + (piece->first + r) * zmoe_qkv_width(a);
    float *key = row + zmoe_queries_width(a) + kv_head * dim;
    for (uint32_t i = 0; i < job->group; i++, queries += zmoe_query_stride(a)) {
      prepare_head(job, &a->query_norm, position, queries);
      for (size_t d = 0; d < dim; d++)
        queries[d] *= a->scale;
    }
    prepare_head(job, &a->key_norm, position, key);
    const float *value = key + a->kv_heads * dim;
    unsigned char *keys = zmoe_cached(job, job->cache->keys, piece->span, kv_head, position);
    unsigned char *values = zmoe_cached(job, job->cache->values, piece->span, kv_head, position);
    if (job->cache->bits == 8) {
      write_codes(job, keys, values, column, key, value);
    } else {
      write_key(job, keys, column, key);
      write_value(job, values, column, value);
    }
  }
}

static void prepare_units(zmoe_attend *job) {
  uint32_t kv_heads = job->attention->kv_heads;
  for (uint32_t unit; (unit = zmoe_take(&job->head_tasks)) < job->n_pieces * kv_heads;)
    prepare_unit(job, &job->pieces[unit / kv_heads], unit % kv_heads);
}

/* ---- sums of ranges ------------------------------------------------------------------ */

/* A sink is a score that only the sum knows. */
static void begin_unit(const zmoe_attend *job, uint32_t kv_head, uint32_t vectors,
                       const zmoe_sums *all) {
  const float *sinks = job->attention->sinks;
  memset(all->sums, 0, (size_t)vectors * job->padded * sizeof *all->sums);
  for (uint32_t v = 0; v < vectors; v++) {
    all->softmax[v] = zmoe_softmax_empty();
    if (sinks != NULL)
      all->softmax[v] = (zmoe_softmax){sinks[kv_head * job->group + v % job->group], 1.0f};
  }
}

/* Adds a range of which a vector sees something to those before it. */
static void add_range(const zmoe_attend *job, uint32_t vectors, const zmoe_sums *range,
                      const zmoe_sums *all) {
  for (uint32_t v = 0; v < vectors; v++) {
    const zmoe_softmax *part = &range->softmax[v];
    float *sums = all->sums + (size_t)v * job->padded;
    const float *more = range->sums + (size_t)v * job->padded;
    if (part->sum == 0.0f)
      continue;
    if (all->softmax[v].sum == 0.0f) {
      all->softmax[v] = *part;
      memcpy(sums, more, job->padded * sizeof *sums);
      continue;
    }
    float factors[] = {all->softmax[v].max, part->max};
    zmoe_softmax both = zmoe_softmax_empty();
    (void)job->ops->soften(factors, 2, &both);
    all->softmax[v].max = both.max;
    all->softmax[v].sum = all->softmax[v].sum * factors[0] + part->sum * factors[1];
    for (uint32_t d = 0; d < job->padded; d++)
      sums[d] = sums[d] * factors[0] + more[d] * factors[1];
  }
}

static void finish_unit(const zmoe_attend *job, const zmoe_piece *piece, uint32_t kv_head,
                        const zmoe_sums *all) {
  for (uint32_t v = 0; v < piece->rows * job->group; v++) {
    float out[ZMOE_MAX_HEAD_DIM], factor = 1.0f / all->softmax[v].sum;
    const float *sums = all->sums + (size_t)v * job->padded;
    for (uint32_t d = 0; d < job->out_dim; d++)
      out[d] = sums[d] * factor;
    if (job->attention->is_gated) {
      float *gate = zmoe_query(job, piece, kv_head, v) + job->out_dim;
      job->ops->sigmoid(gate, job->out_dim);
      for (uint32_t d = 0; d < job->out_dim; d++)
        out[d] *= gate[d];
    }
    size_t head = (size_t)kv_head * job->group + v % job->group;
    size_t at = (piece->first + v / job->group) * job->out_row + head * job->out_head;
    (void)zmoe_convert(job->out + at * zmoe_dtype_bytes(job->dtype), job->dtype, out, ZMOE_F32,
                       job->out_dim, job->isa);
  }
}

/* ---- units, whole or by ranges ----------------------------------------------------------- */

/* The first keys of the task that is to be taken next, where units are not split; or 0. */
static uintptr_t next_unit(const zmoe_attend *job) {
  uint32_t kv_heads = job->attention->kv_heads;
  uint32_t unit = atomic_load_explicit(&job->unit_tasks.next, memory_order_relaxed);
  if (job->ranges > 0 || unit >= job->n_pieces * kv_heads)
    return 0;
  const zmoe_span *span = job->pieces[unit / kv_heads].span;
  return (uintptr_t)zmoe_cached(job, job->cache->keys, span, unit % kv_heads, 0);
}

/* Range `index` of those that the piece sees. */
static void attend_range(const zmoe_attend *job, const zmoe_piece *piece, uint32_t kv_head,
                         uint32_t index, uint32_t skipped, const zmoe_sums *to, float *panels) {
  uint32_t end = piece->position + piece->rows;
  int is_first = index == 0 && job->attention->keep > 0;
  uint32_t key = (index + (is_first ? 0 : skipped)) * ZMOE_RANGE_KEYS;
  uint32_t key_end = zmoe_min(key + ZMOE_RANGE_KEYS, end);
  void *keys = job->cache->keys;
  uintptr_t ahead = key_end < end ? (uintptr_t)zmoe_cached(job, keys, piece->span, kv_head, key_end)
                                  : next_unit(job);
  zmoe_attend_keys(job, piece, kv_head, key, key_end, ahead, to, panels);
}

/* The units' own ranges, all by one thread, or those that attend_parts has left. */
static void attend_units(zmoe_attend *job, float *own) {
  uint32_t kv_heads = job->attention->kv_heads, skipped;
  zmoe_sums all = sums_at(job, own, 0), range = sums_at(job, own, 1);
  for (uint32_t unit; (unit = zmoe_take(&job->unit_tasks)) < job->n_pieces * kv_heads;) {
    const zmoe_piece *piece = &job->pieces[unit / kv_heads];
    uint32_t kv_head = unit % kv_heads, vectors = piece->rows * job->group;
    uint32_t ranges = ranges_of(job, piece, &skipped);
    begin_unit(job, kv_head, vectors, &all);
    for (uint32_t i = 0; i < ranges; i++) {
      if (job->ranges > 0)
        range = sums_at(job, job->sums, (size_t)unit * job->ranges + i);
      else
        attend_range(job, piece, kv_head, i, skipped, &range, panels_of(job, own));
      add_range(job, vectors, &range, &all);
    }
    finish_unit(job, piece, kv_head, &all);
  }
}

static void attend_parts(zmoe_attend *job, float *own) {
  uint32_t kv_heads = job->attention->kv_heads, skipped;
  uint32_t parts = job->n_pieces * kv_heads * job->ranges;
  for (uint32_t part; (part = zmoe_take(&job->part_tasks)) < parts;) {
    uint32_t unit = part / job->ranges, i = part % job->ranges;
    const zmoe_piece *piece = &job->pieces[unit / kv_heads];
    zmoe_sums sums = sums_at(job, job->sums, part);
    if (i < ranges_of(job, piece, &skipped))
      attend_range(job, piece, unit % kv_heads, i, skipped, &sums, panels_of(job, own));
  }
}

/* ---- the stages ------------------------------------------------------------------------- */

void zmoe_attend_sums(zmoe_thread_pool *pool, zmoe_attend *job, uint32_t thread) {
  float *own = job->own + thread * job->own_floats;
  if (job->ranges > 0) {
    attend_parts(job, own);
    zmoe_thread_pool_barrier(pool);
  }
  attend_units(job, own);
}

void zmoe_attend_work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  zmoe_attend *job = argument;
  const zmoe_attention *a = job->attention;
  if (a->clip > 0.0f || is_whole(&a->query_norm, a->head_dim) ||
      is_whole(&a->key_norm, a->head_dim)) {
    prepare_rows(job);
    zmoe_thread_pool_barrier(pool);
  }
  prepare_units(job);
  zmoe_thread_pool_barrier(pool);
  zmoe_attend_sums(pool, job, thread);
}
