/* Norms and sums of rows, and what the calls of decoder.h share. */
#include "layer.h"

#include "decoder.h"

struct norm_rows {
  const zmoe_vector_ops *ops;
  const zmoe_norm *norm;
  zmoe_isa isa;
  const float *x;
  unsigned char *out;
  zmoe_dtype out_dtype;
  uint32_t rows, width;
  zmoe_tasks tasks;
};

int zmoe_norm_fits(const zmoe_norm *norm, uint32_t width) {
  return norm->kind == ZMOE_NORM_NONE || (norm->kind <= ZMOE_NORM_LAYER && norm->width == width);
}

void zmoe_norm_row(const zmoe_vector_ops *ops, const zmoe_norm *norm, uint32_t width,
                   const float *x, void *out, zmoe_dtype out_dtype, zmoe_isa isa) {
  if (norm->kind == ZMOE_NORM_NONE)
    (void)zmoe_convert(out, out_dtype, x, ZMOE_F32, width, isa);
  else
    ops->norm(norm, x, out, out_dtype);
}

static void work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool, (void)thread;
  struct norm_rows *job = argument;
  size_t item = zmoe_dtype_bytes(job->out_dtype);
  for (uint32_t r; (r = zmoe_take(&job->tasks)) < job->rows;) {
    size_t at = (size_t)r * job->width;
    zmoe_norm_row(job->ops, job->norm, job->width, job->x + at, job->out + at * item,
                  job->out_dtype, job->isa);
  }
}

void zmoe_norm_all(zmoe_thread_pool *pool, const zmoe_norm *norm, uint32_t width, const float *x,
                   uint32_t rows, void *out, zmoe_dtype out_dtype) {
  zmoe_isa isa = zmoe_thread_pool_isa(pool);
  struct norm_rows job = {.ops = zmoe_vector_ops_for(isa),
                          .norm = norm,
                          .isa = isa,
                          .x = x,
                          .out = out,
                          .out_dtype = out_dtype,
                          .rows = rows,
                          .width = width};
  zmoe_run_rows(pool, work, &job, rows);
}

struct addition {
  const float *y;
  float *h;
  uint32_t rows;
  size_t width;
  zmoe_tasks tasks;
};

static void add_rows(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool, (void)thread;
  struct addition *job = argument;
  for (uint32_t r; (r = zmoe_take(&job->tasks)) < job->rows;)
    for (size_t i = r * job->width; i < (r + 1) * job->width; i++)
      job->h[i] += job->y[i];
}

void zmoe_add_rows(zmoe_thread_pool *pool, const float *y, uint32_t rows, uint32_t width,
                   float *h) {
  struct addition job = {.y = y, .h = h, .rows = rows, .width = width};
  zmoe_run_rows(pool, add_rows, &job, rows);
}

int zmoe_linear_has_room(zmoe_thread_pool *pool, uint32_t in_features) {
  size_t mark = zmoe_thread_pool_mark(pool);
  size_t own = (size_t)ZMOE_THREAD_SCRATCH * zmoe_thread_pool_threads(pool);
  void *room = zmoe_thread_pool_scratch(pool, zmoe_linear_scratch(in_features) + own);
  zmoe_thread_pool_release(pool, mark);
  return room != NULL;
}
