/* Of a routing, the pairs that are this node's to compute. */
#include "decoder.h"

#include "common/checksum.h"

#include <string.h>

/* The chosen experts of one row, ascending: their order may differ between
 * devices, the set may not. */
static void sort_ids(int32_t *ids, uint32_t count) {
  for (uint32_t i = 1; i < count; i++)
    for (uint32_t j = i; j > 0 && ids[j - 1] > ids[j]; j--) {
      int32_t other = ids[j];
      ids[j] = ids[j - 1];
      ids[j - 1] = other;
    }
}

void zmoe_own_pairs(const int32_t *ids, const float *weights, uint32_t rows, uint32_t top_k,
                    const int32_t *local, uint32_t experts, const uint64_t *ranks, uint32_t rank,
                    int32_t *sorted, zmoe_pairs *out) {
  out->count = 0;
  memcpy(sorted, ids, (size_t)rows * top_k * sizeof *ids);
  for (uint32_t r = 0; r < rows; r++) {
    for (uint32_t i = r * top_k; i < (r + 1) * top_k; i++) {
      if (ids[i] < 0 || (uint32_t)ids[i] >= experts || local[ids[i]] < 0 ||
          (ranks != NULL && !(ranks[i] >> rank & 1)))
        continue;
      out->rows[out->count] = (int32_t)r;
      out->experts[out->count] = local[ids[i]];
      out->weights[out->count++] = weights[i];
    }
    sort_ids(sorted + (size_t)r * top_k, top_k);
  }
  out->digest = zmoe_digest(sorted, (size_t)rows * top_k * sizeof *ids);
}
