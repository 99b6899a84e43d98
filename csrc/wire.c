/* The frame header.
 *
 *   0 magic "ZMOE"       16 epoch      36 source, 2 bytes
 *   4 version, 1 byte    20 step       38 dtype, 1 byte, then 1 of zero
 *   5 kind, 1 byte       24 layer      40 payload_bytes, then 4 of zero
 *   6 zero, 2 bytes      28 rows       48 digest, 8 bytes
 *   8 session, 8 bytes   32 width      56 checksum of 0..55, 8 bytes
 *
 * Little-endian throughout.  The first 16 bytes are what a rank subscribes to:
 * partial outputs of its own session. */
#include "zmoe.h"

#include <string.h>

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

void zmoe_wire_encode(const zmoe_header *header, uint8_t out[ZMOE_HEADER_BYTES]) {
  memset(out, 0, ZMOE_HEADER_BYTES);
  memcpy(out, MAGIC, sizeof MAGIC);
  out[4] = ZMOE_WIRE_VERSION;
  out[5] = header->kind;
  put64(out + 8, header->session);
  put32(out + 16, header->epoch);
  put32(out + 20, header->step);
  put32(out + 24, header->layer);
  put32(out + 28, header->rows);
  put32(out + 32, header->width);
  put16(out + 36, header->source);
  out[38] = header->dtype;
  put32(out + 40, header->payload_bytes);
  put64(out + 48, header->digest);
  put64(out + 56, zmoe_digest(out, 56));
}

void zmoe_wire_presence(uint64_t session, uint32_t rank, uint8_t out[ZMOE_PRESENCE_BYTES]) {
  memset(out, 0, ZMOE_PRESENCE_BYTES);
  memcpy(out, MAGIC, sizeof MAGIC);
  out[4] = ZMOE_WIRE_VERSION;
  out[5] = 0xff; /* no kind: no frame begins like this */
  put64(out + 8, session);
  put16(out + 16, (uint16_t)rank);
}

static int sizes_agree(const zmoe_header *header) {
  int is_rows = header->kind == ZMOE_KIND_ROWS;
  if (header->payload_bytes == 0)
    return !is_rows || header->rows == 0;
  if (header->kind != ZMOE_KIND_PARTIAL && !is_rows)
    return 0;
  uint64_t elements = (uint64_t)header->rows * header->width;
  uint64_t bytes = elements * zmoe_dtype_bytes((zmoe_dtype)header->dtype);
  if (elements > UINT32_MAX || bytes > header->payload_bytes)
    return 0;
  uint64_t more = header->payload_bytes - bytes;
  return is_rows ? more % ZMOE_PAIR_BYTES == 0 : more == 0;
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
  if (get64(at + 56) != zmoe_digest(at, 56))
    return ZMOE_WIRE_CHECKSUM;
  zmoe_header header = {
      .kind = at[5],
      .dtype = at[38],
      .source = get16(at + 36),
      .session = get64(at + 8),
      .epoch = get32(at + 16),
      .step = get32(at + 20),
      .layer = get32(at + 24),
      .rows = get32(at + 28),
      .width = get32(at + 32),
      .payload_bytes = get32(at + 40),
      .digest = get64(at + 48),
  };
  if (get16(at + 6) != 0 || at[39] != 0 || get32(at + 44) != 0 || header.kind < ZMOE_KIND_PARTIAL ||
      header.kind > ZMOE_KIND_ROWS || zmoe_dtype_bytes((zmoe_dtype)header.dtype) == 0 ||
      header.source >= ZMOE_MAX_NODES || !sizes_agree(&header))
    return ZMOE_WIRE_FIELD;
  size_t body_bytes = frame_bytes - ZMOE_HEADER_BYTES;
  if (header.payload_bytes > max_payload_bytes || body_bytes > header.payload_bytes)
    return ZMOE_WIRE_OVERSIZED;
  if (body_bytes < header.payload_bytes)
    return ZMOE_WIRE_SHORT;
  *out = header;
  return ZMOE_WIRE_OK;
}
