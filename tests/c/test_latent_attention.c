/* Latent attention against a reference in double precision that makes every head's keys and
 * values of the latents, as it is defined. */
#include "kernel_rig.h"

typedef struct shape {
  uint32_t heads, latent_dim, rope_dims, key_dim, value_dim, width, rank; /* rank 0: none */
  uint32_t traditional, window, keep, dtype, rows;
} shape;

enum { BLOCKS = 64, N_WEIGHTS = 6 };

typedef struct layer {
  shape s;
  zmoe_latent_attention a;
  zmoe_weight weights[4], *heads[2];
  float *data[N_WEIGHTS], *norms, *angles[2], *h;
} layer;

static zmoe_weight make_weight(layer *l, int i, uint32_t out_features, uint32_t in_features) {
  l->data[i] = random_floats((size_t)out_features * in_features, 2.0f / sqrtf((float)in_features));
  return (zmoe_weight){
      .data = l->data[i], .out_features = out_features, .in_features = in_features};
}

/* A matrix per head. */
static zmoe_weight *make_heads(layer *l, int i, uint32_t out_features, uint32_t in_features) {
  zmoe_weight all = make_weight(l, i, l->s.heads * out_features, in_features);
  zmoe_weight *heads = malloc(l->s.heads * sizeof *heads);
  for (uint32_t head = 0; head < l->s.heads; head++) {
    heads[head] = all;
    heads[head].data = l->data[i] + (size_t)head * out_features * in_features;
    heads[head].out_features = out_features;
  }
  return heads;
}

static layer *make_layer(const shape *s) {
  layer *l = calloc(1, sizeof *l);
  l->s = *s;
  uint32_t rank = s->rank > 0 ? s->rank : s->width, most = s->width + s->rank + s->latent_dim;
  l->norms = random_floats(most, 1.5f);
  l->weights[0] = make_weight(l, 0, s->rank > 0 ? s->rank : 1, s->width);
  l->weights[1] = make_weight(l, 1, s->heads * (s->key_dim + s->rope_dims), rank);
  l->weights[2] = make_weight(l, 2, s->latent_dim + s->rope_dims, s->width);
  l->weights[3] = make_weight(l, 3, s->width, s->heads * s->value_dim);
  l->heads[0] = make_heads(l, 4, s->latent_dim, s->key_dim);
  l->heads[1] = make_heads(l, 5, s->value_dim, s->latent_dim);
  for (int i = 0; i < 2; i++)
    l->angles[i] = random_floats((size_t)s->rows * s->rope_dims, 1.0f);
  l->h = random_floats((size_t)s->rows * s->width, 2.0f);
  l->a = (zmoe_latent_attention){
      .input = {ZMOE_NORM_RMS, s->width, 1e-5f, l->norms, NULL},
      .query_down = s->rank > 0 ? &l->weights[0] : NULL,
      .query_norm = {ZMOE_NORM_RMS, s->rank, 1e-6f, l->norms + s->width, NULL},
      .query = &l->weights[1],
      .down = &l->weights[2],
      .latent_norm = {ZMOE_NORM_RMS, s->latent_dim, 1e-6f, l->norms + s->width + s->rank, NULL},
      .key_heads = l->heads[0],
      .value_heads = l->heads[1],
      .output = &l->weights[3],
      .heads = s->heads,
      .latent_dim = s->latent_dim,
      .rope_dims = s->rope_dims,
      .key_dim = s->key_dim,
      .value_dim = s->value_dim,
      .scale = 0.3f,
      .rope_traditional = s->traditional,
      .window = s->window,
      .keep = s->keep,
      .dtype = s->dtype,
  };
  return l;
}

static void free_layer(layer *l) {
  for (int i = 0; i < N_WEIGHTS; i++)
    free(l->data[i]);
  free(l->norms), free(l->angles[0]), free(l->angles[1]), free(l->h);
  free(l->heads[0]), free(l->heads[1]), free(l);
}

/* ---- the reference --------------------------------------------------------------------- */

static void multiply(const zmoe_weight *w, const double *x, double *y) {
  const float *data = w->data;
  for (uint32_t o = 0; o < w->out_features; o++) {
    y[o] = 0;
    for (uint32_t k = 0; k < w->in_features; k++)
      y[o] += data[(size_t)o * w->in_features + k] * x[k];
  }
}

