/* Instruction sets: which variant of a function runs. */
#ifndef ZMOE_ISA_H
#define ZMOE_ISA_H

typedef enum zmoe_isa {
  ZMOE_ISA_GENERIC = 0,
  ZMOE_ISA_AVX2 = 1,
  ZMOE_ISA_AVX512 = 2,
  ZMOE_ISA_NEON = 3,
  /* Further steps for products alone; the sums of reduce know no difference. */
  ZMOE_ISA_AVX512_BF16 = 4, /* and VNNI */
  ZMOE_ISA_NEON_DOT = 5,    /* dotprod */
  ZMOE_ISA_NEON_BF16 = 6,   /* and bf16, i8mm */
} zmoe_isa;

zmoe_isa zmoe_isa_best(void);            /* the best this CPU can run */
int zmoe_isa_supported(zmoe_isa isa);    /* 1 when it can run here */
const char *zmoe_isa_name(zmoe_isa isa); /* "generic", "avx2", ... */

#endif
