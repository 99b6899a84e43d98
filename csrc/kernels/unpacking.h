/* How vectors of codes come out of a stream of bits, for f32_body.h.  Include after vec.h. */
#ifndef ZMOE_UNPACKING_H
#define ZMOE_UNPACKING_H

#include "kernels.h"

/* Registers whose sums f32_body.h keeps apart, and the elements in all of them. */
enum { CHAINS = LANES == 16 ? 2 : 4, VALUES = CHAINS * LANES };

/* For codes of 2, 3, 5 or 6 bits: the two bytes of each code's word, which widen_packed shuffles
 * there (the others become zero), by how much that is shifted to the right, and what of it is the
 * code. */
struct unpacking {
  uint32_t bits;
  int32_t mask;
  uint8_t bytes[VALUES][4];
  int32_t shifts[VALUES];
};

/* Bytes of VALUES codes. */
KERNEL uint32_t packed_bytes(uint32_t bits) {
  return VALUES * bits / 8;
}

/* What gemv_body.h multiplies as integers: the layout of x, and the weight's format. */
typedef struct form {
  zmoe_layout layout;
  uint32_t format, bits;
  int short_groups; /* of CODES8_INT22: a group has 32 codes */
} form;

#endif
