/* exp and the logistic function, written for the compiler to vectorise.  Before
 * including this, define TARGET, the attribute of functions that use them.
 *
 * Sums and products are rounded one by one (no contraction), so that every
 * instruction set gets the same bits.  exp is Cephes' (S. Moshier): a power of two times a
 * polynomial, within two units of the last place, infinity and NaN as the function has them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE float exp_of(float x) {
  float clamped = x > 88.0f ? 88.0f : x;
  clamped = clamped < -87.0f ? -87.0f : clamped;
  float whole = clamped * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
  int32_t bits;
  memcpy(&bits, &whole, sizeof bits);
  float n = whole - 12582912.0f;
  float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t power = (int32_t)((uint32_t)(bits + 127) << 23);
  float scale;
  memcpy(&scale, &power, sizeof scale);
  float value = p * scale;
  value = x > 88.72f ? INFINITY : value;
  return x < -87.0f ? 0.0f : value;
}

INLINE float sigmoid_of(float x) {
  return 1.0f / (1.0f + exp_of(-x));
}
