/* zmoe_experts and zmoe_gather_linear against double precision. */
#include "kernel_rig.h"

enum { MOST_PAIRS = 1024 };

typedef struct moe {
  zmoe_expert_layer layer;
  uint32_t width, hidden, rows, n_pairs;
  zmoe_dtype x_dtype, out_dtype;
  zmoe_precision precision;
  const void *x;
  int32_t pair_rows[MOST_PAIRS], pair_experts[MOST_PAIRS];
  float pair_weights[MOST_PAIRS];
  int weighted;
} moe;

/* ---- the same in double ------------------------------------------------------------ */

static double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}

static double activation(const zmoe_expert_layer *l, double gate, double up) {
  const double root = 0.79788456080286536, half = 0.70710678118654752;
  double x = l->gate != NULL ? gate : up;
  switch (l->activation) {
  case ZMOE_SILU:
    return gate * sigmoid(gate) * up;
  case ZMOE_GELU:
    return 0.5 * gate * (1 + erf(gate * half)) * up;
  case ZMOE_GELU_TANH:
    return 0.5 * gate * (1 + tanh(root * (gate + 0.044715 * gate * gate * gate))) * up;
  case ZMOE_CLAMPED_SWIGLU:
    gate = fmin(gate, l->limit);
    up = fmax(fmin(up, l->limit), -l->limit);
    return gate * sigmoid(l->alpha * gate) * (up + 1);
  case ZMOE_RELU2:
    return up > 0 ? up * up : 0;
  case ZMOE_GELU_ONLY:
    return 0.5 * x * (1 + erf(x * half));
  case ZMOE_GELU_TANH_ONLY:
    return 0.5 * x * (1 + tanh(root * (x + 0.044715 * x * x * x)));
  }
  return NAN;
}

static double error_of(const moe *m, expected e) {
  return e.error + (m->precision == ZMOE_INT8 ? e.int8_error : 0);
}

/* How far an activation moves when its inputs do, by trying; and its own rounding,
 * a few units of what it multiplies. */
static double activation_error(const moe *m, double gate, double gate_error, double up,
                               double up_error) {
  double value = activation(&m->layer, gate, up), worst = 0;
  for (int i = -1; i <= 1; i++)
    for (int j = -1; j <= 1; j++) {
      double moved = activation(&m->layer, gate + i * gate_error, up + j * up_error);
      worst = fmax(worst, fabs(moved - value));
    }
  double size = fabs(value) + 0x1p-4 * (fabs(gate) + fabs(up) + 1) * (fabs(up) + 1);
  return 1.5 * worst + 0x1p-20 * size +
         (m->x_dtype == ZMOE_BF16 ? rig_rounding(fabs(value) + worst, ZMOE_BF16) : 0);
}

/* The activations of one pair, and how far they may be off. */
static void expect_hidden(const moe *m, uint32_t pair, double *values, double *errors) {
  uint32_t expert = (uint32_t)m->pair_experts[pair], row = (uint32_t)m->pair_rows[pair];
  static double x[4096];
  for (uint32_t k = 0; k < m->width; k++)
    x[k] = rig_load(m->x, (size_t)row * m->width + k, m->x_dtype);
  for (uint32_t h = 0; h < m->hidden; h++) {
    expected gate = {0}, up = rig_expect(&m->layer.up[expert], h, x, NULL);
    if (m->layer.gate != NULL)
      gate = rig_expect(&m->layer.gate[expert], h, x, NULL);
    values[h] = activation(&m->layer, gate.value, up.value);
    errors[h] = activation_error(m, gate.value, error_of(m, gate), up.value, error_of(m, up));
  }
}

/* value and error (outputs, width) of what zmoe_experts writes. */
static void expect_experts(const moe *m, expected *out) {
  static double hidden[4096], errors[4096];
  size_t outputs = m->weighted ? m->rows : m->n_pairs;
  memset(out, 0, outputs * m->width * sizeof *out);
  for (uint32_t p = 0; p < m->n_pairs; p++) {
    expect_hidden(m, p, hidden, errors);
    double weight = m->weighted ? m->pair_weights[p] : 1;
    expected *to = out + (m->weighted ? (size_t)m->pair_rows[p] : p) * m->width;
    for (uint32_t o = 0; o < m->width; o++) {
      expected e = rig_expect(&m->layer.down[m->pair_experts[p]], o, hidden, errors);
      to[o].value += weight * e.value;
      to[o].error += fabs(weight) * (error_of(m, e) + 0x1p-20 * fabs(e.value));
    }
  }
}

