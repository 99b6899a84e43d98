/* The centralised schedule: rows out, partial sums back.
 *
 * A frame for each worker, which holds only the rows that it has experts for,
 * and for those the pairs (row, expert, weight) that are its own to compute.  So
 * a worker needs to know nothing of routing or of other owners, and its answer is
 * as small.  Lock-step is that of the exchange: the leader's rows of one layer
 * show a worker that its answer to the layer before has arrived, and the answers
 * show the leader that its rows have. */
#include "platform.h"

#include "exchange_internal.h"

#include <string.h>

void zmoe_central_release(zmoe_exchange *ex) {
  for (uint32_t r = 0; r < ex->nodes; r++)
    zmoe_held_release(&ex->peers[r].rows);
}

/* ---- the leader: scatter --------------------------------------------------- */

/* Notes which ranks need each row. */
static void note_ranks(zmoe_exchange *ex, const zmoe_routed *routed) {
  for (uint32_t i = 0; i < routed->rows; i++) {
    const uint64_t *ranks = routed->ranks + (size_t)i * routed->top_k;
    ex->touched[i] = 0;
    for (uint32_t k = 0; k < routed->top_k; k++)
      ex->touched[i] |= ranks[k];
  }
}

static void count_for(const zmoe_exchange *ex, const zmoe_routed *routed, uint32_t rank,
                      uint32_t *rows, size_t *pairs) {
  *rows = 0;
  *pairs = 0;
  for (uint32_t i = 0; i < routed->rows; i++)
    *rows += (ex->touched[i] >> rank) & 1;
  for (size_t p = 0; p < (size_t)routed->rows * routed->top_k; p++)
    *pairs += (routed->ranks[p] >> rank) & 1;
}

static void fill(const zmoe_exchange *ex, const zmoe_routed *routed, uint32_t rank, size_t pairs,
                 void *payload) {
  int32_t *pair_rows = payload, *pair_experts = pair_rows + pairs;
  float *pair_weights = (float *)(pair_experts + pairs);
  uint8_t *to = (uint8_t *)(pair_weights + pairs);
  size_t row_bytes = routed->width * zmoe_dtype_bytes(routed->x_dtype);
  int32_t row = 0;
  for (uint32_t i = 0; i < routed->rows; i++) {
    if (!(ex->touched[i] & zmoe_bit(rank)))
      continue;
    memcpy(to, (const uint8_t *)routed->x + i * row_bytes, row_bytes);
    to += row_bytes;
    for (size_t p = (size_t)i * routed->top_k; p < ((size_t)i + 1) * routed->top_k; p++) {
      if (!(routed->ranks[p] & zmoe_bit(rank)))
        continue;
      *pair_rows++ = row;
      *pair_experts++ = routed->ids[p];
      *pair_weights++ = routed->weights[p];
    }
    row++;
  }
}

/* The frame of one worker, held but not sent yet. */
static int prepare(zmoe_exchange *ex, const zmoe_routed *routed, const zmoe_header *answer,
                   uint32_t rank, uint64_t deadline_us) {
  zmoe_held *held = &ex->peers[rank].rows;
  zmoe_header *header = &held->header;
  uint32_t rows;
  size_t pairs;
  count_for(ex, routed, rank, &rows, &pairs);
  *header = *answer;
  header->kind = ZMOE_KIND_ROWS;
  header->dtype = (uint8_t)routed->x_dtype;
  header->rows = rows;
  size_t bytes =
      (size_t)rows * routed->width * zmoe_dtype_bytes(routed->x_dtype) + pairs * ZMOE_PAIR_BYTES;
  if (bytes > ex->max_payload_bytes)
    return ZMOE_EINVAL;
  header->payload_bytes = (uint32_t)bytes;
  int rc = zmoe_exchange_slot(ex, bytes, deadline_us, &held->slot);
  if (rc != ZMOE_OK)
    return rc;
  fill(ex, routed, rank, pairs, zmoe_slot_payload(held->slot));
  zmoe_wire_encode(header, (uint8_t *)zmoe_slot_payload(held->slot) - ZMOE_HEADER_BYTES);
  return ZMOE_OK;
}

static int comes_next(const zmoe_exchange *ex, zmoe_key key) {
  return !ex->collecting && !ex->answering && (!ex->started || zmoe_key_compare(key, ex->now) > 0);
}

