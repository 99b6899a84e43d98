/* The sum: against a plain reference, and every variant against the scalar one. */
#include "check.h"

#include <math.h>
#include <string.h>

#include "common/checksum.h"
#include "common/reduce.h"
#include "common/status.h"

enum { MOST = 300 };

static uint32_t state = 12345;

static uint32_t next_random(void) {
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

static const zmoe_isa VARIANTS[] = {ZMOE_ISA_AVX2, ZMOE_ISA_AVX512, ZMOE_ISA_NEON};
static const zmoe_dtype DTYPES[] = {ZMOE_F32, ZMOE_F16, ZMOE_BF16, ZMOE_Q8};

static uint16_t convert_one(float value, zmoe_dtype dtype) {
  uint16_t out;
  CHECK_EQUAL(zmoe_convert(&out, dtype, &value, ZMOE_F32, 1, ZMOE_ISA_GENERIC), ZMOE_OK);
  return out;
}

static float widen(uint16_t value, zmoe_dtype dtype) {
  float out;
  CHECK_EQUAL(zmoe_convert(&out, ZMOE_F32, &value, dtype, 1, ZMOE_ISA_GENERIC), ZMOE_OK);
  return out;
}

/* All 65536 values of f16 and bf16 survive the way to f32 and back. */
static void test_halves_round_trip(void) {
  for (int d = 1; d < 3; d++) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
      float wide = widen((uint16_t)bits, DTYPES[d]);
      uint16_t back = convert_one(wide, DTYPES[d]);
      if (isnan(wide))
        CHECK_EQUAL(back, DTYPES[d] == ZMOE_F16 ? 0x7e00 : 0x7fc0);
      else
        CHECK_EQUAL(back, bits);
    }
  }
}

static void test_known_halves(void) {
  CHECK(widen(0x3c00, ZMOE_F16) == 1.0f);
  CHECK(widen(0x0001, ZMOE_F16) == 0x1p-24f);
  CHECK(widen(0xfbff, ZMOE_F16) == -65504.0f);
  CHECK(isinf(widen(0x7c00, ZMOE_F16)));
  CHECK(widen(0x3f80, ZMOE_BF16) == 1.0f);
  CHECK_EQUAL(convert_one(65519.996f, ZMOE_F16), 0x7bff);
  CHECK_EQUAL(convert_one(65520.0f, ZMOE_F16), 0x7c00);
  CHECK_EQUAL(convert_one(0x1p-25f, ZMOE_F16), 0); /* a tie goes to even */
  CHECK_EQUAL(convert_one(0x1.000002p-25f, ZMOE_F16), 1);
  CHECK_EQUAL(convert_one(0x1.8p-24f, ZMOE_F16), 2);
  CHECK_EQUAL(convert_one(0x1.ffbp-15f, ZMOE_F16), 0x3ff);
  CHECK_EQUAL(convert_one(0x1.ffcp-15f, ZMOE_F16), 0x400); /* up to the normal numbers */
  CHECK_EQUAL(convert_one(1.00390625f, ZMOE_BF16), 0x3f80);
  CHECK_EQUAL(convert_one(1.01171875f, ZMOE_BF16), 0x3f82);
}

/* Rounding of random f32 agrees with the two neighbouring halves. */
static void test_rounding_is_to_the_nearest(void) {
  for (int d = 1; d < 3; d++) {
    for (int i = 0; i < 200000; i++) {
      uint32_t bits = next_random();
      float value;
      memcpy(&value, &bits, sizeof value);
      if (isnan(value) || fabsf(value) > 60000.0f)
        continue;
      uint16_t half = convert_one(value, DTYPES[d]);
      double error = fabs((double)widen(half, DTYPES[d]) - value);
      for (int step = -1; step <= 1; step += 2) {
        uint16_t other = (uint16_t)(half + step);
        float wide = widen(other, DTYPES[d]);
        if ((half & 0x7fff) == 0 || isnan(wide) || isinf(wide) || (other ^ half) & 0x8000)
          continue;
        double theirs = fabs((double)wide - value);
        CHECK(error < theirs || (error == theirs && (half & 1) == 0));
      }
    }
  }
}

