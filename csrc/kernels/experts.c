/* All matmuls of a node's experts in one layer, in one call: which pairs, in what
 * order, and the memory for them. */
#include "experts.h"

#include <string.h>

#include "weight.h"

/* Rows in order, experts that exist, none twice in a row. */
static int pairs_are_valid(const int32_t *pair_rows, const int32_t *pair_experts, uint32_t n_pairs,
                           uint32_t rows, uint32_t experts) {
  uint32_t first = 0; /* pair of this row */
  for (uint32_t i = 0; i < n_pairs; i++) {
    if (pair_rows[i] < 0 || (uint32_t)pair_rows[i] >= rows ||
        (i > 0 && pair_rows[i] < pair_rows[i - 1]) || pair_experts[i] < 0 ||
        (uint32_t)pair_experts[i] >= experts)
      return 0;
    if (pair_rows[i] != pair_rows[first])
      first = i;
    for (uint32_t j = first; j < i; j++)
      if (pair_experts[j] == pair_experts[i])
        return 0;
  }
  return 1;
}

/* Sorts the block's pairs by expert, keeping their order. */
static void sort_pairs(struct zmoe_experts_job *job, const int32_t *pair_experts,
                       uint32_t *starts) {
  uint32_t experts = job->layer->experts;
  memset(starts, 0, (experts + 1) * sizeof *starts);
  for (uint32_t i = 0; i < job->n_pairs; i++)
    starts[pair_experts[job->first_pair + i] + 1]++;
  for (uint32_t e = 0; e < experts; e++) {
    uint32_t count = starts[e + 1];
    starts[e + 1] += starts[e];
    if (count > 0)
      job->groups[job->n_groups++] = (struct zmoe_group){e, starts[e], starts[e] + count};
  }
  for (uint32_t i = 0; i < job->n_pairs; i++)
    job->order[starts[pair_experts[job->first_pair + i]]++] = i;
}

/* All but the packings, whose layouts depend on the groups. */
static int take_scratch(zmoe_thread_pool *pool, struct zmoe_experts_job *job, uint32_t **starts) {
  size_t pairs = job->n_pairs, rows = job->rows, experts = job->layer->experts;
  size_t middle = job->layer->down == NULL ? 0 : pairs * job->hidden;
  size_t copies = zmoe_is_plain(job->x, job->x_dtype) ? 0 : rows * job->layer->up->in_features;
  *starts = zmoe_thread_pool_scratch(pool, (experts + 1) * sizeof **starts);
  job->groups = zmoe_thread_pool_scratch(pool, experts * sizeof *job->groups);
  job->order = zmoe_thread_pool_scratch(pool, pairs * sizeof *job->order);
  job->x_packed = zmoe_thread_pool_scratch(pool, rows * sizeof *job->x_packed);
  job->in.plain = zmoe_thread_pool_scratch(pool, pairs * sizeof *job->in.plain);
  job->in.packed = zmoe_thread_pool_scratch(pool, pairs * sizeof *job->in.packed);
  job->mid.plain = zmoe_thread_pool_scratch(pool, pairs * sizeof *job->mid.plain);
  job->mid.packed = zmoe_thread_pool_scratch(pool, pairs * sizeof *job->mid.packed);
  job->copies = zmoe_thread_pool_scratch(pool, copies * sizeof *job->copies);
  job->activations = zmoe_thread_pool_scratch(pool, middle * sizeof *job->activations);
  job->own = zmoe_thread_pool_scratch(pool, sizeof *job->own * zmoe_thread_pool_threads(pool));
  if (*starts == NULL || job->groups == NULL || job->order == NULL || job->x_packed == NULL ||
      job->in.plain == NULL || job->in.packed == NULL || job->mid.plain == NULL ||
      job->mid.packed == NULL || job->copies == NULL || job->activations == NULL ||
      job->own == NULL)
    return ZMOE_ENOMEM;
  return ZMOE_OK;
}

/* Room for `rows` rows in the layout that the kernels want for `w`. */
static int take_packed(zmoe_thread_pool *pool, const struct zmoe_experts_job *job,
                       const zmoe_weight *w, uint32_t rows, zmoe_layout *layout, void **to) {
  /* What MLX would round to the type of x, activations too, may be rounded to it. */
  *layout = job->kernels->layout(w, job->x_dtype, job->precision);
  size_t bytes = zmoe_round_up(zmoe_packed_bytes(*layout, w->in_features), 64);
  unsigned char *memory = zmoe_thread_pool_scratch(pool, rows * bytes);
  for (uint32_t r = 0; r < rows && memory != NULL; r++)
    to[r] = memory + r * bytes;
  return memory != NULL ? ZMOE_OK : ZMOE_ENOMEM;
}

static int same_layout(const zmoe_weight *a, const zmoe_weight *b) {
  return b == NULL || (a->format == b->format && a->bits == b->bits && a->group == b->group);
}

static int plan_layouts(zmoe_thread_pool *pool, struct zmoe_experts_job *job) {
  const zmoe_expert_layer *layer = job->layer;
  job->in.layout = job->mid.layout = ZMOE_LAYOUT_PLAIN;
  int status = ZMOE_OK;
  if (same_layout(layer->up, layer->gate))
    status = take_packed(pool, job, layer->up, job->rows, &job->in.layout, job->x_packed);
  if (status == ZMOE_OK && layer->down != NULL)
    status = take_packed(pool, job, layer->down, job->n_pairs, &job->mid.layout, job->mid.packed);
  return status;
}