/* ---- making one -------------------------------------------------------------------- */

static const zmoe_weight *make_weights(weight_kind kind, uint32_t experts, uint32_t out_features,
                                       uint32_t in_features, weight_options options) {
  zmoe_weight *weights = rig_block(experts * sizeof *weights, 0, 0);
  for (uint32_t e = 0; e < experts; e++)
    weights[e] = rig_weight(kind, out_features, in_features, options);
  return weights;
}

typedef struct moe_options {
  weight_kind gate, up, down;
  uint32_t experts, width, hidden, activation, rows, top_k;
  zmoe_dtype x_dtype, out_dtype;
  zmoe_precision precision;
  uint32_t offset;
  int weighted, bias;
} moe_options;

/* Each row's experts are random and distinct; every fifth row has none. */
static void route(moe *m, uint32_t top_k) {
  for (uint32_t r = 0; r < m->rows; r++) {
    uint32_t first = next_random() >> 4;
    for (uint32_t i = 0; i < top_k && r % 5 != 4; i++) {
      m->pair_rows[m->n_pairs] = (int32_t)r;
      m->pair_experts[m->n_pairs] = (int32_t)((first + 3 * i) % m->layer.experts);
      m->pair_weights[m->n_pairs++] = random_float(1.0f);
    }
  }
}

static moe make_moe(const moe_options *o) {
  moe m = {.width = o->width,
           .hidden = o->hidden,
           .rows = o->rows,
           .x_dtype = o->x_dtype,
           .out_dtype = o->out_dtype,
           .precision = o->precision,
           .weighted = o->weighted};
  weight_options options = {ZMOE_F16, ZMOE_BF16, o->bias, o->offset, 0};
  m.layer = (zmoe_expert_layer){
      .experts = o->experts, .activation = o->activation, .alpha = 1.702f, .limit = 3.0f};
  m.layer.up = make_weights(o->up, o->experts, o->hidden, o->width, options);
  m.layer.down = make_weights(o->down, o->experts, o->width, o->hidden, options);
  if (o->activation <= ZMOE_CLAMPED_SWIGLU)
    m.layer.gate = make_weights(o->gate, o->experts, o->hidden, o->width, options);
  m.x = rig_inputs((size_t)o->rows * o->width, 0.25f, o->x_dtype, o->offset, 0);
  route(&m, o->top_k);
  return m;
}

static int run(const moe *m, zmoe_thread_pool *pool, void *out) {
  return zmoe_experts(pool, &m->layer, m->x, m->x_dtype, m->rows, m->pair_rows, m->pair_experts,
                      m->weighted ? m->pair_weights : NULL, m->n_pairs, out, m->out_dtype,
                      m->precision);
}

static size_t outputs_of(const moe *m) {
  return (m->weighted ? m->rows : m->n_pairs) * (size_t)m->width;
}

static void check(const moe *m, const void *out, const expected *expect, zmoe_isa isa) {
  for (size_t i = 0; i < outputs_of(m); i++) {
    double error = expect[i].error + rig_rounding(fabs(expect[i].value), m->out_dtype);
    double actual = rig_load(out, i, m->out_dtype);
    if (!rig_agrees(actual, expect[i].value, 1.01 * error)) {
      fprintf(stderr,
              "%s, activation %u, precision %d: (%u, %u) x %u rows: %zu is %g, not %g (%g)\n",
              zmoe_isa_name(isa), m->layer.activation, (int)m->precision, m->width, m->hidden,
              m->rows, i, actual, expect[i].value, error);
      exit(1);
    }
  }
}

