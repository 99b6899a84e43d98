/* Attention of a unit's queries to one range of keys, block by block. */
#include <string.h>

#include "attention.h"

/* A block of keys and up to ZMOE_QUERIES vectors. */
struct tile {
  uint32_t vector, n, key;
  uint32_t depth; /* the last of the vectors sees keys [key, key + depth) at most */
  const float *key_scales, *value_scales;
  float scores[ZMOE_QUERIES * ZMOE_KEY_BLOCK];
  float corrections[ZMOE_QUERIES];
};

/* How many vectors from `v` on the kernels take at once. */
static uint32_t vectors_at(uint32_t v, uint32_t vectors) {
  uint32_t left = vectors - v;
  return left >= ZMOE_QUERIES ? ZMOE_QUERIES : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

static void multiply(float *x, const float *scales, uint32_t count) {
  for (uint32_t i = 0; i < count && scales != NULL; i++)
    x[i] *= scales[i];
}

/* Scores of a vector become weights; what its row does not see weighs nothing.  Returns what its
 * sums so far are to be multiplied with. */
static float soften(const zmoe_attend *job, uint32_t position, const struct tile *tile,
                    float *scores, zmoe_softmax *softmax) {
  uint32_t end = position + 1, begin = zmoe_window_begin(job->attention, position);
  uint32_t to = end > tile->key ? zmoe_min(end - tile->key, tile->depth) : 0;
  uint32_t from = begin > tile->key ? zmoe_min(begin - tile->key, to) : 0, keep = 0;
  if (job->attention->keep > tile->key)
    keep = zmoe_min(job->attention->keep - tile->key, from);
  multiply(scores, tile->key_scales, to);
  for (uint32_t j = keep; keep > 0 && j < from; j++)
    scores[j] = -FLT_MAX; /* between the first keys and the window: as good as not there */
  if (keep > 0)
    from = 0;
  float correction = from < to ? job->ops->soften(scores + from, to - from, softmax) : 1.0f;
  if (tile->value_scales != NULL)
    multiply(scores + from, tile->value_scales + from, to - from);
  if (to - from < tile->depth) {
    memset(scores, 0, from * sizeof *scores);
    memset(scores + to, 0, (tile->depth - to) * sizeof *scores);
  }
  return correction;
}

static void attend_tile(const zmoe_attend *job, const zmoe_piece *piece, uint32_t kv_head,
                        const zmoe_sums *to, struct tile *tile, zmoe_head_block *keys,
                        zmoe_head_block *values) {
  const float *queries[ZMOE_QUERIES];
  for (uint32_t i = 0; i < tile->n; i++)
    queries[i] = zmoe_query(job, piece, kv_head, tile->vector + i);
  keys->count = values->count = tile->depth;
  job->ops->score(queries, tile->n, keys, tile->scores);
  for (uint32_t i = 0; i < tile->n; i++) {
    uint32_t v = tile->vector + i;
    tile->corrections[i] = soften(job, piece->position + v / job->group, tile,
                                  tile->scores + i * ZMOE_KEY_BLOCK, &to->softmax[v]);
  }
  job->ops->add_values(tile->scores, tile->n, tile->corrections, values,
                       to->sums + (size_t)tile->vector * job->padded, job->padded);
  keys->ahead = values->ahead = 0;
}

/* The first `count` elements of a block in f32. */
static void widen(const zmoe_attend *job, zmoe_head_block *block, uint32_t count, float *panel) {
  if (block->dtype == ZMOE_CODES)
    job->ops->widen(block->data, count, panel);
  else
    (void)zmoe_convert(panel, ZMOE_F32, block->data, (zmoe_dtype)block->dtype, count, job->isa);
  block->data = (const unsigned char *)panel, block->dtype = ZMOE_F32;
}

/* Keys [key, key + count) of one block. */
static void attend_block(const zmoe_attend *job, const zmoe_piece *piece, uint32_t kv_head,
                         uint32_t key, uint32_t count, uintptr_t ahead, const zmoe_sums *to,
                         float *panels) {
  uint32_t dim = job->attention->head_dim, vectors = piece->rows * job->group;
  uint32_t dtype = job->cache->bits == 8 ? ZMOE_CODES : job->dtype;
  unsigned char *key_data = zmoe_cached(job, job->cache->keys, piece->span, kv_head, key);
  unsigned char *value_data = key_data;
  if (!job->is_latent)
    value_data = zmoe_cached(job, job->cache->values, piece->span, kv_head, key);
  zmoe_head_block keys = {.data = key_data, .dtype = dtype, .dim = dim};
  zmoe_head_block values = {.data = value_data, .dtype = dtype, .dim = job->out_dim, .stride = dim};
  /* f32 and bf16 cost next to nothing to use as they lie in the cache. */
  int is_widened = vectors > ZMOE_DIRECT_VECTORS && dtype != ZMOE_F32 && dtype != ZMOE_BF16;
  if (is_widened)
    widen(job, &values, count * dim, panels + (size_t)ZMOE_KEY_BLOCK * dim);
  if (job->is_latent) {
    job->ops->turn(values.data, (zmoe_dtype)values.dtype, count, dim, panels);
    keys.data = (const unsigned char *)panels, keys.dtype = ZMOE_F32;
    values.ahead = ahead;
  } else if (is_widened) {
    widen(job, &keys, ZMOE_KEY_BLOCK * dim, panels);
  } else {
    keys.ahead = (uintptr_t)values.data, values.ahead = ahead;
  }
  struct tile tile = {.key = key,
                      .key_scales = zmoe_scales(job, key_data),
                      .value_scales = zmoe_scales(job, value_data)};
  for (uint32_t v = 0; v < vectors; v += tile.n) {
    tile.vector = v, tile.n = vectors_at(v, vectors);
    uint32_t last = piece->position + (v + tile.n - 1) / job->group;
    if (last < key) /* too early for this block */
      continue;
    tile.depth = zmoe_min(last + 1 - key, count);
    attend_tile(job, piece, kv_head, to, &tile, &keys, &values);
  }
}

void zmoe_attend_keys(const zmoe_attend *job, const zmoe_piece *piece, uint32_t kv_head,
                      uint32_t key, uint32_t key_end, uintptr_t ahead, const zmoe_sums *to,
                      float *panels) {
  uint32_t vectors = piece->rows * job->group;
  memset(to->sums, 0, (size_t)vectors * job->padded * sizeof *to->sums);
  for (uint32_t v = 0; v < vectors; v++)
    to->softmax[v] = zmoe_softmax_empty();
  uint32_t begin = zmoe_window_begin(job->attention, piece->position);
  for (; key < key_end; key += ZMOE_KEY_BLOCK) {
    if (key >= job->attention->keep && key + ZMOE_KEY_BLOCK <= begin)
      continue; /* too late for this block */
    uint32_t next = key + ZMOE_KEY_BLOCK, count = zmoe_min(key_end - key, ZMOE_KEY_BLOCK);
    void *keys = job->cache->keys;
    uintptr_t then =
        next < key_end ? (uintptr_t)zmoe_cached(job, keys, piece->span, kv_head, next) : ahead;
    attend_block(job, piece, kv_head, key, count, then, to, panels);
  }
}
