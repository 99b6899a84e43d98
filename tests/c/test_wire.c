/* The frame header: what is accepted, and how each kind of damage is named. */
#include "check.h"

#include <string.h>

#include "exchange/exchange.h"

enum { MAX_PAYLOAD = 1024 };

static const zmoe_header SAMPLE = {
    .kind = ZMOE_KIND_PARTIAL,
    .dtype = ZMOE_BF16,
    .source = 3,
    .session = 0x1122334455667788u,
    .step = 0x01020304,
    .layer = 39,
    .rows = 2,
    .width = 5,
    .payload_bytes = 20,
    .micro_batch = 1,
    .digest = 0xfedcba9876543210u,
    .payload_checksum = 0x0badcafe,
};

static zmoe_wire_error decode(const zmoe_header *header, size_t frame_bytes, zmoe_header *out) {
  uint8_t frame[ZMOE_HEADER_BYTES + 2 * MAX_PAYLOAD] = {0};
  zmoe_wire_encode(header, frame);
  return zmoe_wire_decode(frame, frame_bytes, MAX_PAYLOAD, out);
}

static void test_round_trip(void) {
  zmoe_header out;
  CHECK_EQUAL(decode(&SAMPLE, ZMOE_HEADER_BYTES + 20, &out), ZMOE_WIRE_OK);
  CHECK(out.kind == SAMPLE.kind && out.dtype == SAMPLE.dtype && out.source == SAMPLE.source);
  CHECK(out.session == SAMPLE.session && out.step == SAMPLE.step);
  CHECK(out.layer == SAMPLE.layer && out.rows == SAMPLE.rows && out.width == SAMPLE.width);
  CHECK(out.payload_bytes == SAMPLE.payload_bytes && out.digest == SAMPLE.digest);
  CHECK(out.payload_checksum == SAMPLE.payload_checksum);
  CHECK(out.micro_batch == SAMPLE.micro_batch && out.chunks == 0 && out.chunk == 0);
}

/* The bytes on the wire are a promise between machines: fixed for a version. */
static void test_golden_bytes(void) {
  static const uint8_t golden[60] = {
      'Z',  'M', 'O', 'E',  3,    0,    0,    0,    0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22,
      0x11, 0,   0,   0,    0,    4,    3,    2,    1,    39,   0,    0,    0,    2,    0,
      0,    0,   5,   0,    0,    0,    3,    0,    2,    1,    20,   0,    0,    0,    1,
      0,    0,   0,   0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, 0xfe, 0xca, 0xad, 0x0b,
  };
  uint8_t frame[ZMOE_HEADER_BYTES];
  zmoe_wire_encode(&SAMPLE, frame);
  CHECK(memcmp(frame, golden, sizeof golden) == 0);
  uint32_t checksum = zmoe_crc32c(golden, sizeof golden, ZMOE_ISA_GENERIC);
  for (int i = 0; i < 4; i++)
    CHECK_EQUAL(frame[60 + i], (checksum >> (8 * i)) & 0xff);
}

static void test_lengths(void) {
  zmoe_header out, big = SAMPLE;
  CHECK_EQUAL(decode(&SAMPLE, 0, &out), ZMOE_WIRE_SHORT);
  CHECK_EQUAL(decode(&SAMPLE, ZMOE_HEADER_BYTES - 1, &out), ZMOE_WIRE_SHORT);
  CHECK_EQUAL(decode(&SAMPLE, ZMOE_HEADER_BYTES + 19, &out), ZMOE_WIRE_SHORT);
  CHECK_EQUAL(decode(&SAMPLE, ZMOE_HEADER_BYTES + 21, &out), ZMOE_WIRE_OVERSIZED);
  big.rows = 1, big.width = MAX_PAYLOAD, big.payload_bytes = 2 * MAX_PAYLOAD;
  CHECK_EQUAL(decode(&big, ZMOE_HEADER_BYTES + 2 * MAX_PAYLOAD, &out), ZMOE_WIRE_OVERSIZED);
  zmoe_header zeros = SAMPLE;
  zeros.payload_bytes = 0; /* all zeros: the shape stays */
  CHECK_EQUAL(decode(&zeros, ZMOE_HEADER_BYTES, &out), ZMOE_WIRE_FIELD);
  zeros.payload_checksum = 0;
  CHECK_EQUAL(decode(&zeros, ZMOE_HEADER_BYTES, &out), ZMOE_WIRE_OK);
  CHECK_EQUAL(out.rows, 2);
}

static void test_every_flipped_bit_is_noticed(void) {
  uint8_t frame[ZMOE_HEADER_BYTES + 20] = {0};
  zmoe_header out;
  for (size_t bit = 0; bit < 8 * ZMOE_HEADER_BYTES; bit++) {
    zmoe_wire_encode(&SAMPLE, frame);
    frame[bit / 8] ^= (uint8_t)(1u << bit % 8);
    zmoe_wire_error error = zmoe_wire_decode(frame, sizeof frame, MAX_PAYLOAD, &out);
    zmoe_wire_error expected = bit < 32   ? ZMOE_WIRE_MAGIC
                               : bit < 40 ? ZMOE_WIRE_VERSION_MISMATCH
                                          : ZMOE_WIRE_CHECKSUM;
    CHECK_EQUAL(error, expected);
  }
}