static void normalize(const zmoe_norm *norm, double *x) {
  double squares = 0;
  for (uint32_t i = 0; i < norm->width; i++)
    squares += x[i] * x[i] / norm->width;
  for (uint32_t i = 0; i < norm->width; i++)
    x[i] = x[i] / sqrt(squares + norm->eps) * norm->weight[i];
}

static void round_all(double *x, size_t count, uint32_t dtype) {
  for (size_t i = 0; i < count; i++)
    x[i] = rounded((float)x[i], (zmoe_dtype)dtype);
}

static void rotate(const layer *l, uint32_t position, double *x) {
  uint32_t half = l->s.rope_dims / 2;
  for (uint32_t i = 0; i < half; i++) {
    double *a = x + (l->s.traditional ? 2 * i : i), *b = l->s.traditional ? a + 1 : a + half;
    double c = l->angles[0][position * half + i], s = l->angles[1][position * half + i], old = *a;
    *a = old * c - *b * s, *b = old * s + *b * c;
  }
}

static int sees(const shape *s, uint32_t row, uint32_t key) {
  int is_near = s->window == 0 || key + s->window - s->keep > row;
  return key <= row && (is_near || row < s->window || key < s->keep);
}

/* What attention adds to h: (rows, width); free it. */
static double *reference(const layer *l) {
  const shape *s = &l->s;
  uint32_t query_dim = s->key_dim + s->rope_dims, cached = s->latent_dim + s->rope_dims;
  double *queries = malloc((size_t)s->rows * s->heads * query_dim * sizeof *queries);
  double *latents = malloc((size_t)s->rows * cached * sizeof *latents);
  double *x = malloc(s->width * sizeof *x), *rank = malloc((s->rank + 1) * sizeof *rank);
  for (uint32_t r = 0; r < s->rows; r++) {
    for (uint32_t i = 0; i < s->width; i++)
      x[i] = l->h[(size_t)r * s->width + i];
    normalize(&l->a.input, x);
    round_all(x, s->width, s->dtype);
    if (s->rank > 0) {
      multiply(&l->weights[0], x, rank);
      normalize(&l->a.query_norm, rank);
      round_all(rank, s->rank, s->dtype);
    }
    double *query = queries + (size_t)r * s->heads * query_dim, *latent = latents + r * cached;
    multiply(&l->weights[1], s->rank > 0 ? rank : x, query);
    for (uint32_t head = 0; head < s->heads; head++)
      rotate(l, r, query + head * query_dim + s->key_dim);
    multiply(&l->weights[2], x, latent);
    normalize(&l->a.latent_norm, latent);
    rotate(l, r, latent + s->latent_dim);
    round_all(latent, cached, s->dtype);
  }
  double *added = malloc((size_t)s->rows * s->width * sizeof *added);
  double *out = malloc((size_t)s->heads * s->value_dim * sizeof *out);
  double *p = malloc(s->rows * sizeof *p), *value = malloc(s->value_dim * sizeof *value);
  for (uint32_t r = 0; r < s->rows; r++) {
    memset(out, 0, s->heads * s->value_dim * sizeof *out);
    for (uint32_t head = 0; head < s->heads; head++) {
      const double *query = queries + ((size_t)r * s->heads + head) * query_dim;
      const float *w = l->heads[0][head].data;
      double max = -INFINITY, sum = 0;
      for (uint32_t j = 0; j <= r; j++) {
        const double *latent = latents + j * cached;
        p[j] = sees(s, r, j) ? 0 : -INFINITY;
        for (uint32_t d = 0; d < s->key_dim; d++) /* the head's own part of its key */
          for (uint32_t i = 0; i < s->latent_dim; i++)
            p[j] += query[d] * w[i * s->key_dim + d] * latent[i] * 0.3f;
        for (uint32_t d = 0; d < s->rope_dims; d++)
          p[j] += query[s->key_dim + d] * latent[s->latent_dim + d] * 0.3f;
        max = fmax(max, p[j]);
      }
      for (uint32_t j = 0; j <= r; j++)
        sum += p[j] = exp(p[j] - max);
      for (uint32_t j = 0; j <= r; j++) {
        multiply(&l->heads[1][head], latents + j * cached, value);
        for (uint32_t d = 0; d < s->value_dim; d++)
          out[head * s->value_dim + d] += p[j] / sum * value[d];
      }
    }
    multiply(&l->weights[3], out, added + (size_t)r * s->width);
  }
  free(queries), free(latents), free(x), free(rank), free(out), free(p), free(value);
  return added;
}

