/* Attention of few queries, as in decode: keys and values straight from the cache. */
#include "attention.h"

#include <string.h>

struct block {
  float scores[ZMOE_GEMV_VECTORS][ZMOE_KEY_BLOCK];
  float corrections[ZMOE_GEMV_VECTORS];
};

/* How many vectors from `v` on the kernels take at once. */
static uint32_t vectors_at(uint32_t v, uint32_t vectors) {
  uint32_t left = vectors - v;
  return left >= ZMOE_QUERIES ? ZMOE_QUERIES : left >= 2 ? 2 : 1;
}

static void score(const zmoe_attend *job, const zmoe_part *part, uint32_t key, uint32_t count,
                  struct block *block) {
  zmoe_head_rows keys = zmoe_cached(job, job->cache->keys, part->kv_head, key, count);
  const float *queries[ZMOE_GEMV_VECTORS];
  for (uint32_t v = 0; v < part->vectors; v++)
    queries[v] = zmoe_query(job, part, v);
  keys.ahead = (uintptr_t)zmoe_cached(job, job->cache->values, part->kv_head, key, count).data;
  for (uint32_t v = 0, n; v < part->vectors; v += n, keys.ahead = 0) {
    n = vectors_at(v, part->vectors);
    job->ops->score(queries + v, n, &keys, block->scores[v], ZMOE_KEY_BLOCK);
  }
}

/* Scores become weights; what a row does not see weighs nothing. */
static void soften(const zmoe_attend *job, const zmoe_part *part, uint32_t key, uint32_t count,
                   struct block *block) {
  for (uint32_t v = 0; v < part->vectors; v++) {
    uint32_t from, to;
    zmoe_visible(job, part->first + v / job->group, key, count, &from, &to);
    float *scores = block->scores[v];
    block->corrections[v] = job->ops->soften(scores + from, to - from, &part->softmax[v]);
    memset(scores, 0, from * sizeof *scores);
    memset(scores + to, 0, (count - to) * sizeof *scores);
  }
}

static void add_values(const zmoe_attend *job, const zmoe_part *part, uint32_t key, uint32_t count,
                       const struct block *block) {
  zmoe_head_rows values = zmoe_cached(job, job->cache->values, part->kv_head, key, count);
  values.ahead = zmoe_attend_next(job, part, key + count);
  for (uint32_t v = 0, n; v < part->vectors; v += n, values.ahead = 0) {
    n = vectors_at(v, part->vectors);
    job->ops->add_values(block->scores[v], ZMOE_KEY_BLOCK, n, block->corrections + v, &values,
                         part->sums + (size_t)v * job->padded, job->padded);
  }
}

void zmoe_attend_gemv(const zmoe_attend *job, const zmoe_part *part) {
  for (uint32_t key = part->key; key < part->key_end; key += ZMOE_KEY_BLOCK) {
    uint32_t count = zmoe_min(part->key_end - key, ZMOE_KEY_BLOCK);
    struct block block;
    score(job, part, key, count, &block);
    soften(job, part, key, count, &block);
    add_values(job, part, key, count, &block);
  }
}
