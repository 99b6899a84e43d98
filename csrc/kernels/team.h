/* The inside of a team: how a call spreads over its threads. */
#ifndef ZMOE_TEAM_H
#define ZMOE_TEAM_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "../compute.h"

/* Work that every thread of a team runs once, `thread` counting from 0. */
typedef void zmoe_team_fn(zmoe_team *team, void *job, uint32_t thread);

/* Runs `fn` on all threads and returns when all have; the caller is one of them. */
void zmoe_team_run(zmoe_team *team, zmoe_team_fn *fn, void *job);
/* The same, for a product: its time counts as such. */
void zmoe_team_multiply(zmoe_team *team, zmoe_team_fn *fn, void *job);
/* Within such work: wait until every thread has come here. */
void zmoe_team_barrier(zmoe_team *team);
uint32_t zmoe_team_threads(const zmoe_team *team);
zmoe_isa zmoe_team_isa(const zmoe_team *team);

/* The working memory of the running call, handed out piece by piece; 64-byte
 * aligned.  NULL when it is used up: the caller returns ZMOE_ENOMEM.  A call
 * marks where it begins and releases what it took before it returns. */
size_t zmoe_team_mark(const zmoe_team *team);
void zmoe_team_release(zmoe_team *team, size_t mark);
void *zmoe_team_scratch(zmoe_team *team, size_t bytes);

/* What zmoe_team_reserve adds by itself: of each thread's own, and lists. */
enum { ZMOE_THREAD_SCRATCH = 128 << 10, ZMOE_CALL_SCRATCH = 256 << 10 };

/* Tasks 0..n-1 of one stage, taken by whichever thread is free. */
typedef struct zmoe_tasks {
  _Alignas(64) _Atomic uint32_t next;
} zmoe_tasks;

static inline uint32_t zmoe_take(zmoe_tasks *tasks) {
  return atomic_fetch_add_explicit(&tasks->next, 1, memory_order_relaxed);
}

static inline size_t zmoe_round_up(size_t value, size_t unit) {
  return (value + unit - 1) / unit * unit;
}

#endif
