/* The experts that one row has chosen are tasks, for each slice of them. They are shared out
 * among the ranks that hold it: in the order of their ids, each to the node that would be done
 * first. Then, as long as it helps, a chain of moves takes a task off a busiest node: one task
 * from each node of the chain to the next, so that all of them end before the busiest did. That
 * no such chain is left means that no assignment is better: the nodes that the busiest can reach
 * are all as full as its time allows, and their tasks can go nowhere else. A place in a node's
 * queue that such a move empties is never filled again, so there are at most nodes * tasks of
 * them. */
#include "assign.h"

#include <assert.h>
#include <string.h>

typedef struct task {
  uint64_t owners;
  uint32_t choice; /* of the row's, where this expert comes first */
  uint32_t rank;
} task;

typedef struct plan {
  task *tasks; /* by expert */
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

/* Sorts the places of a row's choices by expert; returns how many are experts at all. */
static uint32_t sort_choices(const int32_t *ids, uint32_t top_k, uint32_t experts,
                             uint32_t *choices) {
  uint32_t count = 0;
  for (uint32_t k = 0; k < top_k; k++) {
    if (ids[k] < 0 || (uint32_t)ids[k] >= experts)
      continue;
    uint32_t at = count++;
    for (; at > 0 && ids[choices[at - 1]] > ids[k]; at--)
      choices[at] = choices[at - 1];
    choices[at] = k;
  }
  return count;
}

static void list_tasks(const zmoe_owners *owners, uint64_t of_slice, const int32_t *ids,
                       const uint32_t *choices, uint32_t count, plan *p) {
  p->n_tasks = 0;
  for (uint32_t i = 0; i < count; i++) {
    uint64_t able = owners->of_expert[ids[choices[i]]] & of_slice;
    int again = i > 0 && ids[choices[i - 1]] == ids[choices[i]];
    if (able != 0 && !again)
      p->tasks[p->n_tasks++] = (task){able, choices[i], 0};
  }
}

static void give(plan *p, task *t, uint32_t rank) {
  t->rank = rank;
  p->loads[rank]++;
}

static void share_out(plan *p) {
  memset(p->loads, 0, p->nodes * sizeof *p->loads);
  for (task *t = p->tasks; t < p->tasks + p->n_tasks; t++) {
    uint32_t best = lowest(t->owners);
    for (uint64_t rest = t->owners & (t->owners - 1); rest != 0; rest &= rest - 1) {
      uint32_t rank = lowest(rest);
      if (ends_before(p, p->loads[rank] + 1, rank, p->loads[best] + 1, best))
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
    p->loads[from]--;
    give(p, t, rank);
    if (from == s->busiest)
      return;
    t = s->moved[from], rank = from;
  }
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
    if (ends_before(p, p->loads[to] + 1, to, limit, s->busiest)) {
      move_chain(p, s, t, to);
      return 1;
    }
    if (s->reached >> to & 1)
      continue;
    s->reached |= 1ull << to;
    s->moved[to] = t;
    s->queue[s->tail++] = to;
  }
  return 0;
}

static int relieve(plan *p, uint32_t busiest) {
  search s = {.busiest = busiest, .reached = 1ull << busiest, .tail = 1};
  s.queue[0] = busiest;
  while (s.head < s.tail) {
    uint32_t rank = s.queue[s.head++];
    /* One task in and one out: no better where that node is as busy. */
    if (rank != busiest && !ends_before(p, p->loads[rank], rank, p->loads[busiest], busiest))
      continue;
    for (task *t = p->tasks + p->n_tasks; t-- > p->tasks;)
      if (t->rank == rank && follow(p, &s, t))
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

/* ---- all slices of all rows --------------------------------------------------------- */

size_t zmoe_assign_scratch(const zmoe_owners *owners, uint32_t top_k) {
  return owners->experts * sizeof(uint64_t) + top_k * (sizeof(task) + sizeof(uint32_t));
}

void zmoe_assign(const zmoe_owners *owners, const int32_t *ids, uint32_t rows, uint32_t top_k,
                 void *scratch, uint64_t *ranks, uint32_t *counts) {
  assert(owners->nodes > 0 && owners->nodes <= ZMOE_MAX_NODES);
  uint64_t *doers = scratch; /* by expert, of all rows so far */
  plan p = {.nodes = owners->nodes, .speeds = owners->speeds};
  p.tasks = (task *)(void *)(doers + owners->experts);
  uint32_t *choices = (uint32_t *)(void *)(p.tasks + top_k);
  memset(doers, 0, owners->experts * sizeof *doers);
  memset(counts, 0, owners->nodes * sizeof *counts);
  memset(ranks, 0, (size_t)rows * top_k * sizeof *ranks);
  for (uint32_t r = 0; r < rows; r++, ids += top_k, ranks += top_k) {
    uint32_t count = sort_choices(ids, top_k, owners->experts, choices);
    for (uint32_t s = 0; s < owners->slices; s++) {
      list_tasks(owners, owners->of_slice[s], ids, choices, count, &p);
      share_out(&p);
      if (have_choice(&p))
        for (uint32_t i = 0; i < p.n_tasks * p.nodes && improve(&p); i++)
          ;
      for (uint32_t i = 0; i < p.n_tasks; i++)
        ranks[p.tasks[i].choice] |= 1ull << p.tasks[i].rank;
    }
    for (uint32_t i = 0; i < count; i++) {
      int again = i > 0 && ids[choices[i - 1]] == ids[choices[i]];
      if (again)
        ranks[choices[i]] = ranks[choices[i - 1]];
      uint64_t *known = &doers[ids[choices[i]]];
      for (uint64_t more = ranks[choices[i]] & ~*known; more != 0; more &= more - 1)
        counts[lowest(more)]++;
      *known |= ranks[choices[i]];
    }
  }
}
