/* CRC-32C, which finds a payload that was damaged on its way; and the routing digest.
 *
 * x86-64 and Arm have an instruction for 8 bytes of it.  Each needs the result of the
 * one before, which takes three cycles, but one may begin in every cycle: so long data
 * goes through in three streams, and their results are put together by tables that say
 * what as many zero bytes as a stream has would make of a CRC.  AVX2 stands for SSE4.2
 * here, and Arm's dotprod for its crc: whichever CPU has the one has the other. */
#include "platform.h"

#include "common/avx512_target.h"
#include "common/checksum.h"

#include <pthread.h>
#include <string.h>

enum { STREAM_BYTES = 512, TABLES = 8 };

static const uint32_t POLYNOMIAL = 0x82f63b78; /* reflected */

/* tables[k][b]: byte b and then k zero bytes; skips[k][b]: byte k of a CRC, which is b,
 * and then STREAM_BYTES zero bytes. */
static uint32_t tables[TABLES][256], skips[4][256];
static pthread_once_t filled = PTHREAD_ONCE_INIT;

static void fill_tables(void) {
  for (uint32_t b = 0; b < 256; b++) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; bit++)
      crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
    tables[0][b] = crc;
  }
  for (int k = 1; k < TABLES; k++)
    for (uint32_t b = 0; b < 256; b++)
      tables[k][b] = tables[0][tables[k - 1][b] & 0xff] ^ tables[k - 1][b] >> 8;
  for (int k = 0; k < 4; k++)
    for (uint32_t b = 0; b < 256; b++) {
      uint32_t crc = b << 8 * k;
      for (int i = 0; i < STREAM_BYTES; i++)
        crc = tables[0][crc & 0xff] ^ crc >> 8;
      skips[k][b] = crc;
    }
}

static uint64_t word_at(const uint8_t *at) {
  uint64_t word;
  memcpy(&word, at, sizeof word);
  return word;
}

/* Eight bytes at a time: the first k of them are followed by 7 - k more. */
static uint32_t by_tables(uint32_t crc, const uint8_t *at, size_t bytes) {
  pthread_once(&filled, fill_tables);
  for (; bytes >= TABLES; bytes -= TABLES, at += TABLES) {
    uint64_t word = word_at(at) ^ crc;
    crc = 0;
    for (int k = 0; k < TABLES; k++)
      crc ^= tables[TABLES - 1 - k][word >> 8 * k & 0xff];
  }
  for (; bytes > 0; bytes--, at++)
    crc = tables[0][(crc ^ *at) & 0xff] ^ crc >> 8;
  return crc;
}

/* In assembly, since compilers differ in what they call these instructions, and in
 * which features must be asked for. */
#if defined(__x86_64__)
static inline uint32_t take_8(uint32_t crc, uint64_t word) {
  __asm__("crc32q %1, %q0" : "+r"(crc) : "rm"(word));
  return crc;
}

static inline uint32_t take_1(uint32_t crc, uint8_t byte) {
  __asm__("crc32b %1, %0" : "+r"(crc) : "rm"(byte));
  return crc;
}
#elif defined(__aarch64__)
static inline uint32_t take_8(uint32_t crc, uint64_t word) {
  __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word));
  return crc;
}

static inline uint32_t take_1(uint32_t crc, uint8_t byte) {
  __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"((uint32_t)byte));
  return crc;
}
#endif

#if defined(__x86_64__) || defined(__aarch64__)
static inline uint32_t skip_stream(uint32_t crc) {
  return skips[0][crc & 0xff] ^ skips[1][crc >> 8 & 0xff] ^ skips[2][crc >> 16 & 0xff] ^
         skips[3][crc >> 24];
}

static uint32_t by_instruction(uint32_t crc, const uint8_t *at, size_t bytes) {
  if (bytes >= 3 * STREAM_BYTES)
    pthread_once(&filled, fill_tables);
  for (; bytes >= 3 * STREAM_BYTES; bytes -= 3 * STREAM_BYTES, at += 3 * STREAM_BYTES) {
    uint32_t second = 0, third = 0;
    for (size_t i = 0; i < STREAM_BYTES; i += 8) {
      crc = take_8(crc, word_at(at + i));
      second = take_8(second, word_at(at + STREAM_BYTES + i));
      third = take_8(third, word_at(at + 2 * STREAM_BYTES + i));
    }
    crc = skip_stream(skip_stream(crc) ^ second) ^ third;
  }
  for (; bytes >= 8; bytes -= 8, at += 8)
    crc = take_8(crc, word_at(at));
  for (; bytes > 0; bytes--, at++)
    crc = take_1(crc, *at);
  return crc;
}
#endif

#if defined(__x86_64__)
enum { VECTOR = 64, FOLDED = 4 * VECTOR };

typedef long long lanes __attribute__((vector_size(VECTOR)));

#define FOLDING __attribute__((target(AVX512_FEATURES ",vpclmulqdq")))

/* x^(8 n + 32) and x^(8 n - 32), by which the halves of a lane are multiplied to be moved n
 * bytes on; reflected, as all is here. */
static uint64_t by_vectors[2], by_vector[2];
static pthread_once_t folds_filled = PTHREAD_ONCE_INIT;

