/* Element types. */
#ifndef ZMOE_DTYPE_H
#define ZMOE_DTYPE_H

#include <stddef.h>
#include <stdint.h>

typedef enum zmoe_dtype { ZMOE_F32 = 0, ZMOE_F16 = 1, ZMOE_BF16 = 2 } zmoe_dtype;

/* What may stand for a dtype between nodes: each row in blocks of 32 elements, the
 * last one padded with zeros; a block is a scale in bf16, then 32 integers of 8
 * bits.  Only reduce, wire and exchange know it. */
#define ZMOE_Q8 3
#define ZMOE_Q8_BLOCK 32
#define ZMOE_Q8_BLOCK_BYTES 34

/* 32-bit integers, whose sums wrap around, and words of any meaning, which arrive bit for bit.
 * Only reduce, wire and exchange know them. */
#define ZMOE_I32 4

/* Bytes of one element, 0 for ZMOE_Q8, which has none, for ZMOE_I32 and for an unknown dtype. */
size_t zmoe_dtype_bytes(zmoe_dtype dtype);
/* Bytes of rows x width elements; UINT64_MAX for an unknown dtype, and for more
 * than 2^32 - 1 elements. */
uint64_t zmoe_payload_bytes(zmoe_dtype dtype, uint32_t rows, uint32_t width);

#endif
