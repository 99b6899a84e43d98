/* zmoe_linear against double precision: formats, instruction sets, sizes. */
#include "kernel_rig.h"

/* ---- one product -------------------------------------------------------------- */

typedef struct product {
  weight_kind kind;
  uint32_t out_features, in_features, rows, offset;
  zmoe_dtype scale_dtype, x_dtype, y_dtype;
  int guarded, bias;
} product;

static zmoe_thread_pool *pools[N_ISAS]; /* one thread each, NULL where it cannot run */

static void describe(const product *p, zmoe_isa isa, zmoe_precision precision, uint32_t row,
                     uint32_t out, double actual, expected e) {
  fprintf(stderr,
          "%s, %s, precision %d: (%u, %u) x %u rows, dtypes %d %d %d, offset %u, guarded %d: "
          "y[%u][%u] is %.9g, not %.9g (error %.3g, int8 %.3g)\n",
          zmoe_isa_name(isa), rig_kind_name(p->kind), (int)precision, p->out_features,
          p->in_features, p->rows, (int)p->scale_dtype, (int)p->x_dtype, (int)p->y_dtype, p->offset,
          p->guarded, row, out, actual, e.value, e.error, e.int8_error);
  exit(1);
}

/* y lies in rows of a stride, between them a gap that nobody may write. */
static void check_outputs(const product *p, zmoe_isa isa, zmoe_precision precision,
                          const unsigned char *y, size_t stride, const expected *expect) {
  size_t item = zmoe_dtype_bytes(p->y_dtype);
  for (uint32_t r = 0; r < p->rows; r++) {
    const unsigned char *row = y + r * stride * item;
    for (uint32_t o = 0; o < p->out_features; o++) {
      expected e = expect[(size_t)r * p->out_features + o];
      double error = e.error + (precision == ZMOE_INT8 ? e.int8_error : 0);
      error += rig_rounding(fabs(e.value) + error, p->y_dtype);
      double actual = rig_load(row, o, p->y_dtype);
      if (!rig_agrees(actual, e.value, error))
        describe(p, isa, precision, r, o, actual, e);
    }
    for (size_t i = p->out_features * item; i < stride * item && r + 1 < p->rows; i++)
      CHECK_EQUAL(row[i], 0xa5);
  }
}

static expected *expect_all(const product *p, const zmoe_weight *w, const void *x) {
  expected *expect = malloc(((size_t)p->rows * p->out_features + 1) * sizeof *expect);
  double *wide = malloc(((size_t)p->rows * p->in_features + 1) * sizeof *wide);
  for (size_t i = 0; i < (size_t)p->rows * p->in_features; i++)
    wide[i] = rig_load(x, i, p->x_dtype);
  for (uint32_t o = 0; o < p->out_features; o++)
    for (uint32_t r = 0; r < p->rows; r++)
      expect[(size_t)r * p->out_features + o] =
          rig_expect(w, o, wide + (size_t)r * p->in_features, NULL);
  free(wide);
  return expect;
}

static zmoe_weight make_weight(const product *p) {
  weight_options options = {(uint32_t)p->scale_dtype, (uint32_t)p->scale_dtype, p->bias, p->offset,
                            p->guarded};
  return rig_weight(p->kind, p->out_features, p->in_features, options);
}

/* The same product with every instruction set, in both precisions. */
static void check_weight(const product *p, zmoe_weight w) {
  void *x = rig_inputs((size_t)p->rows * p->in_features, 1.0f, p->x_dtype, p->offset, p->guarded);
  expected *expect = expect_all(p, &w, x);
  size_t stride = p->out_features + 3, item = zmoe_dtype_bytes(p->y_dtype);
  size_t bytes = p->rows == 0 ? 0 : ((p->rows - 1) * stride + p->out_features) * item;
  unsigned char *y = rig_block(bytes, p->offset, 0);
  const zmoe_weight *weights[] = {&w};
  void *ys[] = {y};
  for (int i = 0; i < N_ISAS; i++)
    for (int precision = ZMOE_EXACT; precision <= ZMOE_INT8 && pools[i] != NULL; precision++) {
      memset(y, 0xa5, bytes);
      CHECK_EQUAL(zmoe_thread_pool_reserve(pools[i], zmoe_linear_scratch(p->in_features)), ZMOE_OK);
      CHECK_EQUAL(zmoe_linear(pools[i], weights, 1, x, p->x_dtype, p->rows, ys, &stride, p->y_dtype,
                              (zmoe_precision)precision),
                  ZMOE_OK);
      check_outputs(p, ALL_ISAS[i], (zmoe_precision)precision, y, stride, expect);
    }
  free(expect);
  rig_free_blocks();
}

