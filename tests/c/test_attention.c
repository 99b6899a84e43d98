/* Attention against a reference in double precision, over shapes and options. */
#include "attention_layer.h"
#include "kernel_rig.h"

typedef struct result {
  unsigned char *keys, *values;
  size_t cache_bytes;
  uint32_t *blocks;
  float *added; /* (rows, width) */
} result;

/* Rows of other sequences in the same calls, before and after the layer's own. */
enum { OTHERS = 2, OTHER_BLOCKS = 4, OTHER_POSITION = 70 };
static const uint32_t OTHER_ROWS[OTHERS] = {1, 5};

static size_t head_bytes(const layer *l) {
  size_t elements = (size_t)64 * l->s.head_dim;
  return l->bits == 8 ? elements + 64 * 4 : elements * zmoe_dtype_bytes((zmoe_dtype)l->s.dtype);
}

/* Key or value `position` of one head, element by element: keys lie across, values along, and
 * with 8 bits the scales after them. */
static void put(const layer *l, unsigned char *cache, const uint32_t *blocks, uint32_t head,
                uint32_t position, int is_key, const float *from) {
  const shape *s = &l->s;
  size_t item = zmoe_dtype_bytes((zmoe_dtype)s->dtype), slot = position % 64;
  unsigned char *block = cache + (blocks[position / 64] * s->kv_heads + head) * head_bytes(l);
  signed char codes[ZMOE_MAX_HEAD_DIM];
  float scale = encode_head(from, s->head_dim, codes);
  for (size_t d = 0; d < s->head_dim; d++) {
    size_t at = is_key ? d * 64 + slot : slot * s->head_dim + d;
    if (l->bits == 8)
      block[at] = (unsigned char)codes[d];
    else
      zmoe_convert(block + at * item, (zmoe_dtype)s->dtype, from + d, ZMOE_F32, 1,
                   ZMOE_ISA_GENERIC);
  }
  if (l->bits == 8)
    memcpy(block + 64 * s->head_dim + 4 * slot, &scale, 4);
}

/* What is not written is never used: it is all ones, NaN in every dtype. */
static result make_cache(const layer *l, uint32_t *n_blocks) {
  const shape *s = &l->s;
  uint32_t own = (s->filled + s->rows + 63) / 64;
  *n_blocks = own + OTHERS * OTHER_BLOCKS;
  result out = {.blocks = malloc(*n_blocks * sizeof(uint32_t))};
  out.cache_bytes = *n_blocks * s->kv_heads * head_bytes(l);
  out.keys = memset(malloc(out.cache_bytes), 0xff, out.cache_bytes);
  out.values = memset(malloc(out.cache_bytes), 0xff, out.cache_bytes);
  for (uint32_t i = 0; i < *n_blocks; i++)
    out.blocks[i] = i;
  for (uint32_t i = 0; i < *n_blocks; i++) {
    uint32_t other = next_random() % *n_blocks, block = out.blocks[i];
    out.blocks[i] = out.blocks[other], out.blocks[other] = block;
  }
  for (uint32_t i = 0; i < s->kv_heads; i++)
    for (uint32_t j = 0; j < s->filled; j++) {
      size_t at = ((size_t)i * s->filled + j) * s->head_dim;
      put(l, out.keys, out.blocks, i, j, 1, l->keys + at);
      put(l, out.values, out.blocks, i, j, 0, l->values + at);
    }
  return out;
}