int zmoe_exchange_scatter(zmoe_exchange *ex, const zmoe_routed *routed, uint32_t step,
                          uint32_t layer, uint64_t digest, uint64_t deadline_us,
                          zmoe_fault *fault) {
  zmoe_header answer; /* as a whole: of all rows */
  int rc = zmoe_header_make(ex, step, layer, routed->rows, routed->width, routed->wire_dtype,
                            digest, &answer);
  if (ex->role != ZMOE_LEADER || routed->rows > ex->scatter_rows ||
      zmoe_dtype_bytes(routed->x_dtype) == 0 || !comes_next(ex, zmoe_key_of(&answer)))
    rc = ZMOE_EINVAL;
  if (rc == ZMOE_OK) {
    zmoe_central_release(ex);
    note_ranks(ex, routed);
  }
  for (uint32_t r = 1; r < ex->nodes && rc == ZMOE_OK; r++)
    rc = prepare(ex, routed, &answer, r, deadline_us);
  if (rc == ZMOE_OK) {
    zmoe_advance(ex, NULL, &answer);
    /* What a broken link loses is asked for again. */
    for (uint32_t r = 1; r < ex->nodes; r++)
      zmoe_links_send_to(ex, &ex->peers[r], &ex->peers[r].rows);
    zmoe_intake_promote(ex);
  } else if (ex->role == ZMOE_LEADER && !ex->collecting) {
    zmoe_central_release(ex);
  }
  zmoe_fault_set(ex, 0, fault);
  return rc;
}

/* ---- a worker: receive ------------------------------------------------------- */

/* Into `out` what the frame holds; 0 when it is not to be trusted. */
static int take_pairs(const uint8_t *at, zmoe_received *out) {
  size_t bytes = (size_t)out->pairs * 4;
  memcpy(out->pair_rows, at, bytes);
  memcpy(out->pair_experts, at + bytes, bytes);
  memcpy(out->pair_weights, at + 2 * bytes, bytes);
  uint32_t first = 0; /* pair of this row */
  for (uint32_t i = 0; i < out->pairs; i++) {
    int32_t row = out->pair_rows[i], expert = out->pair_experts[i];
    if (row < 0 || (uint32_t)row >= out->rows || row < out->pair_rows[first] || expert < 0 ||
        (uint32_t)expert >= out->experts)
      return 0;
    if (row > out->pair_rows[first])
      first = i;
    for (uint32_t j = first; j < i; j++)
      if (out->pair_experts[j] == expert)
        return 0;
  }
  return 1;
}

/* From expert ids to this rank's numbers; 0 for one that is another's. */
static int renumber(zmoe_received *out) {
  for (uint32_t i = 0; i < out->pairs; i++) {
    out->pair_experts[i] = out->local[out->pair_experts[i]];
    if (out->pair_experts[i] < 0)
      return 0;
  }
  return 1;
}

static int take_rows(zmoe_exchange *ex, zmoe_received *out) {
  zmoe_frame *frame = &ex->peers[0].now;
  const zmoe_header *header = &frame->header;
  size_t x_bytes =
      (size_t)header->rows * header->width * zmoe_dtype_bytes((zmoe_dtype)header->dtype);
  size_t pairs =
      header->payload_bytes == 0 ? 0 : (header->payload_bytes - x_bytes) / ZMOE_PAIR_BYTES;
  if (x_bytes > out->x_bytes || pairs > out->max_pairs)
    return 0;
  const uint8_t *at = (const uint8_t *)zmoe_zmq.msg_data(&frame->message) + ZMOE_HEADER_BYTES;
  out->rows = header->rows;
  out->width = header->width;
  out->dtype = (zmoe_dtype)header->dtype;
  out->digest = header->digest;
  out->pairs = (uint32_t)pairs;
  if (!take_pairs(at, out))
    return 0;
  if (x_bytes > 0)
    memcpy(out->x, at + pairs * ZMOE_PAIR_BYTES, x_bytes);
  return 1;
}

/* Waits until rows have come that can be trusted. */
static int wait_for_rows(zmoe_exchange *ex, zmoe_received *out, uint64_t deadline_us,
                         uint64_t *lost) {
  uint64_t until_us = zmoe_later_us(zmoe_now_us(), deadline_us);
  for (;;) {
    uint64_t now_us = zmoe_now_us();
    int rc = zmoe_wait_for_all(ex, until_us > now_us ? until_us - now_us : 0, lost);
    if (rc != ZMOE_OK || take_rows(ex, out))
      return rc;
    ex->stats.bad_field++;
    ex->missing = zmoe_bit(0);
    zmoe_frame_drop(&ex->peers[0].now);
  }
}

