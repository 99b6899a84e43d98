/* Attention of many queries, as in prefill: by the kernels of large matmuls.
 *
 * A block of keys is a weight, the scores its matmul with the queries; a block
 * of values is packed so that the weighted sums are one too.  Both are made f32
 * once for all queries of the unit. */
#include "attention.h"

#include <string.h>

#include "matmul.h"

/* Some vectors of a part and a block of keys. */
struct tile {
  uint32_t vector, n;  /* n <= ZMOE_TILE_ROWS */
  uint32_t key, depth; /* the last of the vectors sees keys [key, key + depth) at most */
  float scores[ZMOE_KEY_BLOCK / ZMOE_PANEL][ZMOE_TILE_ROWS * ZMOE_PANEL];
  float weights[ZMOE_TILE_ROWS][ZMOE_KEY_BLOCK];
};

/* Fewer where heads are wide, so that a block stays in a core's own cache. */
static uint32_t keys_at_a_time(const zmoe_attention *attention) {
  return attention->head_dim > 128 ? ZMOE_PANEL : ZMOE_KEY_BLOCK;
}

static float *value_panels(const zmoe_attend *job, float *panels) {
  const zmoe_attention *a = job->attention;
  return panels + (size_t)keys_at_a_time(a) * a->head_dim;
}

size_t zmoe_attend_panel_floats(const zmoe_attention *a) {
  return keys_at_a_time(a) * (a->head_dim + zmoe_round_up(a->head_dim, ZMOE_PANEL));
}

static void pack(const zmoe_attend *job, const zmoe_part *part, uint32_t key, uint32_t count,
                 float *panels) {
  zmoe_head_rows rows = zmoe_cached(job, job->cache->keys, part->kv_head, key, count);
  zmoe_head_rows values = zmoe_cached(job, job->cache->values, part->kv_head, key, count);
  const zmoe_weight keys = {
      .data = rows.data, .out_features = count, .in_features = rows.dim, .format = rows.dtype};
  size_t row_bytes = rows.dim * zmoe_dtype_bytes(rows.dtype);
  for (uint32_t first = 0; first < count; first += ZMOE_PANEL) {
    uint32_t last = zmoe_panel_end(first, count);
    zmoe_prefetch_range((uintptr_t)values.data + first * row_bytes, (last - first) * row_bytes);
    job->kernels->pack_panel(&keys, first, last, 0, rows.dim, panels + (size_t)first * rows.dim);
  }
  values.ahead = zmoe_attend_next(job, part, key + count);
  job->ops->pack_values(&values, ZMOE_PANEL, value_panels(job, panels));
}

static void score(const zmoe_attend *job, const zmoe_part *part, const float *panels,
                  struct tile *tile) {
  uint32_t dim = job->attention->head_dim;
  const float *queries[ZMOE_TILE_ROWS];
  for (uint32_t t = 0; t < tile->n; t++)
    queries[t] = zmoe_query(job, part, tile->vector + t);
  for (uint32_t first = 0; first < tile->depth; first += ZMOE_PANEL)
    job->kernels->tile(panels + (size_t)first * dim, dim, queries, tile->n,
                       tile->scores[first / ZMOE_PANEL], 0);
}

static float *sums_of(const zmoe_part *part, uint32_t panel, uint32_t vector) {
  return part->sums + ((size_t)panel * part->vectors + vector) * ZMOE_PANEL;
}

static void scale_sums(const zmoe_attend *job, const zmoe_part *part, uint32_t vector,
                       float factor) {
  for (uint32_t p = 0; p < job->padded / ZMOE_PANEL; p++) {
    float *sums = sums_of(part, p, vector);
    for (uint32_t d = 0; d < ZMOE_PANEL; d++)
      sums[d] *= factor;
  }
}

/* Scores become weights; what a row does not see weighs nothing. */
static void soften(const zmoe_attend *job, const zmoe_part *part, struct tile *tile) {
  for (uint32_t t = 0; t < tile->n; t++) {
    uint32_t vector = tile->vector + t, from, to;
    zmoe_visible(job, part->first + vector / job->group, tile->key, tile->depth, &from, &to);
    float *weights = tile->weights[t];
    for (uint32_t p = 0; p * ZMOE_PANEL < tile->depth; p++)
      memcpy(weights + p * ZMOE_PANEL, tile->scores[p] + t * ZMOE_PANEL,
             ZMOE_PANEL * sizeof *weights);
    scale_sums(job, part, vector,
               job->ops->soften(weights + from, to - from, &part->softmax[vector]));
    memset(weights, 0, from * sizeof *weights);
    memset(weights + to, 0, (tile->depth - to) * sizeof *weights);
  }
}

static void add_values(const zmoe_attend *job, const zmoe_part *part, const float *panels,
                       uint32_t count, const struct tile *tile) {
  const float *weights[ZMOE_TILE_ROWS];
  for (uint32_t t = 0; t < tile->n; t++)
    weights[t] = tile->weights[t];
  for (uint32_t p = 0; p < job->padded / ZMOE_PANEL; p++)
    job->kernels->tile(panels + (size_t)p * count * ZMOE_PANEL, tile->depth, weights, tile->n,
                       sums_of(part, p, tile->vector), 1);
}

void zmoe_attend_gemm(const zmoe_attend *job, const zmoe_part *part, float *panels) {
  uint32_t step = keys_at_a_time(job->attention);
  for (uint32_t key = part->key; key < part->key_end; key += step) {
    uint32_t count = zmoe_min(part->key_end - key, step);
    pack(job, part, key, count, panels);
    struct tile tile = {.key = key};
    for (; tile.vector < part->vectors; tile.vector += ZMOE_TILE_ROWS) {
      tile.n = zmoe_min(part->vectors - tile.vector, ZMOE_TILE_ROWS);
      uint32_t first = part->first + tile.vector / job->group, from, to;
      uint32_t last = part->first + (tile.vector + tile.n - 1) / job->group;
      zmoe_visible(job, last, key, count, &from, &tile.depth);
      zmoe_visible(job, first, key, count, &from, &to);
      if (from >= tile.depth) /* all too early for this block, or too late */
        continue;
      score(job, part, panels, &tile);
      soften(job, part, &tile);
      add_values(job, part, value_panels(job, panels), count, &tile);
    }
  }
}
