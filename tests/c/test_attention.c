/* Attention against a reference in double precision, over shapes and options. */
#include "attention_layer.h"
#include "kernel_rig.h"

typedef struct result {
  zmoe_kv_cache cache;
  float *added; /* (rows, width) */
  size_t cache_bytes;
} result;

static void fill_cache(const layer *l, zmoe_kv_cache *cache) {
  const shape *s = &l->s;
  size_t item = zmoe_dtype_bytes((zmoe_dtype)s->dtype), row = s->head_dim * item;
  for (uint32_t i = 0; i < s->kv_heads; i++) {
    size_t to = (size_t)i * cache->capacity * row, from = (size_t)i * s->filled * s->head_dim;
    zmoe_convert((char *)cache->keys + to, (zmoe_dtype)s->dtype, l->keys + from, ZMOE_F32,
                 (size_t)s->filled * s->head_dim, ZMOE_ISA_GENERIC);
    zmoe_convert((char *)cache->values + to, (zmoe_dtype)s->dtype, l->values + from, ZMOE_F32,
                 (size_t)s->filled * s->head_dim, ZMOE_ISA_GENERIC);
  }
}

/* `steps` rows at a time.  What lies beyond the filled part of a cache is never
 * read: it is all ones, NaN in every dtype. */
static result run(const layer *l, zmoe_thread_pool *pool, uint32_t at_a_time, uint32_t spare) {
  const shape *s = &l->s;
  uint32_t capacity = s->filled + s->rows + spare;
  result out = {.cache = {.capacity = capacity, .length = s->filled}};
  out.cache_bytes = l->kv_width * capacity * zmoe_dtype_bytes((zmoe_dtype)s->dtype);
  out.cache.keys = memset(malloc(out.cache_bytes), 0xff, out.cache_bytes);
  out.cache.values = memset(malloc(out.cache_bytes), 0xff, out.cache_bytes);
  fill_cache(l, &out.cache);
  size_t count = (size_t)s->rows * s->width;
  out.added = malloc(count * sizeof *out.added);
  memcpy(out.added, l->h, count * sizeof *out.added);
  for (uint32_t r = 0; r < s->rows; r += at_a_time) {
    uint32_t rows = s->rows - r < at_a_time ? s->rows - r : at_a_time;
    size_t angle = (size_t)r * (s->rope_dims / 2);
    CHECK_EQUAL(zmoe_attention_step(pool, &l->attention, &out.cache, l->cosines + angle,
                                    l->sines + angle, rows, out.added + (size_t)r * s->width,
                                    ZMOE_EXACT),
                ZMOE_OK);
  }
  CHECK_EQUAL(out.cache.length, s->filled + s->rows);
  for (size_t i = 0; i < count; i++)
    out.added[i] -= l->h[i];
  return out;
}

static void free_result(result *out) {
  free(out->cache.keys), free(out->cache.values), free(out->added);
}

static double tolerance(uint32_t dtype) {
  return dtype == ZMOE_F32 ? 1e-5 : dtype == ZMOE_F16 ? 1e-3 : 8e-3;
}

/* One thread against the reference, more threads against one, on one ISA. */
static void check_isa(const layer *l, const double *expected, zmoe_isa isa) {
  const shape *s = &l->s;
  result first = {0};
  for (uint32_t threads = 1; threads <= 3; threads++) {
    zmoe_thread_pool *pool =
        make_pool(threads, isa, zmoe_attention_scratch(&l->attention, s->filled));
    result out = run(l, pool, s->rows, threads == 2 ? 3 : 0);
    size_t count = (size_t)s->rows * s->width;
    if (threads == 1) {
      double error = distance(out.added, expected, count);
      if (error > tolerance(s->dtype))
        printf("     heads %u/%u of %u, rows %u after %u, dtype %u, %s: %g\n", s->heads,
               s->kv_heads, s->head_dim, s->rows, s->filled, s->dtype, zmoe_isa_name(isa), error);
      CHECK(error <= tolerance(s->dtype));
      first = out;
    } else {
      CHECK(memcmp(out.added, first.added, count * sizeof *out.added) == 0);
      free_result(&out);
    }
    zmoe_thread_pool_destroy(pool);
  }
  free_result(&first);
}

