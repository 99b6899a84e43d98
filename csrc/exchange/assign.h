/* zmoe: which owner computes which selected expert.
 *
 * Integers alone, and nothing but the arguments: every node that has the same
 * routing and the same owners comes to the same assignment without talking.
 */
#ifndef ZMOE_ASSIGN_H
#define ZMOE_ASSIGN_H

#include "exchange/exchange.h"

/* What reading an expert's weights takes, in the time of one row. */
#define ZMOE_LOAD_ROWS 8

/* Who holds the experts of a layer. A rank holds the same slice of each of its
 * experts; ranks with an expert and a slice in common are replicas. */
typedef struct zmoe_owners {
  uint32_t nodes; /* at most ZMOE_MAX_NODES */
  uint32_t experts, slices;
  const uint64_t *of_expert; /* (experts): bit r for rank r */
  const uint64_t *of_slice;  /* (slices): the same; every rank is in one */
  const uint32_t *speeds;    /* (nodes): relative, at least 1 */
} zmoe_owners;

/* Give every selected (expert, slice) to one of its owners, all its rows together.
 *
 * ids (rows, top_k): the selected experts; those outside [0, experts) are nobody's.
 * ranks (slices, experts) = who computes it, -1 where nobody does; counts (nodes) =
 * how many each rank computes. With (ZMOE_LOAD_ROWS + rows) / speed for the time of
 * each, the busiest node's time is the least possible where all have as many rows;
 * else it is near (greedy, then improved by chains of moves as long as any helps, up
 * to nodes * tasks of them). `scratch`: zmoe_assign_scratch bytes, aligned to 8. */
void zmoe_assign(const zmoe_owners *owners, const int32_t *ids, uint32_t rows, uint32_t top_k,
                 void *scratch, int32_t *ranks, uint32_t *counts);
size_t zmoe_assign_scratch(const zmoe_owners *owners);

#endif
