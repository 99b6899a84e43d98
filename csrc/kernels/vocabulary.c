/* Both ends of a model: tokens into rows of the embedding, rows into logits. */
#include "decoder.h"
#include "layer.h"
#include "weight.h"

/* ---- tokens in ------------------------------------------------------------------------- */

struct embedding {
  const zmoe_weight *weight;
  const int32_t *tokens;
  uint32_t count;
  zmoe_dtype dtype;
  zmoe_isa isa;
  float *h;
  zmoe_tasks tasks;
};

/* x becomes what rounding to `dtype` leaves of it. */
static void round_row(float *x, uint32_t width, zmoe_dtype dtype, zmoe_isa isa) {
  enum { PART = 256 };
  float rounded[PART];
  for (uint32_t at = 0; at < width && dtype != ZMOE_F32; at += PART) {
    uint32_t n = width - at < PART ? width - at : PART;
    (void)zmoe_convert(rounded, dtype, x + at, ZMOE_F32, n, isa);
    (void)zmoe_convert(x + at, ZMOE_F32, rounded, dtype, n, isa);
  }
}

static void embed(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool, (void)thread;
  struct embedding *job = argument;
  uint32_t width = job->weight->in_features;
  for (uint32_t r; (r = zmoe_take(&job->tasks)) < job->count;) {
    float *row = job->h + (size_t)r * width;
    zmoe_decode_range(job->weight, (uint32_t)job->tokens[r], 0, width, row);
    round_row(row, width, job->dtype, job->isa);
  }
}

int zmoe_embed(zmoe_thread_pool *pool, const zmoe_weight *embedding, const int32_t *tokens,
               uint32_t count, zmoe_dtype dtype, float *h) {
  int status = zmoe_weight_check(embedding);
  if (status != ZMOE_OK || zmoe_dtype_bytes(dtype) == 0)
    return ZMOE_EINVAL;
  for (uint32_t i = 0; i < count; i++)
    if (tokens[i] < 0 || (uint32_t)tokens[i] >= embedding->out_features)
      return ZMOE_EINVAL;
  struct embedding job = {.weight = embedding,
                          .tokens = tokens,
                          .count = count,
                          .dtype = dtype,
                          .isa = zmoe_thread_pool_isa(pool),
                          .h = h};
  zmoe_run_rows(pool, embed, &job, count);
  return ZMOE_OK;
}

/* ---- logits out -------------------------------------------------------------------------- */

int zmoe_logits(zmoe_thread_pool *pool, const zmoe_norm *norm, const zmoe_weight *head,
                zmoe_dtype dtype, const float *h, const uint32_t *rows, uint32_t count,
                float *logits, zmoe_precision precision) {
  uint32_t width = head->in_features;
  size_t item = zmoe_dtype_bytes(dtype), stride = head->out_features;
  if (zmoe_weight_check(head) != ZMOE_OK || item == 0 || !zmoe_norm_fits(norm, width))
    return ZMOE_EINVAL;
  zmoe_isa isa = zmoe_thread_pool_isa(pool);
  const zmoe_vector_ops *ops = zmoe_vector_ops_for(isa);
  size_t mark = zmoe_thread_pool_mark(pool);
  uint32_t most = count < ZMOE_ROW_BLOCK ? count : ZMOE_ROW_BLOCK;
  unsigned char *x = zmoe_thread_pool_scratch(pool, most * width * item);
  int status = x != NULL ? ZMOE_OK : ZMOE_ENOMEM;
  for (uint32_t first = 0; first < count && status == ZMOE_OK; first += ZMOE_ROW_BLOCK) {
    uint32_t n = count - first < ZMOE_ROW_BLOCK ? count - first : ZMOE_ROW_BLOCK;
    for (uint32_t r = 0; r < n; r++)
      zmoe_norm_row(ops, norm, width, h + (size_t)rows[first + r] * width, x + r * width * item,
                    dtype, isa);
    void *ys[] = {logits + first * stride};
    status = zmoe_linear(pool, &head, 1, x, dtype, n, ys, &stride, ZMOE_F32, precision);
  }
  zmoe_thread_pool_release(pool, mark);
  return status;
}

size_t zmoe_logits_scratch(const zmoe_weight *head) {
  return (size_t)ZMOE_ROW_BLOCK * head->in_features * sizeof(float) + 64 +
         zmoe_linear_scratch(head->in_features);
}
