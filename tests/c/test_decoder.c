/* Norms and routers against a reference in double precision; what is refused. */
#include "numbers.h"

#include "kernels/layer.h"

/* ---- norms ------------------------------------------------------------------------ */

static void reference_norm(const zmoe_norm *norm, const float *x, double *out) {
  double mean = 0, squares = 0;
  for (uint32_t i = 0; i < norm->width && norm->kind == ZMOE_NORM_LAYER; i++)
    mean += (double)x[i] / norm->width;
  for (uint32_t i = 0; i < norm->width; i++)
    squares += (x[i] - mean) * (x[i] - mean) / norm->width;
  for (uint32_t i = 0; i < norm->width; i++) {
    out[i] = norm->kind == ZMOE_NORM_NONE ? x[i] : (x[i] - mean) / sqrt(squares + norm->eps);
    if (norm->kind != ZMOE_NORM_NONE && norm->weight != NULL)
      out[i] *= norm->weight[i];
    if (norm->kind != ZMOE_NORM_NONE && norm->bias != NULL)
      out[i] += norm->bias[i];
  }
}

/* The same bits from every instruction set and number of threads, near the reference. */
static void check_norm(const zmoe_norm *norm, const float *x, uint32_t rows, zmoe_dtype dtype) {
  static const double tolerance[] = {1e-6, 6e-4, 5e-3};
  size_t count = (size_t)rows * norm->width, bytes = count * zmoe_dtype_bytes(dtype);
  double *expected = malloc(count * sizeof *expected);
  unsigned char *out = malloc(bytes), *first = malloc(bytes);
  float *wide = malloc(count * sizeof *wide);
  for (uint32_t r = 0; r < rows; r++)
    reference_norm(norm, x + (size_t)r * norm->width, expected + (size_t)r * norm->width);
  for (uint32_t i = 0; i < 2 * N_ISAS; i++) {
    if (!zmoe_isa_supported(ALL_ISAS[i / 2]))
      continue;
    zmoe_thread_pool *pool = make_pool(1 + i % 2, ALL_ISAS[i / 2], 0);
    zmoe_norm_all(pool, norm, norm->width, x, rows, i == 0 ? first : out, dtype);
    CHECK(i == 0 || memcmp(first, out, bytes) == 0);
    zmoe_thread_pool_destroy(pool);
  }
  zmoe_convert(wide, ZMOE_F32, first, dtype, count, ZMOE_ISA_GENERIC);
  CHECK(distance(wide, expected, count) <= tolerance[dtype]);
  free(expected), free(out), free(first), free(wide);
}

static void test_norms(void) {
  static const uint32_t widths[] = {1, 7, 16, 24, 80, 100, 2048};
  for (uint32_t i = 0; i < sizeof widths / sizeof *widths; i++)
    for (uint32_t kind = 0; kind <= ZMOE_NORM_LAYER; kind++)
      for (uint32_t parts = 0; parts < 4; parts++) {
        uint32_t rows = 1 + next_random() % 5;
        float *x = random_floats((size_t)rows * widths[i], 3.0f);
        float *weight = random_floats(widths[i], 2.0f), *bias = random_floats(widths[i], 2.0f);
        const zmoe_norm norm = {kind, widths[i], 1e-5f, parts & 1 ? weight : NULL,
                                parts & 2 ? bias : NULL};
        for (int dtype = 0; dtype < 3; dtype++)
          check_norm(&norm, x, rows, (zmoe_dtype)dtype);
        free(x), free(weight), free(bias);
      }
}

