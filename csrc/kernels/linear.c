/* All products of one input, in one call. */
#include "product.h"

#include <string.h>

#include "compute.h"
#include "weight.h"

/* x arranged in one way, which several weights may share. */
struct arrangement {
  zmoe_layout layout;
  const zmoe_weight *like;
  void **rows; /* [rows] */
};

struct linear {
  const zmoe_kernels *kernels;
  zmoe_isa isa;
  uint32_t n_weights;
  const zmoe_weight *const *weights;
  const void *x;
  zmoe_dtype x_dtype, y_dtype;
  uint32_t rows, ins;
  void *const *ys;
  const size_t *strides;
  float *copies;
  const float **plain;
  struct arrangement arrangements[ZMOE_MAX_WEIGHTS];
  uint32_t n_arrangements;
  uint32_t of_weight[ZMOE_MAX_WEIGHTS]; /* index of its arrangement */
  uint32_t first_task[ZMOE_MAX_WEIGHTS + 1];
  unsigned char *per_thread;
  _Atomic int infinite; /* a row holds what only the plain way gets right */
  uint32_t run;         /* of tasks */
  zmoe_tasks input_tasks, tasks;
};

enum { PER_THREAD = ZMOE_PANEL_BYTES + ZMOE_SUMS * 4 };

/* ---- stages ---------------------------------------------------------------- */