static void check_shape(const shape *s) {
  layer l = make_layer(s);
  describe_layer(&l);
  double *expected = reference_attention(&l);
  for (int i = 0; i < N_ISAS; i++)
    if (zmoe_isa_supported(ALL_ISAS[i]))
      check_isa(&l, expected, ALL_ISAS[i]);
  free(expected);
  free_layer(&l);
}

/* ---- tests ---------------------------------------------------------------------------------- */

enum { NONE = ZMOE_NORM_NONE, RMS = ZMOE_NORM_RMS, LAYER = ZMOE_NORM_LAYER };

/* heads kv dim width | rope trad window | input heads' norms: whole bias fused sinks clip |
 * dtype rows filled: what models do, then what is odd. */
static const shape SHAPES[] = {
    {4, 2, 16, 64, 16, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F32, 1, 0},       /* qwen3_moe */
    {8, 1, 64, 96, 64, 0, 0, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_F32, 7, 5},      /* mixtral */
    {4, 4, 32, 64, 32, 0, 0, RMS, RMS, 1, 0, 0, 0, 0, ZMOE_F32, 130, 3},     /* olmoe */
    {6, 2, 24, 64, 24, 0, 0, LAYER, NONE, 0, 0, 1, 0, 0.9f, ZMOE_F32, 7, 9}, /* dbrx */
    {8, 2, 64, 64, 64, 0, 16, RMS, NONE, 0, 1, 0, 1, 0, ZMOE_F32, 130, 40},  /* gpt_oss */
    {8, 4, 80, 64, 40, 0, 0, RMS, RMS, 0, 1, 0, 0, 0, ZMOE_F32, 2, 130},     /* glm4_moe */
    {3, 1, 24, 40, 10, 1, 5, NONE, LAYER, 0, 1, 0, 1, 1.5f, ZMOE_F32, 130, 0},
    {9, 3, 80, 33, 0, 0, 0, LAYER, LAYER, 1, 0, 1, 1, 0, ZMOE_F32, 7, 66},
    {1, 1, 1, 1, 0, 0, 0, NONE, NONE, 0, 1, 0, 0, 0, ZMOE_F32, 5, 2},
    {2, 1, 256, 32, 256, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F32, 40, 50},
    {2, 1, 136, 32, 128, 1, 1, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F32, 9, 3}, /* itself alone */
    {3, 1, 17, 20, 16, 0, 64, RMS, NONE, 0, 0, 1, 1, 0, ZMOE_F32, 130, 200},
    {48, 16, 8, 40, 8, 0, 0, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_F32, 130, 0}, /* units of 42 rows */
    /* halves */
    {8, 1, 128, 64, 128, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_BF16, 1, 100},
    {8, 1, 128, 64, 128, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F16, 1, 100},
    {6, 2, 24, 50, 24, 1, 0, LAYER, NONE, 0, 1, 0, 1, 0, ZMOE_BF16, 2, 7},
    {6, 2, 17, 50, 16, 1, 0, LAYER, NONE, 0, 1, 0, 1, 0, ZMOE_F16, 2, 70},
    {4, 4, 80, 64, 80, 0, 30, RMS, RMS, 1, 0, 0, 0, 0, ZMOE_BF16, 130, 10},
    {6, 2, 17, 64, 16, 0, 30, RMS, RMS, 1, 0, 0, 0, 0, ZMOE_F16, 130, 0},
    /* long, in ranges of keys; the last two with many queries to a head of keys */
    {4, 4, 16, 32, 16, 0, 0, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_F32, 1, 2500},
    {3, 1, 24, 32, 16, 0, 1800, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_BF16, 1, 3000},
    {16, 1, 16, 32, 16, 0, 0, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_F32, 3, 2000},
    {160, 1, 8, 32, 8, 0, 1300, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_F32, 2, 1500},
};

