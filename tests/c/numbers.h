/* Random numbers, the instruction sets of this machine, and comparisons, for the
 * tests of what computes. */
#ifndef ZMOE_NUMBERS_H
#define ZMOE_NUMBERS_H

#include "check.h"

#include <math.h>
#include <string.h>

#include "kernels/decoder.h"

static uint32_t random_state = 12345;

static inline uint32_t next_random(void) {
  random_state ^= random_state << 13, random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

static inline float random_float(float size) {
  return ((float)(next_random() >> 8) * 0x1p-23f - 1.0f) * size;
}

/* `count` new floats in [-size, size); free them. */
static inline float *random_floats(size_t count, float size) {
  float *x = malloc((count + 1) * sizeof *x);
  for (size_t i = 0; i < count; i++)
    x[i] = random_float(size);
  return x;
}

/* What rounding to `dtype` leaves of x. */
static inline float rounded(float x, zmoe_dtype dtype) {
  unsigned char half[4];
  CHECK_EQUAL(zmoe_convert(half, dtype, &x, ZMOE_F32, 1, ZMOE_ISA_GENERIC), ZMOE_OK);
  CHECK_EQUAL(zmoe_convert(&x, ZMOE_F32, half, dtype, 1, ZMOE_ISA_GENERIC), ZMOE_OK);
  return x;
}

static const zmoe_isa ALL_ISAS[] = {ZMOE_ISA_GENERIC,     ZMOE_ISA_AVX2,     ZMOE_ISA_AVX512,
                                    ZMOE_ISA_AVX512_BF16, ZMOE_ISA_NEON,     ZMOE_ISA_NEON_DOT,
                                    ZMOE_ISA_NEON_BF16,   ZMOE_ISA_AVX_VNNI, ZMOE_ISA_AVX512_VNNI};
enum { N_ISAS = sizeof ALL_ISAS / sizeof *ALL_ISAS };

/* A thread pool of its own with room for `bytes`. */
static inline zmoe_thread_pool *make_pool(uint32_t threads, zmoe_isa isa, size_t bytes) {
  zmoe_thread_pool *pool;
  CHECK_EQUAL(zmoe_thread_pool_create(threads, NULL, 50, isa, &pool), ZMOE_OK);
  CHECK_EQUAL(zmoe_thread_pool_reserve(pool, bytes), ZMOE_OK);
  return pool;
}

/* max |a - b| over max |b|; infinity where one is NaN. */
static inline double distance(const float *a, const double *b, size_t count) {
  double worst = 0, largest = 1e-30;
  for (size_t i = 0; i < count; i++) {
    double error = fabs(a[i] - b[i]);
    worst = error <= worst ? worst : isnan(error) ? INFINITY : error;
    largest = fabs(b[i]) > largest ? fabs(b[i]) : largest;
  }
  return worst / largest;
}

#endif
