/* Chains of sublayers: the same bits as their parts called one after the other, on any number of
 * threads, and for a row whatever other rows there are. */
#include "attention_layer.h"
#include "kernel_rig.h"

#include "kernels/layer.h"

enum { ROWS = 140, WIDTH = 64, HIDDEN = 40, EXPERTS = 6, TOP_K = 2, BLOCKS = 3, SCRATCH = 8 << 20 };

static const shape SHAPE = {.heads = 4,
                            .kv_heads = 2,
                            .head_dim = 16,
                            .width = WIDTH,
                            .rope_dims = 16,
                            .input = ZMOE_NORM_RMS,
                            .head_norms = ZMOE_NORM_RMS,
                            .dtype = ZMOE_BF16,
                            .rows = ROWS};

/* Attention, routed experts beside a weighted shared one, attention, a dense network. */
typedef struct model {
  layer attention;
  zmoe_rope rope;
  zmoe_weight gates[2], up[EXPERTS], gate[EXPERTS], down[EXPERTS], dense[3];
  zmoe_expert_layer experts, expert;
  zmoe_router router, weight;
  zmoe_mlp shared, mlp;
  int32_t local[EXPERTS];
  zmoe_moe moe;
} model;

typedef struct state {
  float *h, *caches; /* (rows, width); keys and values of both attentions */
  zmoe_kv_cache cache[2];
} state;

static zmoe_weight weight_of(uint32_t out_features, uint32_t in_features) {
  return rig_weight((weight_kind){ZMOE_FORMAT_F32, 0, 0}, out_features, in_features,
                    (weight_options){0});
}

static void make_model(model *m) {
  m->attention = make_layer(&SHAPE, 0);
  describe_layer(&m->attention);
  m->rope = (zmoe_rope){m->attention.cosines, m->attention.sines, ROWS};
  m->gates[0] = weight_of(EXPERTS, WIDTH), m->gates[1] = weight_of(1, WIDTH);
  for (int e = 0; e < EXPERTS; e++) {
    m->up[e] = weight_of(HIDDEN, WIDTH), m->gate[e] = weight_of(HIDDEN, WIDTH);
    m->down[e] = weight_of(WIDTH, HIDDEN);
    m->local[e] = EXPERTS - 1 - e;
  }
  for (int i = 0; i < 3; i++)
    m->dense[i] = i < 2 ? weight_of(HIDDEN, WIDTH) : weight_of(WIDTH, HIDDEN);
  const zmoe_norm norm = m->attention.attention.input;
  m->experts = (zmoe_expert_layer){m->gate, m->up, m->down, EXPERTS, ZMOE_SILU, 0, 0};
  m->expert = (zmoe_expert_layer){&m->dense[0], &m->dense[1], &m->dense[2], 1, ZMOE_SILU, 0, 0};
  m->router = (zmoe_router){.input = norm, .gate = &m->gates[0], .top_k = TOP_K, .normalize = 1};
  m->weight =
      (zmoe_router){.input = norm, .gate = &m->gates[1], .kind = ZMOE_SIGMOID_TOP_K, .top_k = 1};
  m->shared = (zmoe_mlp){.expert = &m->expert, .weight = &m->weight, .dtype = ZMOE_BF16};
  m->mlp = (zmoe_mlp){.input = norm, .expert = &m->expert, .dtype = ZMOE_BF16};
  m->moe = (zmoe_moe){&m->router, &m->experts, m->local, EXPERTS, &m->shared, ZMOE_BF16};
}

static state make_state(const model *m) {
  size_t floats = (size_t)BLOCKS * SHAPE.kv_heads * 64 * SHAPE.head_dim;
  state s = {.h = malloc(sizeof(float) * ROWS * WIDTH), .caches = calloc(4 * floats, 4)};
  memcpy(s.h, m->attention.h, sizeof(float) * ROWS * WIDTH);
  for (int i = 0; i < 2; i++)
    s.cache[i] =
        (zmoe_kv_cache){s.caches + 2 * i * floats, s.caches + (2 * i + 1) * floats, BLOCKS, 0};
  return s;
}

static void free_state(state *s) {
  free(s->h), free(s->caches);
}

static void sublayers_of(const model *m, const state *s, zmoe_sublayer to[4]) {
  memset(to, 0, 4 * sizeof *to);
  for (int i = 0; i < 2; i++)
    to[2 * i] = (zmoe_sublayer){
        .attention = &m->attention.attention, .cache = &s->cache[i], .rope = &m->rope};
  to[1].moe = &m->moe;
  to[3].mlp = &m->mlp;
}

static const uint32_t TABLE[BLOCKS] = {2, 0, 1};