static void fill(unsigned char *data, size_t bytes, int any_bits, zmoe_dtype dtype, size_t count) {
  for (size_t i = 0; i < bytes; i++)
    data[i] = (unsigned char)(next_random() >> 11);
  if (any_bits)
    return;
  float values[MOST]; /* of a like size, so that order matters */
  for (size_t i = 0; i < count; i++)
    values[i] = (float)(int32_t)next_random() * 0x1p-28f;
  CHECK_EQUAL(zmoe_convert(data, dtype, values, ZMOE_F32, count, ZMOE_ISA_GENERIC), ZMOE_OK);
}

/* Random bits make NaN, infinity and subnormals common; odd offsets, as in
 * libzmq's buffers, and lengths around every vector's. */
static void check_variant(zmoe_isa isa, zmoe_dtype part, zmoe_dtype out, uint32_t n, size_t count,
                          int any_bits) {
  static unsigned char data[8][4 * MOST + 16], expected[4 * MOST + 16], actual[4 * MOST + 16];
  const void *parts[8];
  for (uint32_t p = 0; p < n; p++) {
    size_t offset = next_random() % 16;
    fill(data[p] + offset, 4 * count, any_bits, part, count);
    parts[p] = next_random() % 8 == 0 ? NULL : data[p] + offset;
  }
  memset(expected, 0xaa, sizeof expected);
  memset(actual, 0xaa, sizeof actual);
  CHECK_EQUAL(zmoe_reduce(expected + 1, out, parts, n, part, count, ZMOE_ISA_GENERIC), ZMOE_OK);
  CHECK_EQUAL(zmoe_reduce(actual + 1, out, parts, n, part, count, isa), ZMOE_OK);
  CHECK(memcmp(expected, actual, sizeof expected) == 0);
}

static void test_variants_agree(void) {
  for (size_t v = 0; v < sizeof VARIANTS / sizeof *VARIANTS; v++) {
    if (!zmoe_isa_supported(VARIANTS[v])) {
      printf("     (%s cannot run here)\n", zmoe_isa_name(VARIANTS[v]));
      continue;
    }
    for (int p = 0; p < 4; p++)
      for (int o = 0; o < 4; o++)
        for (uint32_t n = 0; n <= 8; n++)
          for (size_t count = 0; count < MOST; count += 1 + next_random() % 7)
            check_variant(VARIANTS[v], DTYPES[p], DTYPES[o], n, count, (int)(count & 1));
  }
}

/* Every f16 and bf16 value through every variant. */
static void test_variants_convert_alike(void) {
  static uint16_t halves[65536], back[65536], back_generic[65536];
  static float wide[65536], wide_generic[65536];
  for (uint32_t i = 0; i < 65536; i++)
    halves[i] = (uint16_t)i;
  for (size_t v = 0; v < sizeof VARIANTS / sizeof *VARIANTS; v++) {
    for (int d = 1; d < 3 && zmoe_isa_supported(VARIANTS[v]); d++) {
      zmoe_convert(wide_generic, ZMOE_F32, halves, DTYPES[d], 65536, ZMOE_ISA_GENERIC);
      zmoe_convert(wide, ZMOE_F32, halves, DTYPES[d], 65536, VARIANTS[v]);
      CHECK(memcmp(wide, wide_generic, sizeof wide) == 0);
      for (int o = 1; o < 3; o++) { /* also from one half to the other */
        zmoe_convert(back_generic, DTYPES[o], wide, ZMOE_F32, 65536, ZMOE_ISA_GENERIC);
        zmoe_convert(back, DTYPES[o], wide, ZMOE_F32, 65536, VARIANTS[v]);
        CHECK(memcmp(back, back_generic, sizeof back) == 0);
      }
    }
  }
}

/* ---- blocks of 8-bit integers ---------------------------------------------------- */

