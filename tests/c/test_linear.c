/* zmoe_linear as a call: several weights, threads, working memory, odd numbers. */
#include "kernel_rig.h"

/* ---- several weights -------------------------------------------------------------- */

typedef struct several {
  zmoe_weight weights[ZMOE_MAX_WEIGHTS];
  const zmoe_weight *pointers[ZMOE_MAX_WEIGHTS];
  float *ys[ZMOE_MAX_WEIGHTS];
  void *outputs[ZMOE_MAX_WEIGHTS];
  size_t strides[ZMOE_MAX_WEIGHTS];
  const void *x;
  zmoe_dtype x_dtype;
  uint32_t n, rows, in_features;
} several;

/* One weight each of `n` formats, from kind `from` on. */
static several make_several(uint32_t from, uint32_t n, uint32_t rows, uint32_t in_features,
                            zmoe_dtype x_dtype) {
  several s = {.n = n, .rows = rows, .in_features = in_features, .x_dtype = x_dtype};
  for (uint32_t i = 0; i < n; i++) {
    uint32_t out_features = 20 + 13 * i;
    weight_options options = {i % 3, 0, i % 2 == 0, 0, 0};
    s.weights[i] = rig_weight(RIG_KINDS[(from + i) % N_KINDS], out_features, in_features, options);
    s.pointers[i] = &s.weights[i];
    s.strides[i] = out_features + i;
    s.ys[i] = rig_block(rows * s.strides[i] * sizeof(float), 0, 0);
    s.outputs[i] = s.ys[i];
    memset(s.ys[i], 0xa5, rows * s.strides[i] * sizeof(float));
  }
  s.x = rig_inputs((size_t)rows * in_features, 1.0f, x_dtype, 0, 0);
  return s;
}

static int multiply(several *s, zmoe_thread_pool *pool, zmoe_precision precision) {
  for (uint32_t i = 0; i < s->n; i++)
    s->pointers[i] = &s->weights[i]; /* `s` may have been copied */
  return zmoe_linear(pool, s->pointers, s->n, s->x, s->x_dtype, s->rows, s->outputs, s->strides,
                     ZMOE_F32, precision);
}

static void check_several(const several *s, zmoe_precision precision) {
  double *x = malloc((size_t)s->rows * s->in_features * sizeof *x);
  for (size_t i = 0; i < (size_t)s->rows * s->in_features; i++)
    x[i] = rig_load(s->x, i, s->x_dtype);
  for (uint32_t i = 0; i < s->n; i++)
    for (uint32_t o = 0; o < s->weights[i].out_features; o++)
      for (uint32_t r = 0; r < s->rows; r++) {
        expected e = rig_expect(&s->weights[i], o, x + (size_t)r * s->in_features, NULL);
        double error = e.error + (precision == ZMOE_INT8 ? e.int8_error : 0);
        CHECK(rig_agrees(s->ys[i][r * s->strides[i] + o], e.value, error));
      }
  for (uint32_t i = 0; i < s->n; i++)
    for (size_t gap = s->weights[i].out_features; gap < s->strides[i]; gap++) {
      uint32_t bits;
      memcpy(&bits, &s->ys[i][gap], sizeof bits);
      CHECK_EQUAL(bits, 0xa5a5a5a5);
    }
  free(x);
}

/* Formats that share an packing of x and ones that do not; the working
 * memory is what zmoe_linear_scratch says. */
static void test_several_weights(void) {
  static const uint32_t rows[] = {1, 3, 8, 9, 130};
  for (int i = 0; i < N_ISAS; i++)
    for (uint32_t n = 0; n < 10 && zmoe_isa_supported(ALL_ISAS[i]); n++) {
      if (rig_skips(n))
        continue;
      several s = make_several(n * 5, n % 2 ? 8 : 3, rows[n % 5], 384, (zmoe_dtype)(n % 3));
      zmoe_thread_pool *pool =
          make_pool(1 + n % 2, ALL_ISAS[i], zmoe_linear_scratch(s.in_features));
      zmoe_precision precision = n % 4 < 2 ? ZMOE_EXACT : ZMOE_INT8;
      CHECK_EQUAL(multiply(&s, pool, precision), ZMOE_OK);
      check_several(&s, precision);
      zmoe_thread_pool_destroy(pool);
      rig_free_blocks();
    }
}