static zmoe_span span_of(uint32_t first, uint32_t rows) {
  return (zmoe_span){TABLE, BLOCKS, rows, first, NULL, NULL};
}

/* ---- the same, part by part -------------------------------------------------------------- */

static void attend(zmoe_thread_pool *pool, const model *m, state *s, int i) {
  const zmoe_span span = span_of(0, ROWS);
  CHECK_EQUAL(zmoe_attention_step(pool, &m->attention.attention, &s->cache[i], &span, 1,
                                  m->rope.cosines, m->rope.sines, s->h, ZMOE_EXACT),
              ZMOE_OK);
}

/* Each row's experts; of an MLP, that all rows have. */
static void experts_of(zmoe_thread_pool *pool, const zmoe_expert_layer *layer, const void *x,
                       const int32_t *ids, const float *weights, uint32_t k, float *out) {
  int32_t rows[ROWS * TOP_K];
  for (uint32_t i = 0; i < ROWS * k; i++)
    rows[i] = (int32_t)(i / k);
  CHECK_EQUAL(zmoe_experts(pool, layer, x, ZMOE_BF16, ROWS, rows, ids, weights, ROWS * k, out,
                           ZMOE_F32, ZMOE_EXACT),
              ZMOE_OK);
}

static void add(float *h, const float *y) {
  for (size_t i = 0; i < (size_t)ROWS * WIDTH; i++)
    h[i] += y[i];
}

static void run_parts(zmoe_thread_pool *pool, const model *m, state *s) {
  static uint16_t x[ROWS * WIDTH];
  static float sum[ROWS * WIDTH], shared[ROWS * WIDTH];
  int32_t ids[ROWS * TOP_K], none[ROWS];
  float weights[ROWS * TOP_K], ones[ROWS];
  attend(pool, m, s, 0);
  CHECK_EQUAL(zmoe_route(pool, &m->router, s->h, ROWS, x, ZMOE_BF16, ids, weights), ZMOE_OK);
  for (int i = 0; i < ROWS * TOP_K; i++)
    ids[i] = m->local[ids[i]];
  experts_of(pool, &m->experts, x, ids, weights, TOP_K, sum);
  CHECK_EQUAL(zmoe_route(pool, &m->weight, s->h, ROWS, x, ZMOE_BF16, none, ones), ZMOE_OK);
  experts_of(pool, &m->expert, x, none, ones, 1, shared);
  add(s->h, sum), add(s->h, shared);
  attend(pool, m, s, 1);
  zmoe_norm_all(pool, &m->mlp.input, WIDTH, s->h, ROWS, x, ZMOE_BF16);
  for (int i = 0; i < ROWS; i++)
    none[i] = 0, ones[i] = 1.0f;
  experts_of(pool, &m->expert, x, none, ones, 1, sum);
  add(s->h, sum);
}

static void test_parts(void) {
  static model m;
  make_model(&m);
  state want = make_state(&m);
  zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), SCRATCH);
  run_parts(pool, &m, &want);
  zmoe_thread_pool_destroy(pool);
  /* All rows at once; then row by row, but for the first. */
  for (uint32_t n = 0; n < 4; n++) {
    state got = make_state(&m);
    zmoe_sublayer sublayers[4];
    sublayers_of(&m, &got, sublayers);
    pool = make_pool(1 + n % 2, zmoe_isa_best(), SCRATCH);
    uint64_t ns = 0;
    for (uint32_t first = 0, rows; first < ROWS; first += rows) {
      rows = n < 2 ? ROWS : first == 0 ? ROWS - 6 : 1;
      const zmoe_span span = span_of(first, rows);
      CHECK_EQUAL(zmoe_chain(pool, sublayers, 4, &span, 1, got.h + (size_t)first * WIDTH, rows,
                             ZMOE_EXTENT_ALL, NULL, &ns, ZMOE_EXACT),
                  ZMOE_OK);
    }
    CHECK(ns > 0);
    CHECK(memcmp(got.h, want.h, sizeof(float) * ROWS * WIDTH) == 0);
    zmoe_thread_pool_destroy(pool);
    free_state(&got);
  }
  free_state(&want), free_layer(&m.attention), rig_free_blocks();
}

/* ---- a routing of the caller ----------------------------------------------------------------- */

typedef struct held {
  uint16_t x[ROWS * WIDTH];
  int32_t ids[ROWS * TOP_K], sorted[ROWS * TOP_K], rows[ROWS * TOP_K], experts[ROWS * TOP_K];
  float weights[ROWS * TOP_K], pair_weights[ROWS * TOP_K], sum[ROWS * WIDTH];
  zmoe_pairs pairs;
} held;

