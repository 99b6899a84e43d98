/* A node's threads: work is done once by each, whether they spin or sleep.  The
 * Makefile also runs this under ThreadSanitizer. */
#include "common/platform.h"

#include "kernel_rig.h"

#include "kernels/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

enum { MOST_THREADS = 5, CALLS = 3000, PHASES = 7, TASKS = 40 };

typedef struct work {
  uint32_t threads;
  uint32_t done[MOST_THREADS];           /* calls that each thread has worked in */
  uint32_t phase[MOST_THREADS];          /* where each stands in this call */
  _Atomic uint32_t taken[PHASES][TASKS]; /* how often, over all calls */
  zmoe_tasks tasks[PHASES];
} work;

/* Between two barriers a thread writes its own place; after one, all are written. */
static void do_work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  work *w = argument;
  w->done[thread]++;
  for (uint32_t p = 0; p < PHASES; p++) {
    w->phase[thread] = p + 1;
    for (uint32_t task; (task = zmoe_take(&w->tasks[p])) < TASKS;)
      atomic_fetch_add(&w->taken[p][task], 1);
    zmoe_thread_pool_barrier(pool);
    for (uint32_t t = 0; t < w->threads; t++)
      CHECK_EQUAL(w->phase[t], p + 1);
    zmoe_thread_pool_barrier(pool);
  }
}

static zmoe_thread_pool *pool_of(uint32_t threads, uint32_t spin_us) {
  zmoe_thread_pool *pool;
  CHECK_EQUAL(zmoe_thread_pool_create(threads, NULL, spin_us, zmoe_isa_best(), &pool), ZMOE_OK);
  CHECK_EQUAL(zmoe_thread_pool_threads(pool), threads);
  return pool;
}

/* Without spinning helpers sleep after nearly every call; with it, hardly ever. */
static void check_calls(uint32_t threads, uint32_t spin_us, uint32_t calls) {
  static work w;
  memset(&w, 0, sizeof w);
  w.threads = threads;
  zmoe_thread_pool *pool = pool_of(threads, spin_us);
  for (uint32_t call = 0; call < calls; call++) {
    for (uint32_t p = 0; p < PHASES; p++)
      atomic_store(&w.tasks[p].next, 0);
    zmoe_thread_pool_run(pool, do_work, &w);
    for (uint32_t t = 0; t < threads; t++)
      CHECK_EQUAL(w.done[t], call + 1);
  }
  for (uint32_t p = 0; p < PHASES; p++)
    for (uint32_t task = 0; task < TASKS; task++)
      CHECK_EQUAL(w.taken[p][task], calls);
  zmoe_thread_pool_destroy(pool);
}

static void test_calls(void) {
  check_calls(1, 0, 10);
  check_calls(2, 0, CALLS);
  check_calls(2, 1000, CALLS);
  check_calls(2, 3, CALLS); /* now awake, now asleep */
  check_calls(3, 0, CALLS / 10);
  check_calls(MOST_THREADS, 10, CALLS / 30); /* more than there are cores */
}

#if defined(__linux__)
/* Where the threads of `test_sleep` wait for each other. */
typedef struct meeting {
  _Atomic pid_t ids[2];
  int sleeper; /* the thread that is to fall asleep; the other looks on */
  int at_barrier;
} meeting;

/* Whether the system has put that thread of ours to sleep. */
static int is_asleep(pid_t id) {
  char path[64], line[512] = "";
  (void)snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)id);
  FILE *file = fopen(path, "r");
  CHECK(file != NULL);
  CHECK(fgets(line, sizeof line, file) != NULL);
  (void)fclose(file);
  const char *end = strrchr(line, ')'); /* of the name, which may hold anything */
  return end != NULL && end[2] == 'S';
}

static void wait_asleep(const _Atomic pid_t *id) {
  for (time_t end = time(NULL) + 60; time(NULL) < end; sched_yield())
    if (atomic_load(id) != 0 && is_asleep(atomic_load(id)))
      return;
  CHECK(!"asleep within a minute");
}

static void meet(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  meeting *m = argument;
  atomic_store(&m->ids[thread], (pid_t)syscall(SYS_gettid));
  if ((int)thread != m->sleeper)
    wait_asleep(&m->ids[m->sleeper]);
  if (m->at_barrier)
    zmoe_thread_pool_barrier(pool);
}

/* A thread that waits at a barrier, or for the end of a call, leaves its core to others. */
static void test_sleep(void) {
  zmoe_thread_pool *pool = pool_of(2, 100);
  for (int sleeper = 0; sleeper < 2; sleeper++) {
    meeting m = {.sleeper = sleeper, .at_barrier = 1};
    zmoe_thread_pool_run(pool, meet, &m);
  }
  meeting end = {.sleeper = 0};
  zmoe_thread_pool_run(pool, meet, &end);
  zmoe_thread_pool_destroy(pool);
}
#else
static void test_sleep(void) {}
#endif

static void nothing(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool, (void)argument, (void)thread;
}

/* Before the helpers run, while they spin, when they sleep. */
static void test_destroy(void) {
  for (uint32_t i = 0; i < 60; i++) {
    zmoe_thread_pool *pool = pool_of(3, i % 2 ? 0 : 100000);
    for (uint32_t call = 0; call < i % 3; call++)
      zmoe_thread_pool_run(pool, nothing, NULL);
    zmoe_thread_pool_destroy(pool);
  }
  zmoe_thread_pool_destroy(NULL);
}