static void take_rows(struct linear *job) {
  for (uint32_t r; (r = zmoe_take(&job->input_tasks)) < job->rows;) {
    zmoe_widen(job->x, job->x_dtype, r, job->ins, job->copies, job->isa);
    if (job->n_arrangements == 0)
      continue;
    if (!zmoe_is_finite(job->plain[r], job->ins)) {
      atomic_store(&job->infinite, 1);
      continue;
    }
    for (uint32_t a = 0; a < job->n_arrangements; a++)
      if (job->arrangements[a].layout != ZMOE_LAYOUT_PLAIN)
        job->kernels->arrange(job->arrangements[a].layout, job->arrangements[a].like, job->plain[r],
                              job->arrangements[a].rows[r]);
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
  float *panel = (float *)(void *)(job->per_thread + (size_t)thread * PER_THREAD);
  float *sums = panel + ZMOE_PANEL_BYTES / 4;
  uint32_t n_tasks = job->first_task[job->n_weights], i = 0;
  int infinite = atomic_load(&job->infinite);
  zmoe_run mine = {0, 0};
  for (uint32_t task; zmoe_take_of_run(&job->tasks, n_tasks, job->run, &mine, &task);) {
    while (task >= job->first_task[i + 1])
      i++;
    const zmoe_weight *w = job->weights[i];
    uint32_t first = (task - job->first_task[i]) * ZMOE_PANEL,
             last = zmoe_panel_end(first, w->outs);
    zmoe_rows rows = {job->plain, NULL, ZMOE_LAYOUT_PLAIN};
    if (job->n_arrangements > 0 && !infinite) {
      const struct arrangement *a = &job->arrangements[job->of_weight[i]];
      rows.arranged = a->rows;
      rows.layout = a->layout;
    }
    zmoe_product(job->kernels, w, &rows, 0, job->rows, first, last, panel, sums);
    zmoe_add_bias(w, job->rows, first, last, sums);
    store(job, i, first, last, sums);
  }
}

static void work(zmoe_team *team, void *argument, uint32_t thread) {
  struct linear *job = argument;
  take_rows(job);
  zmoe_team_barrier(team);
  multiply(job, thread);
}

/* ---- the call ---------------------------------------------------------------- */

static int same_arrangement(zmoe_layout layout, const zmoe_weight *a, const zmoe_weight *b) {
  return a->group == b->group && (!zmoe_layout_is_integer(layout) || a->format == b->format);
}

/* Which layouts the weights want; none when all take x as it is. */
static void plan_arrangements(struct linear *job, zmoe_precision precision) {
  for (uint32_t i = 0; i < job->n_weights; i++) {
    const zmoe_weight *w = job->weights[i];
    zmoe_layout layout = job->kernels->layout(w, job->x_dtype, precision);
    if (job->rows > zmoe_few_rows(layout))
      layout = ZMOE_LAYOUT_PLAIN;
    uint32_t a = 0;
    while (a < job->n_arrangements && !(job->arrangements[a].layout == layout &&
                                        same_arrangement(layout, job->arrangements[a].like, w)))
      a++;
    if (a == job->n_arrangements)
      job->arrangements[job->n_arrangements++] = (struct arrangement){layout, w, NULL};
    job->of_weight[i] = a;
  }
  if (job->n_arrangements == 1 && job->arrangements[0].layout == ZMOE_LAYOUT_PLAIN)
    job->n_arrangements = 0;
}

static int take_scratch(zmoe_team *team, struct linear *job) {
  job->per_thread = zmoe_team_scratch(team, (size_t)PER_THREAD * zmoe_team_threads(team));
  job->plain = zmoe_team_scratch(team, ZMOE_ROW_BLOCK * sizeof *job->plain);
  int plain = zmoe_is_plain(job->x, job->x_dtype);
  if (!plain)
    job->copies = zmoe_team_scratch(team, (size_t)job->rows * job->ins * sizeof(float));
  if (job->per_thread == NULL || job->plain == NULL || (!plain && job->copies == NULL))
    return ZMOE_ENOMEM;
  for (uint32_t r = 0; r < job->rows; r++)
    job->plain[r] = zmoe_plain_row(job->x, job->x_dtype, r, job->ins, job->copies);
  for (uint32_t a = 0; a < job->n_arrangements; a++) {
    struct arrangement *to = &job->arrangements[a];
    to->rows = zmoe_team_scratch(team, job->rows * sizeof *to->rows);
    size_t bytes = zmoe_round_up(zmoe_arranged_bytes(to->layout, job->ins), 64);
    unsigned char *rows = zmoe_team_scratch(team, job->rows * bytes);
    if (to->rows == NULL || rows == NULL)
      return ZMOE_ENOMEM;
    for (uint32_t r = 0; r < job->rows; r++)
      to->rows[r] = rows + r * bytes;
  }
  return ZMOE_OK;
}

size_t zmoe_linear_scratch(uint32_t ins) {
  size_t arranged = zmoe_arranged_most(ins) + 128;
  return (size_t)ZMOE_ROW_BLOCK * (ins + 64) * sizeof(float) +
         (size_t)ZMOE_MAX_WEIGHTS * ZMOE_ROW_BLOCK * (arranged + sizeof(void *));
}

static int multiply_block(zmoe_team *team, struct linear *job, zmoe_precision precision) {
  plan_arrangements(job, precision);
  for (uint32_t i = 0; i < job->n_weights; i++)
    job->first_task[i + 1] = job->first_task[i] + zmoe_panels(job->weights[i]->outs);
  uint32_t n_tasks = job->first_task[job->n_weights];
  job->run = job->rows > ZMOE_DOT_ROWS ? 1 : zmoe_run_of(n_tasks, zmoe_team_threads(team));
  size_t mark = zmoe_team_mark(team);
  int status = take_scratch(team, job);
  if (status == ZMOE_OK)
    zmoe_team_multiply(team, work, job);
  zmoe_team_release(team, mark);
  return status;
}

int zmoe_linear(zmoe_team *team, const zmoe_weight *const *weights, uint32_t n_weights,
                const void *x, zmoe_dtype x_dtype, uint32_t rows, void *const *ys,
                const size_t *strides, zmoe_dtype y_dtype, zmoe_precision precision) {
  size_t x_item = zmoe_dtype_bytes(x_dtype), y_item = zmoe_dtype_bytes(y_dtype);
  if (n_weights < 1 || n_weights > ZMOE_MAX_WEIGHTS || x_item == 0 || y_item == 0)
    return ZMOE_EINVAL;
  uint32_t ins = weights[0]->ins;
  for (uint32_t i = 0; i < n_weights; i++)
    if (weights[i]->ins != ins || strides[i] < weights[i]->outs)
      return ZMOE_EINVAL;
  for (uint32_t first = 0; first < rows; first += ZMOE_ROW_BLOCK) {
    void *outs[ZMOE_MAX_WEIGHTS];
    for (uint32_t i = 0; i < n_weights; i++)
      outs[i] = (unsigned char *)ys[i] + first * strides[i] * y_item;
    struct linear job = {
        .kernels = zmoe_kernels_for(zmoe_team_isa(team)),
        .isa = zmoe_team_isa(team),
        .n_weights = n_weights,
        .weights = weights,
        .x = (const unsigned char *)x + (size_t)first * ins * x_item,
        .x_dtype = x_dtype,
        .y_dtype = y_dtype,
        .rows = rows - first < ZMOE_ROW_BLOCK ? rows - first : ZMOE_ROW_BLOCK,
        .ins = ins,
        .ys = outs,
        .strides = strides,
    };
    int status = multiply_block(team, &job, precision);
    if (status != ZMOE_OK)
      return status;
  }
  return ZMOE_OK;
}