/* The last experts go as far as they are asked to, and leave h alone. */
static void test_extents(void) {
  static model m;
  static held memory;
  static uint16_t x[ROWS * WIDTH];
  static float sum[ROWS * WIDTH];
  int32_t ids[ROWS * TOP_K];
  float weights[ROWS * TOP_K];
  make_model(&m);
  zmoe_thread_pool *pool = make_pool(2, zmoe_isa_best(), SCRATCH);
  state want = make_state(&m);
  attend(pool, &m, &want, 0);
  CHECK_EQUAL(zmoe_route(pool, &m.router, want.h, ROWS, x, ZMOE_BF16, ids, weights), ZMOE_OK);
  for (int owned = 0; owned < 2; owned++)
    for (zmoe_extent extent = ZMOE_EXTENT_ROUTE; extent <= ZMOE_EXTENT_SUM; extent++) {
      state got = make_state(&m);
      zmoe_sublayer sublayers[4];
      sublayers_of(&m, &got, sublayers);
      for (int e = 0; e < EXPERTS && !owned; e++)
        m.local[e] = -1;
      memset(&memory, 0xff, sizeof memory);
      memory.pairs = (zmoe_pairs){memory.rows, memory.experts, memory.pair_weights, 99, 0};
      zmoe_routing to = {memory.x,      memory.ids,    memory.weights,
                         memory.sorted, &memory.pairs, memory.sum};
      const zmoe_span span = span_of(0, ROWS);
      uint64_t ns = 0;
      CHECK_EQUAL(
          zmoe_chain(pool, sublayers, 2, &span, 1, got.h, ROWS, extent, &to, &ns, ZMOE_EXACT),
          ZMOE_OK);
      CHECK(memcmp(got.h, want.h, sizeof(float) * ROWS * WIDTH) == 0);
      CHECK(memcmp(memory.x, x, sizeof x) == 0 && memcmp(memory.ids, ids, sizeof ids) == 0);
      CHECK(memcmp(memory.weights, weights, sizeof weights) == 0);
      uint32_t pairs = owned ? ROWS * TOP_K : 0;
      CHECK_EQUAL(memory.pairs.count, extent >= ZMOE_EXTENT_PAIRS ? pairs : 99);
      memset(sum, 0, sizeof sum);
      if (owned && extent == ZMOE_EXTENT_SUM)
        experts_of(pool, &m.experts, x, memory.experts, memory.pair_weights, TOP_K, sum);
      if (extent == ZMOE_EXTENT_SUM)
        CHECK(memcmp(memory.sum, sum, sizeof sum) == 0);
      CHECK_EQUAL(ns > 0, owned && extent == ZMOE_EXTENT_SUM);
      free_state(&got);
      for (int e = 0; e < EXPERTS; e++)
        m.local[e] = EXPERTS - 1 - e;
    }
  zmoe_thread_pool_destroy(pool);
  free_state(&want), free_layer(&m.attention), rig_free_blocks();
}

/* ---- both ends ------------------------------------------------------------------------- */

enum { VOCABULARY = 70 };

