/* Payloads and their chunks.
 *
 * Blocks are those of ZMOE_Q8 in every dtype, so that the chunks of a shape are
 * the same elements in all of them; they never span two rows, so that a row's
 * encoding does not depend on its neighbours. */
#include "payload.h"

#include <string.h>

size_t zmoe_item_bytes(zmoe_dtype dtype) {
  return dtype == ZMOE_I32 ? 4 : zmoe_dtype_bytes(dtype);
}

static uint64_t blocks_of(uint64_t elements) {
  return (elements + ZMOE_Q8_BLOCK - 1) / ZMOE_Q8_BLOCK;
}

uint64_t zmoe_payload_bytes(zmoe_dtype dtype, uint32_t rows, uint32_t width) {
  uint64_t elements = (uint64_t)rows * width;
  size_t item = zmoe_item_bytes(dtype);
  if (elements > UINT32_MAX || (item == 0 && dtype != ZMOE_Q8))
    return UINT64_MAX;
  return item > 0 ? elements * item : rows * blocks_of(width) * ZMOE_Q8_BLOCK_BYTES;
}

static size_t element_of(uint64_t block, uint32_t width) {
  uint64_t per_row = blocks_of(width);
  return per_row > 0 ? block / per_row * width + block % per_row * ZMOE_Q8_BLOCK : 0;
}

/* Blocks [begin, end) of rows of `width`. */
static zmoe_range range_of(zmoe_dtype dtype, uint32_t width, size_t begin, size_t end) {
  zmoe_range range = {.block = begin, .blocks = end - begin, .element = element_of(begin, width)};
  range.elements = element_of(end, width) - range.element;
  size_t item = zmoe_item_bytes(dtype);
  range.byte = item > 0 ? range.element * item : begin * ZMOE_Q8_BLOCK_BYTES;
  range.bytes = item > 0 ? range.elements * item : range.blocks * ZMOE_Q8_BLOCK_BYTES;
  return range;
}

zmoe_range zmoe_chunk(zmoe_dtype dtype, uint32_t rows, uint32_t width, uint32_t chunks,
                      uint32_t index) {
  uint64_t blocks = rows * blocks_of(width);
  return range_of(dtype, width, blocks * index / chunks, blocks * (index + 1) / chunks);
}

/* A run of blocks has at most one block more than its share of the elements, and
 * a share may be rounded up by one block. */
size_t zmoe_chunk_most(size_t bytes, uint32_t chunks) {
  return bytes / chunks + 2 * ZMOE_Q8_BLOCK * sizeof(float);
}

static size_t bytes_of(zmoe_dtype dtype, size_t blocks, size_t elements) {
  return dtype == ZMOE_Q8 ? blocks * ZMOE_Q8_BLOCK_BYTES : elements * zmoe_item_bytes(dtype);
}

int zmoe_reduce_range(void *out, zmoe_dtype out_dtype, const void *const *parts, uint32_t n_parts,
                      zmoe_dtype part_dtype, uint32_t width, const zmoe_range *range,
                      zmoe_isa isa) {
  int in_blocks = out_dtype == ZMOE_Q8 || part_dtype == ZMOE_Q8;
  if (!in_blocks || width % ZMOE_Q8_BLOCK == 0)
    return zmoe_reduce(out, out_dtype, parts, n_parts, part_dtype, range->elements, isa);
  if (n_parts > ZMOE_MAX_NODES)
    return ZMOE_EINVAL;
  const unsigned char *at[ZMOE_MAX_NODES];
  const void *row[ZMOE_MAX_NODES];
  unsigned char *to = out;
  size_t per_row = blocks_of(width), end = range->block + range->blocks;
  for (uint32_t p = 0; p < n_parts; p++)
    at[p] = parts[p];
  for (size_t block = range->block; block < end;) {
    size_t in_row = block % per_row;
    size_t blocks = per_row - in_row < end - block ? per_row - in_row : end - block;
    size_t left = width - in_row * ZMOE_Q8_BLOCK;
    size_t elements = blocks * ZMOE_Q8_BLOCK < left ? blocks * ZMOE_Q8_BLOCK : left;
    for (uint32_t p = 0; p < n_parts; p++)
      row[p] = at[p];
    int rc = zmoe_reduce(to, out_dtype, row, n_parts, part_dtype, elements, isa);
    if (rc != ZMOE_OK)
      return rc;
    for (uint32_t p = 0; p < n_parts; p++)
      at[p] = at[p] != NULL ? at[p] + bytes_of(part_dtype, blocks, elements) : NULL;
    to += bytes_of(out_dtype, blocks, elements);
    block += blocks;
  }
  return ZMOE_OK;
}

