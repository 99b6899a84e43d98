/* The sum in chunks: rank c adds up chunk c of all partials and publishes it, so
 * that a rank sends and receives 2 (N - 1) / N payloads instead of N - 1.
 *
 * The chunk of the sum travels encoded as the partials do, and every rank takes it
 * as it travels, its owner too.  Where each rank adds whole partials for itself, it
 * rounds the sum just so (zmoe_sum_range): the bits are the same.
 *
 * A slot holds the chunks one after the other, each behind its header. */
#include "common/platform.h"

#include "exchange_internal.h"

#include <assert.h>

static zmoe_range range_of(const zmoe_header *header, uint32_t chunk) {
  return zmoe_chunk((zmoe_dtype)header->dtype, header->rows, header->width, header->chunks, chunk);
}

size_t zmoe_scatter_slot_bytes(size_t payload_bytes, uint32_t chunks) {
  return payload_bytes + (size_t)(chunks - 1) * ZMOE_HEADER_BYTES;
}

zmoe_held zmoe_scatter_partial(const zmoe_collective *collective, uint32_t chunk) {
  zmoe_range range = range_of(&collective->header, chunk);
  int empty = collective->header.payload_bytes == 0;
  zmoe_held held = {.slot = collective->partial, .header = collective->header};
  held.header.chunk = (uint8_t)chunk;
  held.header.payload_bytes = empty ? 0 : (uint32_t)range.bytes;
  held.frame = (uint8_t *)zmoe_slot_payload(collective->partial) - ZMOE_HEADER_BYTES +
               (empty ? 0 : range.byte) + (size_t)chunk * ZMOE_HEADER_BYTES;
  return held;
}

zmoe_held zmoe_scatter_own_sum(const zmoe_exchange *ex, const zmoe_collective *collective) {
  zmoe_held held = {.slot = collective->sum, .header = collective->header};
  held.header.kind = ZMOE_KIND_SUM;
  held.header.chunk = (uint8_t)ex->rank;
  held.header.payload_bytes = collective->sum_bytes;
  held.frame = (uint8_t *)zmoe_slot_payload(collective->sum) - ZMOE_HEADER_BYTES;
  return held;
}

int zmoe_scatter_encode(zmoe_exchange *ex, zmoe_collective *collective, const void *src,
                        zmoe_dtype src_dtype) {
  const zmoe_header *header = &collective->header;
  size_t item = zmoe_dtype_bytes(src_dtype);
  for (uint32_t c = 0; c < ex->nodes; c++) {
    zmoe_held held = zmoe_scatter_partial(collective, c);
    zmoe_range range = range_of(header, c);
    const void *part = src != NULL ? (const uint8_t *)src + range.element * item : NULL;
    int rc = zmoe_held_fill(ex, &held, part, src_dtype, &range);
    if (rc != ZMOE_OK)
      return rc;
  }
  return ZMOE_OK;
}

int zmoe_scatter_send(zmoe_exchange *ex, const zmoe_collective *collective) {
  /* Each rank begins with the one after it: nobody is sent all at once. */
  for (uint32_t i = 1; i < ex->nodes; i++) {
    uint32_t to = (ex->rank + i) % ex->nodes;
    zmoe_held held = zmoe_scatter_partial(collective, to);
    int error = zmoe_peers_send_to(ex, to, &held);
    if (error != 0)
      return error;
  }
  return 0;
}

static const void *body_of_held(const zmoe_held *held) {
  return held->header.payload_bytes > 0 ? held->frame + ZMOE_HEADER_BYTES : NULL;
}

void zmoe_scatter_sum(zmoe_exchange *ex, uint64_t index) {
  zmoe_collective *collective = zmoe_collective_at(ex, index);
  zmoe_dtype dtype = (zmoe_dtype)collective->header.dtype;
  zmoe_range range = range_of(&collective->header, ex->rank);
  zmoe_held own = zmoe_scatter_partial(collective, ex->rank);
  const void *parts[ZMOE_MAX_NODES], *some = NULL;
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_frame *frame = &ex->peers[r].partials[index % ZMOE_WINDOW];
    parts[r] = r == ex->rank ? body_of_held(&own) : zmoe_frame_body(frame);
    some = parts[r] != NULL ? parts[r] : some;
  }
  if (some != NULL) {
    collective->sum_bytes = (uint32_t)range.bytes;
    int rc = zmoe_sum_range(zmoe_slot_payload(collective->sum), dtype, parts, ex->nodes, dtype,
                            collective->header.width, &range, ex->isa);
    assert(rc == ZMOE_OK);
    (void)rc;
  }
  for (uint32_t r = 0; r < ex->nodes; r++)
    zmoe_frame_drop(&ex->peers[r].partials[index % ZMOE_WINDOW]);
  zmoe_held sum = zmoe_scatter_own_sum(ex, collective);
  zmoe_held_encode(ex, &sum);
  collective->sent_at_us = zmoe_now_us();
  int error = zmoe_peers_send(ex, ex->xpub, &sum);
  if (error != 0)
    ex->zmq_errno = error;
}

int zmoe_scatter_gather(zmoe_exchange *ex, uint64_t index, void *out, zmoe_dtype out_dtype) {
  zmoe_collective *collective = zmoe_collective_at(ex, index);
  zmoe_held own = zmoe_scatter_own_sum(ex, collective);
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_range range = range_of(&collective->header, r);
    zmoe_frame *frame = &ex->peers[r].sums[index % ZMOE_WINDOW];
    const void *sum = r == ex->rank ? body_of_held(&own) : zmoe_frame_body(frame);
    uint8_t *to = (uint8_t *)out + range.element * zmoe_dtype_bytes(out_dtype);
    int rc = zmoe_reduce_range(to, out_dtype, &sum, 1, (zmoe_dtype)collective->header.dtype,
                               collective->header.width, &range, ex->isa);
    if (rc != ZMOE_OK)
      return rc;
  }
  return ZMOE_OK;
}
