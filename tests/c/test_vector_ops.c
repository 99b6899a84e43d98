/* Vector operations: the same bits from every instruction set. */
#include "numbers.h"

#include "kernels/vector_ops.h"

enum { QUERIES = ZMOE_QUERIES, KEYS = ZMOE_KEY_BLOCK, MOST = 256 };

static const uint32_t DIMS[] = {1, 8, 16, 17, 24, 32, 80, 100, 128, 136, 256};

/* Runs `check` for every table but the plain one. */
static void each_variant(void (*check)(const zmoe_vector_ops *, const zmoe_vector_ops *,
                                       uint32_t dim)) {
  for (int i = 0; i < N_ISAS; i++)
    for (size_t d = 0; zmoe_isa_supported(ALL_ISAS[i]) && d < sizeof DIMS / sizeof *DIMS; d++)
      check(&zmoe_vector_ops_generic, zmoe_vector_ops_for(ALL_ISAS[i]), DIMS[d]);
}

static unsigned char data[KEYS * MOST * 4 + 1];

/* A block of the cache at an odd address, and what is in it. */
static zmoe_head_block random_block(uint32_t dim, zmoe_dtype dtype, float *x) {
  float *drawn = random_floats((size_t)KEYS * dim, 2.0f);
  for (uint32_t i = 0; i < KEYS * dim; i++)
    x[i] = rounded(drawn[i], dtype);
  zmoe_convert(data + 1, dtype, x, ZMOE_F32, (size_t)KEYS * dim, ZMOE_ISA_GENERIC);
  free(drawn);
  return (zmoe_head_block){data + 1, 0, dtype, dim, 1 + next_random() % KEYS, dim};
}

/* Plain x86-64 has no fused multiply-add. */
static float multiply_add(const zmoe_vector_ops *ops, float a, float b, float c) {
#if defined(__x86_64__)
  if (ops == &zmoe_vector_ops_generic)
    return a * b + c;
#endif
  (void)ops;
  return fmaf(a, b, c);
}

/* Scores and sums are those of a loop over their terms, for any number of queries. */
static void check_sums(const zmoe_vector_ops *plain, const zmoe_vector_ops *ops, uint32_t dim) {
  (void)plain;
  static float elements[KEYS * MOST];
  for (uint32_t n = 1; n <= QUERIES; n *= 2)
    for (int dtype = 0; dtype < 3; dtype++) {
      zmoe_head_block block = random_block(dim, (zmoe_dtype)dtype, elements);
      float *x = random_floats(QUERIES * MOST, 1.0f), scores[QUERIES * KEYS], sums[QUERIES * MOST];
      const float *queries[QUERIES], corrections[QUERIES] = {1, 0.3f, 0, 2, 1, 0.7f, 0, 3};
      for (uint32_t i = 0; i < QUERIES; i++)
        queries[i] = x + i * MOST;
      memcpy(sums, x, sizeof sums);
      ops->score(queries, n, &block, scores);
      for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < block.count; j++) {
          float expected = 0;
          for (uint32_t d = 0; d < dim; d++)
            expected = multiply_add(ops, elements[d * KEYS + j], queries[i][d], expected);
          CHECK(expected == scores[i * KEYS + j]);
        }
      ops->add_values(scores, n, corrections, &block, sums, MOST);
      for (uint32_t i = 0; i < n; i++)
        for (uint32_t d = 0; d < dim; d++) {
          float expected = queries[i][d] * corrections[i];
          for (uint32_t j = 0; j < block.count; j++)
            expected = multiply_add(ops, elements[j * dim + d], scores[i * KEYS + j], expected);
          CHECK(expected == sums[i * MOST + d]);
        }
      free(x);
    }
}

/* Rows become columns, and half of each row is summed where that is all that is asked for. */
static void check_latents(const zmoe_vector_ops *plain, const zmoe_vector_ops *ops, uint32_t dim) {
  (void)plain;
  static float elements[KEYS * MOST], keys[KEYS * MOST], sums[2][MOST];
  for (int dtype = 0; dtype < 3; dtype++) {
    zmoe_head_block block = random_block(dim, (zmoe_dtype)dtype, elements);
    ops->turn(block.data, (zmoe_dtype)dtype, block.count, dim, keys);
    for (uint32_t j = 0; j < block.count; j++)
      for (uint32_t d = 0; d < dim; d++)
        CHECK(keys[d * KEYS + j] == elements[j * dim + d]);
    memset(sums, 0, sizeof sums);
    const float correction = 1;
    ops->add_values(elements, 1, &correction, &block, sums[0], MOST);
    block.dim = dim / 2;
    ops->add_values(elements, 1, &correction, &block, sums[1], MOST);
    for (uint32_t d = 0; d < dim; d++)
      CHECK(sums[1][d] == (d < dim / 2 ? sums[0][d] : 0));
  }
}

