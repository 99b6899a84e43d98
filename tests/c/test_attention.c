/* Attention against a reference in double precision, over shapes and options. */
#include "numbers.h"

typedef struct shape {
  uint32_t heads, kv_heads, head_dim, width;
  uint32_t rope_dims, traditional, window;
  uint32_t input, head_norms;    /* zmoe_norm_kind */
  int whole, bias, fused, sinks; /* whole: the norms of heads are over all of them */
  float clip;
  uint32_t dtype, rows, filled;
} shape;

/* A layer of that shape, its cache and its input. */
typedef struct layer {
  shape s;
  size_t q_width, kv_width, total;
  float *weights, *biases, *output, *output_bias, *norms, *sinks, *cosines, *sines;
  float *keys, *values, *h; /* of dtype's values: (kv_heads, filled, head_dim); (rows, width) */
  zmoe_weight projections[3], output_weight;
  zmoe_attention attention;
} layer;

static zmoe_weight f32_weight(const float *data, const float *bias, size_t outs, size_t ins) {
  return (zmoe_weight){.data = data, .bias = bias, .outs = (uint32_t)outs, .ins = (uint32_t)ins};
}

static void point_at_weights(layer *l) {
  const shape *s = &l->s;
  size_t outs[] = {s->fused ? l->total : l->q_width, l->kv_width, l->kv_width}, at = 0;
  for (int i = 0; i < (s->fused ? 1 : 3); i++) {
    l->projections[i] =
        f32_weight(l->weights + at * s->width, s->bias ? l->biases + at : NULL, outs[i], s->width);
    at += outs[i];
  }
  l->output_weight = f32_weight(l->output, s->bias ? l->output_bias : NULL, s->width, l->q_width);
}

static zmoe_norm norm_of(const layer *l, uint32_t kind, size_t width, size_t at) {
  return (zmoe_norm){kind, (uint32_t)width, 1e-5f, l->norms + at,
                     kind == ZMOE_NORM_LAYER ? l->norms + at + 1 : NULL};
}

static layer make_layer(const shape *s) {
  layer l = {.s = *s};
  l.q_width = (size_t)s->heads * s->head_dim, l.kv_width = (size_t)s->kv_heads * s->head_dim;
  l.total = l.q_width + 2 * l.kv_width;
  size_t angles = (size_t)s->rows * (s->rope_dims / 2), past = l.kv_width * s->filled;
  l.weights = random_floats(l.total * s->width, 3.0f / sqrtf((float)s->width));
  l.biases = random_floats(l.total, 0.3f);
  l.output = random_floats(s->width * l.q_width, 1.0f);
  l.output_bias = random_floats(s->width, 0.3f);
  l.norms = random_floats(s->width + l.q_width + 8, 1.5f);
  l.sinks = random_floats(s->heads, 2.0f);
  l.cosines = random_floats(angles, 1.0f), l.sines = random_floats(angles, 1.0f);
  l.keys = random_floats(past, 1.5f), l.values = random_floats(past, 1.0f);
  for (size_t i = 0; i < past; i++) {
    l.keys[i] = rounded(l.keys[i], (zmoe_dtype)s->dtype);
    l.values[i] = rounded(l.values[i], (zmoe_dtype)s->dtype);
  }
  l.h = random_floats((size_t)s->rows * s->width, 2.0f);
  return l;
}

static void describe(layer *l) {
  const shape *s = &l->s;
  point_at_weights(l);
  l->attention = (zmoe_attention){
      .input = norm_of(l, s->input, s->width, 0),
      .projections = l->projections,
      .n_projections = s->fused ? 1 : 3,
      .output = &l->output_weight,
      .query_norm = norm_of(l, s->head_norms, s->whole ? l->q_width : s->head_dim, 3),
      .key_norm = norm_of(l, s->head_norms, s->whole ? l->kv_width : s->head_dim, 5),
      .heads = s->heads,
      .kv_heads = s->kv_heads,
      .head_dim = s->head_dim,
      .scale = 1.0f / sqrtf((float)s->head_dim),
      .clip = s->clip,
      .rope_dims = s->rope_dims,
      .rope_traditional = s->traditional,
      .sinks = s->sinks ? l->sinks : NULL,
      .window = s->window,
      .dtype = s->dtype,
  };
}

static void free_layer(layer *l) {
  free(l->weights), free(l->biases), free(l->output), free(l->output_bias), free(l->norms);
  free(l->sinks), free(l->cosines), free(l->sines), free(l->keys), free(l->values), free(l->h);
}

/* ---- the reference ------------------------------------------------------------------- */

