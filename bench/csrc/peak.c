/* The floating-point operations per second of one core, in registers: chains of multiply-adds that
 * hide each other's latency, as the kernels of an instruction set use them.
 * usage: peak ISA   prints GFLOP/s, the best of several spans; status 2 where ISA has none here */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { CHAINS = 12, STEPS = 1 << 16, SPANS = 200 };
#define EACH_CHAIN(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)

/* STEPS times one `op` on each of the registers 0 to 11, which are zero. */
#if defined(__x86_64__)
#define RUN(name, op)                                                                              \
  static void name(void) {                                                                         \
    uint64_t left = STEPS;                                                                         \
    __asm__ volatile("vzeroall\n1:\n" EACH_CHAIN(op) "dec %0\njnz 1b\n"                            \
                     : "+r"(left)                                                                  \
                     :                                                                             \
                     : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",       \
                       "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");      \
  }
#define FMA256(n) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n "\n"
#define FMA512(n) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #n "\n"
#define BF16(n) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #n "\n"
RUN(avx2, FMA256)
RUN(avx512, FMA512)
RUN(avx512_bf16, BF16)
#elif defined(__aarch64__)
#define ZERO(n) "movi v" #n ".4s, #0\n"
#define FMA(n) "fmla v" #n ".4s, v14.4s, v15.4s\n"
static void neon(void) {
  uint64_t left = STEPS;
  __asm__ volatile(EACH_CHAIN(ZERO) ZERO(14)
                       ZERO(15) "1:\n" EACH_CHAIN(FMA) "subs %0, %0, #1\nb.ne 1b\n"
                   : "+r"(left)
                   :
                   : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11",
                     "v14", "v15");
}
#endif

static const struct {
  const char *name;
  void (*run)(void);
  uint32_t flops; /* of one op */
} KINDS[] = {
#if defined(__x86_64__)
    {"AVX2", avx2, 16},
    {"AVX_VNNI", avx2, 16},
    {"AVX512", avx512, 32},
    {"AVX512_VNNI", avx512, 32},
    {"AVX512_BF16", avx512_bf16, 64},
#elif defined(__aarch64__)
    {"NEON", neon, 8},
    {"NEON_DOT", neon, 8},
    {"NEON_BF16", neon, 8}, /* of f32, which bf16 may exceed */
#endif
    {NULL, NULL, 0},
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
      for (int span = 0; span < SPANS; span++) {
        double start = seconds();
        KINDS[i].run();
        double rate = (double)KINDS[i].flops * CHAINS * STEPS / (seconds() - start);
        best = rate > best ? rate : best;
      }
      printf("%.1f\n", best / 1e9);
      return 0;
    }
  return 2;
}
