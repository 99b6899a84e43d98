/* The parts of decoder layers one after the other, in one call: attention, delta nets, dense
 * networks, and routed experts as far as this node computes them. */
#include "common/platform.h"

#include <string.h>

#include "decoder.h"
#include "layer.h"

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

static uint32_t block_of(uint32_t rows) {
  return rows < ZMOE_ROW_BLOCK ? rows : ZMOE_ROW_BLOCK;
}

/* ---- an expert to which every row goes --------------------------------------------------- */

struct mlp_memory {
  void *x;
  int32_t *rows, *experts, *ids;
  float *weights;
};

static int take_mlp_memory(zmoe_thread_pool *pool, const zmoe_mlp *mlp, uint32_t rows,
                           struct mlp_memory *m) {
  size_t width = mlp->expert->up->in_features;
  m->x = zmoe_thread_pool_scratch(pool, rows * width * zmoe_dtype_bytes((zmoe_dtype)mlp->dtype));
  m->rows = zmoe_thread_pool_scratch(pool, rows * sizeof *m->rows);
  m->experts = zmoe_thread_pool_scratch(pool, rows * sizeof *m->experts);
  m->ids = zmoe_thread_pool_scratch(pool, rows * sizeof *m->ids);
  m->weights = zmoe_thread_pool_scratch(pool, rows * sizeof *m->weights);
  if (m->x == NULL || m->rows == NULL || m->experts == NULL || m->ids == NULL || m->weights == NULL)
    return ZMOE_ENOMEM;
  for (uint32_t r = 0; r < rows; r++) {
    m->rows[r] = (int32_t)r;
    m->experts[r] = 0;
    m->weights[r] = 1.0f;
  }
  return ZMOE_OK;
}

int zmoe_mlp_output(zmoe_thread_pool *pool, const zmoe_mlp *mlp, const float *h, uint32_t rows,
                    float *out, zmoe_precision precision) {
  const zmoe_expert_layer *expert = mlp->expert;
  zmoe_dtype dtype = (zmoe_dtype)mlp->dtype;
  uint32_t width = expert->up->in_features;
  if (zmoe_dtype_bytes(dtype) == 0 || !zmoe_norm_fits(&mlp->input, width) || expert->experts != 1)
    return ZMOE_EINVAL;
  size_t mark = zmoe_thread_pool_mark(pool);
  struct mlp_memory m;
  int status = take_mlp_memory(pool, mlp, block_of(rows), &m);
  for (uint32_t first = 0; first < rows && status == ZMOE_OK; first += ZMOE_ROW_BLOCK) {
    uint32_t n = block_of(rows - first);
    const float *x = h + (size_t)first * width;
    if (mlp->weight == NULL)
      zmoe_norm_all(pool, &mlp->input, width, x, n, m.x, dtype);
    else
      status = zmoe_route(pool, mlp->weight, x, n, m.x, dtype, m.ids, m.weights);
    if (status == ZMOE_OK)
      status = zmoe_experts(pool, expert, m.x, dtype, n, m.rows, m.experts, m.weights, n,
                            out + (size_t)first * expert->down->out_features, ZMOE_F32, precision);
  }
  zmoe_thread_pool_release(pool, mark);
  return status;
}

size_t zmoe_mlp_scratch(const zmoe_mlp *mlp) {
  const zmoe_weight *up = mlp->expert->up;
  size_t row = up->in_features * zmoe_dtype_bytes((zmoe_dtype)mlp->dtype) + 4 * sizeof(int32_t) +
               mlp->expert->down->out_features * sizeof(float);
  size_t within = zmoe_experts_scratch(up->in_features, up->out_features, 1);
  if (mlp->weight != NULL)
    within = larger(within, zmoe_route_scratch(mlp->weight));
  return ZMOE_ROW_BLOCK * row + 6 * 64 + within;
}

/* ---- routed experts ------------------------------------------------------------------------ */

