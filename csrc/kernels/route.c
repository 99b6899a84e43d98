/* Which experts a row goes to, and with what weights. */
#include "layer.h"

#include <math.h>

#include "decoder.h"

struct route {
  const zmoe_router *router;
  const zmoe_vector_ops *ops;
  float *logits; /* (rows, 2, experts): scores; room for those of the choice */
  int32_t *ids;
  float *weights;
  uint32_t rows, experts;
  zmoe_tasks tasks;
};

/* ---- one row -------------------------------------------------------------------- */

/* Strictly: of equals, and of two NaN, the first stays. */
static int is_better(float a, float b) {
  return a > b || (isnan(b) && !isnan(a));
}

/* The k best, best first, by insertion: after the first few hardly any expert is one. */
static void select_experts(const float *scores, uint32_t experts, uint32_t k, int32_t *ids) {
  uint32_t found = 0;
  for (uint32_t e = 0; e < experts; e++) {
    if (found == k && !is_better(scores[e], scores[ids[k - 1]]))
      continue;
    uint32_t at = found < k ? found++ : k - 1;
    for (; at > 0 && is_better(scores[e], scores[ids[at - 1]]); at--)
      ids[at] = ids[at - 1];
    ids[at] = (int32_t)e;
  }
}

/* In place; a row's probabilities. */
static void softmax(const zmoe_vector_ops *ops, float *x, uint32_t count) {
  zmoe_softmax state = zmoe_softmax_empty();
  (void)ops->soften(x, count, &state);
  for (uint32_t i = 0; i < count; i++)
    x[i] /= state.sum;
}

static void normalize(float *weights, uint32_t k) {
  float sum = 1e-20f; /* of the weights of chosen experts: all of them may be 0 */
  for (uint32_t i = 0; i < k; i++)
    sum += weights[i];
  for (uint32_t i = 0; i < k; i++)
    weights[i] /= sum;
}

/* The scores of the groups that lose become 0. */
static void drop_groups(const zmoe_router *router, float *scores, uint32_t experts) {
  float sums[ZMOE_MAX_GROUPS];
  int32_t best[2], kept[ZMOE_MAX_GROUPS];
  uint8_t is_kept[ZMOE_MAX_GROUPS] = {0};
  uint32_t each = experts / router->groups;
  for (uint32_t g = 0; g < router->groups; g++) {
    select_experts(scores + g * each, each, 2, best);
    sums[g] = scores[g * each + (uint32_t)best[0]] + scores[g * each + (uint32_t)best[1]];
  }
  select_experts(sums, router->groups, router->kept, kept);
  for (uint32_t i = 0; i < router->kept; i++)
    is_kept[kept[i]] = 1;
  for (uint32_t e = 0; e < experts; e++)
    scores[e] = is_kept[e / each] ? scores[e] : 0.0f;
}

/* What the experts of `scores` (2, experts) are chosen by. */
static const float *choice(const struct route *job, float *scores) {
  const zmoe_router *router = job->router;
  uint32_t experts = job->experts;
  if (router->bias == NULL && router->groups == 0)
    return scores;
  float *chosen_by = scores + experts;
  for (uint32_t e = 0; e < experts; e++)
    chosen_by[e] = scores[e] + (router->bias == NULL ? 0.0f : router->bias[e]);
  if (router->groups > 0)
    drop_groups(router, chosen_by, experts);
  return chosen_by;
}

static void route_row(const struct route *job, float *scores, int32_t *ids, float *weights) {
  const zmoe_router *router = job->router;
  uint32_t k = router->top_k;
  if (router->kind == ZMOE_SOFTMAX_TOP_K)
    softmax(job->ops, scores, job->experts);
  if (router->kind == ZMOE_SIGMOID_TOP_K)
    job->ops->sigmoid(scores, job->experts);
  select_experts(choice(job, scores), job->experts, k, ids);
  for (uint32_t i = 0; i < k; i++)
    weights[i] = scores[ids[i]];
  if (router->kind == ZMOE_TOP_K_SOFTMAX)
    softmax(job->ops, weights, k);
  if (router->normalize)
    normalize(weights, k);
  for (uint32_t i = 0; i < k && router->scale != 0.0f; i++)
    weights[i] *= router->scale;
}

