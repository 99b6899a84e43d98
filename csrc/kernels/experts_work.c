/* The matmuls of a node's experts in one layer.
 *
 * The pairs (row, expert) are sorted by expert, so that each weight is read
 * once.  Stage by stage, all threads together: take the rows; gate, up and the
 * activation; pack what comes out; down, weighted and summed per row in the
 * order of the experts.  A task is one panel of outputs of one expert, or, in
 * the last stage, of all experts, so that no two threads add to one sum. */
#include "experts.h"

#include <string.h>

/* ---- stages ---------------------------------------------------------------- */

/* 0 for a row that no layout but the plain one can hold. */
static int pack_row(const zmoe_kernels *kernels, zmoe_layout layout, const zmoe_weight *w,
                    const float *x, void *to) {
  if (layout == ZMOE_LAYOUT_PLAIN)
    return 1;
  int finite = zmoe_is_finite(x, w->in_features);
  if (finite)
    kernels->pack_input(layout, w, x, to);
  return finite;
}

static void take_rows(struct zmoe_experts_job *job) {
  const zmoe_weight *w = job->layer->up;
  for (uint32_t r; (r = zmoe_take(&job->take_tasks)) < job->rows;) {
    zmoe_widen(job->x, job->x_dtype, r, w->in_features, job->copies, job->isa);
    const float *x = zmoe_plain_row(job->x, job->x_dtype, r, w->in_features, job->copies);
    int packed = pack_row(job->kernels, job->in.layout, w, x, job->x_packed[r]);
    for (uint32_t i = 0; i < job->n_pairs && !packed; i++)
      if (job->in.plain[i] == x)
        job->in.packed[i] = NULL;
  }
}

static void matmul(const struct zmoe_experts_job *job, const zmoe_weight *w, const zmoe_rows *x,
                   const struct zmoe_group *group, uint32_t first, zmoe_scratch *scratch,
                   float *sums) {
  uint32_t last = zmoe_panel_end(first, w->out_features);
  zmoe_matmul(job->kernels, w, x, group->begin, group->end, first, last, scratch, sums);
  zmoe_add_bias(w, group->end - group->begin, first, last, sums);
}

/* The tasks of one stage are the panels of one expert after the other. */
static struct zmoe_group *group_of(const struct zmoe_experts_job *job, uint32_t task) {
  return &job->groups[task / zmoe_panels(job->hidden)];
}

static uint32_t output_of(const struct zmoe_experts_job *job, uint32_t task) {
  return task % zmoe_panels(job->hidden) * ZMOE_PANEL;
}

/* Of up and gate each its own next panel is fetched ahead: memory is read slower by turns. */
static void activate_panel(struct zmoe_experts_job *job, uint32_t task, uint32_t next,
                           struct zmoe_experts_own *own) {
  const zmoe_expert_layer *layer = job->layer;
  const struct zmoe_group *group = group_of(job, task);
  int is_last = next == job->n_groups * zmoe_panels(job->hidden);
  uint32_t first = output_of(job, task), then = is_last ? 0 : group_of(job, next)->expert;
  zmoe_scratch *scratch = &own->scratch;
  float *up = own->up, *gate = own->gate;
  scratch->next = is_last ? NULL : &layer->up[then];
  scratch->next_output = output_of(job, next);
  matmul(job, &layer->up[group->expert], &job->in, group, first, scratch, up);
  if (layer->gate != NULL) {
    scratch->next = is_last ? NULL : &layer->gate[then];
    matmul(job, &layer->gate[group->expert], &job->in, group, first, scratch, gate);
  }
  uint32_t count = zmoe_panel_end(first, job->hidden) - first;
  for (uint32_t i = group->begin; i < group->end; i++) {
    size_t at = (size_t)(i - group->begin) * ZMOE_PANEL;
    job->ops->activate(layer, gate + at, up + at, count,
                       job->activations + (size_t)i * job->hidden + first);
  }
}

static void activate(struct zmoe_experts_job *job, struct zmoe_experts_own *own) {
  uint32_t count = job->n_groups * zmoe_panels(job->hidden);
  zmoe_run mine = {0, 0};
  for (uint32_t task; zmoe_take_of_run(&job->up_tasks, count, job->threads, &mine, &task);)
    activate_panel(job, task, zmoe_next_of_run(&job->up_tasks, count, &mine), own);
}

