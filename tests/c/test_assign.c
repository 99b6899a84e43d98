/* Assignments of random routings: everything once, at an owner, and never outside the buffers. */
#include <string.h>

#include "check.h"
#include "exchange/assign.h"
#include "numbers.h"

enum { MOST_EXPERTS = 40, MOST_SLICES = 3 };

typedef struct owners_of {
  zmoe_owners raw;
  uint64_t of_expert[MOST_EXPERTS], of_slice[MOST_SLICES];
  uint32_t speeds[ZMOE_MAX_NODES];
} owners_of;

static void draw_owners(owners_of *o) {
  memset(o, 0, sizeof *o);
  uint32_t slices = 1 + next_random() % MOST_SLICES, experts = 1 + next_random() % MOST_EXPERTS;
  uint32_t nodes = slices + next_random() % (ZMOE_MAX_NODES - slices + 1);
  o->raw = (zmoe_owners){nodes, experts, slices, o->of_expert, o->of_slice, o->speeds};
  for (uint32_t r = 0; r < nodes; r++) {
    o->of_slice[r < slices ? r : next_random() % slices] |= 1ull << r;
    o->speeds[r] = next_random() % 3 ? 1 : 0xffffffffu >> next_random() % 32;
  }
  for (uint32_t e = 0; e < experts; e++)
    for (uint32_t r = 0; r < nodes; r++)
      if (next_random() % 3 == 0)
        o->of_expert[e] |= 1ull << r;
}

/* The choices of one row: each expert at one owner in each slice. */
static void check_row(const zmoe_owners *o, const int32_t *ids, uint32_t k, const uint64_t *ranks) {
  for (uint32_t i = 0; i < k; i++) {
    int known = ids[i] >= 0 && (uint32_t)ids[i] < o->experts;
    uint64_t able = known ? o->of_expert[ids[i]] : 0;
    CHECK((ranks[i] & ~able) == 0);
    for (uint32_t s = 0; s < o->slices; s++)
      CHECK_EQUAL(__builtin_popcountll(ranks[i] & o->of_slice[s]), (able & o->of_slice[s]) != 0);
    for (uint32_t j = 0; j < i; j++)
      CHECK(ids[i] != ids[j] || ranks[i] == ranks[j]);
  }
}

static void check_assignment(const zmoe_owners *o, const int32_t *ids, uint32_t rows, uint32_t k) {
  void *scratch = malloc(zmoe_assign_scratch(o, k)); /* of this very size, for the sanitizer */
  uint64_t *ranks = malloc(rows * k * sizeof *ranks), *alone = malloc(k * sizeof *alone);
  uint64_t run[MOST_EXPERTS] = {0};
  uint32_t *counts = malloc(o->nodes * sizeof *counts), expected[ZMOE_MAX_NODES] = {0};
  for (uint32_t r = 0; r < rows; r++) {
    zmoe_assign(o, ids, rows, k, scratch, ranks, counts);
    check_row(o, ids + r * k, k, ranks + r * k);
    zmoe_assign(o, ids + r * k, 1, k, scratch, alone, counts);
    CHECK(memcmp(alone, ranks + r * k, k * sizeof *alone) == 0);
    for (uint32_t i = 0; i < k; i++)
      if (alone[i] != 0)
        run[ids[r * k + i]] |= alone[i];
  }
  zmoe_assign(o, ids, rows, k, scratch, ranks, counts);
  for (uint32_t e = 0; e < o->experts; e++)
    for (uint32_t r = 0; r < o->nodes; r++)
      expected[r] += (uint32_t)(run[e] >> r & 1);
  for (uint32_t r = 0; r < o->nodes; r++)
    CHECK_EQUAL(counts[r], expected[r]);
  free(scratch), free(ranks), free(alone), free(counts);
}

static void test_random_routings(void) {
  for (int i = 0; i < 2000; i++) {
    owners_of owners;
    draw_owners(&owners);
    uint32_t rows = next_random() % 20, k = 1 + next_random() % 8;
    int32_t *ids = malloc((rows * k + 1) * sizeof *ids);
    for (uint32_t j = 0; j < rows * k; j++)
      ids[j] = (int32_t)(next_random() % (owners.raw.experts + 4)) - 2;
    if (rows > 0)
      ids[0] = i % 2 ? INT32_MIN : INT32_MAX;
    check_assignment(&owners.raw, ids, rows, k);
    free(ids);
  }
}

/* Rank 0 alone has the first four experts and shares the others with rank 1. */
static void test_replicas_even_out(void) {
  const uint64_t of_expert[8] = {1, 1, 1, 1, 3, 3, 3, 3}, of_slice[1] = {3};
  uint32_t speeds[2] = {1, 1}, counts[2];
  const zmoe_owners owners = {2, 8, 1, of_expert, of_slice, speeds};
  const int32_t ids[8] = {7, 0, 4, 1, 6, 2, 5, 3};
  uint64_t ranks[8], scratch[64];
  CHECK(zmoe_assign_scratch(&owners, 8) <= sizeof scratch);
  zmoe_assign(&owners, ids, 1, 8, scratch, ranks, counts);
  CHECK(counts[0] == 4 && counts[1] == 4);
  for (int i = 0; i < 8; i++)
    CHECK_EQUAL(ranks[i], ids[i] >= 4 ? 2 : 1);
  speeds[0] = 3; /* 6 experts take as long there as 2 on rank 1 */
  zmoe_assign(&owners, ids, 1, 8, scratch, ranks, counts);
  CHECK(counts[0] == 6 && counts[1] == 2);
}

int main(void) {
  static const test_case tests[] = {
      {"every pair is assigned once, to an owner, by its row alone", test_random_routings},
      {"replicas even out, by speed", test_replicas_even_out},
  };
  RUN(tests);
  return 0;
}