static void reference_norm(const zmoe_norm *norm, double *x) {
  if (norm->kind == ZMOE_NORM_NONE)
    return;
  double mean = 0, squares = 0;
  for (uint32_t i = 0; i < norm->width && norm->kind == ZMOE_NORM_LAYER; i++)
    mean += x[i] / norm->width;
  for (uint32_t i = 0; i < norm->width; i++)
    squares += (x[i] - mean) * (x[i] - mean) / norm->width;
  for (uint32_t i = 0; i < norm->width; i++)
    x[i] = (x[i] - mean) / sqrt(squares + norm->eps) * norm->weight[i] +
           (norm->bias != NULL ? norm->bias[i] : 0);
}

static void reference_product(const zmoe_weight *w, const double *x, double *y) {
  const float *data = w->data, *bias = w->bias;
  for (uint32_t o = 0; o < w->outs; o++) {
    y[o] = bias != NULL ? bias[o] : 0;
    for (uint32_t k = 0; k < w->ins; k++)
      y[o] += data[(size_t)o * w->ins + k] * x[k];
  }
}

static void round_all(double *x, size_t count, uint32_t dtype) {
  for (size_t i = 0; i < count; i++)
    x[i] = rounded((float)x[i], (zmoe_dtype)dtype);
}

static void reference_rope(const layer *l, uint32_t row, double *head) {
  uint32_t half = l->s.rope_dims / 2;
  for (uint32_t i = 0; i < half; i++) {
    uint32_t a = l->s.traditional ? 2 * i : i, b = l->s.traditional ? 2 * i + 1 : i + half;
    double c = l->cosines[row * half + i], s = l->sines[row * half + i], x = head[a], y = head[b];
    head[a] = x * c - y * s, head[b] = x * s + y * c;
  }
}

/* qkv (total) of one row, norms and rope done, keys and values rounded. */
static void reference_project(const layer *l, uint32_t row, double *qkv) {
  const zmoe_attention *a = &l->attention;
  const shape *s = &l->s;
  double *x = malloc(s->width * sizeof *x), *k = qkv + l->q_width;
  for (uint32_t i = 0; i < s->width; i++)
    x[i] = l->h[(size_t)row * s->width + i];
  reference_norm(&a->input, x);
  round_all(x, s->width, s->dtype);
  double *y = qkv;
  for (uint32_t i = 0; i < a->n_projections; y += a->projections[i++].outs)
    reference_product(&a->projections[i], x, y);
  for (size_t i = 0; i < l->total && s->clip > 0; i++)
    qkv[i] = fmin(fmax(qkv[i], -s->clip), s->clip);
  if (s->whole)
    reference_norm(&a->query_norm, qkv), reference_norm(&a->key_norm, k);
  for (uint32_t i = 0; i < s->heads + s->kv_heads; i++) {
    double *head = qkv + (size_t)i * s->head_dim;
    if (!s->whole)
      reference_norm(i < s->heads ? &a->query_norm : &a->key_norm, head);
    reference_rope(l, row, head);
  }
  round_all(k, 2 * l->kv_width, s->dtype);
  free(x);
}

/* Key (or value) `position` of a head: from the cache, or of one of the rows. */
static double cached(const layer *l, const float *past, const double *qkvs, size_t offset,
                     uint32_t kv_head, uint32_t position, uint32_t d) {
  const shape *s = &l->s;
  if (position < s->filled)
    return past[((size_t)kv_head * s->filled + position) * s->head_dim + d];
  return qkvs[(position - s->filled) * l->total + offset + (size_t)kv_head * s->head_dim + d];
}

static void reference_head(const layer *l, const double *qkvs, uint32_t row, uint32_t head,
                           double *out) {
  const shape *s = &l->s;
  uint32_t kv_head = head / (s->heads / s->kv_heads), end = s->filled + row + 1;
  uint32_t begin = s->window != 0 && end > s->window ? end - s->window : 0;
  const double *q = qkvs + row * l->total + (size_t)head * s->head_dim;
  double *p = malloc(end * sizeof *p), max = s->sinks ? l->sinks[head] : -INFINITY, sum = 0;
  for (uint32_t j = begin; j < end; j++) {
    p[j] = 0;
    for (uint32_t d = 0; d < s->head_dim; d++)
      p[j] += q[d] * cached(l, l->keys, qkvs, l->q_width, kv_head, j, d) * l->attention.scale;
    max = fmax(max, p[j]);
  }
  for (uint32_t j = begin; j < end; j++)
    sum += p[j] = exp(p[j] - max);
  sum += s->sinks ? exp(l->sinks[head] - max) : 0;
  for (uint32_t d = 0; d < s->head_dim; d++) {
    out[d] = 0;
    for (uint32_t j = begin; j < end; j++)
      out[d] += p[j] / sum * cached(l, l->values, qkvs, l->q_width + l->kv_width, kv_head, j, d);
  }
  free(p);
}