/* `at_a_time` rows in a call, with rows of other sequences or without. */
static result run(const layer *l, zmoe_thread_pool *pool, uint32_t at_a_time, int is_alone) {
  const shape *s = &l->s;
  uint32_t n_blocks, half = s->rope_dims / 2, end = s->filled + s->rows;
  result out = make_cache(l, &n_blocks);
  const zmoe_kv_cache cache = {out.keys, out.values, n_blocks, l->bits};
  float *angles[2], *h = random_floats((size_t)(s->rows + 6) * s->width, 2.0f);
  for (int i = 0; i < 2; i++) {
    angles[i] = random_floats((size_t)(end + OTHER_POSITION + 8) * half + 1, 1.0f);
    memcpy(angles[i] + (size_t)s->filled * half, i ? l->sines : l->cosines,
           (size_t)s->rows * half * sizeof **angles);
  }
  out.added = malloc((size_t)s->rows * s->width * sizeof *out.added);
  for (uint32_t r = 0; r < s->rows; r += at_a_time) {
    uint32_t rows = s->rows - r < at_a_time ? s->rows - r : at_a_time;
    const uint32_t *others = out.blocks + n_blocks - OTHERS * OTHER_BLOCKS;
    zmoe_span spans[] = {
        {others, OTHER_BLOCKS, OTHER_ROWS[0], OTHER_POSITION, NULL, NULL},
        {out.blocks, n_blocks, rows, s->filled + r, NULL, NULL},
        {others + OTHER_BLOCKS, OTHER_BLOCKS, OTHER_ROWS[1], OTHER_POSITION, NULL, NULL}};
    float *mine = h + (is_alone ? 0 : OTHER_ROWS[0] * s->width);
    memcpy(mine, l->h + (size_t)r * s->width, (size_t)rows * s->width * sizeof *mine);
    CHECK_EQUAL(zmoe_attention_step(pool, &l->attention, &cache, is_alone ? spans + 1 : spans,
                                    is_alone ? 1 : 3, angles[0], angles[1], h, ZMOE_EXACT),
                ZMOE_OK);
    for (size_t i = 0; i < (size_t)rows * s->width; i++)
      out.added[(size_t)r * s->width + i] = mine[i] - l->h[(size_t)r * s->width + i];
  }
  free(h), free(angles[0]), free(angles[1]);
  return out;
}

static void free_result(result *out) {
  free(out->keys), free(out->values), free(out->blocks), free(out->added);
}

/* What f64 rounds to another code than f32 is off by one of 127. */
static double tolerance(const layer *l) {
  double own = l->s.dtype == ZMOE_F32 ? 1e-5 : l->s.dtype == ZMOE_F16 ? 1e-3 : 8e-3;
  return l->bits == 8 ? fmax(own, 2e-3) : own;
}

/* One thread against the reference, three threads against one, on one ISA. */
static void check_isa(const layer *l, const double *expected, zmoe_isa isa) {
  const shape *s = &l->s;
  result first = {0};
  for (uint32_t threads = 1; threads <= 3; threads += 2) {
    zmoe_thread_pool *pool =
        make_pool(threads, isa, zmoe_attention_scratch(&l->attention, threads));
    result out = run(l, pool, s->rows, 1);
    size_t count = (size_t)s->rows * s->width;
    if (threads == 1) {
      double error = distance(out.added, expected, count);
      if (error > tolerance(l))
        printf("     heads %u/%u of %u, rows %u after %u, dtype %u, bits %u, %s: %g\n", s->heads,
               s->kv_heads, s->head_dim, s->rows, s->filled, s->dtype, l->bits, zmoe_isa_name(isa),
               error);
      CHECK(error <= tolerance(l));
      first = out;
    } else {
      CHECK(memcmp(out.added, first.added, count * sizeof *out.added) == 0);
      free_result(&out);
    }
    zmoe_thread_pool_destroy(pool);
  }
  free_result(&first);
}

/* The n-th. */
static void check_shape(const shape *s, uint32_t bits, uint32_t n) {
  layer l = make_layer(s, bits);
  describe_layer(&l);
  double *expected = NULL;
  for (uint32_t i = 0; i < N_ISAS; i++) {
    if (!rig_runs(ALL_ISAS[i]) || rig_skips(n * N_ISAS + i))
      continue;
    if (expected == NULL)
      expected = reference_attention(&l);
    check_isa(&l, expected, ALL_ISAS[i]);
  }
  free(expected);
  free_layer(&l);
}

/* ---- tests ---------------------------------------------------------------------------------- */

enum { NONE = ZMOE_NORM_NONE, RMS = ZMOE_NORM_RMS, LAYER = ZMOE_NORM_LAYER };

/* heads kv dim width | rope trad window | input heads' norms: whole bias fused sinks clip |
 * dtype rows filled keep gated: what models do, then what is odd. */