/* ---- threads ------------------------------------------------------------------------- */

static void test_threads_make_no_difference(void) {
  static const uint32_t rows[] = {1, 4, 9, 130};
  for (int i = 0; i < N_ISAS; i++) {
    if (!zmoe_isa_supported(ALL_ISAS[i]))
      continue;
    zmoe_thread_pool *pools[3];
    for (uint32_t t = 0; t < 3; t++)
      pools[t] = make_pool(t + 1, ALL_ISAS[i], zmoe_linear_scratch(384));
    for (uint32_t n = 0; n < 8; n++) {
      if (rig_skips(n))
        continue;
      several s = make_several(n * 3, 8, rows[n % 4], 384, (zmoe_dtype)(n % 3));
      zmoe_precision precision = (zmoe_precision)(n / 4);
      void *first[ZMOE_MAX_WEIGHTS];
      for (uint32_t t = 0; t < 3; t++) {
        CHECK_EQUAL(multiply(&s, pools[t], precision), ZMOE_OK);
        for (uint32_t j = 0; j < s.n; j++) {
          size_t bytes = s.rows * s.strides[j] * sizeof(float);
          if (t == 0)
            first[j] = memcpy(rig_block(bytes, 0, 0), s.ys[j], bytes);
          CHECK(memcmp(first[j], s.ys[j], bytes) == 0);
          memset(s.ys[j], 0xa5, bytes);
        }
      }
      rig_free_blocks();
    }
    for (uint32_t t = 0; t < 3; t++)
      zmoe_thread_pool_destroy(pools[t]);
  }
}

/* ---- working memory --------------------------------------------------------------------- */

/* With less than enough a call fails before it writes; with more it succeeds. */
static void test_too_little_memory(void) {
  size_t enough = zmoe_linear_scratch(4096);
  int failed = 0;
  several s = make_several(2, 2, 128, 4096, ZMOE_BF16);
  for (size_t bytes = 0; bytes <= enough; bytes += enough / 16) {
    zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), bytes);
    s.rows = bytes % 3 == 0 ? 128 : 8;
    for (uint32_t i = 0; i < s.n; i++)
      memset(s.ys[i], 0xa5, s.rows * s.strides[i] * sizeof(float));
    int status = multiply(&s, pool, ZMOE_EXACT);
    CHECK(status == ZMOE_OK || status == ZMOE_ENOMEM);
    for (size_t i = 0; i < 64 && status == ZMOE_ENOMEM; i++)
      CHECK_EQUAL(((unsigned char *)s.ys[0])[i], 0xa5);
    failed += status == ZMOE_ENOMEM;
    zmoe_thread_pool_destroy(pool);
  }
  zmoe_thread_pool *bare;
  CHECK_EQUAL(zmoe_thread_pool_create(1, NULL, 0, zmoe_isa_best(), &bare), ZMOE_OK);
  CHECK_EQUAL(multiply(&s, bare, ZMOE_EXACT), ZMOE_ENOMEM); /* nothing was reserved */
  zmoe_thread_pool_destroy(bare);
  CHECK(failed > 0);
  rig_free_blocks();
}

static void test_refusals(void) {
  zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), zmoe_linear_scratch(64));
  several s = make_several(6, 3, 2, 128, ZMOE_F32);
  s.n = 0;
  CHECK_EQUAL(multiply(&s, pool, ZMOE_EXACT), ZMOE_EINVAL);
  s.n = ZMOE_MAX_WEIGHTS + 1;
  CHECK_EQUAL(zmoe_linear(pool, s.pointers, s.n, s.x, s.x_dtype, 1, s.outputs, s.strides, ZMOE_F32,
                          ZMOE_EXACT),
              ZMOE_EINVAL);
  s.n = 3;
  s.weights[1].in_features = 64;
  CHECK_EQUAL(multiply(&s, pool, ZMOE_EXACT), ZMOE_EINVAL);
  s.weights[1].in_features = 128;
  s.strides[2] = s.weights[2].out_features - 1;
  CHECK_EQUAL(multiply(&s, pool, ZMOE_EXACT), ZMOE_EINVAL);
  s.strides[2]++;
  s.x_dtype = (zmoe_dtype)3;
  CHECK_EQUAL(multiply(&s, pool, ZMOE_EXACT), ZMOE_EINVAL);
  s.x_dtype = ZMOE_F32;
  CHECK_EQUAL(multiply(&s, pool, ZMOE_EXACT), ZMOE_OK);
  zmoe_thread_pool_destroy(pool);
  rig_free_blocks();
}

