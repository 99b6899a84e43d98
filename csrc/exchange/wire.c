/* The frame header.
 *
 *   0 magic "ZMOE"       16 zero       36 source, 2 bytes
 *   4 version, 1 byte    20 step       38 dtype, kind: 1 byte each
 *   5 zero, 3 bytes      24 layer      40 payload_bytes
 *   8 session, 8 bytes   28 rows       44 micro_batch, chunks, chunk, busiest: 1 byte each
 *                        32 width      48 digest, 8 bytes
 *                                      56 checksum of the payload
 *                                      60 checksum of 0..59
 *
 * Little-endian throughout; numbers of 4 bytes where nothing is said.  Both checksums
 * are CRC-32C.  The first 16 bytes are what a rank subscribes to:
 * whatever is published in its own session. */
#include "payload.h"

#include <string.h>

enum { CHECKSUM_AT = ZMOE_HEADER_BYTES - 4 };

static const uint8_t MAGIC[4] = {'Z', 'M', 'O', 'E'};

static void put16(uint8_t *at, uint16_t value) {
  at[0] = (uint8_t)value;
  at[1] = (uint8_t)(value >> 8);
}

static void put32(uint8_t *at, uint32_t value) {
  put16(at, (uint16_t)value);
  put16(at + 2, (uint16_t)(value >> 16));
}

static void put64(uint8_t *at, uint64_t value) {
  put32(at, (uint32_t)value);
  put32(at + 4, (uint32_t)(value >> 32));
}

static uint16_t get16(const uint8_t *at) {
  return (uint16_t)(at[0] | at[1] << 8);
}

static uint32_t get32(const uint8_t *at) {
  return get16(at) | (uint32_t)get16(at + 2) << 16;
}

static uint64_t get64(const uint8_t *at) {
  return get32(at) | (uint64_t)get32(at + 4) << 32;
}

static uint32_t checksum_of(const uint8_t *header) {
  return zmoe_crc32c(header, CHECKSUM_AT, zmoe_isa_best());
}

void zmoe_wire_encode(const zmoe_header *header, uint8_t out[ZMOE_HEADER_BYTES]) {
  memset(out, 0, ZMOE_HEADER_BYTES);
  memcpy(out, MAGIC, sizeof MAGIC);
  out[4] = ZMOE_WIRE_VERSION;
  put64(out + 8, header->session);
  put32(out + 20, header->step);
  put32(out + 24, header->layer);
  put32(out + 28, header->rows);
  put32(out + 32, header->width);
  put16(out + 36, header->source);
  out[38] = header->dtype;
  out[39] = header->kind;
  put32(out + 40, header->payload_bytes);
  out[44] = header->micro_batch;
  out[45] = header->chunks;
  out[46] = header->chunk;
  out[47] = header->busiest;
  put64(out + 48, header->digest);
  put32(out + CHECKSUM_AT - 4, header->payload_checksum);
  put32(out + CHECKSUM_AT, checksum_of(out));
}

void zmoe_wire_presence(uint64_t session, uint32_t rank, uint8_t out[ZMOE_PRESENCE_BYTES]) {
  memset(out, 0, ZMOE_PRESENCE_BYTES);
  memcpy(out, MAGIC, sizeof MAGIC);
  out[4] = ZMOE_WIRE_VERSION;
  out[5] = 0xff; /* zero in a frame: none begins like this */
  put64(out + 8, session);
  put16(out + 16, (uint16_t)rank);
}

static int chunk_is_valid(const zmoe_header *header) {
  if (header->chunks == 0)
    return header->chunk == 0 && header->kind != ZMOE_KIND_SUM;
  return header->kind != ZMOE_KIND_ROWS && header->chunks <= ZMOE_MAX_NODES &&
         header->chunk < header->chunks;
}

static int sizes_agree(const zmoe_header *header) {
  if (header->payload_bytes == 0)
    return header->payload_checksum == 0 && (header->kind != ZMOE_KIND_ROWS || header->rows == 0);
  zmoe_dtype dtype = (zmoe_dtype)header->dtype;
  uint64_t bytes = zmoe_payload_bytes(dtype, header->rows, header->width);
  if (bytes == UINT64_MAX)
    return 0;
  if (header->kind == ZMOE_KIND_ROWS)
    return bytes <= header->payload_bytes && (header->payload_bytes - bytes) % ZMOE_PAIR_BYTES == 0;
  if (header->kind != ZMOE_KIND_PARTIAL && header->kind != ZMOE_KIND_SUM)
    return 0;
  if (header->chunks > 0)
    bytes = zmoe_chunk(dtype, header->rows, header->width, header->chunks, header->chunk).bytes;
  return bytes == header->payload_bytes;
}

static int fields_are_valid(const uint8_t *at, const zmoe_header *header) {
  int reserved_is_zero = at[5] == 0 && get16(at + 6) == 0 && get32(at + 16) == 0;
  int only_rows = header->kind == ZMOE_KIND_ROWS || header->busiest == 0;
  return reserved_is_zero && only_rows && header->kind >= ZMOE_KIND_PARTIAL &&
         header->kind <= ZMOE_KIND_ROWS &&
         zmoe_payload_bytes((zmoe_dtype)header->dtype, 0, 0) == 0 &&
         header->source < ZMOE_MAX_NODES && chunk_is_valid(header) && sizes_agree(header);
}

zmoe_wire_error zmoe_wire_decode(const void *frame, size_t frame_bytes, size_t max_payload_bytes,
                                 zmoe_header *out) {
  const uint8_t *at = frame;
  if (frame_bytes < ZMOE_HEADER_BYTES)
    return ZMOE_WIRE_SHORT;
  if (memcmp(at, MAGIC, sizeof MAGIC) != 0)
    return ZMOE_WIRE_MAGIC;
  if (at[4] != ZMOE_WIRE_VERSION)
    return ZMOE_WIRE_VERSION_MISMATCH;
  if (get32(at + CHECKSUM_AT) != checksum_of(at))
    return ZMOE_WIRE_CHECKSUM;
  zmoe_header header = {
      .kind = at[39],
      .dtype = at[38],
      .source = get16(at + 36),
      .session = get64(at + 8),
      .step = get32(at + 20),
      .layer = get32(at + 24),
      .rows = get32(at + 28),
      .width = get32(at + 32),
      .payload_bytes = get32(at + 40),
      .micro_batch = at[44],
      .chunks = at[45],
      .chunk = at[46],
      .busiest = at[47],
      .digest = get64(at + 48),
      .payload_checksum = get32(at + CHECKSUM_AT - 4),
  };
  if (!fields_are_valid(at, &header))
    return ZMOE_WIRE_FIELD;
  size_t body_bytes = frame_bytes - ZMOE_HEADER_BYTES;
  if (header.payload_bytes > max_payload_bytes || body_bytes > header.payload_bytes)
    return ZMOE_WIRE_OVERSIZED;
  if (body_bytes < header.payload_bytes)
    return ZMOE_WIRE_SHORT;
  *out = header;
  return ZMOE_WIRE_OK;
}
