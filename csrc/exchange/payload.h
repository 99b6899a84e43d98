/* How an array of rows lies in a payload, and how it is cut into chunks. */
#ifndef ZMOE_PAYLOAD_H
#define ZMOE_PAYLOAD_H

#include "common/reduce.h"
#include "exchange/exchange.h"

/* A run of whole blocks of ZMOE_Q8_BLOCK elements; the last block of a row may have
 * fewer. */
typedef struct zmoe_range {
  size_t block, blocks;
  size_t element, elements;
  size_t byte, bytes;
} zmoe_range;

/* Bytes of one element; 0 for ZMOE_Q8 and for an unknown dtype. */
size_t zmoe_item_bytes(zmoe_dtype dtype);
/* Chunk `index` of `chunks`, as even as blocks go; all of it for 0 of 1.  The
 * shape must be one of which zmoe_payload_bytes knows the bytes. */
zmoe_range zmoe_chunk(zmoe_dtype dtype, uint32_t rows, uint32_t width, uint32_t chunks,
                      uint32_t index);
/* More than any chunk has of a payload of `bytes`. */
size_t zmoe_chunk_most(size_t bytes, uint32_t chunks);

/* zmoe_reduce of a range: `out` and `parts` point to its beginning. */
int zmoe_reduce_range(void *out, zmoe_dtype out_dtype, const void *const *parts, uint32_t n_parts,
                      zmoe_dtype part_dtype, uint32_t width, const zmoe_range *range, zmoe_isa isa);
/* Encodes a range of `src`, of NULL for zeros; `checksum` becomes the CRC-32C of what was
 * written, unless it is NULL. */
int zmoe_encode_range(void *out, zmoe_dtype out_dtype, const void *src, zmoe_dtype src_dtype,
                      uint32_t width, const zmoe_range *range, uint32_t *checksum, zmoe_isa isa);
/* The same for the sum of all ranks' parts, which is rounded to `part_dtype` before it is
 * converted.  A NULL part adds zeros: a sum that holds one is never -0. */
int zmoe_sum_range(void *out, zmoe_dtype out_dtype, const void *const *parts, uint32_t n_parts,
                   zmoe_dtype part_dtype, uint32_t width, const zmoe_range *range, zmoe_isa isa);

#endif