static void test_shapes(void) {
  for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
    check_shape(&SHAPES[i]);
}

static uint32_t pick(uint32_t n) {
  return next_random() % n;
}

/* Anything goes together. */
static void test_random_shapes(void) {
  static const uint32_t groups[] = {1, 2, 3, 8}, dims[] = {4, 16, 24, 32, 80, 100, 128};
  static const uint32_t rows[] = {1, 2, 3, 7, 20}, filled[] = {0, 1, 31, 32, 64, 65, 150};
  for (int i = 0; i < 40; i++) {
    shape s = {.kv_heads = 1 + pick(3), .head_dim = dims[pick(7)], .width = 1 + pick(70)};
    s.heads = s.kv_heads * groups[pick(4)];
    s.rope_dims = pick(2) ? s.head_dim : s.head_dim / 4 * 2;
    s.traditional = pick(2), s.window = pick(2) ? 1 + pick(100) : 0;
    s.input = pick(3), s.head_norms = pick(3), s.whole = (int)pick(2), s.bias = (int)pick(2);
    s.fused = (int)pick(2), s.sinks = (int)pick(2), s.clip = pick(3) ? 0.0f : 1.0f;
    s.dtype = pick(3), s.rows = rows[pick(5)], s.filled = filled[pick(7)];
    if (!rig_skips((uint32_t)i))
      check_shape(&s);
  }
}

/* Rows at once and row by row: the same sums, in another order. */
static void test_prefill_is_many_steps(void) {
  const shape s = {6, 2, 32, 48, 32, 0, 40, RMS, RMS, 0, 1, 0, 1, 0, ZMOE_F32, 130, 20};
  layer l = make_layer(&s);
  describe_layer(&l);
  zmoe_thread_pool *pool = make_pool(2, zmoe_isa_best(), zmoe_attention_scratch(&l.attention, 200));
  result at_once = run(&l, pool, s.rows, 0), steps = run(&l, pool, 1, 0);
  result some = run(&l, pool, 37, 0);
  size_t count = (size_t)s.rows * s.width;
  double *expected = malloc(count * sizeof *expected);
  for (size_t i = 0; i < count; i++)
    expected[i] = at_once.added[i];
  CHECK(distance(steps.added, expected, count) < 1e-5);
  CHECK(distance(some.added, expected, count) < 1e-5);
  free(expected);
  free_result(&at_once), free_result(&steps), free_result(&some);
  zmoe_thread_pool_destroy(pool);
  free_layer(&l);
}

/* NaN in one row: out of it, and of all that see it; never a crash. */
static void test_nan_goes_through(void) {
  for (uint32_t rows = 1; rows <= 20; rows += 19) {
    const shape s = {4, 2, 16, 24, 16, 0, 0, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_BF16, rows, 5};
    layer l = make_layer(&s);
    describe_layer(&l);
    l.h[(size_t)(rows - 1) * s.width] = NAN;
    zmoe_thread_pool *pool =
        make_pool(1, zmoe_isa_best(), zmoe_attention_scratch(&l.attention, 25));
    result out = run(&l, pool, rows, 0);
    for (uint32_t i = 0; i < s.width; i++)
      CHECK(isnan(out.added[(size_t)(rows - 1) * s.width + i]));
    free_result(&out);
    zmoe_thread_pool_destroy(pool);
    free_layer(&l);
  }
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"shapes of models, and odd ones", test_shapes},
      {"random shapes", test_random_shapes},
      {"a prefill is many steps", test_prefill_is_many_steps},
      {"NaN goes through", test_nan_goes_through},
  };
  rig_start(argc, argv);
  RUN(tests);
  return 0;
}
