/* A node's threads.
 *
 * A decode step makes hundreds of calls of a few microseconds each, so threads
 * spin for a while before they sleep on a condition variable, and whoever has
 * what they wait for wakes them only when some sleep. */
#include "common/platform.h"

#include "team.h"

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

struct zmoe_team {
  uint32_t threads, spin_us;
  pid_t owner; /* a forked child has none of its threads */
  zmoe_isa isa;
  pthread_t *helpers;
  struct helper *starts;
  unsigned char *scratch;
  size_t scratch_bytes, scratch_used;
  uint64_t products_ns;

  zmoe_team_fn *fn;
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
  zmoe_team *team;
  uint32_t thread;
  int32_t core;
};

/* ---- waiting ---------------------------------------------------------------
 * A wait spins for `spin_us` and then sleeps, be it for the next call, at a
 * barrier or for a call's end: whoever it waits for may be long, or without a core. */

/* Whether `word` became `wanted` within the time to spin. */
static int spin_until(const zmoe_team *team, const _Atomic uint32_t *word, uint32_t wanted) {
  uint64_t sleep_us = 0, yield_us = 0;
  for (uint32_t spins = 1; atomic_load_explicit(word, memory_order_acquire) != wanted; spins++) {
    RELAX();
    if (spins % SPINS_PER_CLOCK != 0)
      continue;
    uint64_t now_us = zmoe_now_us();
    if (sleep_us == 0) {
      sleep_us = zmoe_later_us(now_us, team->spin_us);
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
static void wait_until(zmoe_team *team, const _Atomic uint32_t *word, uint32_t wanted) {
  if (spin_until(team, word, wanted))
    return;
  pthread_mutex_lock(&team->mutex);
  atomic_fetch_add(&team->sleepers, 1);
  while (atomic_load(word) != wanted)
    pthread_cond_wait(&team->wake, &team->mutex);
  atomic_fetch_sub(&team->sleepers, 1);
  pthread_mutex_unlock(&team->mutex);
}

/* After a change of a word.  Both that change and a sleeper's count of itself come
 * before a look at the other, all sequentially consistent: one of the two is seen.  Both
 * are read-modify-writes, because QEMU on x86 lets a plain store pass a later load. */
static void wake_sleepers(zmoe_team *team) {
  if (atomic_load(&team->sleepers) == 0)
    return;
  pthread_mutex_lock(&team->mutex);
  pthread_cond_broadcast(&team->wake);
  pthread_mutex_unlock(&team->mutex);
}

static void publish_call(zmoe_team *team) {
  atomic_fetch_add(&team->call, 1);
  wake_sleepers(team);
}

void zmoe_team_barrier(zmoe_team *team) {
  if (team->threads == 1)
    return;
  uint32_t phase = atomic_load_explicit(&team->phase, memory_order_acquire);
  if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->threads - 1) {
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_fetch_add(&team->phase, 1);
    wake_sleepers(team);
    return;
  }
  wait_until(team, &team->phase, phase + 1);
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
  zmoe_team *team = self->team;
  stay_on(self->core);
  for (uint32_t last = 0;; last++) {
    wait_until(team, &team->call, last + 1);
    if (team->ended)
      return NULL;
    team->fn(team, team->job, self->thread);
    if (atomic_fetch_sub(&team->running, 1) == 1)
      wake_sleepers(team);
  }
}

void zmoe_team_run(zmoe_team *team, zmoe_team_fn *fn, void *job) {
  if (team->threads == 1) {
    fn(team, job, 0);
    return;
  }
  team->fn = fn;
  team->job = job;
  atomic_store(&team->running, team->threads - 1);
  publish_call(team);
  fn(team, job, 0);
  wait_until(team, &team->running, 0);
}

void zmoe_team_multiply(zmoe_team *team, zmoe_team_fn *fn, void *job) {
  uint64_t start = zmoe_now_ns();
  zmoe_team_run(team, fn, job);
  team->products_ns += zmoe_now_ns() - start;
}

uint64_t zmoe_team_products_ns(const zmoe_team *team) {
  return team->products_ns;
}

uint32_t zmoe_team_threads(const zmoe_team *team) {
  return team->threads;
}

zmoe_isa zmoe_team_isa(const zmoe_team *team) {
  return team->isa;
}

/* ---- life ------------------------------------------------------------------ */

static void end_helpers(zmoe_team *team, uint32_t started) {
  team->ended = 1;
  publish_call(team);
  for (uint32_t i = 0; i < started; i++)
    pthread_join(team->helpers[i], NULL);
}

static int start_helpers(zmoe_team *team, const int32_t *cores) {
  for (uint32_t i = 0; i + 1 < team->threads; i++) {
    team->starts[i] = (struct helper){team, i + 1, cores != NULL ? cores[i + 1] : -1};
    if (pthread_create(&team->helpers[i], NULL, help, &team->starts[i]) != 0) {
      end_helpers(team, i);
      return ZMOE_ENOMEM;
    }
  }
  return ZMOE_OK;
}

static void free_team(zmoe_team *team) {
  pthread_cond_destroy(&team->wake);
  pthread_mutex_destroy(&team->mutex);
  free(team->helpers);
  free(team->starts);
  free(team->scratch);
  free(team);
}

int zmoe_team_create(uint32_t threads, const int32_t *cores, uint32_t spin_us, zmoe_isa isa,
                     zmoe_team **out) {
  *out = NULL;
  if (threads < 1 || threads > ZMOE_MAX_THREADS || !zmoe_isa_supported(isa))
    return ZMOE_EINVAL;
  zmoe_team *team = aligned_alloc(ALIGNMENT, zmoe_round_up(sizeof *team, ALIGNMENT));
  if (team == NULL)
    return ZMOE_ENOMEM;
  *team = (zmoe_team){.threads = threads, .spin_us = spin_us, .owner = getpid(), .isa = isa};
  pthread_mutex_init(&team->mutex, NULL);
  pthread_cond_init(&team->wake, NULL);
  team->helpers = calloc(threads, sizeof *team->helpers);
  team->starts = calloc(threads, sizeof *team->starts);
  int status = ZMOE_ENOMEM;
  if (team->helpers != NULL && team->starts != NULL)
    status = start_helpers(team, cores);
  if (status != ZMOE_OK) {
    free_team(team);
    return status;
  }
  *out = team;
  return ZMOE_OK;
}

void zmoe_team_destroy(zmoe_team *team) {
  if (team == NULL || team->owner != getpid())
    return;
  end_helpers(team, team->threads - 1);
  free_team(team);
}

/* ---- working memory -------------------------------------------------------- */

int zmoe_team_reserve(zmoe_team *team, size_t bytes) {
  bytes += (size_t)team->threads * ZMOE_THREAD_SCRATCH + ZMOE_CALL_SCRATCH;
  bytes = zmoe_round_up(bytes, ALIGNMENT);
  if (bytes <= team->scratch_bytes)
    return ZMOE_OK;
  unsigned char *scratch = aligned_alloc(ALIGNMENT, bytes);
  if (scratch == NULL)
    return ZMOE_ENOMEM;
  free(team->scratch);
  team->scratch = scratch;
  team->scratch_bytes = bytes;
  return ZMOE_OK;
}

size_t zmoe_team_mark(const zmoe_team *team) {
  return team->scratch_used;
}

void zmoe_team_release(zmoe_team *team, size_t mark) {
  team->scratch_used = mark;
}

void *zmoe_team_scratch(zmoe_team *team, size_t bytes) {
  bytes = zmoe_round_up(bytes, ALIGNMENT);
  if (bytes > team->scratch_bytes - team->scratch_used)
    return NULL;
  void *piece = team->scratch + team->scratch_used;
  team->scratch_used += bytes;
  return piece;
}