static int route(zmoe_thread_pool *pool, const zmoe_moe *moe, const float *h, uint32_t rows,
                 zmoe_extent extent, zmoe_routing *to, uint64_t *experts_ns,
                 zmoe_precision precision) {
  const zmoe_router *router = moe->router;
  zmoe_dtype dtype = (zmoe_dtype)moe->dtype;
  int status = zmoe_route(pool, router, h, rows, to->x, dtype, to->ids, to->weights);
  if (status != ZMOE_OK || extent == ZMOE_EXTENT_ROUTE)
    return status;
  zmoe_own_pairs(to->ids, to->weights, rows, router->top_k, moe->local, moe->n_experts, NULL, 0,
                 to->sorted, to->pairs);
  if (extent == ZMOE_EXTENT_PAIRS)
    return ZMOE_OK;
  const zmoe_pairs *pairs = to->pairs;
  if (pairs->count == 0) {
    memset(to->sum, 0, (size_t)rows * router->gate->in_features * sizeof *to->sum);
    return ZMOE_OK;
  }
  uint64_t start = zmoe_now_ns();
  status = zmoe_experts(pool, moe->experts, to->x, dtype, rows, pairs->rows, pairs->experts,
                        pairs->weights, pairs->count, to->sum, ZMOE_F32, precision);
  *experts_ns += zmoe_now_ns() - start;
  return status;
}

static int take_routing(zmoe_thread_pool *pool, const zmoe_moe *moe, size_t rows, zmoe_routing *to,
                        float **shared) {
  size_t width = moe->router->gate->in_features, count = rows * moe->router->top_k;
  to->x = zmoe_thread_pool_scratch(pool, rows * width * zmoe_dtype_bytes((zmoe_dtype)moe->dtype));
  int32_t **ints[] = {&to->ids, &to->sorted, &to->pairs->rows, &to->pairs->experts};
  float **floats[] = {&to->weights, &to->pairs->weights, &to->sum, shared};
  int lacks = to->x == NULL;
  for (uint32_t i = 0; i < 4; i++) {
    *ints[i] = zmoe_thread_pool_scratch(pool, count * sizeof(int32_t));
    *floats[i] = zmoe_thread_pool_scratch(pool, (i < 2 ? count : rows * width) * sizeof(float));
    lacks |= *ints[i] == NULL || *floats[i] == NULL;
  }
  return lacks ? ZMOE_ENOMEM : ZMOE_OK;
}

static int add_moe(zmoe_thread_pool *pool, const zmoe_moe *moe, float *h, uint32_t rows,
                   uint64_t *experts_ns, zmoe_precision precision) {
  uint32_t width = moe->router->gate->in_features;
  size_t mark = zmoe_thread_pool_mark(pool);
  zmoe_pairs pairs;
  zmoe_routing to = {.pairs = &pairs};
  float *shared;
  int status = take_routing(pool, moe, block_of(rows), &to, &shared);
  for (uint32_t first = 0; first < rows && status == ZMOE_OK; first += ZMOE_ROW_BLOCK) {
    uint32_t n = block_of(rows - first);
    float *at = h + (size_t)first * width;
    status = route(pool, moe, at, n, ZMOE_EXTENT_SUM, &to, experts_ns, precision);
    if (status == ZMOE_OK && moe->shared != NULL)
      status = zmoe_mlp_output(pool, moe->shared, at, n, shared, precision);
    if (status != ZMOE_OK)
      break;
    zmoe_add_rows(pool, to.sum, n, width, at);
    if (moe->shared != NULL)
      zmoe_add_rows(pool, shared, n, width, at);
  }
  zmoe_thread_pool_release(pool, mark);
  return status;
}