static void there_and_back(float *out, const float *values, size_t count) {
  unsigned char blocks[(MOST + ZMOE_Q8_BLOCK) * 2];
  CHECK_EQUAL(zmoe_convert(blocks, ZMOE_Q8, values, ZMOE_F32, count, zmoe_isa_best()), ZMOE_OK);
  CHECK_EQUAL(zmoe_convert(out, ZMOE_F32, blocks, ZMOE_Q8, count, zmoe_isa_best()), ZMOE_OK);
}

/* The bytes are a promise between machines. */
static void test_known_blocks(void) {
  float values[40] = {127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -126.5f, 3}, back[40];
  static const int8_t expected[] = {127, 0, 2, 2, 0, -2, -126, 3, 0};
  unsigned char blocks[2 * ZMOE_Q8_BLOCK_BYTES];
  values[32] = -2, values[39] = 1; /* 2 / 127 is between 0x3c80 and 0x3c81 */
  CHECK_EQUAL(zmoe_convert(blocks, ZMOE_Q8, values, ZMOE_F32, 40, ZMOE_ISA_GENERIC), ZMOE_OK);
  CHECK(blocks[0] == 0x80 && blocks[1] == 0x3f); /* 1.0 in bf16 */
  CHECK(memcmp(blocks + 2, expected, sizeof expected) == 0);
  const unsigned char *second = blocks + ZMOE_Q8_BLOCK_BYTES;
  CHECK(second[0] == 0x82 && second[1] == 0x3c);
  CHECK_EQUAL((int8_t)second[2], -126);
  CHECK_EQUAL((int8_t)second[9], 63);
  for (int i = 10; i < ZMOE_Q8_BLOCK_BYTES; i++)
    CHECK_EQUAL(second[i], 0); /* the padding */
  there_and_back(back, values, 40);
  CHECK(back[0] == 127 && back[2] == 2 && back[3] == 2 && back[8] == 0);
}

/* No element is further from its value than half a step, whatever the magnitude. */
static void test_blocks_are_near(void) {
  for (int exponent = -118; exponent <= 126; exponent += 4) {
    float values[MOST], back[MOST];
    for (size_t i = 0; i < MOST; i++)
      values[i] = ldexpf((float)(int32_t)next_random() * 0x1p-31f, exponent);
    there_and_back(back, values, MOST);
    for (size_t b = 0; b < MOST; b += ZMOE_Q8_BLOCK) {
      float largest = 0;
      for (size_t i = b; i < b + ZMOE_Q8_BLOCK && i < MOST; i++)
        largest = fmaxf(largest, fabsf(values[i]));
      double step = (double)largest / 127 * (1 + 0x1p-7);
      for (size_t i = b; i < b + ZMOE_Q8_BLOCK && i < MOST; i++)
        CHECK(fabs((double)back[i] - values[i]) <= step / 2 * (1 + 1e-6));
    }
  }
}

static void test_blocks_that_are_not_finite(void) {
  static const float bad[] = {NAN, INFINITY, -INFINITY};
  for (int k = 0; k < 3; k++) {
    float values[MOST], back[MOST];
    for (size_t i = 0; i < MOST; i++)
      values[i] = 1;
    values[70] = bad[k];
    there_and_back(back, values, MOST);
    for (size_t i = 0; i < MOST; i++)
      CHECK(i / ZMOE_Q8_BLOCK == 2 ? isnan(back[i]) : fabsf(back[i] - 1) < 0.01f);
  }
}

static void test_tiny_blocks_are_zeros(void) {
  static const unsigned char zeros[2 * ZMOE_Q8_BLOCK_BYTES];
  unsigned char blocks[2 * ZMOE_Q8_BLOCK_BYTES];
  float values[40];
  for (int i = 0; i < 40; i++)
    values[i] = (i % 2 ? -1 : 1) * ldexpf(1, -151 + i);
  CHECK_EQUAL(zmoe_convert(blocks, ZMOE_Q8, values, ZMOE_F32, 40, zmoe_isa_best()), ZMOE_OK);
  CHECK(memcmp(blocks, zeros, ZMOE_Q8_BLOCK_BYTES) == 0); /* up to 2^-120 */
  CHECK(memcmp(blocks, zeros, sizeof blocks) != 0);       /* up to 2^-112 */
}

