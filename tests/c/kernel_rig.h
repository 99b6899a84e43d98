/* Weights of every format in memory of exactly their size, and products in
 * double precision, with bounds on what kernels may differ from them. */
#ifndef ZMOE_KERNEL_RIG_H
#define ZMOE_KERNEL_RIG_H

#include "numbers.h"

/* ---- how much --------------------------------------------------------------------
 * A test's argument, if it is a number: one of so many cases is enough. */

void rig_start(int argc, char **argv);
int rig_skips(uint32_t n); /* the n-th case */
/* Whether this CPU has `isa`, and there is time for it: where not all cases are run, plain C is
 * left to those who run all. */
int rig_runs(zmoe_isa isa);

/* ---- memory -------------------------------------------------------------------
 * Blocks end where what they hold ends, so that AddressSanitizer sees a read past
 * it.  It does not see masked vector loads: guarded blocks end before a page
 * that nobody may touch. */

void *rig_block(size_t bytes, uint32_t offset, int guarded); /* `offset` bytes off alignment */
void rig_free_blocks(void);                                  /* all of them */

/* ---- weights ------------------------------------------------------------------- */

typedef struct weight_kind {
  uint32_t format, bits, group;
} weight_kind;

enum { N_KINDS = 3 + 7 * 3 + 3 };
extern const weight_kind RIG_KINDS[N_KINDS];

typedef struct weight_options {
  uint32_t scale_dtype, bias_dtype;
  int bias; /* has one */
  uint32_t offset;
  int guarded;
} weight_options;

/* Random numbers, most of them below 2; in blocks of the rig. */
zmoe_weight rig_weight(weight_kind kind, uint32_t out_features, uint32_t in_features,
                       weight_options options);
const char *rig_kind_name(weight_kind kind);
/* `count` numbers in [-size, size), now and then 0 or 16 times as large, in `dtype`. */
void *rig_inputs(size_t count, float size, zmoe_dtype dtype, uint32_t offset, int guarded);
double rig_load(const void *data, size_t i, zmoe_dtype dtype);

/* ---- products in double --------------------------------------------------------- */

typedef struct expected {
  double value;
  double error;      /* how far f32 may be from it */
  double int8_error; /* and what x in 8 bits adds */
  double spread;     /* root of the sum of squares of all terms */
} expected;

/* What one output is for x (w->in_features): with an error of its own, or NULL. */
expected rig_expect(const zmoe_weight *w, uint32_t row, const double *x, const double *x_error);
/* The rounding of `value` to `dtype`. */
double rig_rounding(double value, zmoe_dtype dtype);
/* Whether `actual` is within `error` of it, or as infinite or NaN as it is. */
int rig_agrees(double actual, double value, double error);

#endif
