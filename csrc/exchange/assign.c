/* Tasks of one slice are shared out among the ranks that hold it: the longest first,
 * each to the node that would be done first. Then, as long as it helps, a chain of
 * moves takes a task off a busiest node: one task from each node of the chain to the
 * next, so that all of them end before the busiest did. Where all tasks are alike, no
 * such chain means that no assignment is better: the nodes that the busiest can reach
 * are all as full as its time allows, and their tasks can go nowhere else. A place in
 * a node's queue that such a move empties is never filled again, so there are at most
 * nodes * tasks of them. */
#include "assign.h"

#include <assert.h>
#include <string.h>

typedef struct task {
  uint64_t owners;
  uint32_t expert, cost;
  uint32_t rank;
} task;

typedef struct plan {
  task *tasks; /* the longest first */
  uint32_t n_tasks, nodes;
  const uint32_t *speeds;
  uint64_t loads[ZMOE_MAX_NODES];
} plan;

/* Whether `load` on `rank` ends before `other_load` on `other`. */
static int ends_before(const plan *p, uint64_t load, uint32_t rank, uint64_t other_load,
                       uint32_t other) {
  return load * p->speeds[other] < other_load * p->speeds[rank];
}

static uint32_t lowest(uint64_t set) {
  return (uint32_t)__builtin_ctzll(set);
}

/* ---- tasks -------------------------------------------------------------------- */

static void count_rows(const int32_t *ids, size_t count, uint32_t *rows_of, uint32_t experts) {
  memset(rows_of, 0, experts * sizeof *rows_of);
  for (size_t i = 0; i < count; i++)
    if (ids[i] >= 0 && (uint32_t)ids[i] < experts)
      rows_of[ids[i]]++;
}

/* The longest first, then by expert. */
static void sort_tasks(task *tasks, uint32_t count) {
  uint32_t gap = 1;
  while (gap < count / 3)
    gap = 3 * gap + 1;
  for (; gap > 0; gap /= 3)
    for (uint32_t i = gap; i < count; i++) {
      task moved = tasks[i];
      uint32_t j = i;
      for (; j >= gap; j -= gap) {
        const task *before = &tasks[j - gap];
        if (before->cost > moved.cost ||
            (before->cost == moved.cost && before->expert < moved.expert))
          break;
        tasks[j] = *before;
      }
      tasks[j] = moved;
    }
}

static void list_tasks(const zmoe_owners *owners, uint64_t of_slice, const uint32_t *rows_of,
                       plan *p) {
  p->n_tasks = 0;
  for (uint32_t e = 0; e < owners->experts; e++) {
    uint64_t able = owners->of_expert[e] & of_slice;
    if (rows_of[e] > 0 && able != 0)
      p->tasks[p->n_tasks++] = (task){able, e, ZMOE_LOAD_ROWS + rows_of[e], 0};
  }
  sort_tasks(p->tasks, p->n_tasks);
}

static void give(plan *p, task *t, uint32_t rank) {
  t->rank = rank;
  p->loads[rank] += t->cost;
}

static void share_out(plan *p) {
  memset(p->loads, 0, sizeof p->loads);
  for (task *t = p->tasks; t < p->tasks + p->n_tasks; t++) {
    uint32_t best = lowest(t->owners);
    for (uint64_t rest = t->owners & (t->owners - 1); rest != 0; rest &= rest - 1) {
      uint32_t rank = lowest(rest);
      if (ends_before(p, p->loads[rank] + t->cost, rank, p->loads[best] + t->cost, best))
        best = rank;
    }
    give(p, t, best);
  }
}

/* ---- improvement ---------------------------------------------------------------- */

/* Chains from `busiest`: `moved[rank]` is the task by which each was reached first. */
typedef struct search {
  uint32_t busiest;
  uint64_t reached;
  task *moved[ZMOE_MAX_NODES];
  uint32_t queue[ZMOE_MAX_NODES];
  uint32_t head, tail;
} search;

/* Move every task of the chain that ends with `last` on `rank`. */
static void move_chain(plan *p, search *s, task *last, uint32_t rank) {
  for (task *t = last;;) {
    uint32_t from = t->rank;
    p->loads[from] -= t->cost;
    give(p, t, rank);
    if (from == s->busiest)
      return;
    t = s->moved[from], rank = from;
  }
}