static const shape SHAPES[] = {
    {4, 2, 16, 64, 16, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F32, 1, 0, 0, 0},       /* qwen3_moe */
    {8, 1, 64, 96, 64, 0, 0, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_F32, 7, 5, 0, 0},      /* mixtral */
    {4, 4, 32, 64, 32, 0, 0, RMS, RMS, 1, 0, 0, 0, 0, ZMOE_F32, 130, 3, 0, 0},     /* olmoe */
    {6, 2, 24, 64, 24, 0, 0, LAYER, NONE, 0, 0, 1, 0, 0.9f, ZMOE_F32, 7, 9, 0, 0}, /* dbrx */
    {8, 2, 64, 64, 64, 0, 16, RMS, NONE, 0, 1, 0, 1, 0, ZMOE_F32, 130, 40, 0, 0},  /* gpt_oss */
    {8, 4, 80, 64, 40, 0, 0, RMS, RMS, 0, 1, 0, 0, 0, ZMOE_F32, 2, 130, 0, 0},     /* glm4_moe */
    {8, 2, 32, 64, 8, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F32, 7, 70, 0, 1},       /* qwen3_next */
    {3, 1, 24, 40, 10, 1, 5, NONE, LAYER, 0, 1, 0, 1, 1.5f, ZMOE_F32, 130, 0, 0, 0},
    {9, 3, 80, 33, 0, 0, 0, LAYER, LAYER, 1, 0, 1, 1, 0, ZMOE_F32, 7, 66, 0, 0},
    {1, 1, 1, 1, 0, 0, 0, NONE, NONE, 0, 1, 0, 0, 0, ZMOE_F32, 5, 2, 0, 0},
    {2, 1, 256, 32, 256, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F32, 40, 50, 0, 0},
    {2, 1, 136, 32, 128, 1, 1, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F32, 9, 3, 0, 0}, /* itself alone */
    {3, 1, 17, 20, 16, 0, 64, RMS, NONE, 0, 0, 1, 1, 0, ZMOE_F32, 130, 200, 0, 0},
    {48, 16, 8, 40, 8, 0, 0, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_F32, 130, 0, 0,
     0}, /* units of 42 rows */
    /* halves */
    {8, 1, 128, 64, 128, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_BF16, 1, 100, 0, 0},
    {8, 1, 128, 64, 128, 0, 0, RMS, RMS, 0, 0, 0, 0, 0, ZMOE_F16, 1, 100, 0, 0},
    {6, 2, 24, 50, 24, 1, 0, LAYER, NONE, 0, 1, 0, 1, 0, ZMOE_BF16, 2, 7, 0, 0},
    {6, 2, 17, 50, 16, 1, 0, LAYER, NONE, 0, 1, 0, 1, 0, ZMOE_F16, 2, 70, 0, 0},
    {4, 4, 80, 64, 80, 0, 30, RMS, RMS, 1, 0, 0, 0, 0, ZMOE_BF16, 130, 10, 0, 0},
    {6, 2, 17, 64, 16, 0, 30, RMS, RMS, 1, 0, 0, 0, 0, ZMOE_F16, 130, 0, 0, 0},
    /* long, in ranges of keys; the last two with many queries to a head of keys */
    {4, 4, 16, 32, 16, 0, 0, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_F32, 1, 2500, 0, 0},
    {3, 1, 24, 32, 16, 0, 1800, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_BF16, 1, 3000, 0, 0},
    {16, 1, 16, 32, 16, 0, 0, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_F32, 3, 2000, 0, 0},
    {160, 1, 8, 32, 8, 0, 1300, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_F32, 2, 1500, 0, 0},
    /* windows that keep their first keys */
    {4, 2, 16, 32, 16, 0, 12, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_F32, 30, 5, 4, 0},
    {4, 2, 16, 32, 16, 0, 600, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_BF16, 20, 1700, 4, 0},
    {8, 1, 32, 32, 16, 0, 300, RMS, NONE, 0, 0, 0, 0, 0, ZMOE_F16, 70, 2000, 100, 0},
};

static void test_shapes(void) {
  for (uint32_t i = 0; i < 2 * sizeof SHAPES / sizeof *SHAPES; i++)
    check_shape(&SHAPES[i / 2], i % 2 ? 8 : 0, i);
}

static uint32_t pick(uint32_t n) {
  return next_random() % n;
}

/* Anything goes together. */
static void test_random_shapes(void) {
  static const uint32_t groups[] = {1, 2, 3, 8}, dims[] = {4, 16, 24, 32, 80, 100, 128};
  static const uint32_t rows[] = {1, 2, 3, 7, 20}, filled[] = {0, 1, 31, 32, 64, 65, 150};
  for (uint32_t i = 0; i < 40; i++) {
    shape s = {.kv_heads = 1 + pick(3), .head_dim = dims[pick(7)], .width = 1 + pick(70)};
    s.heads = s.kv_heads * groups[pick(4)];
    s.rope_dims = pick(2) ? s.head_dim : s.head_dim / 4 * 2;
    s.traditional = pick(2), s.window = pick(2) ? 1 + pick(100) : 0;
    s.input = pick(3), s.head_norms = pick(3), s.whole = (int)pick(2), s.bias = (int)pick(2);
    s.fused = (int)pick(2), s.sinks = (int)pick(2), s.clip = pick(3) ? 0.0f : 1.0f;
    s.dtype = pick(3), s.rows = rows[pick(5)], s.filled = filled[pick(7)];
    s.keep = s.window > 0 && pick(2) ? pick(s.window) : 0;
    s.gated = !s.whole && pick(2);
    check_shape(&s, pick(3) ? 0 : 8, i);
  }
}