/* eps is not lost beside tiny numbers, nor a small variance beside a large mean. */
static void test_norms_of_extremes(void) {
  float tiny[16], shifted[64];
  for (int i = 0; i < 64; i++)
    shifted[i] = 1000.0f + (float)i / 64;
  for (int i = 0; i < 16; i++)
    tiny[i] = 1e-20f * (float)(i + 1);
  const zmoe_norm rms = {ZMOE_NORM_RMS, 16, 1e-6f, NULL, NULL};
  const zmoe_norm layer = {ZMOE_NORM_LAYER, 64, 1e-5f, NULL, NULL};
  check_norm(&rms, tiny, 1, ZMOE_F32);
  double expected[64];
  float out[64];
  reference_norm(&layer, shifted, expected);
  zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), 0);
  zmoe_norm_all(pool, &layer, layer.width, shifted, 1, out, ZMOE_F32);
  CHECK(distance(out, expected, 64) < 1e-3);
  zmoe_thread_pool_destroy(pool);
}

/* ---- routers ------------------------------------------------------------------------- */

enum { MOST_EXPERTS = 300 };

/* The scores of the experts. */
static void reference_scores(const zmoe_router *router, const double *x, double *logits) {
  const float *data = router->gate->data, *bias = router->gate->bias;
  uint32_t experts = router->gate->out_features, in_features = router->gate->in_features;
  double max = -INFINITY, sum = 0;
  for (uint32_t e = 0; e < experts; e++) {
    logits[e] = bias != NULL ? bias[e] : 0;
    for (uint32_t k = 0; k < in_features; k++)
      logits[e] += data[(size_t)e * in_features + k] * x[k];
    max = fmax(max, logits[e]);
  }
  for (uint32_t e = 0; e < experts; e++)
    sum += exp(logits[e] - max);
  for (uint32_t e = 0; e < experts && router->kind == ZMOE_SOFTMAX_TOP_K; e++)
    logits[e] = exp(logits[e] - max) / sum;
  for (uint32_t e = 0; e < experts && router->kind == ZMOE_SIGMOID_TOP_K; e++)
    logits[e] = 1 / (1 + exp(-logits[e]));
}

static double best_two(const double *scores, uint32_t count) {
  double first = -INFINITY, second = -INFINITY;
  for (uint32_t i = 0; i < count; i++) {
    second = fmax(second, fmin(first, scores[i]));
    first = fmax(first, scores[i]);
  }
  return first + second;
}

/* What they are chosen by: with the bias, and 0 in groups that `kept` others are better than. */
static void reference_choice(const zmoe_router *router, const double *scores, double *choice) {
  uint32_t experts = router->gate->out_features, groups = router->groups;
  double sums[MOST_EXPERTS];
  for (uint32_t e = 0; e < experts; e++)
    choice[e] = scores[e] + (router->bias != NULL ? router->bias[e] : 0);
  for (uint32_t g = 0; g < groups; g++)
    sums[g] = best_two(choice + g * (experts / groups), experts / groups);
  for (uint32_t g = 0; g < groups; g++) {
    uint32_t better = 0;
    for (uint32_t other = 0; other < groups; other++)
      better += sums[other] > sums[g];
    for (uint32_t e = 0; e < experts / groups && better >= router->kept; e++)
      choice[g * (experts / groups) + e] = 0;
  }
}

static void reference_route(const zmoe_router *router, const double *x, int32_t *ids,
                            double *weights) {
  double scores[MOST_EXPERTS], choice[MOST_EXPERTS], sum = 0, total = 0;
  reference_scores(router, x, scores);
  reference_choice(router, scores, choice);
  for (uint32_t i = 0; i < router->top_k; i++) {
    ids[i] = 0;
    for (uint32_t e = 1; e < router->gate->out_features; e++)
      ids[i] = choice[e] > choice[ids[i]] ? (int32_t)e : ids[i];
    weights[i] = scores[ids[i]];
    choice[ids[i]] = -INFINITY;
  }
  double best = weights[0]; /* any number serves: exp of the best is never too large */
  for (uint32_t i = 0; i < router->top_k; i++) {
    if (router->kind == ZMOE_TOP_K_SOFTMAX)
      sum += weights[i] = exp(weights[i] - best);
    total += weights[i];
  }
  for (uint32_t i = 0; i < router->top_k; i++) {
    weights[i] /= router->kind == ZMOE_TOP_K_SOFTMAX ? sum : 1;
    if (router->normalize)
      weights[i] /= total / (router->kind == ZMOE_TOP_K_SOFTMAX ? sum : 1);
    weights[i] *= router->scale != 0 ? router->scale : 1;
  }
}

