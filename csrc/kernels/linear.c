/* All matmuls of one input, in one call. */
#include "matmul.h"

#include <string.h>

#include "compute.h"
#include "weight.h"

/* x packed in one way, which several weights may share. */
struct packing {
  zmoe_layout layout;
  const zmoe_weight *like;
  void **rows; /* [rows] */
};

struct own {
  zmoe_scratch scratch;
  float sums[ZMOE_SUMS];
};
_Static_assert(sizeof(struct own) <= ZMOE_THREAD_SCRATCH, "a pool reserves as much");

struct linear {
  const zmoe_kernels *kernels;
  zmoe_isa isa;
  uint32_t n_weights;
  const zmoe_weight *const *weights;
  const void *x;
  zmoe_dtype x_dtype, y_dtype;
  uint32_t rows, in_features;
  void *const *ys;
  const size_t *strides;
  float *copies;
  const float **plain;
  struct packing packings[ZMOE_MAX_WEIGHTS];
  uint32_t n_packings;
  uint32_t of_weight[ZMOE_MAX_WEIGHTS]; /* index of its packing */
  uint32_t first_task[ZMOE_MAX_WEIGHTS + 1];
  struct own *own; /* [threads] */
  uint32_t threads;
  zmoe_tasks input_tasks, tasks;
};

/* ---- stages ---------------------------------------------------------------- */

static void take_rows(struct linear *job) {
  for (uint32_t r; (r = zmoe_take(&job->input_tasks)) < job->rows;) {
    zmoe_widen(job->x, job->x_dtype, r, job->in_features, job->copies, job->isa);
    if (job->n_packings == 0)
      continue;
    int finite = zmoe_is_finite(job->plain[r], job->in_features);
    for (uint32_t a = 0; a < job->n_packings; a++) {
      const struct packing *to = &job->packings[a];
      if (!finite)
        to->rows[r] = NULL;
      else if (to->layout != ZMOE_LAYOUT_PLAIN)
        job->kernels->pack_input(to->layout, to->like, job->plain[r], to->rows[r]);
    }
  }
}

static void store(const struct linear *job, uint32_t i, uint32_t first, uint32_t last,
                  const float *sums) {
  size_t item = zmoe_dtype_bytes(job->y_dtype);
  for (uint32_t r = 0; r < job->rows; r++)
    (void)zmoe_convert((unsigned char *)job->ys[i] + (r * job->strides[i] + first) * item,
                       job->y_dtype, sums + (size_t)r * ZMOE_PANEL, ZMOE_F32, last - first,
                       job->isa);
}

static void multiply(struct linear *job, uint32_t thread) {
  zmoe_scratch *scratch = &job->own[thread].scratch;
  float *sums = job->own[thread].sums;
  uint32_t n_tasks = job->first_task[job->n_weights], i = 0;
  zmoe_run mine = {0, 0};
  for (uint32_t task; zmoe_take_of_run(&job->tasks, n_tasks, job->threads, &mine, &task);) {
    while (task >= job->first_task[i + 1])
      i++;
    const zmoe_weight *w = job->weights[i];
    uint32_t first = (task - job->first_task[i]) * ZMOE_PANEL,
             last = zmoe_panel_end(first, w->out_features);
    zmoe_rows rows = {job->plain, NULL, ZMOE_LAYOUT_PLAIN};
    if (job->n_packings > 0) {
      const struct packing *a = &job->packings[job->of_weight[i]];
      rows.packed = a->rows;
      rows.layout = a->layout;
    }
    uint32_t next = zmoe_next_of_run(&job->tasks, n_tasks, &mine), then = i;
    while (next < n_tasks && next >= job->first_task[then + 1])
      then++;
    scratch->next = next < n_tasks ? job->weights[then] : NULL;
    scratch->next_output = (next - job->first_task[then]) * ZMOE_PANEL;
    zmoe_matmul(job->kernels, w, &rows, 0, job->rows, first, last, scratch, sums);
    zmoe_add_bias(w, job->rows, first, last, sums);
    store(job, i, first, last, sums);
  }
}

static void work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  struct linear *job = argument;
  take_rows(job);
  zmoe_thread_pool_barrier(pool);
  multiply(job, thread);
}

/* ---- the call ---------------------------------------------------------------- */

static int same_packing(zmoe_layout layout, const zmoe_weight *a, const zmoe_weight *b) {
  return a->group == b->group &&
         (!zmoe_layout_is_integer(layout) || (a->format == b->format && a->bits == b->bits));
}