static void test_order_is_that_of_the_ranks(void) {
  float a = 1e8f, b = -1e8f, c = 1.0f, out;
  const void *abc[] = {&a, &b, &c}, *bca[] = {&b, &c, &a};
  CHECK_EQUAL(zmoe_reduce(&out, ZMOE_F32, abc, 3, ZMOE_F32, 1, zmoe_isa_best()), ZMOE_OK);
  CHECK(out == 1.0f);
  CHECK_EQUAL(zmoe_reduce(&out, ZMOE_F32, bca, 3, ZMOE_F32, 1, zmoe_isa_best()), ZMOE_OK);
  CHECK(out == 0.0f);
}

/* In f32, not in the parts' dtype: 2048 + 1 + 1 in f16 would stay at 2048. */
static void test_accumulates_in_f32(void) {
  uint16_t big = convert_one(2048.0f, ZMOE_F16), one = convert_one(1.0f, ZMOE_F16), out;
  const void *parts[] = {&big, &one, &one};
  CHECK_EQUAL(zmoe_reduce(&out, ZMOE_F16, parts, 3, ZMOE_F16, 1, ZMOE_ISA_GENERIC), ZMOE_OK);
  CHECK(widen(out, ZMOE_F16) == 2050.0f);
}

static void test_nothing_is_zeros(void) {
  uint16_t out[5] = {1, 2, 3, 4, 5};
  const void *none[3] = {NULL, NULL, NULL};
  CHECK_EQUAL(zmoe_reduce(out, ZMOE_BF16, none, 3, ZMOE_F32, 4, zmoe_isa_best()), ZMOE_OK);
  CHECK(out[0] == 0 && out[3] == 0 && out[4] == 5);
}

static void test_refusals(void) {
  float in = 0, out;
  const void *parts[] = {&in};
  CHECK_EQUAL(zmoe_reduce(&out, (zmoe_dtype)9, parts, 1, ZMOE_F32, 1, ZMOE_ISA_GENERIC),
              ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_reduce(&out, ZMOE_F32, parts, ZMOE_MAX_NODES + 1, ZMOE_F32, 1, ZMOE_ISA_GENERIC),
              ZMOE_EINVAL);
  zmoe_isa foreign = zmoe_isa_supported(ZMOE_ISA_NEON) ? ZMOE_ISA_AVX2 : ZMOE_ISA_NEON;
  CHECK_EQUAL(zmoe_reduce(&out, ZMOE_F32, parts, 1, ZMOE_F32, 1, foreign), ZMOE_EINVAL);
}

static void test_digest(void) {
  unsigned char data[64] = {0};
  uint64_t seen[65];
  for (size_t n = 0; n <= 64; n++) { /* zeros of every length differ */
    seen[n] = zmoe_digest(data, n);
    for (size_t m = 0; m < n; m++)
      CHECK(seen[m] != seen[n]);
  }
  for (size_t bit = 0; bit < 512; bit++) {
    data[bit / 8] ^= (unsigned char)(1u << bit % 8);
    CHECK(zmoe_digest(data, 64) != seen[64]);
    data[bit / 8] ^= (unsigned char)(1u << bit % 8);
  }
}

int main(void) {
  static const test_case tests[] = {
      {"all halves survive f32", test_halves_round_trip},
      {"known halves", test_known_halves},
      {"rounding is to the nearest, ties to even", test_rounding_is_to_the_nearest},
      {"all variants agree bit for bit", test_variants_agree},
      {"all variants convert alike", test_variants_convert_alike},
      {"known blocks of 8-bit integers", test_known_blocks},
      {"blocks are as near as their scale allows", test_blocks_are_near},
      {"a NaN or an infinity shows in its whole block", test_blocks_that_are_not_finite},
      {"what is too small for a scale is zero", test_tiny_blocks_are_zeros},
      {"parts are added in order", test_order_is_that_of_the_ranks},
      {"sums are made in f32", test_accumulates_in_f32},
      {"no part is zeros", test_nothing_is_zeros},
      {"unusable arguments are refused", test_refusals},
      {"digests tell lengths and bits apart", test_digest},
  };
  RUN(tests);
  return 0;
}