static void check_router(const zmoe_router *router, uint32_t rows, zmoe_dtype dtype, zmoe_isa isa,
                         uint32_t threads) {
  uint32_t width = router->gate->in_features, k = router->top_k;
  float *h = random_floats((size_t)rows * width, 2.0f), *weights = random_floats(rows * k, 1);
  double *x = malloc(width * sizeof *x), *expected = malloc(k * sizeof *expected);
  int32_t *ids = malloc(rows * k * sizeof *ids), *expected_ids = malloc(k * sizeof *ids);
  unsigned char *x_out = malloc((size_t)rows * width * 4);
  float *wide = malloc((size_t)rows * width * sizeof *wide);
  zmoe_thread_pool *pool = make_pool(threads, isa, zmoe_route_scratch(router));
  CHECK_EQUAL(zmoe_route(pool, router, h, rows, x_out, dtype, ids, weights), ZMOE_OK);
  zmoe_convert(wide, ZMOE_F32, x_out, dtype, (size_t)rows * width, ZMOE_ISA_GENERIC);
  for (uint32_t r = 0; r < rows; r++) {
    reference_norm(&router->input, h + (size_t)r * width, x);
    CHECK(distance(wide + (size_t)r * width, x, width) < (dtype == ZMOE_F32 ? 1e-6 : 5e-3));
    for (uint32_t i = 0; i < width; i++) /* from here on, what x is in its dtype */
      x[i] = wide[(size_t)r * width + i];
    reference_route(router, x, expected_ids, expected);
    CHECK(memcmp(ids + r * k, expected_ids, k * sizeof *ids) == 0);
    CHECK(distance(weights + r * k, expected, k) < 1e-5);
  }
  zmoe_thread_pool_destroy(pool);
  free(h), free(weights), free(x), free(expected), free(ids), free(expected_ids), free(x_out);
  free(wide);
}

static void test_routers(void) {
  static const uint32_t experts[] = {1, 5, 16, 64, 300};
  for (uint32_t i = 0; i < 120; i++) {
    uint32_t n = experts[i % 5], width = 1 + next_random() % 60;
    float *gate = random_floats((size_t)n * width, 1 / sqrtf((float)width)),
          *bias = random_floats(n, 1);
    float *norm = random_floats(width, 2), *more = random_floats(n, 1);
    const zmoe_weight weight = {
        .data = gate, .bias = i % 2 ? bias : NULL, .out_features = n, .in_features = width};
    const zmoe_router router = {.input = {next_random() % 3, width, 1e-5f, norm, NULL},
                                .gate = &weight,
                                .kind = i % 3,
                                .top_k = 1 + next_random() % (n < 9 ? n : 9),
                                .normalize = next_random() % 2,
                                .bias = i % 3 == 2 && i % 4 ? more : NULL,
                                .groups = i % 3 == 2 && n % 4 == 0 ? 4 : 0,
                                .kept = 1 + i % 4,
                                .scale = i % 7 ? 2.5f : 0};
    zmoe_isa isa = ALL_ISAS[next_random() % N_ISAS];
    check_router(&router, i % 10 == 9 ? 130 : 1 + i % 4, (zmoe_dtype)(next_random() % 3),
                 zmoe_isa_supported(isa) ? isa : zmoe_isa_best(), 1 + i % 3);
    free(gate), free(bias), free(norm), free(more);
  }
}

/* Logits that are given: the gate's own bias. */
static void route_logits(uint32_t kind, const float *logits, uint32_t n, uint32_t k, int32_t *ids,
                         float *weights) {
  float *zeros = calloc(n, sizeof *zeros), h = 0, x;
  const zmoe_weight gate = {.data = zeros, .bias = logits, .out_features = n, .in_features = 1};
  const zmoe_router router = {.gate = &gate, .kind = kind, .top_k = k};
  zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), zmoe_route_scratch(&router));
  CHECK_EQUAL(zmoe_route(pool, &router, &h, 1, &x, ZMOE_F32, ids, weights), ZMOE_OK);
  zmoe_thread_pool_destroy(pool);
  free(zeros);
}