int zmoe_exchange_receive(zmoe_exchange *ex, zmoe_received *out, uint32_t step, uint32_t layer,
                          uint64_t deadline_us, zmoe_fault *fault) {
  uint64_t lost = 0;
  zmoe_header awaited = {.kind = ZMOE_KIND_ROWS, .session = ex->session, .epoch = ex->epoch};
  awaited.source = (uint16_t)ex->rank;
  awaited.step = step;
  awaited.layer = layer;
  zmoe_key key = zmoe_key_of(&awaited);
  int goes_on = ex->collecting && zmoe_key_compare(key, ex->now) == 0;
  int rc = ex->role == ZMOE_WORKER && (goes_on || comes_next(ex, key)) ? ZMOE_OK : ZMOE_EINVAL;
  if (rc == ZMOE_OK && !goes_on) {
    zmoe_advance(ex, NULL, &awaited);
    ex->missing = zmoe_bit(0);
    zmoe_intake_promote(ex);
  }
  if (rc == ZMOE_OK)
    rc = wait_for_rows(ex, out, deadline_us, &lost);
  if (rc == ZMOE_OK && !renumber(out)) {
    zmoe_set_diverged(ex, &ex->peers[0].now.header);
    rc = ZMOE_EDIVERGED;
  }
  if (rc == ZMOE_OK) {
    ex->held[0].header = ex->peers[0].now.header; /* what the answer must be like */
    zmoe_frame_drop(&ex->peers[0].now);
    ex->collecting = 0;
    ex->answering = 1;
  } else {
    zmoe_fault_set(ex, lost, fault);
  }
  return rc;
}

/* ---- both: publish ------------------------------------------------------------ */

int zmoe_central_publish(zmoe_exchange *ex, zmoe_slot *slot, const zmoe_header *header) {
  const zmoe_header *expected = &ex->held[0].header;
  int is_due = ex->role == ZMOE_WORKER ? ex->answering : ex->collecting;
  if (!is_due || ex->held[0].slot != NULL || header->rows != expected->rows ||
      zmoe_key_compare(zmoe_key_of(header), ex->now) != 0 || header->width != expected->width ||
      header->digest != expected->digest ||
      (ex->role == ZMOE_LEADER && header->dtype != expected->dtype))
    return ZMOE_EINVAL;
  ex->held[0] = (zmoe_held){slot, *header};
  if (ex->role == ZMOE_LEADER)
    return ZMOE_OK;
  zmoe_wire_encode(header, (uint8_t *)zmoe_slot_payload(slot) - ZMOE_HEADER_BYTES);
  ex->published_at_us = zmoe_now_us();
  ex->answering = 0;
  ex->stats.exchanges++;
  (void)zmoe_links_send(ex, ex->peers[0].dealer, &ex->held[0]); /* or it is asked for again */
  return ZMOE_OK;
}

/* ---- the leader: the sum -------------------------------------------------------- */

int zmoe_central_sum(zmoe_exchange *ex, void *out, zmoe_dtype out_dtype) {
  const zmoe_header *ours = &ex->held[0].header;
  zmoe_dtype dtype = (zmoe_dtype)ours->dtype;
  size_t row_bytes = ours->width * zmoe_dtype_bytes(dtype);
  const uint8_t *at[ZMOE_MAX_NODES]; /* each rank's next row */
  const void *parts[ZMOE_MAX_NODES];
  for (uint32_t r = 0; r < ex->nodes; r++)
    at[r] = zmoe_payload_of(ex, r);
  int rc = ZMOE_OK;
  for (uint32_t i = 0; i < ours->rows && rc == ZMOE_OK; i++) {
    for (uint32_t r = 0; r < ex->nodes; r++) {
      int has_row = r == 0 || (ex->touched[i] & zmoe_bit(r));
      parts[r] = at[r] == NULL ? NULL : has_row ? at[r] : ex->zeros;
      at[r] += at[r] != NULL && has_row ? row_bytes : 0;
    }
    rc = zmoe_reduce((uint8_t *)out + i * ours->width * zmoe_dtype_bytes(out_dtype), out_dtype,
                     parts, ex->nodes, dtype, ours->width, ex->isa);
  }
  zmoe_central_release(ex);
  return rc;
}
