/* The floating-point operations per second of one core, in registers: chains of multiply-adds that
 * hide each other's latency, as the kernels of an instruction set use them.
 * usage: peak ISA   prints GFLOP/s, the best of several spans; status 2 where ISA has none here */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { CHAINS = 12, STEPS = 1 << 16 };

/* `flops` of one `step` on each chain, whose operands stay what they are. */
#define PEAK(name, features, vec, zero, flops, step)                                               \
  features static double name(void) {                                                              \
    vec sum[CHAINS], a = zero;                                                                     \
    for (int c = 0; c < CHAINS; c++)                                                               \
      sum[c] = zero;                                                                               \
    for (int i = 0; i < STEPS; i++)                                                                \
      _Pragma("GCC unroll 12") for (int c = 0; c < CHAINS; c++) {                                  \
        sum[c] = step(sum[c], a);                                                                  \
        __asm__("" : KEEP(sum[c]));                                                                \
      }                                                                                            \
    return (double)flops * CHAINS * STEPS;                                                         \
  }

#if defined(__x86_64__)
#define TARGET(list) __attribute__((target(list)))
#define KEEP(value) "+v"(value)
#define FMA256(sum, a) _mm256_fmadd_ps(a, a, sum)
#define FMA512(sum, a) _mm512_fmadd_ps(a, a, sum)
#define BF16(sum, a) _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)a)
PEAK(avx2, TARGET("avx2,fma"), __m256, _mm256_setzero_ps(), 16, FMA256)
PEAK(avx512, TARGET("avx512f"), __m512, _mm512_setzero_ps(), 32, FMA512)
PEAK(avx512_bf16, TARGET("avx512f,avx512bf16"), __m512, _mm512_setzero_ps(), 64, BF16)
#elif defined(__aarch64__)
#define KEEP(value) "+w"(value)
#define FMA(sum, a) vfmaq_f32(sum, a, a)
PEAK(neon, , float32x4_t, vdupq_n_f32(0), 8, FMA)
#endif

static const struct {
  const char *name;
  double (*run)(void);
} KINDS[] = {
#if defined(__x86_64__)
    {"AVX2", avx2},
    {"AVX_VNNI", avx2},
    {"AVX512", avx512},
    {"AVX512_VNNI", avx512},
    {"AVX512_BF16", avx512_bf16},
#elif defined(__aarch64__)
    {"NEON", neon},
    {"NEON_DOT", neon},
    {"NEON_BF16", neon}, /* of f32, which bf16 may exceed */
#endif
    {NULL, NULL},
};

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int argc, char **argv) {
  for (int i = 0; argc == 2 && KINDS[i].name != NULL; i++)
    if (strcmp(KINDS[i].name, argv[1]) == 0) {
      double best = 0;
      for (int span = 0; span < 200; span++) {
        double start = seconds(), done = KINDS[i].run();
        double rate = done / (seconds() - start);
        best = rate > best ? rate : best;
      }
      printf("%.1f\n", best / 1e9);
      return 0;
    }
  return 2;
}