static void check_softmax(const zmoe_vector_ops *plain, const zmoe_vector_ops *fast, uint32_t dim) {
  float *x = random_floats(dim, 3.0f), scores[2][MOST], corrections[2];
  zmoe_softmax states[2] = {zmoe_softmax_empty(), zmoe_softmax_empty()};
  for (int v = 0; v < 2; v++) {
    const zmoe_vector_ops *ops = v ? fast : plain;
    memcpy(scores[v], x, dim * sizeof *x);
    corrections[v] = ops->soften(scores[v], dim / 2, &states[v]);
    corrections[v] += ops->soften(scores[v] + dim / 2, dim - dim / 2, &states[v]);
  }
  CHECK(memcmp(scores[0], scores[1], dim * sizeof *x) == 0);
  CHECK(corrections[0] == corrections[1]);
  CHECK(states[0].max == states[1].max && states[0].sum == states[1].sum);
  free(x);
}

static void test_attention(void) {
  each_variant(check_sums);
  each_variant(check_latents);
  each_variant(check_softmax);
}

static void check_heads(const zmoe_vector_ops *plain, const zmoe_vector_ops *fast, uint32_t dim) {
  float *x = random_floats(dim, 3.0f), *angles = random_floats(dim, 1.0f), out[2][MOST];
  for (uint32_t traditional = 0; traditional < 2; traditional++) {
    for (int v = 0; v < 2; v++) {
      const zmoe_vector_ops *ops = v ? fast : plain;
      memcpy(out[v], x, dim * sizeof *x);
      ops->clip(out[v], dim, 2.0f);
      ops->rotate(out[v], angles, angles + dim / 2, dim / 2 * 2, traditional);
    }
    CHECK(memcmp(out[0], out[1], dim * sizeof *x) == 0);
  }
  free(x), free(angles);
}

static void test_heads(void) {
  each_variant(check_heads);
}

static void check_delta(const zmoe_vector_ops *plain, const zmoe_vector_ops *fast, uint32_t dim) {
  float *x = random_floats(3 * (size_t)dim, 1.0f), to[2][MOST], at_query[2];
  const float *key = x + dim, *query = x + 2 * (size_t)dim;
  for (int v = 0; v < 2; v++)
    at_query[v] = (v ? fast : plain)->delta(x, to[v], key, query, dim, 0.9f, 2.0f, 0.7f);
  CHECK(at_query[0] == at_query[1] && memcmp(to[0], to[1], dim * sizeof *x) == 0);
  double held = 0, wanted = 0;
  for (uint32_t i = 0; i < dim; i++)
    held += 0.9 * x[i] * key[i];
  for (uint32_t i = 0; i < dim; i++)
    wanted += (0.9 * x[i] + key[i] * 0.7 * (2 - held)) * query[i];
  CHECK(fabs(at_query[0] - wanted) < 1e-4 * (1 + dim));
  free(x);
}

static void test_delta(void) {
  each_variant(check_delta);
}

static void check_activations(const zmoe_vector_ops *plain, const zmoe_vector_ops *fast,
                              uint32_t dim) {
  float *gate = random_floats(dim, 3.0f), *up = random_floats(dim, 3.0f), out[2][MOST];
  for (uint32_t activation = ZMOE_SILU; activation <= ZMOE_GELU_TANH_ONLY; activation++) {
    const zmoe_expert_layer layer = {.activation = activation, .alpha = 1.702f, .limit = 2.0f};
    plain->activate(&layer, gate, up, dim, out[0]);
    fast->activate(&layer, gate, up, dim, out[1]);
    CHECK(memcmp(out[0], out[1], dim * sizeof *gate) == 0);
  }
  for (int v = 0; v < 2; v++) {
    memcpy(out[v], gate, dim * sizeof *gate);
    (v ? fast : plain)->sigmoid(out[v], dim);
  }
  CHECK(memcmp(out[0], out[1], dim * sizeof *gate) == 0);
  for (uint32_t i = 0; i < dim; i++)
    CHECK(fabs(out[0][i] - 1 / (1 + exp(-(double)gate[i]))) < 1e-6);
  free(gate), free(up);
}

static void test_activations(void) {
  each_variant(check_activations);
}

int main(void) {
  static const test_case tests[] = {
      {"scores, softmax and sums", test_attention},
      {"clip and rotations", test_heads},
      {"rows of a delta net's state", test_delta},
      {"activations", test_activations},
  };
  RUN(tests);
  return 0;
}
