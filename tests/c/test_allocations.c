/* Between two exchanges, and in products, our code asks the allocator for nothing.
 *
 * The linker sends every allocator call of csrc/ (and of this test) through the
 * counters below. libzmq's own calls are not among them: it allocates a block
 * for each message that is longer than what it stores in place, and no option
 * of its changes that. */
#include "common/platform.h"

#include "check.h"

#include <sys/mman.h>

#include "kernels/compute.h"
#include "rig.h"

static int calls;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
int __real_posix_memalign(void **out, size_t alignment, size_t bytes);
void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void __real_free(void *data);

void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
int __wrap_posix_memalign(void **out, size_t alignment, size_t bytes);
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void __wrap_free(void *data);

void *__wrap_malloc(size_t bytes) {
  calls++;
  return __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes) {
  calls++;
  return __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes) {
  calls++;
  return __real_realloc(old, bytes);
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes) {
  calls++;
  return __real_aligned_alloc(alignment, bytes);
}

int __wrap_posix_memalign(void **out, size_t alignment, size_t bytes) {
  calls++;
  return __real_posix_memalign(out, alignment, bytes);
}

void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  calls++;
  return __real_mmap(at, bytes, protection, flags, fd, offset);
}

void __wrap_free(void *data) {
  calls++;
  __real_free(data);
}

static rig_node nodes[3], central[3];

static void exchange(uint32_t step) {
  static float data[RIG_MAX_BYTES / 4], sums[3][RIG_MAX_BYTES / 4];
  zmoe_fault fault;
  uint32_t width = step % 2 ? RIG_MAX_BYTES / 4 : 16; /* both size classes */
  zmoe_call call = rig_call(step, 0, 1, width, (zmoe_dtype)(step / 4 % 4));
  call.algorithm = (zmoe_algorithm)(step / 2 % 2);
  for (int r = 0; r < 3; r++)
    CHECK_EQUAL(zmoe_exchange_publish(nodes[r].ex, &call, data, ZMOE_F32, RIG_PATIENCE_US, &fault),
                ZMOE_OK);
  rig_collect_all(nodes, 3, (float *[]){sums[0], sums[1], sums[2]});
  for (int r = 0; r < 3; r++)
    CHECK_EQUAL(zmoe_exchange_service(nodes[r].ex, &fault), ZMOE_OK);
}

enum { MAX_ROWS = 64, WIDTH = 64, PAIRS = 3 * MAX_ROWS };

/* Rank 0 leads; it and each worker have an expert. */
static void central_exchange(uint32_t step) {
  static float x[MAX_ROWS * WIDTH], sum[MAX_ROWS * WIDTH], weights[PAIRS], got_weights[PAIRS];
  static int32_t ids[PAIRS], got_rows[PAIRS], got_experts[PAIRS];
  static uint64_t ranks[PAIRS];
  static const int32_t local[3] = {0, 0, 0};
  zmoe_fault fault;
  zmoe_call call = rig_call(step, 0, step % 2 ? MAX_ROWS : 1, WIDTH, ZMOE_F32);
  for (uint32_t p = 0; p < PAIRS; p++)
    ids[p] = (int32_t)(p % 3), ranks[p] = UINT64_C(1) << p % 3;
  zmoe_routed routed = {x, ids, weights, ranks, 3, ZMOE_F32, 0};
  CHECK_EQUAL(zmoe_exchange_dispatch(central[0].ex, &call, &routed, RIG_PATIENCE_US, &fault),
              ZMOE_OK);
  for (uint32_t r = 0; r < 3; r++) {
    zmoe_dispatch_batch got = {.x = sum,
                               .pair_rows = got_rows,
                               .pair_experts = got_experts,
                               .pair_weights = got_weights,
                               .x_bytes = sizeof sum,
                               .max_pairs = PAIRS,
                               .experts = 3,
                               .local = local,
                               .width = WIDTH};
    int rc = ZMOE_OK;
    do
      if (r > 0)
        rc = zmoe_exchange_receive(central[r].ex, &got, step, 0, RIG_PATIENCE_US, &fault);
    while (rc == ZMOE_EINTR);
    CHECK_EQUAL(rc, ZMOE_OK);
    CHECK_EQUAL(zmoe_exchange_publish(central[r].ex, &call, sum, ZMOE_F32, RIG_PATIENCE_US, &fault),
                ZMOE_OK);
  }
  int rc;
  do
    rc = zmoe_exchange_collect(central[0].ex, sum, ZMOE_F32, RIG_PATIENCE_US, &fault);
  while (rc == ZMOE_EINTR);
  CHECK_EQUAL(rc, ZMOE_OK);
}