/* Which layouts the weights want; none when all take x as it is. */
static void plan_packings(struct linear *job, zmoe_precision precision) {
  for (uint32_t i = 0; i < job->n_weights; i++) {
    const zmoe_weight *w = job->weights[i];
    zmoe_layout layout = job->kernels->layout(w, job->x_dtype, precision);
    uint32_t a = 0;
    while (a < job->n_packings &&
           !(job->packings[a].layout == layout && same_packing(layout, job->packings[a].like, w)))
      a++;
    if (a == job->n_packings)
      job->packings[job->n_packings++] = (struct packing){layout, w, NULL};
    job->of_weight[i] = a;
  }
  if (job->n_packings == 1 && job->packings[0].layout == ZMOE_LAYOUT_PLAIN)
    job->n_packings = 0;
}

static int take_scratch(zmoe_thread_pool *pool, struct linear *job) {
  job->own = zmoe_thread_pool_scratch(pool, sizeof *job->own * zmoe_thread_pool_threads(pool));
  job->plain = zmoe_thread_pool_scratch(pool, ZMOE_ROW_BLOCK * sizeof *job->plain);
  int plain = zmoe_is_plain(job->x, job->x_dtype);
  if (!plain)
    job->copies =
        zmoe_thread_pool_scratch(pool, (size_t)job->rows * job->in_features * sizeof(float));
  if (job->own == NULL || job->plain == NULL || (!plain && job->copies == NULL))
    return ZMOE_ENOMEM;
  for (uint32_t r = 0; r < job->rows; r++)
    job->plain[r] = zmoe_plain_row(job->x, job->x_dtype, r, job->in_features, job->copies);
  for (uint32_t a = 0; a < job->n_packings; a++) {
    struct packing *to = &job->packings[a];
    to->rows = zmoe_thread_pool_scratch(pool, job->rows * sizeof *to->rows);
    size_t bytes = zmoe_round_up(zmoe_packed_bytes(to->layout, job->in_features), 64);
    unsigned char *rows = zmoe_thread_pool_scratch(pool, job->rows * bytes);
    if (to->rows == NULL || rows == NULL)
      return ZMOE_ENOMEM;
    for (uint32_t r = 0; r < job->rows; r++)
      to->rows[r] = rows + r * bytes;
  }
  return ZMOE_OK;
}

size_t zmoe_linear_scratch(uint32_t in_features) {
  size_t packed = zmoe_packed_most(in_features) + 128;
  return (size_t)ZMOE_ROW_BLOCK * (in_features + 64) * sizeof(float) +
         (size_t)ZMOE_MAX_WEIGHTS * ZMOE_ROW_BLOCK * (packed + sizeof(void *));
}

static int multiply_block(zmoe_thread_pool *pool, struct linear *job, zmoe_precision precision) {
  plan_packings(job, precision);
  for (uint32_t i = 0; i < job->n_weights; i++)
    job->first_task[i + 1] = job->first_task[i] + zmoe_panels(job->weights[i]->out_features);
  size_t mark = zmoe_thread_pool_mark(pool);
  int status = take_scratch(pool, job);
  if (status == ZMOE_OK)
    zmoe_thread_pool_run_matmul(pool, work, job);
  zmoe_thread_pool_release(pool, mark);
  return status;
}

int zmoe_linear(zmoe_thread_pool *pool, const zmoe_weight *const *weights, uint32_t n_weights,
                const void *x, zmoe_dtype x_dtype, uint32_t rows, void *const *ys,
                const size_t *strides, zmoe_dtype y_dtype, zmoe_precision precision) {
  size_t x_item = zmoe_dtype_bytes(x_dtype), y_item = zmoe_dtype_bytes(y_dtype);
  if (n_weights < 1 || n_weights > ZMOE_MAX_WEIGHTS || x_item == 0 || y_item == 0)
    return ZMOE_EINVAL;
  uint32_t in_features = weights[0]->in_features;
  for (uint32_t i = 0; i < n_weights; i++)
    if (weights[i]->in_features != in_features || strides[i] < weights[i]->out_features)
      return ZMOE_EINVAL;
  for (uint32_t first = 0; first < rows; first += ZMOE_ROW_BLOCK) {
    void *targets[ZMOE_MAX_WEIGHTS];
    for (uint32_t i = 0; i < n_weights; i++)
      targets[i] = (unsigned char *)ys[i] + first * strides[i] * y_item;
    struct linear job = {
        .kernels = zmoe_kernels_for(zmoe_thread_pool_isa(pool)),
        .isa = zmoe_thread_pool_isa(pool),
        .threads = zmoe_thread_pool_threads(pool),
        .n_weights = n_weights,
        .weights = weights,
        .x = (const unsigned char *)x + (size_t)first * in_features * x_item,
        .x_dtype = x_dtype,
        .y_dtype = y_dtype,
        .rows = rows - first < ZMOE_ROW_BLOCK ? rows - first : ZMOE_ROW_BLOCK,
        .in_features = in_features,
        .ys = targets,
        .strides = strides,
    };
    int status = multiply_block(pool, &job, precision);
    if (status != ZMOE_OK)
      return status;
  }
  return ZMOE_OK;
}