static uint64_t power(int exponent) {
  uint32_t value = UINT32_C(1) << 31; /* 1, reflected */
  for (int i = 0; i < exponent; i++)
    value = value & 1 ? value >> 1 ^ POLYNOMIAL : value >> 1;
  return (uint64_t)value << 1; /* a reflected product is one bit short */
}

static void fill_folds(void) {
  by_vectors[0] = power(8 * FOLDED + 32), by_vectors[1] = power(8 * FOLDED - 32);
  by_vector[0] = power(8 * VECTOR + 32), by_vector[1] = power(8 * VECTOR - 32);
}

FOLDING static inline lanes fold(lanes from, lanes by, lanes onto) {
  lanes low, high;
  __asm__("vpclmulqdq $0x00, %1, %2, %0" : "=v"(low) : "v"(by), "v"(from));
  __asm__("vpclmulqdq $0x11, %1, %2, %0" : "=v"(high) : "v"(by), "v"(from));
  return low ^ high ^ onto;
}

/* What is at `at` + `offset`, which is copied to `to` + `offset` unless `to` is NULL. */
FOLDING static inline lanes take_lanes(uint8_t *to, const uint8_t *at, size_t offset) {
  lanes value;
  memcpy(&value, at + offset, sizeof value);
  if (to != NULL)
    memcpy(to + offset, &value, sizeof value);
  return value;
}

FOLDING static inline lanes all_of(const uint64_t pair[2]) {
  long long low = (long long)pair[0], high = (long long)pair[1];
  return (lanes){low, high, low, high, low, high, low, high};
}

/* Copies as it goes, unless `to` is NULL: what waits for memory then hides what multiplies. */
FOLDING static uint32_t fold_all(uint32_t crc, uint8_t *to, const uint8_t *at, size_t bytes) {
  pthread_once(&folds_filled, fill_folds);
  lanes a = take_lanes(to, at, 0) ^ (lanes) { crc }, b = take_lanes(to, at, VECTOR);
  lanes c = take_lanes(to, at, 2 * VECTOR), d = take_lanes(to, at, 3 * VECTOR);
  lanes by = all_of(by_vectors);
  size_t i = FOLDED;
  for (; bytes - i >= FOLDED; i += FOLDED) {
    a = fold(a, by, take_lanes(to, at, i));
    b = fold(b, by, take_lanes(to, at, i + VECTOR));
    c = fold(c, by, take_lanes(to, at, i + 2 * VECTOR));
    d = fold(d, by, take_lanes(to, at, i + 3 * VECTOR));
  }
  by = all_of(by_vector);
  d = fold(fold(fold(a, by, b), by, c), by, d);
  uint8_t rest[VECTOR];
  memcpy(rest, &d, sizeof rest);
  if (to != NULL)
    memcpy(to + i, at + i, bytes - i);
  return by_instruction(by_instruction(0, rest, sizeof rest), at + i, bytes - i);
}

static int folds(size_t bytes) {
  return bytes >= 2 * FOLDED && __builtin_cpu_supports("vpclmulqdq");
}

static uint32_t by_folding(uint32_t crc, const uint8_t *at, size_t bytes) {
  return folds(bytes) ? fold_all(crc, NULL, at, bytes) : by_instruction(crc, at, bytes);
}
#endif

typedef uint32_t crc32c_fn(uint32_t crc, const uint8_t *at, size_t bytes);

static crc32c_fn *const VARIANTS[ZMOE_ISAS] = {
    [ZMOE_ISA_GENERIC] = by_tables,
#if defined(__x86_64__)
    [ZMOE_ISA_AVX2] = by_instruction,
    [ZMOE_ISA_AVX512] = by_folding,
#elif defined(__aarch64__)
    [ZMOE_ISA_NEON_DOT] = by_instruction,
#endif
};

uint32_t zmoe_crc32c_go_on(uint32_t crc, const void *data, size_t bytes, zmoe_isa isa) {
  return ~ZMOE_VARIANT(VARIANTS, isa)(~crc, data, bytes);
}

uint32_t zmoe_crc32c_copy(uint32_t crc, void *to, const void *data, size_t bytes, zmoe_isa isa) {
#if defined(__x86_64__)
  if (ZMOE_VARIANT(VARIANTS, isa) == by_folding && folds(bytes))
    return ~fold_all(~crc, to, data, bytes);
#endif
  memcpy(to, data, bytes);
  return zmoe_crc32c_go_on(crc, to, bytes, isa);
}

uint32_t zmoe_crc32c(const void *data, size_t bytes, zmoe_isa isa) {
  return zmoe_crc32c_go_on(0, data, bytes, isa);
}

/* ---- digest -------------------------------------------------------------
 * Every step is a bijection of the running value, so that two inputs that
 * differ in one word always differ in the digest. */

static uint64_t mix(uint64_t value) {
  value ^= value >> 32;
  value *= 0x9e3779b97f4a7c15u;
  return value ^ value >> 29;
}

uint64_t zmoe_digest(const void *data, size_t bytes) {
  const unsigned char *at = data;
  uint64_t digest = mix(bytes + 1);
  for (; bytes >= 8; bytes -= 8, at += 8) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
    digest = mix(digest ^ word);
  }
  if (bytes > 0) {
    uint64_t word = 0;
    memcpy(&word, at, bytes);
    digest = mix(digest ^ word);
  }
  return mix(digest);
}