static void test_fields(void) {
  zmoe_header out, bad;
  bad = SAMPLE, bad.kind = 0;
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + 20, &out), ZMOE_WIRE_FIELD);
  bad = SAMPLE, bad.kind = ZMOE_KIND_ROWS + 1;
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + 20, &out), ZMOE_WIRE_FIELD);
  bad = SAMPLE, bad.dtype = 4;
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + 20, &out), ZMOE_WIRE_FIELD);
  bad = SAMPLE, bad.source = ZMOE_MAX_NODES;
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + 20, &out), ZMOE_WIRE_FIELD);
  bad = SAMPLE, bad.width = 6;
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + 20, &out), ZMOE_WIRE_FIELD);
  bad = SAMPLE, bad.kind = ZMOE_KIND_RESEND; /* carries no payload */
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + 20, &out), ZMOE_WIRE_FIELD);
  /* These many elements of 4 bytes are 4 bytes modulo 2^64. */
  bad = SAMPLE, bad.dtype = ZMOE_F32, bad.payload_bytes = 4;
  bad.rows = (1u << 31) - (1u << 16) + 1, bad.width = (1u << 31) + (1u << 16) + 1;
  CHECK_EQUAL((uint64_t)bad.rows * bad.width * 4, 4);
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + 4, &out), ZMOE_WIRE_FIELD);
}

static void expect_field(zmoe_header bad) {
  zmoe_header out;
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + bad.payload_bytes, &out), ZMOE_WIRE_FIELD);
}

/* Of 2 rows of 3 blocks each (32, 32 and 6 elements). */
static void test_chunks(void) {
  zmoe_header header = SAMPLE, bad, out;
  header.width = 70, header.chunks = 4;
  static const uint32_t blocks[] = {1, 2, 1, 2}, elements[] = {32, 38, 32, 38};
  for (uint8_t c = 0; c < 4; c++) {
    header.chunk = c;
    for (int sum = 0; sum < 2; sum++) {
      header.kind = sum ? ZMOE_KIND_SUM : ZMOE_KIND_PARTIAL;
      header.dtype = ZMOE_BF16, header.payload_bytes = 2 * elements[c];
      CHECK_EQUAL(decode(&header, ZMOE_HEADER_BYTES + header.payload_bytes, &out), ZMOE_WIRE_OK);
      CHECK(out.chunks == 4 && out.chunk == c);
      header.dtype = ZMOE_Q8, header.payload_bytes = ZMOE_Q8_BLOCK_BYTES * blocks[c];
      CHECK_EQUAL(decode(&header, ZMOE_HEADER_BYTES + header.payload_bytes, &out), ZMOE_WIRE_OK);
    }
  }
  bad = header, bad.payload_bytes += 2;
  expect_field(bad);
  bad = header, bad.chunk = 4;
  expect_field(bad);
  bad = header, bad.chunks = ZMOE_MAX_NODES + 1;
  expect_field(bad);
  bad = header, bad.chunks = 0, bad.chunk = 0; /* a sum is a chunk */
  expect_field(bad);
  bad = SAMPLE, bad.chunk = 1; /* of nothing */
  expect_field(bad);
  bad = SAMPLE, bad.dtype = ZMOE_Q8, bad.payload_bytes = 2 * 5; /* one block a row */
  expect_field(bad);
  bad.payload_bytes = 2 * ZMOE_Q8_BLOCK_BYTES;
  CHECK_EQUAL(decode(&bad, ZMOE_HEADER_BYTES + bad.payload_bytes, &out), ZMOE_WIRE_OK);
}

/* What a later version may use must be zero in this one. */
static void test_reserved_bytes(void) {
  static const int reserved[] = {5, 6, 7, 47};
  zmoe_header out;
  for (size_t i = 0; i < sizeof reserved / sizeof *reserved; i++) {
    uint8_t frame[ZMOE_HEADER_BYTES + 20] = {0};
    zmoe_wire_encode(&SAMPLE, frame);
    frame[reserved[i]] = 1;
    uint32_t checksum = zmoe_crc32c(frame, 60, ZMOE_ISA_GENERIC);
    for (int b = 0; b < 4; b++)
      frame[60 + b] = (uint8_t)(checksum >> (8 * b));
    CHECK_EQUAL(zmoe_wire_decode(frame, sizeof frame, MAX_PAYLOAD, &out), ZMOE_WIRE_FIELD);
  }
}

static void test_presence(void) {
  uint8_t a[ZMOE_PRESENCE_BYTES], b[ZMOE_PRESENCE_BYTES], frame[ZMOE_HEADER_BYTES];
  zmoe_wire_presence(SAMPLE.session, 3, a);
  zmoe_wire_presence(SAMPLE.session, 4, b);
  CHECK(memcmp(a, b, sizeof a) != 0);
  zmoe_wire_presence(SAMPLE.session + 1, 3, b);
  CHECK(memcmp(a, b, sizeof a) != 0);
  zmoe_wire_encode(&SAMPLE, frame);
  CHECK(memcmp(a, frame, ZMOE_TOPIC_BYTES) != 0);
}

int main(void) {
  static const test_case tests[] = {
      {"a header survives encoding and decoding", test_round_trip},
      {"the bytes of version 3 are fixed", test_golden_bytes},
      {"too short and too long frames", test_lengths},
      {"every flipped bit is noticed", test_every_flipped_bit_is_noticed},
      {"unknown kinds and dtypes, contradicting sizes", test_fields},
      {"chunks", test_chunks},
      {"reserved bytes", test_reserved_bytes},
      {"presences differ by session and rank, and from frames", test_presence},
  };
  RUN(tests);
  return 0;
}