/* With every instruction set, one to three threads, the memory that is said to do. */
static void check_moe(const moe_options *o) {
  moe m = make_moe(o);
  expected *expect = malloc((outputs_of(&m) + 1) * sizeof *expect);
  expect_experts(&m, expect);
  size_t bytes = outputs_of(&m) * zmoe_dtype_bytes(m.out_dtype);
  void *out = rig_block(bytes, o->offset, 0), *first = rig_block(bytes, 0, 0);
  for (int i = 0; i < N_ISAS; i++)
    for (uint32_t threads = 1; threads <= 3 && rig_runs(ALL_ISAS[i]); threads++) {
      zmoe_thread_pool *pool =
          make_pool(threads, ALL_ISAS[i], zmoe_experts_scratch(m.width, m.hidden, o->top_k));
      memset(out, 0xa5, bytes);
      CHECK_EQUAL(run(&m, pool, out), ZMOE_OK);
      if (threads == 1)
        check(&m, memcpy(first, out, bytes), expect, ALL_ISAS[i]);
      CHECK(memcmp(first, out, bytes) == 0);
      zmoe_thread_pool_destroy(pool);
    }
  free(expect);
  rig_free_blocks();
}

/* ---- tests --------------------------------------------------------------------------- */

static const weight_kind F32 = {ZMOE_FORMAT_F32, 0, 0}, BF16 = {ZMOE_FORMAT_BF16, 0, 0},
                         FOUR = {ZMOE_FORMAT_AFFINE, 4, 64}, EIGHT = {ZMOE_FORMAT_AFFINE, 8, 32},
                         MXFP4 = {ZMOE_FORMAT_MXFP4, 4, 32}, THREE = {ZMOE_FORMAT_AFFINE, 3, 32};

static void test_activations(void) {
  const weight_kind kinds[] = {F32, BF16, FOUR, EIGHT, MXFP4, THREE};
  for (uint32_t activation = ZMOE_SILU; activation <= ZMOE_GELU_TANH_ONLY; activation++)
    for (uint32_t n = 0; n < 6; n++) {
      if (rig_skips(n + activation))
        continue;
      moe_options o = {.gate = kinds[n],
                       .up = kinds[n],
                       .down = kinds[(n + activation) % 6],
                       .experts = 6,
                       .width = 64,
                       .hidden = 128,
                       .activation = activation,
                       .rows = 1 + 3 * n,
                       .top_k = 2,
                       .x_dtype = (zmoe_dtype)(n % 3),
                       .out_dtype = (zmoe_dtype)((n + activation) % 3),
                       .precision = (zmoe_precision)((n + activation) / 2 % 2),
                       .offset = n % 3,
                       .weighted = n % 2,
                       .bias = n % 4 < 2};
      check_moe(&o);
    }
}

/* Gate and up of formats of their own; sizes that are no multiple of a panel;
 * all rows at one expert; more rows than are worked on at a time. */
static void test_shapes(void) {
  static const uint32_t rows[] = {1, 2, 5, 12, 13, 128, 129, 140};
  for (uint32_t n = 0; n < 8; n++) {
    if (rig_skips(n))
      continue;
    moe_options o = {.gate = n % 2 ? F32 : BF16,
                     .up = BF16,
                     .down = F32,
                     .experts = n < 4 ? 1 : 5,
                     .width = 33 + n,
                     .hidden = 31 + 5 * n,
                     .activation = ZMOE_SILU,
                     .rows = rows[n],
                     .top_k = n < 4 ? 1 : 3,
                     .x_dtype = (zmoe_dtype)(n % 3),
                     .weighted = n % 3 != 0,
                     .bias = 1};
    check_moe(&o);
    o.gate = n % 2 ? FOUR : EIGHT, o.up = FOUR, o.down = MXFP4;
    o.width = 64 * (1 + n % 3), o.hidden = 96, o.precision = (zmoe_precision)(n / 2 % 2);
    check_moe(&o);
  }
}

static void test_no_pairs(void) {
  for (int weighted = 0; weighted < 2; weighted++) {
    moe_options o = {.gate = FOUR,
                     .up = FOUR,
                     .down = FOUR,
                     .experts = 4,
                     .width = 64,
                     .hidden = 64,
                     .rows = 3,
                     .x_dtype = ZMOE_BF16,
                     .weighted = weighted};
    check_moe(&o); /* zeros, or nothing */
    o.rows = 0;
    check_moe(&o);
  }
}

static moe small_moe(void) {
  const moe_options o = {.gate = FOUR,
                         .up = FOUR,
                         .down = FOUR,
                         .experts = 4,
                         .width = 64,
                         .hidden = 64,
                         .rows = 4,
                         .top_k = 2,
                         .weighted = 1};
  return make_moe(&o);
}

