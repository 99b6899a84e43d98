/* For benchmarks only: many exchanges in a row, timed where no Python runs. */
#include "platform.h"

#include "bench_loop.h"
#include "exchange_internal.h"

static double clock_us(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

int zmoe_bench_exchanges(zmoe_exchange *ex, const void *src, void *out, uint32_t rows,
                         uint32_t width, zmoe_dtype dtype, uint32_t count, uint64_t deadline_us,
                         double *elapsed_us, zmoe_fault *fault) {
  for (uint32_t i = 0; i < count; i++) {
    uint32_t step = ex->started ? ex->now.step + 1 : 0;
    double start_us = clock_us();
    int rc =
        zmoe_exchange_publish(ex, src, dtype, step, 0, rows, width, dtype, 0, deadline_us, fault);
    while (rc == ZMOE_OK || rc == ZMOE_EINTR) {
      rc = zmoe_exchange_collect(ex, out, dtype, deadline_us, fault);
      if (rc == ZMOE_OK)
        break;
    }
    if (rc != ZMOE_OK)
      return rc;
    elapsed_us[i] = clock_us() - start_us;
  }
  return ZMOE_OK;
}