/* A matmul whose sums have one term, so that it rounds alike however it is computed. */
static void make_sparse(float *weights, size_t out_features, size_t in_features) {
  for (size_t o = 0; o < out_features; o++)
    for (size_t i = 0; i < in_features; i++)
      if (i != o * 7 % in_features)
        weights[o * in_features + i] = 0;
}

/* Rows at once, in any chunks, among other sequences, on any threads: the same to the bit. */
static void check_invariance(const shape *s, uint32_t bits) {
  layer l = make_layer(s, bits);
  describe_layer(&l);
  make_sparse(l.weights, l.total, s->width), make_sparse(l.output, s->width, l.q_width);
  static const uint32_t chunks[] = {1, 2, 5, 37, 64, 128};
  size_t count = (size_t)s->rows * s->width;
  for (int i = 0; i < N_ISAS; i++) {
    if (!rig_runs(ALL_ISAS[i]))
      continue;
    result first = {0};
    for (uint32_t threads = 1; threads <= 3; threads += 2) {
      zmoe_thread_pool *pool =
          make_pool(threads, ALL_ISAS[i], zmoe_attention_scratch(&l.attention, threads));
      if (threads == 1)
        first = run(&l, pool, s->rows, 1);
      for (int j = 0; j < 6; j++) {
        if (rig_skips((uint32_t)j + threads))
          continue;
        result other = run(&l, pool, chunks[j], (j + (int)threads / 2) % 2);
        CHECK(memcmp(first.added, other.added, count * sizeof *first.added) == 0);
        free_result(&other);
      }
      zmoe_thread_pool_destroy(pool);
    }
    free_result(&first);
  }
  free_layer(&l);
}

static void test_invariance(void) {
  static const shape shapes[] = {
      {6, 2, 32, 48, 32, 0, 40, RMS, RMS, 0, 1, 0, 1, 0, ZMOE_F32, 130, 20, 0, 0},
      {8, 1, 24, 40, 24, 0, 0, RMS, NONE, 1, 0, 0, 0, 0, ZMOE_BF16, 70, 1000, 0, 0},
      {3, 3, 17, 16, 16, 0, 90, RMS, NONE, 0, 0, 1, 0, 0, ZMOE_F16, 130, 900, 4, 0},
      {4, 2, 16, 16, 16, 0, 700, RMS, NONE, 0, 0, 0, 1, 0, ZMOE_BF16, 66, 1400, 70, 1},
  };
  for (uint32_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++)
    if (!rig_skips(i))
      check_invariance(&shapes[i / 2], i % 2 ? 8 : 0);
}

/* NaN in one row: out of it, and of all that see it; never a crash. */
static void test_nan_goes_through(void) {
  for (uint32_t i = 0; i < 4; i++) {
    uint32_t rows = i % 2 ? 20 : 1;
    const shape s = {4, 2, 16, 24, 16,        0,    0, RMS, NONE,  0,
                     0, 0, 0,  0,  ZMOE_BF16, rows, 5, 0,   i == 3};
    layer l = make_layer(&s, i / 2 ? 8 : 0);
    describe_layer(&l);
    l.h[(size_t)(rows - 1) * s.width] = NAN;
    zmoe_thread_pool *pool = make_pool(1, zmoe_isa_best(), zmoe_attention_scratch(&l.attention, 1));
    result out = run(&l, pool, rows, 1);
    for (uint32_t d = 0; d < s.width; d++)
      CHECK(isnan(out.added[(size_t)(rows - 1) * s.width + d]));
    free_result(&out);
    zmoe_thread_pool_destroy(pool);
    free_layer(&l);
  }
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"shapes of models, and odd ones", test_shapes},
      {"random shapes", test_random_shapes},
      {"chunks, neighbours and threads change nothing", test_invariance},
      {"NaN goes through", test_nan_goes_through},
  };
  rig_start(argc, argv);
  RUN(tests);
  return 0;
}
