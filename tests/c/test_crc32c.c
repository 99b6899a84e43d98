/* CRC-32C: against published values, and against its definition bit by bit. */
#include "check.h"

#include <stdint.h>
#include <string.h>

#include "common/checksum.h"

static const zmoe_isa ISAS[] = {ZMOE_ISA_GENERIC,     ZMOE_ISA_AVX2,     ZMOE_ISA_AVX512,
                                ZMOE_ISA_AVX512_BF16, ZMOE_ISA_NEON,     ZMOE_ISA_NEON_DOT,
                                ZMOE_ISA_NEON_BF16,   ZMOE_ISA_AVX_VNNI, ZMOE_ISA_AVX512_VNNI};

/* Copied in two parts, to an odd address; no byte beyond them is touched. */
static void expect_copy(const uint8_t *data, size_t bytes, uint32_t crc, zmoe_isa isa) {
  static uint8_t copy[8192 + 8];
  memset(copy, 0xee, sizeof copy);
  uint32_t first = zmoe_crc32c_copy(0, copy + 1, data, bytes / 3, isa);
  CHECK_EQUAL(
      zmoe_crc32c_copy(first, copy + 1 + bytes / 3, data + bytes / 3, bytes - bytes / 3, isa), crc);
  CHECK_EQUAL(memcmp(copy + 1, data, bytes), 0);
  CHECK(copy[0] == 0xee && copy[1 + bytes] == 0xee);
}

static void expect(const void *data, size_t bytes, uint32_t crc) {
  for (size_t i = 0; i < sizeof ISAS / sizeof *ISAS; i++) {
    if (!zmoe_isa_supported(ISAS[i]))
      continue;
    CHECK_EQUAL(zmoe_crc32c(data, bytes, ISAS[i]), crc);
    uint32_t first = zmoe_crc32c(data, bytes / 3, ISAS[i]);
    CHECK_EQUAL(
        zmoe_crc32c_go_on(first, (const uint8_t *)data + bytes / 3, bytes - bytes / 3, ISAS[i]),
        crc);
    expect_copy(data, bytes, crc, ISAS[i]);
  }
}

/* RFC 3720, appendix B.4, and the check value of the CRC catalogues. */
static void test_published(void) {
  uint8_t data[32];
  expect("", 0, 0);
  expect("123456789", 9, 0xe3069283);
  memset(data, 0, sizeof data);
  expect(data, sizeof data, 0x8a9136aa);
  memset(data, 0xff, sizeof data);
  expect(data, sizeof data, 0x62a8ab43);
  for (uint8_t i = 0; i < sizeof data; i++)
    data[i] = i;
  expect(data, sizeof data, 0x46dd794e);
  for (uint8_t i = 0; i < sizeof data; i++)
    data[i] = (uint8_t)(31 - i);
  expect(data, sizeof data, 0x113fdb5c);
}

static uint32_t by_definition(const uint8_t *data, size_t bytes) {
  uint32_t crc = UINT32_MAX;
  for (size_t bit = 0; bit < 8 * bytes; bit++) {
    uint32_t odd = (crc ^ data[bit / 8] >> bit % 8) & 1;
    crc = crc >> 1 ^ (odd ? 0x82f63b78 : 0);
  }
  return ~crc;
}

/* Lengths about those of the streams, from every offset. */
static void test_lengths(void) {
  static uint8_t data[8192 + 8];
  uint32_t state = 2463534242u;
  for (size_t i = 0; i < sizeof data; i++) {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    data[i] = (uint8_t)state;
  }
  for (size_t bytes = 0; bytes < 64; bytes++)
    for (size_t offset = 0; offset < 8; offset++)
      expect(data + offset, bytes, by_definition(data + offset, bytes));
  for (size_t whole = 1536; whole <= 4608; whole += 1536)
    for (size_t bytes = whole - 9; bytes <= whole + 9; bytes++)
      expect(data + bytes % 8, bytes, by_definition(data + bytes % 8, bytes));
  for (size_t whole = 256; whole <= 1280; whole += 256)
    for (size_t bytes = whole - 17; bytes <= whole + 17; bytes++)
      expect(data + bytes % 8, bytes, by_definition(data + bytes % 8, bytes));
  expect(data, 8192, by_definition(data, 8192));
}

int main(void) {
  static const test_case tests[] = {
      {"published values", test_published},
      {"every length and offset", test_lengths},
  };
  RUN(tests);
  return 0;
}
