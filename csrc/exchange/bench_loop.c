/* For benchmarks only: many exchanges in a row, timed where no Python runs, and
 * the reading of memory and nothing else. */
#include "common/platform.h"

#include "bench_loop.h"
#include "exchange_internal.h"
#include "kernels/thread_pool.h"

#include <string.h>

static double clock_us(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

int zmoe_bench_exchanges(zmoe_exchange *ex, const zmoe_call *call, const void *src, void *out,
                         zmoe_dtype dtype, uint32_t count, uint64_t deadline_us, double *elapsed_us,
                         zmoe_fault *fault) {
  zmoe_call next = *call;
  for (uint32_t i = 0; i < count; i++) {
    next.step = ex->published > 0 ? zmoe_round_at(ex, ex->published - 1)->header.step + 1 : 0;
    double start_us = clock_us();
    int rc;
    do
      rc = zmoe_exchange_publish(ex, &next, src, dtype, deadline_us, fault);
    while (rc == ZMOE_EINTR);
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

/* ---- the memory's speed ------------------------------------------------------- */

enum { CHUNK_BYTES = 64 << 10, LANES = 32, PREFETCH_BYTES = 4 << 10 };

struct reading {
  const unsigned char *data;
  size_t chunks;
  zmoe_tasks tasks;
  _Alignas(64) _Atomic uint64_t seen;
};

/* Chunks are taken as a product's tasks are; more lanes than a register has hide
 * the latency. */
static void read_chunks(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool, (void)thread;
  struct reading *job = argument;
  uint64_t lanes[LANES] = {0};
  for (size_t chunk; (chunk = zmoe_take(&job->tasks)) < job->chunks;) {
    const unsigned char *at = job->data + chunk * CHUNK_BYTES;
    for (size_t i = 0; i < CHUNK_BYTES; i += sizeof lanes) {
      uint64_t words[LANES];
      memcpy(words, at + i, sizeof words);
      for (size_t line = 0; line < sizeof words; line += 64)
        __builtin_prefetch(at + i + line + PREFETCH_BYTES);
      for (int lane = 0; lane < LANES; lane++)
        lanes[lane] ^= words[lane];
    }
  }
  for (int lane = 0; lane < LANES; lane++)
    atomic_fetch_xor(&job->seen, lanes[lane]);
}

uint64_t zmoe_bench_read(zmoe_thread_pool *pool, const void *data, size_t bytes) {
  struct reading job = {.data = data, .chunks = bytes / CHUNK_BYTES};
  zmoe_thread_pool_run(pool, read_chunks, &job);
  return job.seen;
}