/* Rows of the embedding as zmoe_weight_decode has them, rounded; logits as of zmoe_linear. */
static void test_ends(void) {
  static const int32_t tokens[] = {69, 0, 33, 69};
  static const uint32_t rows[] = {0, 3, 2};
  for (uint32_t n = 0; n < 6; n++) {
    zmoe_dtype dtype = (zmoe_dtype)(n % 3);
    const weight_kind kind = {ZMOE_FORMAT_AFFINE, 4, 32};
    const zmoe_weight w =
        rig_weight(kind, VOCABULARY, 2 * 256 + 32, (weight_options){.bias = (int)n / 3});
    uint32_t width = w.in_features;
    zmoe_thread_pool *pool = make_pool(1 + n % 2, zmoe_isa_best(), zmoe_logits_scratch(&w));
    float *h = random_floats(4 * width, 1.0f), *row = malloc(width * sizeof *row);
    CHECK_EQUAL(zmoe_embed(pool, &w, tokens, 4, dtype, h), ZMOE_OK);
    for (uint32_t r = 0; r < 4; r++) {
      CHECK_EQUAL(zmoe_weight_decode(&w, (uint32_t)tokens[r], row), ZMOE_OK);
      for (uint32_t i = 0; i < width; i++)
        CHECK(h[r * width + i] == rounded(row[i], dtype));
    }
    const int32_t none[] = {1, VOCABULARY}, below[] = {-1};
    memcpy(row, h, width * sizeof *row);
    CHECK_EQUAL(zmoe_embed(pool, &w, none, 2, dtype, h), ZMOE_EINVAL);
    CHECK_EQUAL(zmoe_embed(pool, &w, below, 1, dtype, h), ZMOE_EINVAL);
    CHECK(memcmp(row, h, width * sizeof *row) == 0);
    float *weights = random_floats(width, 1.0f), got[3 * VOCABULARY], want[3 * VOCABULARY];
    const zmoe_norm norm = {ZMOE_NORM_RMS, width, 1e-5f, weights, NULL};
    float *x = malloc(3 * width * sizeof *x);
    for (uint32_t i = 0; i < 3; i++)
      zmoe_norm_all(pool, &norm, width, h + rows[i] * width, 1,
                    (unsigned char *)x + i * width * zmoe_dtype_bytes(dtype), dtype);
    const zmoe_weight *weight = &w;
    void *ys[] = {want};
    const size_t stride = VOCABULARY;
    CHECK_EQUAL(zmoe_linear(pool, &weight, 1, x, dtype, 3, ys, &stride, ZMOE_F32, ZMOE_EXACT),
                ZMOE_OK);
    CHECK_EQUAL(zmoe_logits(pool, &norm, &w, dtype, h, rows, 3, got, ZMOE_EXACT), ZMOE_OK);
    CHECK(memcmp(got, want, sizeof got) == 0);
    const zmoe_norm narrow = {ZMOE_NORM_RMS, width - 1, 1e-5f, weights, NULL};
    CHECK_EQUAL(zmoe_logits(pool, &narrow, &w, dtype, h, rows, 3, got, ZMOE_EXACT), ZMOE_EINVAL);
    zmoe_thread_pool_destroy(pool);
    free(h), free(row), free(weights), free(x), rig_free_blocks();
  }
}

/* ---- refusals --------------------------------------------------------------------------- */

static int status_of(zmoe_thread_pool *pool, const zmoe_sublayer *sublayer, float *h,
                     zmoe_span span, uint32_t rows) {
  uint64_t ns = 0;
  return zmoe_chain(pool, sublayer, 1, &span, 1, h, rows, ZMOE_EXTENT_ALL, NULL, &ns, ZMOE_EXACT);
}

static void test_refusals(void) {
  static model m;
  make_model(&m);
  state s = make_state(&m);
  zmoe_sublayer sublayers[4];
  sublayers_of(&m, &s, sublayers);
  zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), SCRATCH);
  zmoe_thread_pool *small = make_pool(1, zmoe_isa_best(), 0);
  CHECK_EQUAL(status_of(pool, &sublayers[0], s.h, span_of(0, 3), 2), ZMOE_EINVAL);
  CHECK_EQUAL(status_of(pool, &sublayers[0], s.h, span_of(0, 3), 4), ZMOE_EINVAL);
  CHECK_EQUAL(status_of(pool, &sublayers[0], s.h, span_of(ROWS - 2, 3), 3), ZMOE_EINVAL);
  m.router.top_k = EXPERTS + 1;
  CHECK_EQUAL(status_of(pool, &sublayers[1], s.h, span_of(0, 3), 3), ZMOE_EINVAL);
  m.router.top_k = TOP_K;
  m.expert.experts = 2;
  CHECK_EQUAL(status_of(pool, &sublayers[3], s.h, span_of(0, 3), 3), ZMOE_EINVAL);
  m.expert.experts = 1;
  CHECK(memcmp(s.h, m.attention.h, sizeof(float) * ROWS * WIDTH) == 0);
  size_t needed = zmoe_moe_scratch(&m.moe);
  CHECK(needed > zmoe_mlp_scratch(&m.mlp) && needed < SCRATCH);
  zmoe_mlp wide = m.mlp;
  zmoe_weight columns = m.dense[1];
  columns.in_features = ZMOE_MAX_COLUMNS;
  zmoe_expert_layer expert = {&columns, &columns, &m.dense[2], 1, ZMOE_SILU, 0, 0};
  wide.expert = &expert, wide.input = (zmoe_norm){0};
  CHECK_EQUAL(zmoe_mlp_output(small, &wide, s.h, 2, s.h, ZMOE_EXACT), ZMOE_ENOMEM);
  zmoe_thread_pool_destroy(pool), zmoe_thread_pool_destroy(small);
  free_state(&s), free_layer(&m.attention), rig_free_blocks();
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"a chain is its parts, one after the other", test_parts},
      {"the last experts go as far as they are asked to", test_extents},
      {"embeddings and logits are those of their parts", test_ends},
      {"refusals", test_refusals},
  };
  rig_start(argc, argv);
  RUN(tests);
  return 0;
}
