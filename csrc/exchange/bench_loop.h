/* For benchmarks only: many exchanges in a row, timed where no Python runs, and
 * the reading of memory and nothing else. */
#ifndef ZMOE_BENCH_LOOP_H
#define ZMOE_BENCH_LOOP_H

#include "exchange/exchange.h"
#include "kernels/compute.h"

/* Runs `count` exchanges like `call`, in steps of their own, from `src` to `out`
 * (both of `dtype`), and writes the microseconds of each into `elapsed_us`.  Every
 * rank must run as many.  Returns a zmoe_status. */
int zmoe_bench_exchanges(zmoe_exchange *ex, const zmoe_call *call, const void *src, void *out,
                         zmoe_dtype dtype, uint32_t count, uint64_t deadline_us, double *elapsed_us,
                         zmoe_fault *fault);

/* All threads of the pool read `data` (whole chunks of 64 KiB) once. */
uint64_t zmoe_bench_read(zmoe_thread_pool *pool, const void *data, size_t bytes);

#endif