/* ---- NaN and infinity ----------------------------------------------------------------------- */

static void put(void *data, size_t i, zmoe_dtype dtype, float value) {
  size_t item = zmoe_dtype_bytes(dtype);
  CHECK_EQUAL(
      zmoe_convert((unsigned char *)data + i * item, dtype, &value, ZMOE_F32, 1, ZMOE_ISA_GENERIC),
      ZMOE_OK);
}

/* In the middle and at the end of rows of x, and of float weights; other rows and
 * outputs stay what they are. */
static void test_odd_numbers(void) {
  static const float odd[] = {NAN, INFINITY, -INFINITY};
  for (int i = 0; i < N_ISAS; i++)
    for (uint32_t n = 0; n < 2 * N_KINDS && zmoe_isa_supported(ALL_ISAS[i]); n++) {
      if (rig_skips(n))
        continue;
      uint32_t rows = n % 2 ? 3 : 11;
      several s = make_several(n / 2, 1, rows, 384, (zmoe_dtype)(n % 3));
      put((void *)s.x, 7, s.x_dtype, odd[n % 3]);
      put((void *)s.x, (size_t)(rows - 1) * 384 + 383, s.x_dtype, odd[(n + 1) % 3]);
      put((void *)s.x, (size_t)(rows - 1) * 384, s.x_dtype, odd[(n / 3) % 3]);
      if (s.weights[0].group == 0)
        for (uint32_t k = 0; k < 384; k += 383)
          put((void *)s.weights[0].data, 3 * 384 + k, (zmoe_dtype)s.weights[0].format,
              odd[(n / 2 + k) % 3]);
      zmoe_thread_pool *pool = make_pool(1, ALL_ISAS[i], zmoe_linear_scratch(384));
      CHECK_EQUAL(multiply(&s, pool, (zmoe_precision)(n / 2 % 2)), ZMOE_OK);
      check_several(&s, (zmoe_precision)(n / 2 % 2));
      zmoe_thread_pool_destroy(pool);
      rig_free_blocks();
    }
}

/* Scales that are NaN, and codes of mxfp8. */
static void test_odd_codes(void) {
  for (int i = 0; i < N_ISAS; i++)
    for (uint32_t kind = 0; kind < N_KINDS && zmoe_isa_supported(ALL_ISAS[i]); kind++) {
      if (RIG_KINDS[kind].format < ZMOE_FORMAT_MXFP4 || rig_skips(kind))
        continue;
      several s = make_several(kind, 1, 1 + kind % 12, 384, ZMOE_F32);
      unsigned char *scales = (unsigned char *)s.weights[0].scales;
      unsigned char *data = (unsigned char *)s.weights[0].data;
      size_t row = zmoe_weight_scale_bytes(&s.weights[0]);
      scales[2 * row - 1] = 0xff; /* of the second output's last group */
      if (RIG_KINDS[kind].format == ZMOE_FORMAT_MXFP8)
        data[5 * 384] = 0x7f;
      zmoe_thread_pool *pool = make_pool(1, ALL_ISAS[i], zmoe_linear_scratch(384));
      CHECK_EQUAL(multiply(&s, pool, ZMOE_EXACT), ZMOE_OK);
      CHECK(isnan(s.ys[0][1]));
      check_several(&s, ZMOE_EXACT);
      zmoe_thread_pool_destroy(pool);
      rig_free_blocks();
    }
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"several weights at once", test_several_weights},
      {"threads make no difference", test_threads_make_no_difference},
      {"too little memory is an error, and nothing is written", test_too_little_memory},
      {"unusable arguments are refused", test_refusals},
      {"NaN and infinity are kept", test_odd_numbers},
      {"and so is NaN in scales and codes", test_odd_codes},
  };
  rig_start(argc, argv);
  RUN(tests);
  return 0;
}