/* ---- runs ------------------------------------------------------------------------------ */

/* h after all rows, `at_a_time` in a call, beside 3 rows of another sequence or alone; free it. */
static float *run(const layer *l, zmoe_thread_pool *pool, uint32_t at_a_time, int is_alone) {
  const shape *s = &l->s;
  size_t bytes = (size_t)BLOCKS * ZMOE_KEY_BLOCK * (s->latent_dim + s->rope_dims) *
                 zmoe_dtype_bytes((zmoe_dtype)s->dtype);
  uint32_t blocks[BLOCKS];
  for (uint32_t i = 0; i < BLOCKS; i++)
    blocks[i] = (i * 37 + at_a_time) % BLOCKS;
  /* What is not written is never used: it is NaN. */
  const zmoe_kv_cache cache = {memset(malloc(bytes), 0xff, bytes), NULL, BLOCKS, 0};
  float *out = malloc((size_t)s->rows * s->width * sizeof *out);
  float *h = malloc((size_t)(s->rows + 3) * s->width * sizeof *h);
  for (uint32_t r = 0; r < s->rows; r += at_a_time) {
    uint32_t rows = s->rows - r < at_a_time ? s->rows - r : at_a_time, others = is_alone ? 0 : 3;
    const zmoe_span spans[] = {{blocks + BLOCKS - 1, 1, others, 0, NULL, NULL},
                               {blocks, BLOCKS - 1, rows, r, NULL, NULL}};
    float *mine = h + (size_t)others * s->width;
    memcpy(h, l->h, 3 * s->width * sizeof *h);
    memcpy(mine, l->h + (size_t)r * s->width, (size_t)rows * s->width * sizeof *h);
    CHECK_EQUAL(zmoe_latent_attention_step(pool, &l->a, &cache, spans + is_alone, 2 - is_alone,
                                           l->angles[0], l->angles[1], h, ZMOE_EXACT),
                ZMOE_OK);
    memcpy(out + (size_t)r * s->width, mine, (size_t)rows * s->width * sizeof *out);
  }
  free(h), free(cache.keys);
  return out;
}

/* heads latent rope key value width rank | traditional window keep dtype rows */
static const shape SHAPES[] = {
    {4, 32, 16, 16, 16, 64, 32, 1, 0, 0, ZMOE_F32, 70},
    {16, 64, 8, 24, 40, 48, 0, 1, 0, 0, ZMOE_BF16, 40},
    {3, 33, 6, 5, 7, 20, 9, 0, 0, 0, ZMOE_F32, 133},
    {128, 16, 4, 8, 8, 32, 16, 1, 0, 0, ZMOE_F16, 5},
    {70, 24, 0, 8, 4, 16, 0, 0, 0, 0, ZMOE_F32, 3},
    {2, 16, 4, 8, 8, 16, 8, 1, 30, 4, ZMOE_F32, 100},
    {2, 16, 4, 8, 8, 16, 0, 1, 0, 0, ZMOE_F32, 600}, /* several ranges of keys */
};

static void test_shapes(void) {
  static const double tolerance[] = {2e-5, 3e-3, 2e-2};
  for (size_t n = 0; n < sizeof SHAPES / sizeof *SHAPES; n++) {
    if (rig_skips((uint32_t)n))
      continue;
    layer *l = make_layer(&SHAPES[n]);
    double *expected = reference(l);
    size_t count = (size_t)l->s.rows * l->s.width;
    for (int i = 0; i < N_ISAS; i++) {
      if (!zmoe_isa_supported(ALL_ISAS[i]))
        continue;
      zmoe_thread_pool *pool = make_pool(1, ALL_ISAS[i], zmoe_latent_attention_scratch(&l->a, 1));
      float *out = run(l, pool, l->s.rows, 1);
      for (size_t j = 0; j < count; j++)
        out[j] -= l->h[j];
      CHECK(distance(out, expected, count) < tolerance[l->s.dtype]);
      free(out);
      zmoe_thread_pool_destroy(pool);
    }
    free(expected);
    free_layer(l);
  }
}