static void point_to_rows(struct zmoe_experts_job *job) {
  uint32_t in_features = job->layer->up->in_features;
  for (uint32_t i = 0; i < job->n_pairs; i++) {
    uint32_t row = (uint32_t)job->pair_rows[job->first_pair + job->order[i]] - job->first_row;
    job->in.plain[i] = zmoe_plain_row(job->x, job->x_dtype, row, in_features, job->copies);
    job->in.packed[i] = job->x_packed[row];
    job->mid.plain[i] = job->activations + (size_t)i * job->hidden;
  }
}

static int run_block(zmoe_thread_pool *pool, struct zmoe_experts_job *job,
                     const int32_t *pair_experts) {
  size_t mark = zmoe_thread_pool_mark(pool);
  uint32_t *starts;
  int status = take_scratch(pool, job, &starts);
  if (status == ZMOE_OK) {
    sort_pairs(job, pair_experts, starts);
    status = plan_layouts(pool, job);
  }
  if (status == ZMOE_OK) {
    point_to_rows(job);
    zmoe_thread_pool_run_matmul(
        pool, job->layer->down != NULL ? zmoe_experts_work : zmoe_gather_work, job);
  }
  zmoe_thread_pool_release(pool, mark);
  return status;
}

static int run(zmoe_thread_pool *pool, const zmoe_expert_layer *layer, const void *x,
               zmoe_dtype x_dtype, uint32_t rows, const int32_t *pair_rows,
               const int32_t *pair_experts, const float *pair_weights, uint32_t n_pairs, void *out,
               zmoe_dtype out_dtype, zmoe_precision precision) {
  size_t row_bytes = (size_t)layer->up->in_features * zmoe_dtype_bytes(x_dtype);
  if (row_bytes == 0 || zmoe_dtype_bytes(out_dtype) == 0 ||
      !pairs_are_valid(pair_rows, pair_experts, n_pairs, rows, layer->experts))
    return ZMOE_EINVAL;
  uint32_t pair = 0;
  for (uint32_t first = 0; first < rows; first += ZMOE_ROW_BLOCK) {
    uint32_t end = rows - first < ZMOE_ROW_BLOCK ? rows : first + ZMOE_ROW_BLOCK;
    uint32_t pair_end = pair;
    while (pair_end < n_pairs && (uint32_t)pair_rows[pair_end] < end)
      pair_end++;
    struct zmoe_experts_job job = {
        .kernels = zmoe_kernels_for(zmoe_thread_pool_isa(pool)),
        .ops = zmoe_vector_ops_for(zmoe_thread_pool_isa(pool)),
        .isa = zmoe_thread_pool_isa(pool),
        .threads = zmoe_thread_pool_threads(pool),
        .layer = layer,
        .precision = precision,
        .x = (const unsigned char *)x + first * row_bytes,
        .x_dtype = x_dtype,
        .out_dtype = out_dtype,
        .rows = end - first,
        .n_pairs = pair_end - pair,
        .width = layer->down != NULL ? layer->down->out_features : 0,
        .hidden = layer->up->out_features,
        .pair_rows = pair_rows,
        .pair_weights = pair_weights,
        .first_pair = pair,
        .first_row = first,
        .out = out,
    };
    int status = run_block(pool, &job, pair_experts);
    if (status != ZMOE_OK)
      return status;
    pair = pair_end;
  }
  return ZMOE_OK;
}

int zmoe_experts(zmoe_thread_pool *pool, const zmoe_expert_layer *layer, const void *x,
                 zmoe_dtype x_dtype, uint32_t rows, const int32_t *pair_rows,
                 const int32_t *pair_experts, const float *pair_weights, uint32_t n_pairs,
                 void *out, zmoe_dtype out_dtype, zmoe_precision precision) {
  if (layer->activation > ZMOE_GELU_TANH_ONLY || layer->experts == 0 ||
      (layer->activation <= ZMOE_CLAMPED_SWIGLU) != (layer->gate != NULL) ||
      layer->down->in_features != layer->up->out_features)
    return ZMOE_EINVAL;
  return run(pool, layer, x, x_dtype, rows, pair_rows, pair_experts, pair_weights, n_pairs, out,
             out_dtype, precision);
}

int zmoe_gather_linear(zmoe_thread_pool *pool, const zmoe_weight *weights, uint32_t n_experts,
                       const void *x, zmoe_dtype x_dtype, uint32_t rows, const int32_t *pair_rows,
                       const int32_t *pair_experts, uint32_t n_pairs, void *out,
                       zmoe_dtype out_dtype, zmoe_precision precision) {
  const zmoe_expert_layer layer = {.up = weights, .experts = n_experts};
  return run(pool, &layer, x, x_dtype, rows, pair_rows, pair_experts, NULL, n_pairs, out, out_dtype,
             precision);
}

size_t zmoe_experts_scratch(uint32_t width, uint32_t hidden, uint32_t pairs_per_row) {
  size_t pairs = (size_t)ZMOE_ROW_BLOCK * pairs_per_row;
  size_t x_bytes = zmoe_packed_most(width) + 64;
  size_t mid_bytes = zmoe_packed_most(hidden) + 64;
  return ZMOE_ROW_BLOCK * (width * sizeof(float) + x_bytes + 64) +
         pairs * (hidden * sizeof(float) + mid_bytes + 64);
}
