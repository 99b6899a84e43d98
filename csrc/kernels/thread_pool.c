/* A node's threads.
 *
 * A decode step makes hundreds of calls of a few microseconds each, so threads
 * spin for a while before they sleep on a condition variable, and whoever has
 * what they wait for wakes them only when some sleep. */
#include "common/platform.h"

#include "thread_pool.h"

#include <assert.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

enum {
  ALIGNMENT = 64,
  YIELD_US = 20,
  SPINS_PER_CLOCK = 64,
};

struct zmoe_thread_pool {
  uint32_t threads, spin_us;
  pid_t owner; /* a forked child has none of its threads */
  zmoe_isa isa;
  pthread_t *helpers;
  struct helper *starts;
  unsigned char *scratch;
  size_t scratch_bytes, scratch_used;
  uint64_t matmul_ns;

  zmoe_thread_fn *fn;
  void *job;
  int ended;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  _Alignas(ALIGNMENT) _Atomic uint32_t call; /* counts the calls: a new value is new work */
  _Alignas(ALIGNMENT) _Atomic uint32_t sleepers;
  _Alignas(ALIGNMENT) _Atomic uint32_t running; /* helpers that are not done yet */
  _Alignas(ALIGNMENT) _Atomic uint32_t arrived; /* at the barrier */
  _Alignas(ALIGNMENT) _Atomic uint32_t phase;   /* barriers passed */
};

struct helper {
  zmoe_thread_pool *pool;
  uint32_t thread;
  int32_t core;
};

/* ---- waiting ---------------------------------------------------------------
 * A wait spins for `spin_us` and then sleeps, be it for the next call, at a
 * barrier or for a call's end: whoever it waits for may be long, or without a core. */

/* Whether `word` became `wanted` within the time to spin. */
static int spin_until(const zmoe_thread_pool *pool, const _Atomic uint32_t *word, uint32_t wanted) {
  uint64_t sleep_us = 0, yield_us = 0;
  for (uint32_t spins = 1; atomic_load_explicit(word, memory_order_acquire) != wanted; spins++) {
    RELAX();
    if (spins % SPINS_PER_CLOCK != 0)
      continue;
    uint64_t now_us = zmoe_now_us();
    if (sleep_us == 0) {
      sleep_us = zmoe_later_us(now_us, pool->spin_us);
      yield_us = now_us + YIELD_US;
    } else if (now_us >= yield_us) { /* whoever we wait for may need our core */
      sched_yield();
      yield_us = zmoe_now_us() + YIELD_US;
    }
    if (now_us >= sleep_us)
      return 0;
  }
  return 1;
}

/* Every word counts up or down to `wanted` and stays there while anyone waits. */
static void wait_until(zmoe_thread_pool *pool, const _Atomic uint32_t *word, uint32_t wanted) {
  if (spin_until(pool, word, wanted))
    return;
  pthread_mutex_lock(&pool->mutex);
  atomic_fetch_add(&pool->sleepers, 1);
  while (atomic_load(word) != wanted)
    pthread_cond_wait(&pool->wake, &pool->mutex);
  atomic_fetch_sub(&pool->sleepers, 1);
  pthread_mutex_unlock(&pool->mutex);
}

/* After a change of a word.  Both that change and a sleeper's count of itself come
 * before a look at the other, all sequentially consistent: one of the two is seen.  Both
 * are read-modify-writes, because QEMU on x86 lets a plain store pass a later load. */
static void wake_sleepers(zmoe_thread_pool *pool) {
  if (atomic_load(&pool->sleepers) == 0)
    return;
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->wake);
  pthread_mutex_unlock(&pool->mutex);
}

static void publish_call(zmoe_thread_pool *pool) {
  atomic_fetch_add(&pool->call, 1);
  wake_sleepers(pool);
}

void zmoe_thread_pool_barrier(zmoe_thread_pool *pool) {
  if (pool->threads == 1)
    return;
  uint32_t phase = atomic_load_explicit(&pool->phase, memory_order_acquire);
  if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) == pool->threads - 1) {
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    atomic_fetch_add(&pool->phase, 1);
    wake_sleepers(pool);
    return;
  }
  wait_until(pool, &pool->phase, phase + 1);
}

/* ---- working --------------------------------------------------------------- */

static void stay_on(int32_t core) {
#if defined(__linux__)
  if (core < 0 || core >= CPU_SETSIZE)
    return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((size_t)core, &set);
  (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set); /* a wish: slower without */
#else
  (void)core;
#endif
}

static void *help(void *start) {
  struct helper *self = start;
  zmoe_thread_pool *pool = self->pool;
  stay_on(self->core);
  for (uint32_t last = 0;; last++) {
    wait_until(pool, &pool->call, last + 1);
    if (pool->ended)
      return NULL;
    pool->fn(pool, pool->job, self->thread);
    if (atomic_fetch_sub(&pool->running, 1) == 1)
      wake_sleepers(pool);
  }
}