static void test_ties_go_to_the_lower_id(void) {
  const float logits[] = {1, 3, 2, 3, 3, 1, 2, 3, 0};
  static const int32_t expected[] = {1, 3, 4, 7, 2, 6, 0};
  int32_t ids[7];
  float weights[7];
  for (uint32_t kind = 0; kind <= ZMOE_SIGMOID_TOP_K; kind++) {
    route_logits(kind, logits, 9, 7, ids, weights);
    CHECK(memcmp(ids, expected, sizeof ids) == 0);
    CHECK(weights[0] == weights[3] && weights[3] > weights[4] && weights[4] == weights[5]);
  }
}

/* NaN comes last, and out of whoever is weighted by it. */
static void test_nan_is_chosen_last(void) {
  const float logits[] = {NAN, 1, NAN, -INFINITY, 2, NAN};
  static const int32_t expected[] = {4, 1, 3, 0, 2};
  int32_t ids[5];
  float weights[5];
  route_logits(ZMOE_TOP_K_SOFTMAX, logits, 6, 3, ids, weights);
  CHECK(memcmp(ids, expected, 3 * sizeof *ids) == 0 && weights[2] == 0 && weights[0] > 0.7f);
  route_logits(ZMOE_TOP_K_SOFTMAX, logits, 6, 5, ids, weights);
  CHECK(memcmp(ids, expected, sizeof ids) == 0 && isnan(weights[0]) && isnan(weights[4]));
}

/* Whatever the logits, the ids are those of k different experts. */
static void test_nan_and_infinity(void) {
  for (int i = 0; i < 300; i++) {
    float logits[20], weights[20];
    int32_t ids[20];
    uint32_t k = 1 + next_random() % 20, seen = 0;
    static const float odd[] = {NAN, INFINITY, -INFINITY, 1, 0};
    for (int e = 0; e < 20; e++)
      logits[e] = i == 0 ? NAN : odd[next_random() % 5];
    route_logits((uint32_t)i % 3, logits, 20, k, ids, weights);
    for (uint32_t j = 0; j < k; j++) {
      CHECK(ids[j] >= 0 && ids[j] < 20 && !(seen >> ids[j] & 1));
      seen |= 1u << ids[j];
    }
  }
}

static void test_bad_routers(void) {
  float h[4] = {1, 2, 3, 4}, weights[4] = {0}, data[8] = {0};
  float x[4] = {9, 9, 9, 9};
  int32_t ids[4] = {9, 9, 9, 9};
  const zmoe_weight gate = {.data = data, .out_features = 2, .in_features = 4};
  const zmoe_weight empty = {.data = data, .out_features = 0, .in_features = 4};
  const zmoe_router good = {.gate = &gate, .top_k = 1};
  zmoe_router bad[8];
  for (int i = 0; i < 8; i++)
    bad[i] = good;
  bad[6].groups = 1, bad[6].kept = 2, bad[7].groups = 2, bad[7].kept = 1;
  bad[0].top_k = 0, bad[1].top_k = 3, bad[2].kind = 3, bad[3].gate = &empty;
  bad[4].input = (zmoe_norm){ZMOE_NORM_RMS, 3, 0, NULL, NULL}, bad[5].input.kind = 3;
  zmoe_thread_pool *pool = make_pool(2, zmoe_isa_best(), zmoe_route_scratch(&good));
  for (int i = 0; i < 8; i++)
    CHECK_EQUAL(zmoe_route(pool, &bad[i], h, 1, x, ZMOE_F32, ids, weights), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_route(pool, &good, h, 1, x, (zmoe_dtype)3, ids, weights), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_route(pool, &good, h, 0, x, ZMOE_F32, ids, weights), ZMOE_OK);
  zmoe_thread_pool_destroy(pool);
  CHECK_EQUAL(zmoe_thread_pool_create(1, NULL, 0, zmoe_isa_best(), &pool), ZMOE_OK);
  CHECK_EQUAL(zmoe_route(pool, &good, h, 1, x, ZMOE_F32, ids, weights), ZMOE_ENOMEM);
  CHECK(x[0] == 9 && ids[0] == 9);
  zmoe_thread_pool_destroy(pool);
}