static void work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool, (void)thread;
  struct route *job = argument;
  size_t k = job->router->top_k;
  for (uint32_t r; (r = zmoe_take(&job->tasks)) < job->rows;)
    route_row(job, job->logits + (size_t)r * 2 * job->experts, job->ids + r * k,
              job->weights + r * k);
}

/* ---- the call --------------------------------------------------------------------- */

static int groups_fit(const zmoe_router *router, uint32_t experts) {
  return router->groups == 0 ||
         (router->groups <= ZMOE_MAX_GROUPS && experts % router->groups == 0 &&
          experts / router->groups >= 2 && router->kept >= 1 && router->kept <= router->groups);
}

static int check(const zmoe_router *router, zmoe_dtype x_dtype) {
  const zmoe_weight *gate = router->gate;
  if (zmoe_weight_check(gate) != ZMOE_OK || gate->out_features > INT32_MAX ||
      !zmoe_norm_fits(&router->input, gate->in_features) || router->kind > ZMOE_SIGMOID_TOP_K ||
      !groups_fit(router, gate->out_features) || router->top_k < 1 ||
      router->top_k > gate->out_features || zmoe_dtype_bytes(x_dtype) == 0)
    return ZMOE_EINVAL;
  return ZMOE_OK;
}

static int route_block(zmoe_thread_pool *pool, struct route *job, const void *x,
                       zmoe_dtype x_dtype) {
  void *ys[] = {job->logits};
  const size_t strides[] = {2 * (size_t)job->experts};
  int status = zmoe_linear(pool, &job->router->gate, 1, x, x_dtype, job->rows, ys, strides,
                           ZMOE_F32, ZMOE_EXACT);
  if (status == ZMOE_OK)
    zmoe_run_rows(pool, work, job, job->rows);
  return status;
}

int zmoe_route(zmoe_thread_pool *pool, const zmoe_router *router, const float *h, uint32_t rows,
               void *x, zmoe_dtype x_dtype, int32_t *ids, float *weights) {
  int status = check(router, x_dtype);
  if (status != ZMOE_OK)
    return status;
  uint32_t width = router->gate->in_features, experts = router->gate->out_features;
  size_t mark = zmoe_thread_pool_mark(pool), k = router->top_k;
  uint32_t most = rows < ZMOE_ROW_BLOCK ? rows : ZMOE_ROW_BLOCK;
  float *logits = zmoe_thread_pool_scratch(pool, (size_t)most * 2 * experts * sizeof *logits);
  if (logits == NULL || !zmoe_linear_has_room(pool, width))
    status = ZMOE_ENOMEM;
  else
    zmoe_norm_all(pool, &router->input, width, h, rows, x, x_dtype);
  size_t row_bytes = width * zmoe_dtype_bytes(x_dtype);
  for (uint32_t first = 0; first < rows && status == ZMOE_OK; first += ZMOE_ROW_BLOCK) {
    struct route job = {.router = router,
                        .ops = zmoe_vector_ops_for(zmoe_thread_pool_isa(pool)),
                        .logits = logits,
                        .ids = ids + first * k,
                        .weights = weights + first * k,
                        .rows = rows - first < ZMOE_ROW_BLOCK ? rows - first : ZMOE_ROW_BLOCK,
                        .experts = experts};
    status = route_block(pool, &job, (const unsigned char *)x + first * row_bytes, x_dtype);
  }
  zmoe_thread_pool_release(pool, mark);
  return status;
}

size_t zmoe_route_scratch(const zmoe_router *router) {
  return (size_t)ZMOE_ROW_BLOCK * 2 * router->gate->out_features * sizeof(float) +
         zmoe_linear_scratch(router->gate->in_features);
}