static void check_matmul(const product *p) {
  check_weight(p, make_weight(p));
}

/* ---- over formats and sizes ------------------------------------------------------- */

static const uint32_t ROWS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 31, 128, 129};
static const uint32_t OUT_FEATURES[] = {1, 31, 32, 33, 2, 63, 65};
static const uint32_t FLOAT_INS[] = {1, 3, 33, 7, 130, 16, 65, 31, 8, 515, 129, 17, 2};
static const uint32_t GROUPS[] = {1, 3, 5, 2, 9, 7, 4};
enum { COUNT_OF_ROWS = sizeof ROWS / sizeof *ROWS };
#define PICK(table, i) (table)[(i) % (sizeof(table) / sizeof *(table))]

/* Neither all combinations nor random ones: coprime lengths of the tables let
 * every pair of values meet over the formats. */
static void test_products(void) {
  static const uint32_t offsets[] = {0, 1, 2, 4};
  uint32_t n = 0;
  for (uint32_t kind = 0; kind < N_KINDS; kind++)
    for (uint32_t r = 0; r < COUNT_OF_ROWS; r++, n++) {
      if (rig_skips(n))
        continue;
      weight_kind k = RIG_KINDS[kind];
      product p = {.kind = k,
                   .out_features = PICK(OUT_FEATURES, n),
                   .rows = ROWS[r],
                   .offset = PICK(offsets, n / 3)};
      p.in_features = k.group == 0 ? PICK(FLOAT_INS, n) : k.group * PICK(GROUPS, n / 2);
      p.scale_dtype = (zmoe_dtype)(n % 3);
      p.x_dtype = (zmoe_dtype)((n / 3 + 2) % 3);
      p.y_dtype = (zmoe_dtype)((n / 9) % 3);
      p.bias = n % 2 == 0;
      p.guarded = n % 5 == 0;
      if (p.guarded)
        p.offset = 0;
      check_matmul(&p);
    }
}

/* All sizes around the vectors, one to five rows. */
static void test_every_size(void) {
  for (uint32_t in_features = 1; in_features <= 70; in_features++)
    for (uint32_t format = ZMOE_FORMAT_F32; format <= ZMOE_FORMAT_BF16; format++) {
      if (rig_skips(in_features + format))
        continue;
      product p = {.kind = {format, 0, 0},
                   .out_features = 3,
                   .in_features = in_features,
                   .rows = 1 + in_features % 5};
      p.x_dtype = (zmoe_dtype)(in_features % 2 ? ZMOE_F32 : ZMOE_BF16);
      p.guarded = in_features % 3 == 0;
      check_matmul(&p);
    }
}

/* More than one panel is deep, and than kernels convert scales at a time. */
static void test_long_rows(void) {
  static const uint32_t in_features[] = {17 * 128, 33 * 128, 65 * 128};
  for (uint32_t kind = 0; kind < N_KINDS; kind++) {
    weight_kind k = RIG_KINDS[kind];
    int few_bits = k.format == ZMOE_FORMAT_AFFINE && k.bits != 4 && k.bits != 8;
    for (uint32_t rows = 1; rows <= 9; rows += 4) {
      if (rig_skips(kind + rows / 4) || (few_bits && rows / 4 != kind % 3))
        continue;
      product p = {.kind = k, .out_features = 5, .rows = rows, .bias = 1};
      p.in_features = k.group == 0 ? 2051 : in_features[kind % 3] + (k.group < 128 ? k.group : 0);
      p.x_dtype = (zmoe_dtype)(kind % 2 ? ZMOE_BF16 : ZMOE_F32);
      p.scale_dtype = ZMOE_BF16;
      check_matmul(&p);
    }
  }
}

