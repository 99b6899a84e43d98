/* What the operating systems call differently.  Include first: it asks the
 * system headers for more than plain C11 has. */
#ifndef ZMOE_PLATFORM_H
#define ZMOE_PLATFORM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define _DARWIN_C_SOURCE

#if __SIZEOF_POINTER__ != 8 || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error                                                                                             \
    "zmoe needs a little-endian 64-bit platform: frames and weights are used as they lie in memory"
#endif

#include <stdint.h>
#include <time.h>

/* Monotonic, in nanoseconds. */
static inline uint64_t zmoe_now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The same in microseconds. */
static inline uint64_t zmoe_now_us(void) {
  return zmoe_now_ns() / 1000u;
}

/* now + span, without wrapping: a span of UINT64_MAX waits for ever. */
static inline uint64_t zmoe_later_us(uint64_t now_us, uint64_t span_us) {
  return span_us > UINT64_MAX - now_us ? UINT64_MAX : now_us + span_us;
}

#endif
