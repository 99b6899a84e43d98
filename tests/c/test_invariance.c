/* A row's result is the same bits whatever else is in the call: every format, instruction
 * set and precision; any number of rows. */
#include "kernel_rig.h"

enum { MOST_ROWS = 130, OUT_FEATURES = 37, MOST_IN = 2304 + 128 };

/* ---- zmoe_linear --------------------------------------------------------------------- */

typedef struct layer {
  zmoe_weight w;
  zmoe_dtype x_dtype;
  const unsigned char *x;
  zmoe_precision precision;
} layer;

/* Rows [first, first + rows) of x, for y (rows, OUT_FEATURES). */
static void multiply(zmoe_thread_pool *pool, const layer *l, uint32_t first, uint32_t rows,
                     float *y) {
  const zmoe_weight *weights[] = {&l->w};
  void *ys[] = {y};
  size_t stride = OUT_FEATURES, row_bytes = l->w.in_features * zmoe_dtype_bytes(l->x_dtype);
  CHECK_EQUAL(zmoe_linear(pool, weights, 1, l->x + first * row_bytes, l->x_dtype, rows, ys, &stride,
                          ZMOE_F32, l->precision),
              ZMOE_OK);
}

static void check_rows(const layer *l, zmoe_isa isa, const float *alone, const float *together,
                       uint32_t rows) {
  for (size_t i = 0; i < (size_t)rows * OUT_FEATURES; i++)
    if (memcmp(alone + i, together + i, sizeof *alone) != 0) {
      fprintf(stderr,
              "%s, group %u, %s, precision %d, x dtype %d, %u columns: with %u rows y[%zu][%zu] is "
              "%.9g, not %.9g as alone\n",
              zmoe_isa_name(isa), l->w.group,
              rig_kind_name((weight_kind){l->w.format, l->w.bits, l->w.group}), (int)l->precision,
              (int)l->x_dtype, l->w.in_features, rows, i / OUT_FEATURES, i % OUT_FEATURES,
              together[i], alone[i]);
      exit(1);
    }
}

/* Row 20 has a NaN, row 25 an infinity: what no layout but the plain one can hold. */
static layer make_layer(uint32_t n, uint32_t in_features, zmoe_dtype x_dtype) {
  weight_kind kind = RIG_KINDS[n % N_KINDS];
  weight_options options = {n % 3, n % 3, n % 2 == 0, 0, 0};
  if (kind.group != 0)
    in_features = in_features / kind.group * kind.group;
  layer l = {.w = rig_weight(kind, OUT_FEATURES, in_features, options), .x_dtype = x_dtype};
  unsigned char *x = rig_inputs((size_t)MOST_ROWS * in_features, 1.0f, x_dtype, 0, 0);
  const float odd[] = {NAN, INFINITY};
  for (size_t i = 0; i < 2; i++)
    CHECK_EQUAL(zmoe_convert(x + ((20 + 5 * i) * in_features + 3) * zmoe_dtype_bytes(x_dtype),
                             x_dtype, &odd[i], ZMOE_F32, 1, ZMOE_ISA_GENERIC),
                ZMOE_OK);
  l.x = x;
  return l;
}

/* The n-th, with any number of rows up to 33, and with 128 or one more, of which a call works on so
 * many at a time; the few also among other neighbours.  Affine codes, of which there are many
 * kinds, have the even numbers with one dtype and the odd ones with another.  The threads take
 * turns. */
static void check_layer(const layer *l, zmoe_isa isa, uint32_t n) {
  static float alone[MOST_ROWS * OUT_FEATURES], together[MOST_ROWS * OUT_FEATURES];
  zmoe_thread_pool *pools[2];
  for (uint32_t t = 0; t < 2; t++)
    pools[t] = make_pool(t + 1, isa, zmoe_linear_scratch(l->w.in_features));
  for (uint32_t r = 0; r < MOST_ROWS; r++)
    multiply(pools[0], l, r, 1, alone + (size_t)r * OUT_FEATURES);
  for (uint32_t rows = 2; rows < MOST_ROWS; rows = rows == 33 ? 128 : rows + 1) {
    int is_turn = l->w.format != ZMOE_FORMAT_AFFINE || (rows + n) % 2 == 0;
    if (!is_turn || rig_skips(rows + n))
      continue;
    multiply(pools[rows / 2 % 2], l, 0, rows, together);
    check_rows(l, isa, alone, together, rows);
    if (rows > 16)
      continue;
    uint32_t first = MOST_ROWS - rows;
    multiply(pools[0], l, first, rows, together);
    check_rows(l, isa, alone + (size_t)first * OUT_FEATURES, together, rows);
  }
  for (uint32_t t = 0; t < 2; t++)
    zmoe_thread_pool_destroy(pools[t]);
}

static void test_rows(void) {
  static const uint32_t in_features[] = {384, 131, MOST_IN, 1024 + 160};
  for (uint32_t n = 0; n < 2 * N_KINDS; n++) {
    if (rig_skips(n))
      continue;
    for (int i = 0; i < N_ISAS; i++)
      for (int precision = ZMOE_EXACT; precision <= ZMOE_INT8; precision++) {
        if (!rig_runs(ALL_ISAS[i]) ||
            (ALL_ISAS[i] == ZMOE_ISA_AVX512_VNNI && precision == ZMOE_EXACT))
          continue; /* exact, it has the loops of AVX-512 */
        uint32_t columns = in_features[(n + (uint32_t)precision) % 4];
        layer l = make_layer(n, columns < RIG_KINDS[n % N_KINDS].group ? 384 : columns,
                             n < N_KINDS ? ZMOE_BF16
                             : n % 2     ? ZMOE_F32
                                         : ZMOE_F16);
        l.precision = (zmoe_precision)precision;
        check_layer(&l, ALL_ISAS[i], n);
        rig_free_blocks();
      }
  }
}