static void test_pinning(void) {
  const int32_t cores[] = {-1, 0, 1 << 20}; /* the last is none: it stays anywhere */
  zmoe_thread_pool *pool;
  CHECK_EQUAL(zmoe_thread_pool_create(3, cores, 0, zmoe_isa_best(), &pool), ZMOE_OK);
  zmoe_thread_pool_run(pool, nothing, NULL);
  zmoe_thread_pool_destroy(pool);
}

static void test_refusals(void) {
  zmoe_thread_pool *pool = (zmoe_thread_pool *)&pool;
  CHECK_EQUAL(zmoe_thread_pool_create(0, NULL, 0, ZMOE_ISA_GENERIC, &pool), ZMOE_EINVAL);
  CHECK(pool == NULL);
  CHECK_EQUAL(zmoe_thread_pool_create(ZMOE_MAX_THREADS + 1, NULL, 0, ZMOE_ISA_GENERIC, &pool),
              ZMOE_EINVAL);
  zmoe_isa foreign = zmoe_isa_supported(ZMOE_ISA_NEON) ? ZMOE_ISA_AVX2 : ZMOE_ISA_NEON;
  CHECK_EQUAL(zmoe_thread_pool_create(1, NULL, 0, foreign, &pool), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_thread_pool_create(1, NULL, 0, (zmoe_isa)77, &pool), ZMOE_EINVAL);
}

static void test_working_memory(void) {
  zmoe_thread_pool *pool = pool_of(1, 0);
  CHECK(zmoe_thread_pool_scratch(pool, 1) == NULL);
  CHECK_EQUAL(zmoe_thread_pool_reserve(pool, 1000), ZMOE_OK);
  CHECK_EQUAL(zmoe_thread_pool_reserve(pool, 10), ZMOE_OK); /* keeps what there is */
  size_t all = 1000 + ZMOE_THREAD_SCRATCH + ZMOE_CALL_SCRATCH, mark = zmoe_thread_pool_mark(pool);
  unsigned char *a = zmoe_thread_pool_scratch(pool, 1), *b = zmoe_thread_pool_scratch(pool, 65);
  CHECK(a != NULL && (uintptr_t)a % 64 == 0 && b == a + 64);
  CHECK(zmoe_thread_pool_scratch(pool, all) == NULL);
  memset(b, 1, 65);
  zmoe_thread_pool_release(pool, mark);
  unsigned char *whole = zmoe_thread_pool_scratch(pool, all);
  CHECK(whole == a);
  memset(whole, 1, all);
  zmoe_thread_pool_release(pool, mark);
  zmoe_thread_pool_destroy(pool);
}

/* The products themselves, for ThreadSanitizer, which sees all that the generic ones do. */
static void test_products(void) {
  const weight_kind four = {ZMOE_FORMAT_AFFINE, 4, 64};
  zmoe_weight weights[3];
  for (int i = 0; i < 3; i++)
    weights[i] = rig_weight(four, 128, 128, (weight_options){0});
  const zmoe_expert_layer layer = {.gate = weights, .up = weights, .down = weights, .experts = 3};
  const zmoe_weight *pointers[] = {&weights[0], &weights[1]};
  static float y[2][40 * 128];
  static const int32_t pair_rows[] = {0, 0, 1, 1, 2}, pair_experts[] = {0, 2, 2, 1, 0};
  static const float pair_weights[] = {1, 2, 3, 4, 5};
  void *ys[] = {y[0], y[1]};
  const size_t strides[] = {128, 128};
  const void *x = rig_inputs(40 * 128, 1.0f, ZMOE_BF16, 0, 0);
  const zmoe_isa isas[] = {ZMOE_ISA_GENERIC, zmoe_isa_best()};
  for (int i = 0; i < 2; i++) {
    zmoe_thread_pool *pool = make_pool(3, isas[i], zmoe_experts_scratch(128, 128, 2));
    CHECK_EQUAL(zmoe_thread_pool_reserve(pool, zmoe_linear_scratch(128)), ZMOE_OK);
    for (uint32_t rows = 1; rows <= 40; rows += 13) {
      CHECK_EQUAL(zmoe_linear(pool, pointers, 2, x, ZMOE_BF16, rows, ys, strides, ZMOE_F32,
                              (zmoe_precision)(rows % 2)),
                  ZMOE_OK);
      CHECK_EQUAL(zmoe_experts(pool, &layer, x, ZMOE_BF16, 3, pair_rows, pair_experts, pair_weights,
                               5, y[0], ZMOE_F32, (zmoe_precision)(rows % 2)),
                  ZMOE_OK);
    }
    zmoe_thread_pool_destroy(pool);
  }
  rig_free_blocks();
}

int main(void) {
  static const test_case tests[] = {
      {"many calls, spinning and sleeping", test_calls},
      {"whoever waits for long sleeps", test_sleep},
      {"a pool may end at any time", test_destroy},
      {"cores", test_pinning},
      {"unusable arguments are refused", test_refusals},
      {"working memory", test_working_memory},
      {"products on three threads", test_products},
  };
  RUN(tests);
  return 0;
}
