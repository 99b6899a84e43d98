/* The inside of a thread pool: how a call spreads over its threads. */
#ifndef ZMOE_THREAD_POOL_H
#define ZMOE_THREAD_POOL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "compute.h"

/* Work that every thread of a thread pool runs once, `thread` counting from 0. */
typedef void zmoe_thread_fn(zmoe_thread_pool *pool, void *job, uint32_t thread);

/* Runs `fn` on all threads and returns when all have; the caller is one of them. */
void zmoe_thread_pool_run(zmoe_thread_pool *pool, zmoe_thread_fn *fn, void *job);
/* The same, for a matmul: its time counts as such. */
void zmoe_thread_pool_run_matmul(zmoe_thread_pool *pool, zmoe_thread_fn *fn, void *job);
/* Within such work: wait until every thread has come here. */
void zmoe_thread_pool_barrier(zmoe_thread_pool *pool);
uint32_t zmoe_thread_pool_threads(const zmoe_thread_pool *pool);
zmoe_isa zmoe_thread_pool_isa(const zmoe_thread_pool *pool);

/* The working memory of the running call, handed out piece by piece; 64-byte
 * aligned.  NULL when it is used up: the caller returns ZMOE_ENOMEM.  A call
 * marks where it begins and releases what it took before it returns. */
size_t zmoe_thread_pool_mark(const zmoe_thread_pool *pool);
void zmoe_thread_pool_release(zmoe_thread_pool *pool, size_t mark);
void *zmoe_thread_pool_scratch(zmoe_thread_pool *pool, size_t bytes);

/* What zmoe_thread_pool_reserve adds by itself: of each thread's own, and lists. */
enum { ZMOE_THREAD_SCRATCH = 160 << 10, ZMOE_CALL_SCRATCH = 256 << 10 };

/* Tasks 0..n-1 of one stage, taken by whichever thread is free. */
typedef struct zmoe_tasks {
  _Alignas(64) _Atomic uint32_t next;
} zmoe_tasks;

static inline uint32_t zmoe_take(zmoe_tasks *tasks) {
  return atomic_fetch_add_explicit(&tasks->next, 1, memory_order_relaxed);
}

/* The same in runs of neighbours, since weights that follow each other are read
 * faster: what a thread has taken and not yet done. */
typedef struct zmoe_run {
  uint32_t next, end;
} zmoe_run;

/* How many neighbours to take when `left` tasks are left: fewer towards the end, so that
 * no thread waits long for another, whatever else its core has to do. */
static inline uint32_t zmoe_run_of(uint32_t left, uint32_t threads) {
  uint32_t run = left / (4 * threads);
  return run < 1 ? 1 : run > 16 ? 16 : run;
}

static inline int zmoe_take_of_run(zmoe_tasks *tasks, uint32_t count, uint32_t threads,
                                   zmoe_run *mine, uint32_t *task) {
  if (mine->next == mine->end) {
    uint32_t begin = atomic_load_explicit(&tasks->next, memory_order_relaxed), run;
    do {
      if (begin >= count)
        return 0;
      run = zmoe_run_of(count - begin, threads);
    } while (!atomic_compare_exchange_weak_explicit(&tasks->next, &begin, begin + run,
                                                    memory_order_relaxed, memory_order_relaxed));
    mine->next = begin;
    mine->end = begin + run;
  }
  *task = mine->next++;
  return 1;
}

/* The task that it will probably give after that, or `count` for none. */
static inline uint32_t zmoe_next_of_run(zmoe_tasks *tasks, uint32_t count, const zmoe_run *mine) {
  uint32_t next = mine->next;
  if (next == mine->end)
    next = atomic_load_explicit(&tasks->next, memory_order_relaxed);
  return next < count ? next : count;
}

static inline size_t zmoe_round_up(size_t value, size_t unit) {
  return (value + unit - 1) / unit * unit;
}

#endif