void zmoe_thread_pool_run(zmoe_thread_pool *pool, zmoe_thread_fn *fn, void *job) {
  if (pool->threads == 1) {
    fn(pool, job, 0);
    return;
  }
  pool->fn = fn;
  pool->job = job;
  atomic_store(&pool->running, pool->threads - 1);
  publish_call(pool);
  fn(pool, job, 0);
  wait_until(pool, &pool->running, 0);
}

void zmoe_thread_pool_run_matmul(zmoe_thread_pool *pool, zmoe_thread_fn *fn, void *job) {
  uint64_t start = zmoe_now_ns();
  zmoe_thread_pool_run(pool, fn, job);
  pool->matmul_ns += zmoe_now_ns() - start;
}

uint64_t zmoe_thread_pool_matmul_ns(const zmoe_thread_pool *pool) {
  return pool->matmul_ns;
}

uint32_t zmoe_thread_pool_threads(const zmoe_thread_pool *pool) {
  return pool->threads;
}

zmoe_isa zmoe_thread_pool_isa(const zmoe_thread_pool *pool) {
  return pool->isa;
}

/* ---- life ------------------------------------------------------------------ */

static void end_helpers(zmoe_thread_pool *pool, uint32_t started) {
  pool->ended = 1;
  publish_call(pool);
  for (uint32_t i = 0; i < started; i++)
    pthread_join(pool->helpers[i], NULL);
}

static int start_helpers(zmoe_thread_pool *pool, const int32_t *cores) {
  for (uint32_t i = 0; i + 1 < pool->threads; i++) {
    pool->starts[i] = (struct helper){pool, i + 1, cores != NULL ? cores[i + 1] : -1};
    if (pthread_create(&pool->helpers[i], NULL, help, &pool->starts[i]) != 0) {
      end_helpers(pool, i);
      return ZMOE_ENOMEM;
    }
  }
  return ZMOE_OK;
}

static void free_pool(zmoe_thread_pool *pool) {
  pthread_cond_destroy(&pool->wake);
  pthread_mutex_destroy(&pool->mutex);
  free(pool->helpers);
  free(pool->starts);
  free(pool->scratch);
  free(pool);
}

int zmoe_thread_pool_create(uint32_t threads, const int32_t *cores, uint32_t spin_us, zmoe_isa isa,
                            zmoe_thread_pool **out) {
  *out = NULL;
  if (threads < 1 || threads > ZMOE_MAX_THREADS || !zmoe_isa_supported(isa))
    return ZMOE_EINVAL;
  zmoe_thread_pool *pool = aligned_alloc(ALIGNMENT, zmoe_round_up(sizeof *pool, ALIGNMENT));
  if (pool == NULL)
    return ZMOE_ENOMEM;
  *pool = (zmoe_thread_pool){.threads = threads, .spin_us = spin_us, .owner = getpid(), .isa = isa};
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->wake, NULL);
  pool->helpers = calloc(threads, sizeof *pool->helpers);
  pool->starts = calloc(threads, sizeof *pool->starts);
  int status = ZMOE_ENOMEM;
  if (pool->helpers != NULL && pool->starts != NULL)
    status = start_helpers(pool, cores);
  if (status != ZMOE_OK) {
    free_pool(pool);
    return status;
  }
  *out = pool;
  return ZMOE_OK;
}

void zmoe_thread_pool_destroy(zmoe_thread_pool *pool) {
  if (pool == NULL || pool->owner != getpid())
    return;
  end_helpers(pool, pool->threads - 1);
  free_pool(pool);
}

/* ---- working memory -------------------------------------------------------- */

int zmoe_thread_pool_reserve(zmoe_thread_pool *pool, size_t bytes) {
  bytes += (size_t)pool->threads * ZMOE_THREAD_SCRATCH + ZMOE_CALL_SCRATCH;
  bytes = zmoe_round_up(bytes, ALIGNMENT);
  if (bytes <= pool->scratch_bytes)
    return ZMOE_OK;
  unsigned char *scratch = aligned_alloc(ALIGNMENT, bytes);
  if (scratch == NULL)
    return ZMOE_ENOMEM;
  free(pool->scratch);
  pool->scratch = scratch;
  pool->scratch_bytes = bytes;
  return ZMOE_OK;
}

size_t zmoe_thread_pool_mark(const zmoe_thread_pool *pool) {
  return pool->scratch_used;
}

void zmoe_thread_pool_release(zmoe_thread_pool *pool, size_t mark) {
  pool->scratch_used = mark;
}

void *zmoe_thread_pool_scratch(zmoe_thread_pool *pool, size_t bytes) {
  bytes = zmoe_round_up(bytes, ALIGNMENT);
  if (bytes > pool->scratch_bytes - pool->scratch_used)
    return NULL;
  void *piece = pool->scratch + pool->scratch_used;
  pool->scratch_used += bytes;
  return piece;
}
