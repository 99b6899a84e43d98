/* zmoe: which owner computes which selected expert.
 *
 * Integers alone, and nothing but the arguments: every node that has the same
 * routing and the same owners comes to the same assignment without talking.
 */
#ifndef ZMOE_ASSIGN_H
#define ZMOE_ASSIGN_H

#include "exchange/exchange.h"

/* Who holds the experts of a layer. A rank holds the same slice of each of its
 * experts; ranks with an expert and a slice in common are replicas. */
typedef struct zmoe_owners {
  uint32_t nodes; /* at most ZMOE_MAX_NODES */
  uint32_t experts, slices;
  const uint64_t *of_expert; /* (experts): bit r for rank r */
  const uint64_t *of_slice;  /* (slices): the same; every rank is in one */
  const uint32_t *speeds;    /* (nodes): relative, at least 1 */
} zmoe_owners;

/* Give every pair (row, chosen expert), slice by slice, to one of the expert's owners.
 *
 * A row's pairs go where that row alone would have the busiest node done first, experts
 * divided by speed: whatever rows are beside it, the same ranks add to its sum.
 *
 * ids (rows, top_k): the chosen experts; those outside [0, experts) are nobody's.
 * ranks (rows, top_k): bit r where rank r computes the pair; counts (nodes) = how many
 * experts each rank computes in all.  `scratch`: zmoe_assign_scratch bytes, aligned to 8. */
void zmoe_assign(const zmoe_owners *owners, const int32_t *ids, uint32_t rows, uint32_t top_k,
                 void *scratch, uint64_t *ranks, uint32_t *counts);
size_t zmoe_assign_scratch(const zmoe_owners *owners, uint32_t top_k);

#endif