size_t zmoe_moe_scratch(const zmoe_moe *moe) {
  const zmoe_router *router = moe->router;
  const zmoe_weight *up = moe->experts->up;
  size_t width = router->gate->in_features, item = zmoe_dtype_bytes((zmoe_dtype)moe->dtype);
  size_t row = width * (item + 2 * sizeof(float)) + 6 * router->top_k * sizeof(float);
  size_t within = zmoe_experts_scratch(up->in_features, up->out_features, router->top_k);
  within = larger(within, zmoe_route_scratch(router));
  if (moe->shared != NULL)
    within = larger(within, zmoe_mlp_scratch(moe->shared));
  return ZMOE_ROW_BLOCK * row + 9 * 64 + within;
}

/* ---- the chain --------------------------------------------------------------------------------
 */

static int add_mlp(zmoe_thread_pool *pool, const zmoe_mlp *mlp, float *h, uint32_t rows,
                   zmoe_precision precision) {
  uint32_t width = mlp->expert->down->out_features;
  size_t mark = zmoe_thread_pool_mark(pool);
  float *out = zmoe_thread_pool_scratch(pool, (size_t)block_of(rows) * width * sizeof *out);
  int status = out != NULL ? ZMOE_OK : ZMOE_ENOMEM;
  for (uint32_t first = 0; first < rows && status == ZMOE_OK; first += ZMOE_ROW_BLOCK) {
    uint32_t n = block_of(rows - first);
    float *at = h + (size_t)first * width;
    status = zmoe_mlp_output(pool, mlp, at, n, out, precision);
    if (status == ZMOE_OK)
      zmoe_add_rows(pool, out, n, width, at);
  }
  zmoe_thread_pool_release(pool, mark);
  return status;
}

/* Whether the spans have so many rows, at positions whose angles are known. */
static int spans_fit(const zmoe_rope *rope, const zmoe_span *spans, uint32_t n_spans,
                     uint32_t rows) {
  uint64_t all = 0;
  for (uint32_t i = 0; i < n_spans; i++) {
    all += spans[i].rows;
    if (rope != NULL && (uint64_t)spans[i].position + spans[i].rows > rope->positions)
      return 0;
  }
  return all == rows;
}

static int attend(zmoe_thread_pool *pool, const zmoe_sublayer *part, const zmoe_span *spans,
                  uint32_t n_spans, float *h, uint32_t rows, zmoe_precision precision) {
  const float *cosines = NULL, *sines = NULL;
  if (!spans_fit(part->rope, spans, n_spans, rows))
    return ZMOE_EINVAL;
  if (part->delta != NULL)
    return zmoe_delta_step(pool, part->delta, spans, n_spans, h, precision);
  if (part->rope != NULL)
    cosines = part->rope->cosines, sines = part->rope->sines;
  if (part->attention != NULL)
    return zmoe_attention_step(pool, part->attention, part->cache, spans, n_spans, cosines, sines,
                               h, precision);
  return zmoe_latent_attention_step(pool, part->latent, part->cache, spans, n_spans, cosines, sines,
                                    h, precision);
}

int zmoe_chain(zmoe_thread_pool *pool, const zmoe_sublayer *sublayers, uint32_t count,
               const zmoe_span *spans, uint32_t n_spans, float *h, uint32_t rows,
               zmoe_extent extent, zmoe_routing *routing, uint64_t *experts_ns,
               zmoe_precision precision) {
  int status = ZMOE_OK;
  for (uint32_t i = 0; i < count && status == ZMOE_OK; i++) {
    const zmoe_sublayer *part = &sublayers[i];
    if (part->mlp != NULL)
      status = add_mlp(pool, part->mlp, h, rows, precision);
    else if (part->moe == NULL)
      status = attend(pool, part, spans, n_spans, h, rows, precision);
    else if (i + 1 < count || extent == ZMOE_EXTENT_ALL)
      status = add_moe(pool, part->moe, h, rows, experts_ns, precision);
    else
      status = route(pool, part->moe, h, rows, extent, routing, experts_ns, precision);
  }
  return status;
}