/* Codes and scales that are NaN, subnormal or the least: in outputs of their own. */
static void test_odd_values(void) {
  for (uint32_t kind = 3; kind < N_KINDS; kind++)
    for (uint32_t rows = 1; rows <= 13; rows += 12) {
      if (rig_skips(kind + rows))
        continue;
      product p = {.kind = RIG_KINDS[kind], .out_features = 6, .in_features = 384, .rows = rows};
      p.x_dtype = kind % 2 ? ZMOE_BF16 : ZMOE_F32;
      p.scale_dtype = ZMOE_F32;
      zmoe_weight w = make_weight(&p);
      unsigned char *data = (unsigned char *)w.data, *scales = (unsigned char *)w.scales;
      const size_t row_bytes = zmoe_weight_row_bytes(&w), scale_bytes = zmoe_weight_scale_bytes(&w);
      if (w.format == ZMOE_FORMAT_AFFINE) {
        const float odd[] = {NAN, 0x1p-140f};
        for (size_t i = 0; i < 2; i++)
          memcpy(scales + i * scale_bytes + 4 * i, &odd[i], sizeof odd[i]);
      } else {
        scales[1] = w.format == ZMOE_FORMAT_NVFP4 ? 0x7f : 255;
        scales[scale_bytes + 2] = 0;
        scales[2 * scale_bytes] = 1;
        scales[3 * scale_bytes] = w.format == ZMOE_FORMAT_NVFP4 ? 0xb3 : 0x81;
      }
      if (w.format == ZMOE_FORMAT_MXFP8) {
        data[4 * row_bytes + 33] = 0x7f;
        data[5 * row_bytes + 383] = 0xff;
      }
      check_weight(&p, w);
    }
}

/* ---- how exact on average ------------------------------------------------------------ */

/* Bounds for the worst are far above what happens, since errors of either sign
 * cancel.  Root mean squares are not: they tell a kernel that loses some bits of x,
 * or half the gain of centred codes, from one that does not. */
static double typical_error(const product *p, zmoe_thread_pool *pool, zmoe_precision precision,
                            const zmoe_weight *w, const void *x, const expected *expect) {
  float *y = malloc((size_t)p->rows * p->out_features * sizeof *y);
  void *ys[] = {y};
  size_t stride = p->out_features;
  double errors = 0, spreads = 0;
  CHECK_EQUAL(zmoe_thread_pool_reserve(pool, zmoe_linear_scratch(p->in_features)), ZMOE_OK);
  CHECK_EQUAL(zmoe_linear(pool, &w, 1, x, p->x_dtype, p->rows, ys, &stride, ZMOE_F32, precision),
              ZMOE_OK);
  for (size_t i = 0; i < (size_t)p->rows * p->out_features; i++) {
    errors += (y[i] - expect[i].value) * (y[i] - expect[i].value);
    spreads += expect[i].spread * expect[i].spread;
  }
  free(y);
  return sqrt(errors / spreads);
}

static void test_accuracy(void) {
  for (uint32_t kind = 0; kind < N_KINDS; kind++)
    for (uint32_t n = 0; n < 4; n++) {
      if (rig_skips(kind + n))
        continue;
      weight_kind k = RIG_KINDS[kind];
      product p = {.kind = k, .out_features = 64, .in_features = 1024, .rows = n < 2 ? 4 : 20};
      p.x_dtype = n % 2 ? ZMOE_BF16 : ZMOE_F32;
      zmoe_weight w = rig_weight(k, p.out_features, p.in_features, (weight_options){0});
      void *x = rig_inputs((size_t)p.rows * p.in_features, 1.0f, p.x_dtype, 0, 0);
      expected *expect = expect_all(&p, &w, x);
      double exact = (p.rows == 4 ? 6 : 16) * 0x1p-24, int8 = k.bits == 8 ? 0.0026 : 0.0021;
      for (int i = 0; i < N_ISAS; i++) {
        if (pools[i] == NULL)
          continue;
        CHECK(typical_error(&p, pools[i], ZMOE_EXACT, &w, x, expect) < exact);
        CHECK(typical_error(&p, pools[i], ZMOE_INT8, &w, x, expect) < int8);
      }
      free(expect);
      rig_free_blocks();
    }
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"every format, row count, dtype and alignment", test_products},
      {"every size of floats", test_every_size},
      {"rows of thousands", test_long_rows},
      {"NaN and subnormal numbers in a weight", test_odd_values},
      {"errors are those of rounding", test_accuracy},
  };
  rig_start(argc, argv);
  for (int i = 0; i < N_ISAS; i++)
    if (zmoe_isa_supported(ALL_ISAS[i]))
      pools[i] = make_pool(1, ALL_ISAS[i], 0);
    else
      printf("   (%s cannot run here)\n", zmoe_isa_name(ALL_ISAS[i]));
  RUN(tests);
  for (int i = 0; i < N_ISAS; i++)
    zmoe_thread_pool_destroy(pools[i]);
  return 0;
}
