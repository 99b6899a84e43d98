/* Conversions and sums, bit-identical with every instruction set. */
#ifndef ZMOE_REDUCE_H
#define ZMOE_REDUCE_H

#include "common/dtype.h"
#include "common/isa.h"

#define ZMOE_MAX_NODES 64 /* and so the most parts of a sum */

/* dst[i] = convert(src[i]), round to nearest even, NaN kept as NaN.  In ZMOE_Q8 a
 * NaN or an infinity makes a NaN of its whole block.  `count` elements are one row,
 * or rows of whole blocks. */
int zmoe_convert(void *dst, zmoe_dtype dst_dtype, const void *src, zmoe_dtype src_dtype,
                 size_t count, zmoe_isa isa);

/* out[i] = ((parts[0][i] + parts[1][i]) + ...), accumulated in f32 in the order
 * given, then converted as above.  A NULL part counts as zeros and is skipped; with
 * every part NULL the result is zeros.  `out` may not alias a part. */
int zmoe_reduce(void *out, zmoe_dtype out_dtype, const void *const *parts, uint32_t n_parts,
                zmoe_dtype part_dtype, size_t count, zmoe_isa isa);

#endif
