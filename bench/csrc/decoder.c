/* The vector operations of a decoder layer, on one thread: microseconds (medians) of
 * one row, and prefill.  bench/README.md has the command.
 *
 *   decoder [KEYS [HEADS [KV_HEADS [HEAD_DIM [BITS]]]]]
 *
 * BITS 8: of keys and values; else bf16.
 *
 * "cold" goes through the caches of 24 layers in turn, as a decode step does;
 * "warm" stays with one. */
#include "common/platform.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/attention.h"

enum { LAYERS = 24, RUNS = 401, WIDTH = 2048, EXPERTS = 64, TOP_K = 8, PREFILL = 128 };

static double now_us(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec * 1e6 + (double)time.tv_nsec * 1e-3;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

typedef struct scene {
  zmoe_thread_pool *pool;
  zmoe_attention attention;
  zmoe_kv_cache caches[LAYERS];
  float *h, *cosines, *sines, *qkv;
  void *out;
  uint32_t *blocks, n_blocks, rows, keys, layers, call;
} scene;

typedef void operation(scene *s);

static double median_us(operation *op, scene *s, uint32_t runs) {
  double *times = malloc(runs * sizeof *times);
  for (uint32_t i = 0; i < runs; i++, s->call++) {
    double start = now_us();
    op(s);
    times[i] = now_us() - start;
  }
  qsort(times, runs, sizeof *times, by_value);
  double median = times[runs / 2];
  free(times);
  return median;
}

static void norm(scene *s) {
  const zmoe_norm *input = &s->attention.input;
  zmoe_norm_all(s->pool, input, input->width, s->h, 1, s->out, ZMOE_BF16);
}

/* Everything between the projections and the output projection. */
static void heads(scene *s) {
  zmoe_piece pieces[PREFILL];
  const zmoe_span span = {s->blocks, s->n_blocks, s->rows, s->keys - s->rows};
  zmoe_attend job = {.attention = &s->attention,
                     .ops = zmoe_vector_ops_for(zmoe_thread_pool_isa(s->pool)),
                     .isa = zmoe_thread_pool_isa(s->pool),
                     .dtype = ZMOE_BF16,
                     .cache = &s->caches[s->call % s->layers],
                     .cosines = s->cosines,
                     .sines = s->sines,
                     .pieces = pieces,
                     .rows = s->rows,
                     .qkv = s->qkv,
                     .out = s->out};
  job.n_pieces = zmoe_attend_cut(&s->attention, &span, 0, s->rows, pieces);
  zmoe_attend_plan(&job, 1);
  size_t mark = zmoe_thread_pool_mark(s->pool);
  job.own = zmoe_thread_pool_scratch(s->pool, zmoe_attend_own_floats(&s->attention) * 4);
  zmoe_thread_pool_run(s->pool, zmoe_attend_work, &job);
  zmoe_thread_pool_release(s->pool, mark);
}

static void route(scene *s) {
  static float gate[EXPERTS * 32], weights[TOP_K];
  static int32_t ids[TOP_K];
  for (int i = 0; gate[0] == 0 && i < EXPERTS * 32; i++)
    gate[i] = (float)(rand() % 1000 + 1) * 1e-3f;
  const zmoe_weight weight = {.data = gate, .out_features = EXPERTS, .in_features = 32};
  const zmoe_router router = {.gate = &weight, .top_k = TOP_K, .normalize = 1};
  zmoe_route(s->pool, &router, s->h, 1, s->out, ZMOE_F32, ids, weights);
}

static void table(scene *s, zmoe_isa isa, uint32_t keys) {
  zmoe_attention *a = &s->attention;
  zmoe_thread_pool_create(1, NULL, 0, isa, &s->pool);
  zmoe_thread_pool_reserve(s->pool, (size_t)64 << 20);
  s->rows = 1, s->layers = 1;
  printf("%-12s norm %.2f", zmoe_isa_name(isa), median_us(norm, s, RUNS));
  s->keys = 1;
  double prepare = median_us(heads, s, RUNS);
  printf("  norms, rope, append %.2f", prepare);
  s->keys = keys;
  printf("  %u keys: warm %.1f", keys, median_us(heads, s, RUNS) - prepare);
  s->layers = LAYERS;
  printf(" cold %.1f", median_us(heads, s, RUNS) - prepare);
  printf("  route %.2f", median_us(route, s, RUNS));
  s->rows = s->keys = PREFILL, s->layers = 1;
  double flops = 4.0 * a->heads * a->head_dim * PREFILL * (PREFILL + 1) / 2, us;
  us = median_us(heads, s, 9);
  printf("  prefill %d: %.0f us, %.1f GFLOP/s", PREFILL, us, flops / us * 1e-3);
  s->keys = keys + PREFILL;
  us = median_us(heads, s, 9);
  printf(", after %u: %.0f us, %.1f\n", keys, us,
         (flops + 4.0 * a->heads * a->head_dim * PREFILL * keys) / us * 1e-3);
  zmoe_thread_pool_destroy(s->pool);
}

static float *random_floats(size_t count) {
  float *x = malloc(count * sizeof *x);
  for (size_t i = 0; i < count; i++)
    x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
  return x;
}

int main(int argc, char **argv) {
  uint32_t shape[] = {128, 16, 16, 128, 0};
  for (int i = 1; i < argc && i <= 5; i++)
    shape[i - 1] = (uint32_t)atoi(argv[i]);
  uint32_t keys = shape[0], heads = shape[1], kv_heads = shape[2], dim = shape[3];
  const float *ones = random_floats(WIDTH);
  zmoe_weight output = {.out_features = WIDTH, .in_features = heads * dim};
  uint32_t n_blocks = (keys + PREFILL + ZMOE_KEY_BLOCK - 1) / ZMOE_KEY_BLOCK;
  scene s = {.attention = {.input = {ZMOE_NORM_RMS, WIDTH, 1e-5f, ones, NULL},
                           .query_norm = {ZMOE_NORM_RMS, dim, 1e-5f, ones, NULL},
                           .key_norm = {ZMOE_NORM_RMS, dim, 1e-5f, ones, NULL},
                           .output = &output,
                           .heads = heads,
                           .kv_heads = kv_heads,
                           .head_dim = dim,
                           .scale = 0.1f,
                           .rope_dims = dim,
                           .dtype = ZMOE_BF16},
             .h = random_floats(WIDTH),
             .blocks = malloc(n_blocks * sizeof(uint32_t)),
             .n_blocks = n_blocks,
             .cosines = random_floats((size_t)(keys + PREFILL) * dim),
             .sines = random_floats((size_t)(keys + PREFILL) * dim),
             .qkv = random_floats((size_t)PREFILL * (heads + 2 * kv_heads) * dim),
             .out = malloc((size_t)PREFILL * (heads * dim + WIDTH) * 4)};
  size_t cache_bytes = (size_t)kv_heads * n_blocks * ZMOE_KEY_BLOCK * dim * 2;
  for (uint32_t i = 0; i < n_blocks; i++)
    s.blocks[i] = (i + n_blocks / 2) % n_blocks;
  for (int i = 0; i < LAYERS; i++)
    s.caches[i] = (zmoe_kv_cache){malloc(cache_bytes), malloc(cache_bytes), n_blocks, shape[4]};
  for (int i = 0; i < LAYERS; i++)
    memset(s.caches[i].keys, 0x3d, cache_bytes), memset(s.caches[i].values, 0x3d, cache_bytes);
  static const zmoe_isa isas[] = {ZMOE_ISA_GENERIC, ZMOE_ISA_AVX2, ZMOE_ISA_AVX512,
                                  ZMOE_ISA_AVX512_BF16, ZMOE_ISA_NEON};
  for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
    if (zmoe_isa_supported(isas[i]))
      table(&s, isas[i], keys);
  return 0;
}