/* ---- refusals of attention and norms ------------------------------------------------------ */

static void test_bad_norms(void) {
  const zmoe_norm good = {ZMOE_NORM_LAYER, 4, 0, NULL, NULL}, odd = {3, 4, 0, NULL, NULL};
  const zmoe_norm none = {ZMOE_NORM_NONE, 0, 0, NULL, NULL};
  CHECK(zmoe_norm_fits(&good, 4) && !zmoe_norm_fits(&good, 5));
  CHECK(!zmoe_norm_fits(&odd, 4) && zmoe_norm_fits(&none, 4));
}

enum { WIDTH = 8, DIM = 4, BLOCKS = 3, FLOATS = 2 * ZMOE_KEY_BLOCK * DIM * BLOCKS };

/* What a refused call must leave alone. */
struct scene {
  float h[2 * WIDTH], keys[FLOATS], values[FLOATS];
};

static void expect(zmoe_thread_pool *pool, const zmoe_attention *attention, const zmoe_span *spans,
                   uint32_t n_spans, const float *angles, int status) {
  static struct scene scene, before;
  memset(&scene, 0x11, sizeof scene);
  memcpy(&before, &scene, sizeof scene);
  const zmoe_kv_cache cache = {scene.keys, scene.values, BLOCKS, 0};
  CHECK_EQUAL(zmoe_attention_step(pool, attention, &cache, spans, n_spans, angles, angles, scene.h,
                                  ZMOE_EXACT),
              status);
  if (status != ZMOE_OK)
    CHECK(memcmp(&before, &scene, sizeof scene) == 0);
}

static void test_bad_spans(zmoe_thread_pool *pool, const zmoe_attention *good,
                           const float *angles) {
  static const uint32_t blocks[] = {2, 0, BLOCKS}; /* the last one is not there */
  static const zmoe_span fine = {blocks, 3, 1, 0, NULL, NULL}, none = {NULL, 0, 0, 0, NULL, NULL};
  static const zmoe_span bad[] = {
      {blocks, 1, 1, 64, NULL, NULL},         {blocks, 1, 2, 63, NULL, NULL},
      {blocks, 3, 1, 128, NULL, NULL},        {blocks, 2, UINT32_MAX, 1, NULL, NULL},
      {blocks, 2, 1, UINT32_MAX, NULL, NULL}, {blocks, 2, UINT32_MAX, UINT32_MAX, NULL, NULL},
      {blocks, 0, 1, 0, NULL, NULL},          {NULL, 0, 1, 0, NULL, NULL},
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    expect(pool, good, &bad[i], 1, angles, ZMOE_EINVAL);
    const zmoe_span after[] = {fine, bad[i]};
    expect(pool, good, after, 2, angles, ZMOE_EINVAL);
  }
  expect(pool, good, &fine, 1, NULL, ZMOE_EINVAL); /* no angles */
  const zmoe_span two[] = {
      none, {blocks, 2, 1, 127, NULL, NULL}, none, {blocks, 1, 1, 63, NULL, NULL}, none};
  expect(pool, good, two, 5, angles, ZMOE_OK);
  expect(pool, good, &none, 1, angles, ZMOE_OK);
  expect(pool, good, NULL, 0, angles, ZMOE_OK);
}