#define REFUSED(change)                                                                            \
  do {                                                                                             \
    moe m = small_moe();                                                                           \
    CHECK_EQUAL(run(&m, pool, out), ZMOE_OK);                                                      \
    memset(out, 0xa5, sizeof out);                                                                 \
    change;                                                                                        \
    CHECK_EQUAL(run(&m, pool, out), ZMOE_EINVAL);                                                  \
    for (size_t i = 0; i < sizeof out; i++)                                                        \
      CHECK_EQUAL(((unsigned char *)out)[i], 0xa5);                                                \
    rig_free_blocks();                                                                             \
  } while (0)

static void test_refusals(void) {
  static float out[4 * 64];
  zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), zmoe_experts_scratch(64, 64, 2));
  REFUSED(m.pair_rows[2] = 3); /* out of order */
  REFUSED(m.pair_rows[0] = -1);
  REFUSED(m.pair_rows[m.n_pairs - 1] = 4);
  REFUSED(m.pair_experts[3] = 4);
  REFUSED(m.pair_experts[3] = -1);
  REFUSED(m.pair_experts[1] = m.pair_experts[0]); /* twice in a row */
  REFUSED(m.rows = 0);
  REFUSED(m.rows = 2);
  REFUSED(m.x_dtype = (zmoe_dtype)3);
  REFUSED(m.out_dtype = (zmoe_dtype)3);
  REFUSED(m.layer.activation = 7);
  REFUSED(m.layer.activation = ZMOE_RELU2); /* takes no gate */
  REFUSED(m.layer.gate = NULL);
  REFUSED(m.layer.experts = 0);
  REFUSED(((zmoe_weight *)m.layer.down)->in_features = 128);
  zmoe_thread_pool_destroy(pool);
}

/* Wide and narrow enough that any of the pieces may be the one that is missing.
 * Ever more room, until it is enough. */
static void check_memory(const moe *m, zmoe_isa isa, size_t enough) {
  static unsigned char out[128 * 1280 * sizeof(float)];
  int failed = 0, status = ZMOE_ENOMEM;
  for (size_t room = 0; status == ZMOE_ENOMEM; room += enough / 24) {
    zmoe_thread_pool *pool = make_pool(1, isa, room);
    memset(out, 0xa5, 64);
    status = run(m, pool, out);
    CHECK(room <= enough);
    CHECK(status == ZMOE_OK || status == ZMOE_ENOMEM);
    for (int i = 0; i < 64 && status == ZMOE_ENOMEM; i++)
      CHECK_EQUAL(out[i], 0xa5);
    failed += status == ZMOE_ENOMEM;
    zmoe_thread_pool_destroy(pool);
  }
  CHECK(failed > 0);
}

static void test_too_little_memory(void) {
  for (int i = 0; i < N_ISAS; i++)
    for (uint32_t wide = 0; wide < 2 && rig_runs(ALL_ISAS[i]); wide++) {
      const moe_options o = {.gate = FOUR,
                             .up = FOUR,
                             .down = FOUR,
                             .experts = 11,
                             .width = wide ? 1280 : 64,
                             .hidden = wide ? 64 : 576,
                             .rows = wide ? 90 : 128,
                             .top_k = wide ? 1 : 6,
                             .x_dtype = ZMOE_BF16,
                             .weighted = 1};
      moe m = make_moe(&o);
      check_memory(&m, ALL_ISAS[i], zmoe_experts_scratch(m.width, m.hidden, o.top_k));
      rig_free_blocks();
    }
}

/* One row with a NaN leaves the others alone. */
static void test_odd_numbers(void) {
  for (int i = 0; i < N_ISAS; i++)
    for (int precision = 0; precision < 2 && rig_runs(ALL_ISAS[i]); precision++) {
      moe m = small_moe();
      static expected expect[4 * 64];
      static float out[4 * 64];
      m.precision = (zmoe_precision)precision;
      ((float *)m.x)[64 + 5] = precision ? NAN : INFINITY;
      expect_experts(&m, expect);
      zmoe_thread_pool *pool = make_pool(1, ALL_ISAS[i], zmoe_experts_scratch(64, 64, 2));
      CHECK_EQUAL(run(&m, pool, out), ZMOE_OK);
      for (size_t o = 0; o < 64; o++) /* infinity - infinity may come by another way */
        CHECK(!isfinite(expect[64 + o].value) && !isfinite(out[64 + o]));
      for (size_t o = 0; o < 4 * 64; o++)
        CHECK(o / 64 == 1 || rig_agrees(out[o], expect[o].value, expect[o].error));
      zmoe_thread_pool_destroy(pool);
      rig_free_blocks();
    }
}

