/* Gated delta nets: rows in any steps, among any others, on any threads.  What they compute is
 * compared with their definition in tests/unit/kernels/test_delta_net.py. */
#include "kernel_rig.h"

enum { WIDTH = 19, SEQUENCES = 3, ROWS = 60, PARTS = ZMOE_DELTA_PARTS };

typedef struct layer {
  zmoe_delta_net net;
  zmoe_weight projections[PARTS], output;
  zmoe_slices parts[PARTS];
  size_t state_bytes;
  float *h; /* (SEQUENCES, ROWS, WIDTH) */
} layer;

/* A matmul whose sums have one term, so that it rounds alike however it is computed. */
static zmoe_weight sparse_weight(uint32_t out_features, uint32_t in_features) {
  size_t count = (size_t)out_features * in_features;
  float *data = rig_block(count * sizeof *data, 0, 0);
  for (size_t i = 0; i < count; i++)
    data[i] = i % in_features == i / in_features * 7 % in_features ? random_float(2) : 0;
  return (zmoe_weight){.data = data, .out_features = out_features, .in_features = in_features};
}

/* In [0.1, 1.9). */
static const float *some_floats(size_t count) {
  float *x = rig_block(count * sizeof *x, 0, 0);
  for (size_t i = 0; i < count; i++)
    x[i] = 1.0f + random_float(0.9f);
  return x;
}

static layer make_layer(uint32_t key_heads, uint32_t per_head, uint32_t key_dim, uint32_t value_dim,
                        uint32_t taps, zmoe_dtype dtype) {
  uint32_t heads = key_heads * per_head, values = per_head * value_dim;
  const uint32_t widths[PARTS] = {key_dim, key_dim, values, values, per_head, per_head};
  layer l = {.h = random_floats((size_t)SEQUENCES * ROWS * WIDTH, 1.0f)};
  for (uint32_t i = 0; i < PARTS; i++) {
    l.projections[i] = sparse_weight(key_heads * widths[i], WIDTH);
    l.parts[i] = (zmoe_slices){i, 0, widths[i]};
  }
  l.output = sparse_weight(WIDTH, heads * value_dim);
  l.net = (zmoe_delta_net){
      .input = {ZMOE_NORM_RMS, WIDTH, 1e-6f, NULL, NULL},
      .n_projections = PARTS,
      .key_heads = key_heads,
      .value_heads = heads,
      .key_dim = key_dim,
      .value_dim = value_dim,
      .taps = taps,
      .conv = some_floats((size_t)taps * key_heads * (2 * key_dim + values)),
      .decay = some_floats(heads),
      .offset = some_floats(heads),
      .norm = {ZMOE_NORM_RMS, value_dim, 1e-6f, some_floats(value_dim), NULL},
      .dtype = dtype,
  };
  l.state_bytes = zmoe_delta_state_bytes(&l.net);
  return l;
}

static zmoe_delta_net net_of(const layer *l) {
  zmoe_delta_net net = l->net;
  net.projections = l->projections, net.output = &l->output, net.parts = l->parts;
  return net;
}

static void free_layer(layer *l) {
  free(l->h);
  rig_free_blocks();
}

/* h after the layer, the sequences side by side, `at_a_time` rows of each in a step. */
static float *run(const layer *l, zmoe_thread_pool *pool, uint32_t at_a_time, uint32_t first,
                  uint32_t count) {
  const zmoe_delta_net net = net_of(l);
  size_t rows_floats = (size_t)ROWS * WIDTH;
  float *out = malloc(SEQUENCES * rows_floats * sizeof *out);
  float *h = malloc((size_t)count * at_a_time * WIDTH * sizeof *h);
  unsigned char *states[SEQUENCES] = {NULL};
  for (uint32_t r = 0, rows; r < ROWS; r += rows) {
    zmoe_span spans[SEQUENCES];
    rows = ROWS - r < at_a_time ? ROWS - r : at_a_time;
    for (uint32_t i = 0; i < count; i++) {
      unsigned char *after = memset(malloc(l->state_bytes), 0xff, l->state_bytes);
      spans[i] = (zmoe_span){NULL, 0, rows, r, states[i], after};
      memcpy(h + (size_t)i * rows * WIDTH, l->h + (first + i) * rows_floats + (size_t)r * WIDTH,
             (size_t)rows * WIDTH * sizeof *h);
    }
    CHECK_EQUAL(zmoe_delta_step(pool, &net, spans, count, h, ZMOE_EXACT), ZMOE_OK);
    for (uint32_t i = 0; i < count; i++) {
      memcpy(out + (first + i) * rows_floats + (size_t)r * WIDTH, h + (size_t)i * rows * WIDTH,
             (size_t)rows * WIDTH * sizeof *h);
      free(states[i]);
      states[i] = spans[i].state_after;
    }
  }
  for (uint32_t i = 0; i < count; i++)
    free(states[i]);
  free(h);
  return out;
}

