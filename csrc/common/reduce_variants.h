/* The sum of partial outputs, once per instruction set.
 *
 * Each variant adds in f32, in the order of `parts` (n_parts >= 1, none NULL),
 * and handles the first elements, as many as fill whole vectors (whole blocks
 * where a dtype is ZMOE_Q8); it returns how many.  reduce.c does the rest with the scalar code of
 * reduce_scalar.h, which defines what every variant must produce, bit for bit. */
#ifndef ZMOE_REDUCE_VARIANTS_H
#define ZMOE_REDUCE_VARIANTS_H

#include "common/reduce.h"

typedef size_t zmoe_reduce_fn(unsigned char *out, zmoe_dtype out_dtype,
                              const unsigned char *const *parts, uint32_t n_parts,
                              zmoe_dtype part_dtype, size_t count);

zmoe_reduce_fn zmoe_reduce_avx2, zmoe_reduce_avx512, zmoe_reduce_neon;

#endif
