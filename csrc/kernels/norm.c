/* Norms of rows, and what the calls of decoder.h share. */
#include "layer.h"

#include "decoder.h"

struct norm_rows {
  const zmoe_small *small;
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

void zmoe_norm_row(const zmoe_small *small, const zmoe_norm *norm, uint32_t width, const float *x,
                   void *out, zmoe_dtype out_dtype, zmoe_isa isa) {
  if (norm->kind == ZMOE_NORM_NONE)
    (void)zmoe_convert(out, out_dtype, x, ZMOE_F32, width, isa);
  else
    small->norm(norm, x, out, out_dtype);
}

static void work(zmoe_team *team, void *argument, uint32_t thread) {
  (void)team, (void)thread;
  struct norm_rows *job = argument;
  size_t item = zmoe_dtype_bytes(job->out_dtype);
  for (uint32_t r; (r = zmoe_take(&job->tasks)) < job->rows;) {
    size_t at = (size_t)r * job->width;
    zmoe_norm_row(job->small, job->norm, job->width, job->x + at, job->out + at * item,
                  job->out_dtype, job->isa);
  }
}

void zmoe_norm_all(zmoe_team *team, const zmoe_norm *norm, uint32_t width, const float *x,
                   uint32_t rows, void *out, zmoe_dtype out_dtype) {
  zmoe_isa isa = zmoe_team_isa(team);
  struct norm_rows job = {.small = zmoe_small_for(isa),
                          .norm = norm,
                          .isa = isa,
                          .x = x,
                          .out = out,
                          .out_dtype = out_dtype,
                          .rows = rows,
                          .width = width};
  zmoe_run_rows(team, work, &job, rows);
}

int zmoe_norm_rows(zmoe_team *team, const zmoe_norm *norm, const float *x, uint32_t rows, void *out,
                   zmoe_dtype out_dtype) {
  if (norm->width == 0 || !zmoe_norm_fits(norm, norm->width) || zmoe_dtype_bytes(out_dtype) == 0)
    return ZMOE_EINVAL;
  zmoe_norm_all(team, norm, norm->width, x, rows, out, out_dtype);
  return ZMOE_OK;
}

int zmoe_linear_has_room(zmoe_team *team, uint32_t ins) {
  size_t mark = zmoe_team_mark(team);
  size_t own = (size_t)ZMOE_THREAD_SCRATCH * zmoe_team_threads(team);
  void *room = zmoe_team_scratch(team, zmoe_linear_scratch(ins) + own);
  zmoe_team_release(team, mark);
  return room != NULL;
}