/* What attention adds to h: (rows, width). */
static double *reference(const layer *l) {
  const shape *s = &l->s;
  double *qkvs = malloc(s->rows * l->total * sizeof *qkvs);
  double *heads = malloc(l->q_width * sizeof *heads);
  double *added = malloc((size_t)s->rows * s->width * sizeof *added);
  for (uint32_t r = 0; r < s->rows; r++)
    reference_project(l, r, qkvs + r * l->total);
  for (uint32_t r = 0; r < s->rows; r++) {
    for (uint32_t i = 0; i < s->heads; i++)
      reference_head(l, qkvs, r, i, heads + (size_t)i * s->head_dim);
    round_all(heads, l->q_width, s->dtype);
    reference_product(&l->output_weight, heads, added + (size_t)r * s->width);
  }
  free(qkvs), free(heads);
  return added;
}

/* ---- what is tested --------------------------------------------------------------------- */

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
static result run(const layer *l, zmoe_team *team, uint32_t at_a_time, uint32_t spare) {
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
    CHECK_EQUAL(zmoe_attention_step(team, &l->attention, &out.cache, l->cosines + angle,
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
    zmoe_team *team = make_team(threads, isa, zmoe_attention_scratch(&l->attention, s->filled));
    result out = run(l, team, s->rows, threads == 2 ? 3 : 0);
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
    zmoe_team_destroy(team);
  }
  free_result(&first);
}

static void check_shape(const shape *s) {
  layer l = make_layer(s);
  describe(&l);
  double *expected = reference(&l);
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
    /* halves */
    {8, 1, 128, 64, 128, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_BF16, 1, 100},
    {8, 1, 128, 64, 128, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F16, 1, 100},
    {6, 2, 24, 50, 24, 1, 0, LAYER, NONE, 0, 1, 0, 1, 0, ZMOE_BF16, 2, 7},
    {6, 2, 17, 50, 16, 1, 0, LAYER, NONE, 0, 1, 0, 1, 0, ZMOE_F16, 2, 70},
    {4, 4, 80, 64, 80, 0, 30, RMS, RMS, 1, 0, 0, 0, 0, ZMOE_BF16, 130, 10},
    {6, 2, 17, 64, 16, 0, 30, RMS, RMS, 1, 0, 0, 0, 0, ZMOE_F16, 130, 0},
    /* long, in ranges of keys; the last two with many queries to a head of keys */
    {4, 4, 16, 32, 16, 0, 0, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_F32, 1, 2500},
    {3, 1, 24, 32, 16, 0, 1800, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_BF16, 2, 3000},
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
    check_shape(&s);
  }
}

/* Rows at once and row by row: the same sums, in another order. */
static void test_prefill_is_many_steps(void) {
  const shape s = {6, 2, 32, 48, 32, 0, 40, RMS, RMS, 0, 1, 0, 1, 0, ZMOE_F32, 130, 20};
  layer l = make_layer(&s);
  describe(&l);
  zmoe_team *team = make_team(2, zmoe_isa_best(), zmoe_attention_scratch(&l.attention, 200));
  result at_once = run(&l, team, s.rows, 0), steps = run(&l, team, 1, 0);
  result some = run(&l, team, 37, 0);
  size_t count = (size_t)s.rows * s.width;
  double *expected = malloc(count * sizeof *expected);
  for (size_t i = 0; i < count; i++)
    expected[i] = at_once.added[i];
  CHECK(distance(steps.added, expected, count) < 1e-5);
  CHECK(distance(some.added, expected, count) < 1e-5);
  free(expected);
  free_result(&at_once), free_result(&steps), free_result(&some);
  zmoe_team_destroy(team);
  free_layer(&l);
}

/* NaN in one row: out of it, and of all that see it; never a crash. */
static void test_nan_goes_through(void) {
  for (uint32_t rows = 1; rows <= 20; rows += 19) {
    const shape s = {4, 2, 16, 24, 16, 0, 0, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_BF16, rows, 5};
    layer l = make_layer(&s);
    describe(&l);
    l.h[(size_t)(rows - 1) * s.width] = NAN;
    zmoe_team *team = make_team(1, zmoe_isa_best(), zmoe_attention_scratch(&l.attention, 25));
    result out = run(&l, team, rows, 0);
    for (uint32_t i = 0; i < s.width; i++)
      CHECK(isnan(out.added[(size_t)(rows - 1) * s.width + i]));
    free_result(&out);
    zmoe_team_destroy(team);
    free_layer(&l);
  }
}

int main(void) {
  static const test_case tests[] = {
      {"shapes of models, and odd ones", test_shapes},
      {"random shapes", test_random_shapes},
      {"a prefill is many steps", test_prefill_is_many_steps},
      {"NaN goes through", test_nan_goes_through},
  };
  RUN(tests);
  return 0;
}
