/* The instruction sets, and which this CPU, under this operating system, can run. */
#include "common/isa.h"

#include <stdint.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>

enum { XCR0_AVX = 0x6, XCR0_AVX512 = 0xe6 };
enum { HAS_AVX_VNNI = 1 << 4 }; /* of leaf 7.1 EAX; older headers lack the name */

/* The register state that the operating system saves on a task switch. */
static uint32_t saved_state(void) {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

static zmoe_isa detect(void) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_F16C) || !(c & bit_FMA))
    return ZMOE_ISA_GENERIC;
  uint32_t saved = saved_state();
  if ((saved & XCR0_AVX) != XCR0_AVX || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2))
    return ZMOE_ISA_GENERIC;
  uint32_t wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL, more = 0;
  uint32_t features = b, bytes = c;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d))
    more = a;
  if ((saved & XCR0_AVX512) != XCR0_AVX512 || (features & wanted) != wanted)
    return more & HAS_AVX_VNNI ? ZMOE_ISA_AVX_VNNI : ZMOE_ISA_AVX2;
  if (!(bytes & bit_AVX512VNNI))
    return ZMOE_ISA_AVX512;
  /* Cooper Lake lacks VBMI. */
  return bytes & bit_AVX512VBMI && more & bit_AVX512BF16 ? ZMOE_ISA_AVX512_BF16
                                                         : ZMOE_ISA_AVX512_VNNI;
}
#elif defined(__aarch64__) && defined(__linux__)
/* Bits of AT_HWCAP and AT_HWCAP2; older headers lack the names. */
enum { HAS_DOT = 1 << 20, HAS_I8MM = 1 << 13, HAS_BF16 = 1 << 14 };

static zmoe_isa detect(void) {
  if (!(getauxval(AT_HWCAP) & HAS_DOT))
    return ZMOE_ISA_NEON;
  unsigned long wanted = HAS_I8MM | HAS_BF16;
  return (getauxval(AT_HWCAP2) & wanted) == wanted ? ZMOE_ISA_NEON_BF16 : ZMOE_ISA_NEON_DOT;
}
#elif defined(__aarch64__) && defined(__APPLE__)
static int has(const char *feature) {
  int value = 0;
  size_t bytes = sizeof value;
  return sysctlbyname(feature, &value, &bytes, NULL, 0) == 0 && value != 0;
}

static zmoe_isa detect(void) {
  if (has("hw.optional.arm.FEAT_BF16") && has("hw.optional.arm.FEAT_I8MM"))
    return ZMOE_ISA_NEON_BF16;
  return ZMOE_ISA_NEON_DOT; /* every Mac with such a CPU has it */
}
#else
static zmoe_isa detect(void) {
#ifdef __aarch64__
  return ZMOE_ISA_NEON;
#else
  return ZMOE_ISA_GENERIC;
#endif
}
#endif

zmoe_isa zmoe_isa_best(void) {
  static int known = -1; /* racing threads write the same value */
  int isa = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (isa < 0) {
    isa = (int)detect();
    __atomic_store_n(&known, isa, __ATOMIC_RELAXED);
  }
  return (zmoe_isa)isa;
}

/* Each with the set that it includes; the chains end at the generic one. */
static const struct {
  const char *name;
  zmoe_isa included;
} SETS[ZMOE_ISAS] = {
    [ZMOE_ISA_GENERIC] = {"generic", ZMOE_ISA_GENERIC},
    [ZMOE_ISA_AVX2] = {"avx2", ZMOE_ISA_GENERIC},
    [ZMOE_ISA_AVX512] = {"avx512", ZMOE_ISA_AVX2},
    [ZMOE_ISA_AVX_VNNI] = {"avx_vnni", ZMOE_ISA_AVX2},
    [ZMOE_ISA_AVX512_VNNI] = {"avx512_vnni", ZMOE_ISA_AVX512},
    [ZMOE_ISA_AVX512_BF16] = {"avx512_bf16", ZMOE_ISA_AVX512_VNNI},
    [ZMOE_ISA_NEON] = {"neon", ZMOE_ISA_GENERIC},
    [ZMOE_ISA_NEON_DOT] = {"neon_dot", ZMOE_ISA_NEON},
    [ZMOE_ISA_NEON_BF16] = {"neon_bf16", ZMOE_ISA_NEON_DOT},
};

zmoe_isa zmoe_isa_included(zmoe_isa isa) {
  return SETS[isa].included;
}

const char *zmoe_isa_name(zmoe_isa isa) {
  return SETS[isa].name;
}

int zmoe_isa_supported(zmoe_isa isa) {
  zmoe_isa runs = zmoe_isa_best();
  while (runs != isa && runs != ZMOE_ISA_GENERIC)
    runs = zmoe_isa_included(runs);
  return runs == isa;
}
