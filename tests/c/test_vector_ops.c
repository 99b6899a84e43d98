/* Vector operations: the same bits from every instruction set. */
#include "numbers.h"

#include "kernels/vector_ops.h"

enum { KEYS = 70, QUERIES = 4, MOST = 256 };

static const uint32_t DIMS[] = {1, 8, 16, 17, 24, 32, 80, 100, 128, 136, 256};

/* Runs `check` for every table but the plain one. */
static void each_variant(void (*check)(const zmoe_vector_ops *, const zmoe_vector_ops *,
                                       uint32_t dim)) {
  for (int i = 0; i < N_ISAS; i++)
    for (size_t d = 0; zmoe_isa_supported(ALL_ISAS[i]) && d < sizeof DIMS / sizeof *DIMS; d++)
      check(&zmoe_vector_ops_generic, zmoe_vector_ops_for(ALL_ISAS[i]), DIMS[d]);
}

static unsigned char data[KEYS * MOST * 4 + 1];

/* Rows of the cache at an odd address. */
static zmoe_head_rows random_rows(uint32_t dim, zmoe_dtype dtype) {
  float *x = random_floats((size_t)KEYS * dim, 2.0f);
  zmoe_convert(data + 1, dtype, x, ZMOE_F32, (size_t)KEYS * dim, ZMOE_ISA_GENERIC);
  free(x);
  return (zmoe_head_rows){data + 1, 0, dtype, dim, 1 + next_random() % KEYS};
}

static void check_attention(const zmoe_vector_ops *plain, const zmoe_vector_ops *fast,
                            uint32_t dim) {
  for (uint32_t n = 1; n <= QUERIES; n *= 2)
    for (int dtype = 0; dtype < 3; dtype++) {
      zmoe_head_rows rows = random_rows(dim, (zmoe_dtype)dtype);
      float *x = random_floats(QUERIES * MOST, 1.0f), a[2][QUERIES * KEYS], corrections[QUERIES];
      float sums[2][QUERIES * MOST], panels[2][KEYS * (MOST + 32)];
      const float *queries[QUERIES] = {x, x + MOST, x + 2 * MOST, x + 3 * MOST};
      for (int v = 0; v < 2; v++) {
        const zmoe_vector_ops *ops = v ? fast : plain;
        memset(a[v], 0, sizeof a[v]), memset(panels[v], 0, sizeof panels[v]);
        memcpy(sums[v], x, sizeof sums[v]);
        ops->score(queries, n, &rows, a[v], KEYS);
        for (uint32_t i = 0; i < n; i++) {
          zmoe_softmax state = zmoe_softmax_empty();
          corrections[i] = ops->soften(a[v] + i * KEYS, rows.count / 2, &state) + (float)i;
          corrections[i] += ops->soften(a[v] + i * KEYS + rows.count / 2, rows.count / 2, &state);
          a[v][i * KEYS + KEYS - 1] = state.sum;
        }
        ops->add_values(a[v], KEYS, n, corrections, &rows, sums[v], MOST);
        ops->pack_values(&rows, 32, panels[v]);
      }
      CHECK(memcmp(a[0], a[1], sizeof a[0]) == 0);
      CHECK(memcmp(sums[0], sums[1], sizeof sums[0]) == 0);
      CHECK(memcmp(panels[0], panels[1], sizeof panels[0]) == 0);
      free(x);
    }
}

static void test_attention(void) {
  each_variant(check_attention);
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

static void check_activations(const zmoe_vector_ops *plain, const zmoe_vector_ops *fast,
                              uint32_t dim) {
  float *gate = random_floats(dim, 3.0f), *up = random_floats(dim, 3.0f), out[2][MOST];
  for (uint32_t activation = ZMOE_SILU; activation <= ZMOE_GELU_TANH_ONLY; activation++) {
    const zmoe_expert_layer layer = {.activation = activation, .alpha = 1.702f, .limit = 2.0f};
    plain->activate(&layer, gate, up, dim, out[0]);
    fast->activate(&layer, gate, up, dim, out[1]);
    CHECK(memcmp(out[0], out[1], dim * sizeof *gate) == 0);
  }
  free(gate), free(up);
}

static void test_activations(void) {
  each_variant(check_activations);
}

int main(void) {
  static const test_case tests[] = {
      {"scores, softmax and sums", test_attention},
      {"clip and rotations", test_heads},
      {"activations", test_activations},
  };
  RUN(tests);
  return 0;
}