static zmoe_thread_pool *pool_for(const layer *l, uint32_t threads, zmoe_isa isa) {
  const zmoe_delta_net net = net_of(l);
  return make_pool(threads, isa, zmoe_delta_scratch(&net, threads));
}

/* A row goes on from the state after the row before it, in whatever step that was. */
static void check_invariance(layer l) {
  static const uint32_t chunks[] = {1, 7, 43, ROWS};
  size_t bytes = (size_t)ROWS * WIDTH * sizeof(float);
  for (int i = 0; i < N_ISAS; i++) {
    if (!rig_runs(ALL_ISAS[i]))
      continue;
    zmoe_thread_pool *pools[] = {pool_for(&l, 1, ALL_ISAS[i]), pool_for(&l, 3, ALL_ISAS[i])};
    float *want = run(&l, pools[0], ROWS, 0, SEQUENCES);
    for (int j = 0; j < 4; j++) {
      if (rig_skips((uint32_t)j))
        continue;
      float *all = run(&l, pools[j % 2], chunks[j], 0, SEQUENCES);
      float *one = run(&l, pools[1 - j % 2], chunks[j], 1, 1);
      CHECK(memcmp(all, want, SEQUENCES * bytes) == 0);
      CHECK(memcmp(one + bytes / sizeof *one, want + bytes / sizeof *one, bytes) == 0);
      free(all), free(one);
    }
    free(want);
    zmoe_thread_pool_destroy(pools[0]), zmoe_thread_pool_destroy(pools[1]);
  }
  free_layer(&l);
}

static void test_invariance(void) {
  check_invariance(make_layer(2, 2, 32, 16, 4, ZMOE_BF16));
  check_invariance(make_layer(3, 1, 17, 5, 2, ZMOE_F32));
  check_invariance(make_layer(1, 3, 9, 33, 1, ZMOE_F16));
}

/* NaN stays in its sequence, in the rows from its own on. */
static void test_nan_goes_through(void) {
  layer l = make_layer(2, 1, 16, 8, 3, ZMOE_F32);
  l.h[((size_t)ROWS + 30) * WIDTH] = NAN;
  zmoe_thread_pool *pool = pool_for(&l, 1, zmoe_isa_best());
  float *out = run(&l, pool, ROWS, 0, SEQUENCES);
  for (uint32_t r = 0; r < SEQUENCES * ROWS; r++)
    CHECK(!isnan(out[(size_t)r * WIDTH + 1]) == (r < ROWS + 30 || r >= 2 * ROWS));
  free(out);
  zmoe_thread_pool_destroy(pool);
  free_layer(&l);
}

static void test_too_little_memory(void) {
  layer l = make_layer(2, 1, 16, 8, 3, ZMOE_F32);
  const zmoe_delta_net net = net_of(&l);
  unsigned char *after = malloc(l.state_bytes);
  const zmoe_span span = {NULL, 0, ROWS, 0, NULL, after};
  zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), 0);
  float *h = malloc((size_t)ROWS * WIDTH * sizeof *h);
  memcpy(h, l.h, (size_t)ROWS * WIDTH * sizeof *h);
  CHECK_EQUAL(zmoe_delta_step(pool, &net, &span, 1, h, ZMOE_EXACT), ZMOE_ENOMEM);
  CHECK(memcmp(h, l.h, (size_t)ROWS * WIDTH * sizeof *h) == 0);
  free(h), free(after);
  zmoe_thread_pool_destroy(pool);
  free_layer(&l);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"chunks, neighbours and threads change nothing", test_invariance},
      {"NaN goes through", test_nan_goes_through},
      {"too little memory", test_too_little_memory},
  };
  rig_start(argc, argv);
  RUN(tests);
  return 0;
}
