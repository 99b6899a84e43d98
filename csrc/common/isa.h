/* The instruction sets: which variant of a function runs. */
#ifndef ZMOE_ISA_H
#define ZMOE_ISA_H

#include <stddef.h>

typedef enum zmoe_isa {
  ZMOE_ISA_GENERIC = 0,
  ZMOE_ISA_AVX2 = 1,
  ZMOE_ISA_AVX512 = 2,
  ZMOE_ISA_NEON = 3,
  /* Further steps for products alone; the sums of reduce know no difference. */
  ZMOE_ISA_AVX512_BF16 = 4, /* and VNNI, VBMI */
  ZMOE_ISA_NEON_DOT = 5,    /* dotprod */
  ZMOE_ISA_NEON_BF16 = 6,   /* and bf16, i8mm */
  ZMOE_ISA_AVX_VNNI = 7,    /* AVX2 and VNNI */
  ZMOE_ISA_AVX512_VNNI = 8, /* AVX-512 and VNNI */
} zmoe_isa;

#define ZMOE_ISAS 9

zmoe_isa zmoe_isa_best(void);             /* the best this CPU can run */
int zmoe_isa_supported(zmoe_isa isa);     /* 1 when it can run here */
const char *zmoe_isa_name(zmoe_isa isa);  /* "generic", "avx2", ... */
zmoe_isa zmoe_isa_included(zmoe_isa isa); /* the next lower one: what runs `isa` runs it too */

/* The entry of `isa` in a table of ZMOE_ISAS variants, or that of the nearest set it includes. */
#define ZMOE_VARIANT(table, isa)                                                                   \
  ({                                                                                               \
    zmoe_isa nearest = (isa);                                                                      \
    while ((table)[nearest] == NULL && nearest != ZMOE_ISA_GENERIC)                                \
      nearest = zmoe_isa_included(nearest);                                                        \
    (table)[nearest];                                                                              \
  })

#endif