static void test_none_between_exchanges(void) {
  calls = 0;
  rig_options options = {.nodes = 3, .resend_ms = 1, .grace_ms = 1000};
  rig_open(nodes, options);
  options.dispatch_rows = MAX_ROWS;
  rig_open(central, options);
  CHECK(calls > 0); /* creation allocates: the counters work */
  calls = 0;
  for (uint32_t step = 0; step < 200; step++) {
    exchange(step);
    central_exchange(step);
  }
  CHECK_EQUAL(calls, 0);
  rig_close(nodes, 3);
  rig_close(central, 3);
  CHECK(calls > 0); /* and so does their removal */
}

/* All formats at once, few rows and many. */
static void test_none_in_matmuls(void) {
  static unsigned char data[64 * 64 * 4], scales[64 * 64];
  static float x[64 * 64], y[3][64 * 64], pair_weights[64];
  static int32_t pair_rows[64], pair_experts[64];
  const zmoe_weight weights[3] = {{.data = data, .out_features = 64, .in_features = 64},
                                  {.data = data,
                                   .out_features = 64,
                                   .in_features = 64,
                                   .scales = scales,
                                   .biases = scales,
                                   .format = ZMOE_FORMAT_AFFINE,
                                   .bits = 4,
                                   .group = 32},
                                  {.data = data,
                                   .out_features = 64,
                                   .in_features = 64,
                                   .scales = scales,
                                   .format = ZMOE_FORMAT_MXFP8,
                                   .bits = 8,
                                   .group = 32}};
  const zmoe_weight *pointers[] = {&weights[0], &weights[1], &weights[2]};
  const zmoe_weight experts[2] = {weights[1], weights[1]};
  const zmoe_expert_layer layer = {.gate = experts, .up = experts, .down = experts, .experts = 2};
  void *ys[] = {y[0], y[1], y[2]};
  const size_t strides[] = {64, 64, 64};
  zmoe_thread_pool *pool;
  for (int32_t i = 0; i < 64; i++)
    pair_rows[i] = i, pair_experts[i] = i % 2;
  calls = 0;
  CHECK_EQUAL(zmoe_thread_pool_create(2, NULL, 0, zmoe_isa_best(), &pool), ZMOE_OK);
  CHECK_EQUAL(zmoe_thread_pool_reserve(pool, zmoe_experts_scratch(64, 64, 1)), ZMOE_OK);
  CHECK_EQUAL(zmoe_thread_pool_reserve(pool, zmoe_linear_scratch(64)), ZMOE_OK);
  CHECK(calls > 0);
  calls = 0;
  for (uint32_t rows = 1; rows <= 64; rows *= 8)
    for (int precision = 0; precision < 2; precision++) {
      CHECK_EQUAL(zmoe_linear(pool, pointers, 3, x, ZMOE_BF16, rows, ys, strides, ZMOE_F32,
                              (zmoe_precision)precision),
                  ZMOE_OK);
      CHECK_EQUAL(zmoe_experts(pool, &layer, x, ZMOE_BF16, rows, pair_rows, pair_experts,
                               pair_weights, rows, y, ZMOE_F32, (zmoe_precision)precision),
                  ZMOE_OK);
      CHECK_EQUAL(zmoe_gather_linear(pool, experts, 2, x, ZMOE_F16, rows, pair_rows, pair_experts,
                                     rows, y, ZMOE_BF16, (zmoe_precision)precision),
                  ZMOE_OK);
    }
  CHECK_EQUAL(calls, 0);
  zmoe_thread_pool_destroy(pool);
  CHECK(calls > 0);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"no allocator call in products", test_none_in_matmuls},
      /* The last one: libzmq frees our slots some time after the sockets are closed. */
      {"nor between exchanges", test_none_between_exchanges},
  };
  rig_start(argc, argv);
  RUN(tests);
  rig_stop();
  return 0;
}