static void pack_activations(struct zmoe_experts_job *job) {
  for (uint32_t i; (i = zmoe_take(&job->mid_tasks)) < job->n_pairs;)
    if (!pack_row(job->kernels, job->mid.layout, job->layer->down, job->mid.plain[i],
                  job->mid.packed[i]))
      job->mid.packed[i] = NULL;
}

static void store(const struct zmoe_experts_job *job, size_t row, uint32_t width, uint32_t first,
                  const float *sums) {
  size_t item = zmoe_dtype_bytes(job->out_dtype);
  (void)zmoe_convert((unsigned char *)job->out + (row * width + first) * item, job->out_dtype, sums,
                     ZMOE_F32, zmoe_panel_end(first, width) - first, job->isa);
}

static void store_pairs(const struct zmoe_experts_job *job, const struct zmoe_group *group,
                        uint32_t width, uint32_t first, const float *sums) {
  for (uint32_t i = group->begin; i < group->end; i++)
    store(job, job->first_pair + job->order[i], width, first,
          sums + (size_t)(i - group->begin) * ZMOE_PANEL);
}

static void add_weighted(const struct zmoe_experts_job *job, const struct zmoe_group *group,
                         const float *sums, float *total) {
  for (uint32_t i = group->begin; i < group->end; i++) {
    uint32_t pair = job->first_pair + job->order[i];
    float weight = job->pair_weights[pair];
    float *to = total + (size_t)((uint32_t)job->pair_rows[pair] - job->first_row) * ZMOE_PANEL;
    const float *from = sums + (size_t)(i - group->begin) * ZMOE_PANEL;
    for (uint32_t o = 0; o < ZMOE_PANEL; o++)
      to[o] += weight * from[o];
  }
}

static void sum_experts(struct zmoe_experts_job *job, struct zmoe_experts_own *own) {
  zmoe_scratch *scratch = &own->scratch;
  float *sums = own->up, *total = own->total;
  uint32_t count = zmoe_panels(job->width);
  zmoe_run mine = {0, 0};
  for (uint32_t task; zmoe_take_of_run(&job->down_tasks, count, job->threads, &mine, &task);) {
    uint32_t first = task * ZMOE_PANEL, next = zmoe_next_of_run(&job->down_tasks, count, &mine);
    scratch->next_output = next * ZMOE_PANEL;
    memset(total, 0, (size_t)job->rows * ZMOE_PANEL * sizeof *total);
    for (uint32_t g = 0; g < job->n_groups; g++) {
      const struct zmoe_group *group = &job->groups[g];
      const zmoe_weight *down = &job->layer->down[group->expert];
      scratch->next = next < count ? down : NULL;
      matmul(job, down, &job->mid, group, first, scratch, sums);
      if (job->pair_weights == NULL)
        store_pairs(job, group, job->width, first, sums);
      else
        add_weighted(job, group, sums, total);
    }
    if (job->pair_weights != NULL)
      for (uint32_t r = 0; r < job->rows; r++)
        store(job, job->first_row + r, job->width, first, total + (size_t)r * ZMOE_PANEL);
  }
}

void zmoe_experts_work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  struct zmoe_experts_job *job = argument;
  struct zmoe_experts_own *own = &job->own[thread];
  take_rows(job);
  zmoe_thread_pool_barrier(pool);
  activate(job, own);
  zmoe_thread_pool_barrier(pool);
  if (job->mid.layout != ZMOE_LAYOUT_PLAIN) {
    pack_activations(job);
    zmoe_thread_pool_barrier(pool);
  }
  sum_experts(job, own);
}

/* One matrix of the experts alone: `up`, its matmuls stored as they are. */
void zmoe_gather_work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  struct zmoe_experts_job *job = argument;
  zmoe_scratch *scratch = &job->own[thread].scratch;
  float *sums = job->own[thread].up;
  scratch->next = NULL;
  take_rows(job);
  zmoe_thread_pool_barrier(pool);
  uint32_t panels = zmoe_panels(job->hidden);
  for (uint32_t task; (task = zmoe_take(&job->up_tasks)) < job->n_groups * panels;) {
    const struct zmoe_group *group = &job->groups[task / panels];
    uint32_t first = task % panels * ZMOE_PANEL;
    matmul(job, &job->layer->up[group->expert], &job->in, group, first, scratch, sums);
    store_pairs(job, group, job->hidden, first, sums);
  }
}