static void test_bad_attention(void) {
  static const float data[32 * WIDTH] = {0}, angles[4 * ZMOE_KEY_BLOCK] = {0};
  static const uint32_t first = 0;
  static const zmoe_span row = {&first, 1, 1, 0, NULL, NULL};
  zmoe_weight projections[3] = {{.data = data, .out_features = 16, .in_features = WIDTH},
                                {.data = data, .out_features = 8, .in_features = WIDTH},
                                {.data = data, .out_features = 8, .in_features = WIDTH}};
  zmoe_weight wrong[3] = {projections[0], projections[1], projections[2]};
  zmoe_weight narrow[3] = {projections[0], projections[1], projections[2]};
  zmoe_weight output = {.data = data, .out_features = WIDTH, .in_features = 16}, other = output,
              taller = output;
  zmoe_weight gated[3] = {projections[0], projections[1], projections[2]};
  gated[0].out_features = 32, wrong[2].out_features = 4, narrow[1].in_features = 4,
  other.in_features = 8, taller.out_features = 7;
  const zmoe_norm none = {0}, odd = {ZMOE_NORM_RMS, 5, 0, NULL, NULL}, kind = {3, 4, 0, NULL, NULL};
  const zmoe_attention good = {.input = none,
                               .projections = projections,
                               .n_projections = 3,
                               .output = &output,
                               .heads = 4,
                               .kv_heads = 2,
                               .head_dim = DIM,
                               .rope_dims = 4,
                               .scale = 1};
  zmoe_attention bad[23];
  for (int i = 0; i < 23; i++)
    bad[i] = good;
  bad[0].heads = 0, bad[1].kv_heads = 0, bad[2].heads = 3, bad[3].kv_heads = 3;
  bad[4].head_dim = 0, bad[5].rope_dims = 3, bad[6].rope_dims = 6, bad[7].n_projections = 2;
  bad[8].n_projections = 1, bad[9].projections = wrong, bad[10].projections = narrow;
  bad[11].output = &other, bad[12].output = &taller, bad[13].input = odd;
  bad[14].query_norm = odd, bad[15].key_norm = kind, bad[16].dtype = 3;
  bad[20].is_gated = bad[21].is_gated = 1, bad[22].is_gated = 2; /* 20: without gates */
  bad[21].projections = bad[22].projections = gated;
  bad[21].query_norm = (zmoe_norm){ZMOE_NORM_RMS, 16, 0, NULL, NULL}; /* of all heads */
  bad[17].keep = 1, bad[18].window = bad[18].keep = 4, bad[19].window = 4, bad[19].keep = 5;
  zmoe_thread_pool *pool = make_pool(2, zmoe_isa_best(), zmoe_attention_scratch(&good, 2));
  for (int i = 0; i < 23; i++)
    expect(pool, &bad[i], &row, 1, angles, ZMOE_EINVAL);
  test_bad_spans(pool, &good, angles);
  zmoe_thread_pool_destroy(pool);
  /* None; some; enough for all but the nested products. */
  size_t own = zmoe_attention_scratch(&good, 1) - zmoe_linear_scratch(16);
  const size_t rooms[] = {0, 1, own - ((size_t)300 << 10)};
  for (int i = 0; i < 3; i++) {
    CHECK_EQUAL(zmoe_thread_pool_create(1, NULL, 0, zmoe_isa_best(), &pool), ZMOE_OK);
    if (rooms[i] > 0)
      CHECK_EQUAL(zmoe_thread_pool_reserve(pool, rooms[i]), ZMOE_OK);
    expect(pool, &good, &row, 1, angles, ZMOE_ENOMEM);
    zmoe_thread_pool_destroy(pool);
  }
}

int main(void) {
  static const test_case tests[] = {
      {"norms, the same bits everywhere", test_norms},
      {"norms of extremes", test_norms_of_extremes},
      {"routers", test_routers},
      {"ties go to the lower id", test_ties_go_to_the_lower_id},
      {"NaN is chosen last", test_nan_is_chosen_last},
      {"NaN and infinity are routed somewhere", test_nan_and_infinity},
      {"bad routers are refused", test_bad_routers},
      {"bad norms are refused", test_bad_norms},
      {"bad attention is refused, nothing written", test_bad_attention},
  };
  RUN(tests);
  return 0;
}