/* Rows at once, in any chunks, among others, on any threads: the same to the bit. */
static void test_invariance(void) {
  static const uint32_t chunks[] = {1, 5, 32, 50};
  for (size_t n = 0; n < sizeof SHAPES / sizeof *SHAPES; n++) {
    if (rig_skips((uint32_t)n))
      continue;
    layer *l = make_layer(&SHAPES[n]);
    size_t bytes = (size_t)l->s.rows * l->s.width * sizeof(float);
    for (int i = 0; i < N_ISAS; i++) {
      if (!zmoe_isa_supported(ALL_ISAS[i]))
        continue;
      float *first = NULL;
      for (uint32_t threads = 1; threads <= 3; threads++) {
        zmoe_thread_pool *pool =
            make_pool(threads, ALL_ISAS[i], zmoe_latent_attention_scratch(&l->a, threads));
        uint32_t chunk = chunks[(n + threads + (uint32_t)i) % 4];
        float *out = run(l, pool, threads == 1 ? l->s.rows : chunk, threads % 2 == 1);
        CHECK(first == NULL || memcmp(first, out, bytes) == 0);
        if (first == NULL)
          first = out;
        else
          free(out);
        zmoe_thread_pool_destroy(pool);
      }
      free(first);
    }
    free_layer(l);
  }
}

/* What no call can do changes nothing. */
static void test_refusals(void) {
  layer *l = make_layer(&SHAPES[0]);
  zmoe_latent_attention bad[9];
  for (int i = 0; i < 9; i++)
    bad[i] = l->a;
  bad[0].heads = 0, bad[1].latent_dim = 31, bad[2].rope_dims = 14, bad[3].key_dim = 15;
  bad[4].value_dim = 17, bad[5].keep = 1, bad[6].dtype = 3, bad[7].query_norm.width = 31;
  bad[8].query_down = NULL;
  static float keys[2 * 64 * 48], h[2 * 64];
  const uint32_t blocks[] = {1, 0, 2};
  const zmoe_kv_cache cache = {keys, NULL, 2, 0}, codes = {keys, NULL, 2, 8};
  const zmoe_span good = {blocks, 2, 1, 64, NULL, NULL}, beyond = {blocks, 3, 1, 130, NULL, NULL},
                  late = {blocks, 2, 2, 127, NULL, NULL};
  zmoe_thread_pool *pool = make_pool(2, zmoe_isa_best(), zmoe_latent_attention_scratch(&l->a, 2));
  const float *c = l->angles[0], *s = l->angles[1];
  for (int i = 0; i < 9; i++)
    CHECK_EQUAL(zmoe_latent_attention_step(pool, &bad[i], &cache, &good, 1, c, s, h, ZMOE_EXACT),
                ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_latent_attention_step(pool, &l->a, &codes, &good, 1, c, s, h, ZMOE_EXACT),
              ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_latent_attention_step(pool, &l->a, &cache, &good, 1, NULL, s, h, ZMOE_EXACT),
              ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_latent_attention_step(pool, &l->a, &cache, &beyond, 1, c, s, h, ZMOE_EXACT),
              ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_latent_attention_step(pool, &l->a, &cache, &late, 1, c, s, h, ZMOE_EXACT),
              ZMOE_EINVAL);
  zmoe_thread_pool_destroy(pool);
  pool = make_pool(1, zmoe_isa_best(), 0);
  CHECK_EQUAL(zmoe_latent_attention_step(pool, &l->a, &cache, &good, 1, c, s, h, ZMOE_EXACT),
              ZMOE_ENOMEM);
  for (size_t i = 0; i < sizeof h / sizeof *h; i++)
    CHECK(h[i] == 0 && keys[i] == 0);
  zmoe_thread_pool_destroy(pool);
  free_layer(l);
}

/* NaN comes out of the row that has it and of those that see it, not of earlier ones. */
static void test_nan_goes_through(void) {
  layer *l = make_layer(&SHAPES[0]);
  l->h[40 * l->s.width] = NAN;
  zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), zmoe_latent_attention_scratch(&l->a, 1));
  float *out = run(l, pool, l->s.rows, 1);
  for (uint32_t r = 0; r < l->s.rows; r++)
    CHECK(!isnan(out[r * l->s.width + 1]) == (r < 40));
  free(out);
  zmoe_thread_pool_destroy(pool);
  free_layer(l);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"shapes of models, and odd ones", test_shapes},
      {"chunks, neighbours and threads change nothing", test_invariance},
      {"what is refused", test_refusals},
      {"NaN goes through", test_nan_goes_through},
  };
  rig_start(argc, argv);
  RUN(tests);
  return 0;
}