static void check_gather(weight_kind kind, uint32_t rows, zmoe_precision precision,
                         zmoe_dtype x_dtype) {
  moe_options o = {.gate = kind,
                   .up = kind,
                   .down = kind,
                   .experts = 5,
                   .width = 128,
                   .hidden = 35,
                   .activation = ZMOE_RELU2,
                   .rows = rows,
                   .top_k = 2,
                   .x_dtype = x_dtype,
                   .bias = 1};
  o.down = F32;
  moe m = make_moe(&o);
  size_t bytes = (size_t)m.n_pairs * m.hidden * sizeof(float);
  float *out = rig_block(bytes, 0, 0);
  for (int i = 0; i < N_ISAS; i++) {
    if (!rig_runs(ALL_ISAS[i]))
      continue;
    zmoe_thread_pool *pool = make_pool(2, ALL_ISAS[i], zmoe_experts_scratch(m.width, m.hidden, 2));
    CHECK_EQUAL(zmoe_gather_linear(pool, m.layer.up, m.layer.experts, m.x, m.x_dtype, m.rows,
                                   m.pair_rows, m.pair_experts, m.n_pairs, out, ZMOE_F32,
                                   precision),
                ZMOE_OK);
    for (uint32_t p = 0; p < m.n_pairs; p++) {
      double x[128];
      for (uint32_t k = 0; k < 128; k++)
        x[k] = rig_load(m.x, (size_t)m.pair_rows[p] * 128 + k, m.x_dtype);
      for (uint32_t h = 0; h < m.hidden; h++) {
        expected e = rig_expect(&m.layer.up[m.pair_experts[p]], h, x, NULL);
        double error = e.error + (precision == ZMOE_INT8 ? e.int8_error : 0);
        CHECK(rig_agrees(out[(size_t)p * m.hidden + h], e.value, error));
      }
    }
    zmoe_thread_pool_destroy(pool);
  }
  rig_free_blocks();
}

static void test_gather(void) {
  static const uint32_t rows[] = {0, 1, 4, 40, 130};
  const weight_kind kinds[] = {F32, BF16, FOUR, EIGHT, MXFP4, THREE};
  for (uint32_t n = 0; n < 12; n++)
    check_gather(kinds[n % 6], rows[n % 5], (zmoe_precision)(n / 6), (zmoe_dtype)(n % 3));
}

/* What is reserved holds every thread's own memory, however many they are. */
static void test_many_threads(void) {
  const moe_options o = {.gate = FOUR,
                         .up = FOUR,
                         .down = FOUR,
                         .experts = 4,
                         .width = 64,
                         .hidden = 64,
                         .rows = 3,
                         .top_k = 2,
                         .weighted = 1};
  const moe m = make_moe(&o);
  float *out[2];
  for (uint32_t i = 0; i < 2; i++) {
    const uint32_t threads = i == 0 ? 1 : 64;
    zmoe_thread_pool *pool =
        make_pool(threads, zmoe_isa_best(), zmoe_experts_scratch(m.width, m.hidden, o.top_k));
    out[i] = rig_block(outputs_of(&m) * sizeof *out[i], 0, 0);
    CHECK_EQUAL(run(&m, pool, out[i]), ZMOE_OK);
    zmoe_thread_pool_destroy(pool);
  }
  CHECK(memcmp(out[0], out[1], outputs_of(&m) * sizeof *out[0]) == 0);
  rig_free_blocks();
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"every activation", test_activations},
      {"many threads", test_many_threads},
      {"formats and sizes", test_shapes},
      {"no pairs, no rows", test_no_pairs},
      {"unusable arguments are refused, and nothing is written", test_refusals},
      {"too little memory is an error, and nothing is written", test_too_little_memory},
      {"NaN and infinity stay in their row", test_odd_numbers},
      {"one matrix of the experts", test_gather},
  };
  rig_start(argc, argv);
  RUN(tests);
  return 0;
}