enum { PIECE = 64 }; /* blocks, few enough to stay in the nearest cache */

/* The blocks of `range` from `block` on, a piece at most. */
static zmoe_range piece_of(const zmoe_range *range, zmoe_dtype dtype, uint32_t width,
                           size_t block) {
  size_t end = range->block + range->blocks;
  return range_of(dtype, width, block, end - block < PIECE ? end : block + PIECE);
}

int zmoe_encode_range(void *out, zmoe_dtype out_dtype, const void *src, zmoe_dtype src_dtype,
                      uint32_t width, const zmoe_range *range, uint32_t *checksum, zmoe_isa isa) {
  uint32_t crc = 0;
  int rc = ZMOE_OK;
  size_t end = range->block + range->blocks;
  for (size_t block = range->block; block < end && rc == ZMOE_OK; block += PIECE) {
    zmoe_range piece = piece_of(range, out_dtype, width, block);
    uint8_t *to = (uint8_t *)out + (piece.byte - range->byte);
    size_t before = (piece.element - range->element) * zmoe_item_bytes(src_dtype);
    const void *from = src != NULL ? (const uint8_t *)src + before : NULL;
    int copies = out_dtype == src_dtype && from != NULL;
    if (copies && checksum != NULL)
      crc = zmoe_crc32c_copy(crc, to, from, piece.bytes, isa);
    else if (copies)
      memcpy(to, from, piece.bytes);
    else
      rc = zmoe_reduce_range(to, out_dtype, &from, 1, src_dtype, width, &piece, isa);
    if (!copies && checksum != NULL)
      crc = zmoe_crc32c_go_on(crc, to, piece.bytes, isa);
  }
  if (checksum != NULL)
    *checksum = crc;
  return rc;
}

/* A row's sum must not depend on the rows beside it.  So every algorithm rounds it alike: to
 * what would travel.  And a missing part must add as its zeros would, had other rows made
 * it present: they turn a sum of -0 into 0. */
int zmoe_sum_range(void *out, zmoe_dtype out_dtype, const void *const *parts, uint32_t n_parts,
                   zmoe_dtype part_dtype, uint32_t width, const zmoe_range *range, zmoe_isa isa) {
  static const uint8_t ZEROS[PIECE * ZMOE_Q8_BLOCK * sizeof(float)];
  uint8_t rounded[sizeof ZEROS];
  const void *of_piece[ZMOE_MAX_NODES], *again = rounded;
  int rounds = part_dtype != out_dtype && part_dtype != ZMOE_F32;
  int rc = n_parts > ZMOE_MAX_NODES ? ZMOE_EINVAL : ZMOE_OK;
  size_t end = range->block + range->blocks;
  for (size_t block = range->block; block < end && rc == ZMOE_OK; block += PIECE) {
    zmoe_range piece = piece_of(range, part_dtype, width, block);
    const void *zeros = ZEROS;
    for (uint32_t p = 0; p < n_parts; p++) {
      of_piece[p] = parts[p] != NULL ? (const uint8_t *)parts[p] + piece.byte - range->byte : zeros;
      zeros = parts[p] != NULL ? zeros : NULL;
    }
    size_t element = piece.element - range->element, first = piece.block - range->block;
    void *to = (uint8_t *)out + bytes_of(out_dtype, first, element);
    rc = zmoe_reduce_range(rounds ? rounded : to, rounds ? part_dtype : out_dtype, of_piece,
                           n_parts, part_dtype, width, &piece, isa);
    if (rounds && rc == ZMOE_OK)
      rc = zmoe_reduce_range(to, out_dtype, &again, 1, part_dtype, width, &piece, isa);
  }
  return rc;
}