/* ---- zmoe_experts and zmoe_gather_linear ----------------------------------------------- */

enum { EXPERTS = 4, WIDTH = 256, HIDDEN = 160, MOE_ROWS = 40, TOP_K = 2 };

static const zmoe_weight *make_weights(weight_kind kind, uint32_t out_features,
                                       uint32_t in_features) {
  zmoe_weight *weights = rig_block(EXPERTS * sizeof *weights, 0, 0);
  for (uint32_t e = 0; e < EXPERTS; e++)
    weights[e] = rig_weight(kind, out_features, in_features, (weight_options){0});
  return weights;
}

typedef struct routing {
  int32_t rows[MOE_ROWS * TOP_K], experts[MOE_ROWS * TOP_K];
  float weights[MOE_ROWS * TOP_K];
} routing;

/* Expert 0 has most of the pairs. */
static routing route(void) {
  routing all;
  for (uint32_t i = 0; i < MOE_ROWS * TOP_K; i++) {
    all.rows[i] = (int32_t)(i / TOP_K);
    all.experts[i] = i % TOP_K == 0 ? 0 : (int32_t)(1 + i / TOP_K % (EXPERTS - 1));
    all.weights[i] = random_float(1.0f);
  }
  return all;
}

/* Rows [first, first + rows): with `weighted` their sums (rows, WIDTH), else `up` alone
 * (pairs, HIDDEN). */
static void run_moe(zmoe_thread_pool *pool, const zmoe_expert_layer *layer, const uint16_t *x,
                    const routing *all, uint32_t first, uint32_t rows, zmoe_precision precision,
                    int weighted, float *out) {
  int32_t pair_rows[MOE_ROWS * TOP_K];
  for (uint32_t i = 0; i < rows * TOP_K; i++)
    pair_rows[i] = (int32_t)(i / TOP_K);
  const int32_t *experts = all->experts + (size_t)first * TOP_K;
  x += (size_t)first * WIDTH;
  if (weighted)
    CHECK_EQUAL(zmoe_experts(pool, layer, x, ZMOE_BF16, rows, pair_rows, experts,
                             all->weights + (size_t)first * TOP_K, rows * TOP_K, out, ZMOE_F32,
                             precision),
                ZMOE_OK);
  else
    CHECK_EQUAL(zmoe_gather_linear(pool, layer->up, EXPERTS, x, ZMOE_BF16, rows, pair_rows, experts,
                                   rows * TOP_K, out, ZMOE_F32, precision),
                ZMOE_OK);
}

/* Gives all NaNs the same bits: their sign depends on the order of an addition's operands, which
 * neither C nor IEEE 754 settles. */
static void unify_nans(float *values, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (isnan(values[i]))
      values[i] = NAN;
}

static void check_moe(zmoe_thread_pool *pool, const zmoe_expert_layer *layer, const uint16_t *x,
                      const routing *all, zmoe_precision precision, int weighted) {
  static float alone[MOE_ROWS * TOP_K * WIDTH], together[MOE_ROWS * TOP_K * WIDTH];
  const size_t each = weighted ? WIDTH : TOP_K * HIDDEN;
  for (uint32_t r = 0; r < MOE_ROWS; r++)
    run_moe(pool, layer, x, all, r, 1, precision, weighted, alone + r * each);
  unify_nans(alone, MOE_ROWS * each);
  for (uint32_t rows = 2; rows <= MOE_ROWS; rows += rows < 9 ? 1 : 31) {
    if (rows < 9 && rig_skips(rows))
      continue;
    run_moe(pool, layer, x, all, 0, rows, precision, weighted, together);
    unify_nans(together, rows * each);
    CHECK(memcmp(alone, together, rows * each * sizeof *alone) == 0);
  }
}

/* Rows 3 and 30 are not finite, or become so within the experts. */
static void test_pairs(void) {
  for (uint32_t kind = 0; kind < N_KINDS; kind++) {
    if (rig_skips(kind) || RIG_KINDS[kind].group == 128)
      continue;
    for (int i = 0; i < N_ISAS; i++) {
      if (!rig_runs(ALL_ISAS[i]))
        continue;
      zmoe_expert_layer layer = {.gate = make_weights(RIG_KINDS[kind], HIDDEN, WIDTH),
                                 .up = make_weights(RIG_KINDS[kind], HIDDEN, WIDTH),
                                 .down = make_weights(RIG_KINDS[N_KINDS - 3], WIDTH, HIDDEN),
                                 .experts = EXPERTS};
      if (RIG_KINDS[kind].group == 0 || HIDDEN % RIG_KINDS[kind].group == 0)
        layer.down = make_weights(RIG_KINDS[kind], WIDTH, HIDDEN);
      uint16_t *x = rig_inputs((size_t)MOE_ROWS * WIDTH, 1.0f, ZMOE_BF16, 0, 0);
      x[3 * WIDTH + 9] = 0x7f80;
      x[30 * WIDTH + 9] = 0x7f00;
      routing all = route();
      zmoe_thread_pool *pool = make_pool(2, ALL_ISAS[i], zmoe_experts_scratch(WIDTH, HIDDEN, 2));
      for (int n = 0; n < 4; n++)
        check_moe(pool, &layer, x, &all, (zmoe_precision)(n / 2), n % 2);
      zmoe_thread_pool_destroy(pool);
      rig_free_blocks();
    }
  }
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"rows of a matmul do not depend on other rows", test_rows},
      {"pairs of the experts do not depend on other pairs", test_pairs},
  };
  rig_start(argc, argv);
  RUN(tests);
  return 0;
}