/* The task of the chain to `rank` that leaves the busiest node. */
static const task *first_of(const search *s, uint32_t rank) {
  while (s->moved[rank]->rank != s->busiest)
    rank = s->moved[rank]->rank;
  return s->moved[rank];
}

/* The nodes of the chain to `rank`. */
static uint64_t chain_to(const search *s, uint32_t rank) {
  uint64_t nodes = 1ull << rank;
  for (; rank != s->busiest; nodes |= 1ull << rank)
    rank = s->moved[rank]->rank;
  return nodes;
}

/* Follow `t` to its other owners; 1 once a chain has been moved. */
static int follow(plan *p, search *s, task *t) {
  uint64_t limit = p->loads[s->busiest];
  for (uint64_t rest = t->owners & ~chain_to(s, t->rank); rest != 0; rest &= rest - 1) {
    uint32_t to = lowest(rest);
    if (ends_before(p, p->loads[to] + t->cost, to, limit, s->busiest)) {
      move_chain(p, s, t, to);
      return 1;
    }
    if (s->reached >> to & 1)
      continue;
    s->reached |= 1ull << to;
    s->moved[to] = t;
    s->queue[s->tail++] = to;
  }
  /* An exchange for a shorter one. */
  if (t->rank != s->busiest && (t->owners >> s->busiest & 1) &&
      t->cost < first_of(s, t->rank)->cost) {
    move_chain(p, s, t, s->busiest);
    return 1;
  }
  return 0;
}

static int relieve(plan *p, uint32_t busiest) {
  search s = {.busiest = busiest, .reached = 1ull << busiest, .tail = 1};
  s.queue[0] = busiest;
  while (s.head < s.tail) {
    uint32_t rank = s.queue[s.head++];
    uint64_t load = p->loads[rank] + (rank == busiest ? 0 : s.moved[rank]->cost);
    for (task *t = p->tasks + p->n_tasks; t-- > p->tasks;) /* the shortest first */
      if (t->rank == rank &&
          (rank == busiest || ends_before(p, load - t->cost, rank, p->loads[busiest], busiest)) &&
          follow(p, &s, t))
        return 1;
  }
  return 0;
}

/* Relieve one of the nodes that end last; 0 when none can be. */
static int improve(plan *p) {
  uint32_t last = 0;
  for (uint32_t rank = 1; rank < p->nodes; rank++)
    if (ends_before(p, p->loads[last], last, p->loads[rank], rank))
      last = rank;
  for (uint32_t rank = last; rank < p->nodes; rank++)
    if (!ends_before(p, p->loads[rank], rank, p->loads[last], last) && relieve(p, rank))
      return 1;
  return 0;
}

static int have_choice(const plan *p) {
  for (uint32_t i = 0; i < p->n_tasks; i++)
    if (p->tasks[i].owners & (p->tasks[i].owners - 1))
      return 1;
  return 0;
}

/* ---- all slices ------------------------------------------------------------------- */

size_t zmoe_assign_scratch(const zmoe_owners *owners) {
  return owners->experts * (sizeof(task) + sizeof(uint32_t));
}

void zmoe_assign(const zmoe_owners *owners, const int32_t *ids, uint32_t rows, uint32_t top_k,
                 void *scratch, int32_t *ranks, uint32_t *counts) {
  assert(owners->nodes > 0 && owners->nodes <= ZMOE_MAX_NODES);
  plan p = {.tasks = scratch, .nodes = owners->nodes, .speeds = owners->speeds};
  uint32_t *rows_of = (uint32_t *)(void *)(p.tasks + owners->experts);
  count_rows(ids, (size_t)rows * top_k, rows_of, owners->experts);
  memset(counts, 0, owners->nodes * sizeof *counts);
  for (uint32_t s = 0; s < owners->slices; s++, ranks += owners->experts) {
    memset(ranks, -1, owners->experts * sizeof *ranks);
    list_tasks(owners, owners->of_slice[s], rows_of, &p);
    share_out(&p);
    if (have_choice(&p))
      for (uint32_t i = 0; i < p.n_tasks * p.nodes && improve(&p); i++)
        ;
    for (uint32_t i = 0; i < p.n_tasks; i++) {
      ranks[p.tasks[i].expert] = (int32_t)p.tasks[i].rank;
      counts[p.tasks[i].rank]++;
    }
  }
}
