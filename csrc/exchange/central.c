/* The centralised schedule: rows out, partial sums back.
 *
 * A worker's frame holds only the rows that it has experts for, and of those the
 * pairs (row, expert, weight) that are its own to compute.  So a worker needs to
 * know nothing of routing or of other owners, and its answer is as small.
 *
 * A leader's collective begins when it dispatches, a worker's when it waits for rows;
 * the partial comes later.  The leader's rows of one layer show a worker that its
 * answer to the layer before has arrived, and the answers show the leader that its
 * rows have: it holds what it dispatched to the end of the collective, and a worker its
 * last answer to the end of the next. */
#include "common/platform.h"

#include "exchange_internal.h"

#include <string.h>

void zmoe_central_release(zmoe_exchange *ex) {
  for (uint32_t r = 0; r < ex->nodes; r++)
    zmoe_slot_drop(&ex->peers[r].rows.slot);
}

/* The exchange that a dispatch or a receive has begun; NULL when there is none. */
static zmoe_collective *open_collective(zmoe_exchange *ex) {
  return zmoe_is_open(ex) ? zmoe_collective_at(ex, ex->collected) : NULL;
}

/* ---- the leader: dispatch ----------------------------------------------------- */

/* Notes which ranks need each row. */
static void note_ranks(zmoe_exchange *ex, const zmoe_routed *routed, uint32_t rows) {
  const uint64_t *ranks = routed->ranks;
  for (uint32_t i = 0; i < rows; i++) {
    ex->dispatched[i] = 0;
    for (uint32_t k = 0; k < routed->top_k; k++)
      ex->dispatched[i] |= *ranks++;
  }
}

static void count_for(const zmoe_exchange *ex, const zmoe_routed *routed, uint32_t all,
                      uint32_t rank, uint32_t *rows, size_t *pairs) {
  *rows = 0;
  *pairs = 0;
  for (uint32_t i = 0; i < all; i++)
    *rows += (ex->dispatched[i] >> rank) & 1;
  for (size_t p = 0; p < (size_t)all * routed->top_k; p++)
    *pairs += (routed->ranks[p] >> rank) & 1;
}

static void fill(const zmoe_exchange *ex, const zmoe_routed *routed, const zmoe_call *call,
                 uint32_t rank, size_t pairs, void *payload) {
  int32_t *pair_rows = payload, *pair_experts = pair_rows + pairs;
  float *pair_weights = (float *)(pair_experts + pairs);
  uint8_t *to = (uint8_t *)(pair_weights + pairs);
  size_t row_bytes = call->width * zmoe_dtype_bytes(routed->x_dtype);
  int32_t row = 0;
  for (uint32_t i = 0; i < call->rows; i++) {
    if (!(ex->dispatched[i] & zmoe_bit(rank)))
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

/* The frame for one worker, held but not sent yet; `whole` is the header of all rows'
 * partial. */
static int prepare(zmoe_exchange *ex, const zmoe_routed *routed, const zmoe_call *call,
                   const zmoe_header *whole, uint32_t rank, uint64_t deadline_us, uint64_t *lost) {
  zmoe_held *held = &ex->peers[rank].rows;
  uint32_t rows;
  size_t pairs;
  count_for(ex, routed, call->rows, rank, &rows, &pairs);
  uint64_t bytes = zmoe_payload_bytes(routed->x_dtype, rows, call->width) + pairs * ZMOE_PAIR_BYTES;
  if (bytes > ex->max_payload_bytes)
    return ZMOE_EINVAL;
  int rc = zmoe_wait_slot(ex, bytes, deadline_us, &held->slot, lost);
  if (rc != ZMOE_OK)
    return rc;
  held->header = *whole;
  held->header.kind = ZMOE_KIND_ROWS;
  held->header.dtype = (uint8_t)routed->x_dtype;
  held->header.rows = rows;
  held->header.busiest = (uint8_t)(routed->busiest < UINT8_MAX ? routed->busiest : UINT8_MAX);
  held->header.payload_bytes = (uint32_t)bytes;
  held->header.digest = call->digest; /* the worker adds its own plan's */
  held->frame = (uint8_t *)zmoe_slot_payload(held->slot) - ZMOE_HEADER_BYTES;
  fill(ex, routed, call, rank, pairs, zmoe_slot_payload(held->slot));
  zmoe_held_encode(ex, held);
  return ZMOE_OK;
}

static int may_dispatch(zmoe_exchange *ex, const zmoe_routed *routed, const zmoe_header *header) {
  return ex->role == ZMOE_LEADER && header->chunks == 0 && header->micro_batch == 0 &&
         header->rows <= ex->dispatch_rows && zmoe_dtype_bytes(routed->x_dtype) != 0 &&
         zmoe_collective_may_begin(ex, header);
}

/* Workers that waited long for us have asked for these rows: such requests are
 * void, and would later look like those of a worker that has lost them. */
static void drop_requests(zmoe_exchange *ex) {
  for (uint32_t i = 0; i < ex->nodes && !zmoe_peers_routed(ex, ZMQ_DONTWAIT); i++)
    ;
}

int zmoe_exchange_dispatch(zmoe_exchange *ex, const zmoe_call *call, const zmoe_routed *routed,
                           uint64_t deadline_us, zmoe_fault *fault) {
  zmoe_collective made = {.partial = NULL};
  uint64_t lost = 0;
  int rc = zmoe_collective_header(ex, call, &made.header);
  if (rc == ZMOE_OK && !may_dispatch(ex, routed, &made.header))
    rc = ZMOE_EINVAL;
  if (rc == ZMOE_OK) {
    note_ranks(ex, routed, call->rows);
    for (uint32_t r = 1; r < ex->nodes && rc == ZMOE_OK; r++)
      rc = prepare(ex, routed, call, &made.header, r, deadline_us, &lost);
    if (rc != ZMOE_OK)
      zmoe_central_release(ex);
  }
  if (rc == ZMOE_OK) {
    drop_requests(ex);
    zmoe_collective_begin(ex, &made);
    for (uint32_t r = 1; r < ex->nodes; r++) /* what a broken link loses is asked for again */
      (void)zmoe_peers_send_back(ex, r, &ex->peers[r].rows);
    zmoe_receive_promote(ex);
  }
  zmoe_fault_publish(ex, rc, lost, fault);
  return rc;
}

/* ---- a worker: receive ---------------------------------------------------------- */

/* Rows in order, experts that exist, none twice in a row. */
static int pairs_are_valid(const zmoe_dispatch_batch *got) {
  uint32_t first = 0; /* pair of this row */
  for (uint32_t i = 0; i < got->pairs; i++) {
    int32_t row = got->pair_rows[i], expert = got->pair_experts[i];
    if (row < 0 || (uint32_t)row >= got->rows || row < got->pair_rows[first] || expert < 0 ||
        (uint32_t)expert >= got->experts)
      return 0;
    if (row > got->pair_rows[first])
      first = i;
    for (uint32_t j = first; j < i; j++)
      if (got->pair_experts[j] == expert)
        return 0;
  }
  return 1;
}

/* What a frame holds; 0 when it cannot be trusted, or has no room. */
static int take_rows(zmoe_frame *frame, zmoe_dispatch_batch *out) {
  const zmoe_header *header = &frame->header;
  const uint8_t *at = zmoe_frame_body(frame);
  zmoe_dtype dtype = (zmoe_dtype)header->dtype;
  /* No more than the payload, as decoding has found. */
  size_t x_bytes = at != NULL ? zmoe_payload_bytes(dtype, header->rows, header->width) : 0;
  size_t pairs = (header->payload_bytes - x_bytes) / ZMOE_PAIR_BYTES, each = pairs * 4;
  if (zmoe_dtype_bytes(dtype) == 0 || x_bytes > out->x_bytes || pairs > out->max_pairs)
    return 0;
  out->rows = header->rows;
  out->pairs = (uint32_t)pairs;
  out->busiest = header->busiest;
  out->dtype = dtype;
  out->digest = header->digest;
  if (at == NULL)
    return 1;
  memcpy(out->pair_rows, at, each);
  memcpy(out->pair_experts, at + each, each);
  memcpy(out->pair_weights, at + 2 * each, each);
  memcpy(out->x, at + 3 * each, x_bytes);
  return pairs_are_valid(out);
}

/* From expert ids to this rank's numbers; 0 for one that is another's. */
static int renumber(zmoe_dispatch_batch *out) {
  for (uint32_t i = 0; i < out->pairs; i++) {
    out->pair_experts[i] = out->local[out->pair_experts[i]];
    if (out->pair_experts[i] < 0)
      return 0;
  }
  return 1;
}

/* Waits until rows have come that can be trusted. */
static int wait_for_rows(zmoe_exchange *ex, zmoe_dispatch_batch *out, uint64_t deadline_us,
                         uint64_t *lost) {
  zmoe_frame *frame = &ex->peers[0].partials[ex->collected % ZMOE_WINDOW];
  uint64_t until_us = zmoe_later_us(zmoe_now_us(), deadline_us);
  for (;;) {
    uint64_t now_us = zmoe_now_us();
    int rc = zmoe_wait_for_all(ex, until_us > now_us ? until_us - now_us : 0, lost);
    if (rc != ZMOE_OK)
      return rc;
    if (frame->header.width != out->width || frame->header.rows > ex->dispatch_rows) {
      zmoe_set_diverged(ex, &frame->header);
      return ZMOE_EDIVERGED;
    }
    if (take_rows(frame, out))
      return ZMOE_OK;
    ex->stats.bad_field++;
    zmoe_frame_drop(frame);
    open_collective(ex)->missing = zmoe_bit(0);
  }
}

/* Begins to wait for the rows of a layer, or goes on. */
static int await_rows(zmoe_exchange *ex, uint32_t step, uint32_t layer) {
  const zmoe_call call = {.step = step, .layer = layer};
  const zmoe_collective *open = open_collective(ex);
  zmoe_collective made = {.partial = NULL};
  int rc = zmoe_collective_header(ex, &call, &made.header);
  if (rc == ZMOE_OK && ex->role != ZMOE_WORKER)
    rc = ZMOE_EINVAL;
  if (rc != ZMOE_OK)
    return rc;
  if (open != NULL) {
    int same = zmoe_key_compare(zmoe_key_of(&open->header), zmoe_key_of(&made.header)) == 0;
    return same && open->missing != 0 ? ZMOE_OK : ZMOE_EINVAL;
  }
  if (!zmoe_collective_may_begin(ex, &made.header))
    return ZMOE_EINVAL;
  zmoe_collective_begin(ex, &made)->missing = zmoe_bit(0);
  zmoe_receive_promote(ex);
  return ZMOE_OK;
}

int zmoe_exchange_receive(zmoe_exchange *ex, zmoe_dispatch_batch *out, uint32_t step,
                          uint32_t layer, uint64_t deadline_us, zmoe_fault *fault) {
  uint64_t lost = 0;
  int rc = await_rows(ex, step, layer);
  if (rc == ZMOE_OK)
    rc = wait_for_rows(ex, out, deadline_us, &lost);
  if (rc == ZMOE_OK) {
    zmoe_collective *collective = open_collective(ex);
    zmoe_frame *frame = &ex->peers[0].partials[ex->collected % ZMOE_WINDOW];
    collective->header.rows = out->rows; /* of the answer */
    collective->header.width = out->width;
    collective->header.digest = out->digest;
    if (!renumber(out)) {
      zmoe_set_diverged(ex, &frame->header);
      rc = ZMOE_EDIVERGED;
    }
    zmoe_frame_drop(frame);
  }
  if (rc != ZMOE_OK)
    zmoe_fault_set(ex, lost, fault);
  return rc;
}

/* ---- both: publish ----------------------------------------------------------------- */

/* Whether a partial is that of the open exchange, and the time for it has come.  A worker was
 * told the routing alone. */
static int is_due(const zmoe_exchange *ex, const zmoe_collective *collective,
                  const zmoe_header *header, uint64_t routing) {
  if (collective == NULL || collective->partial != NULL ||
      (ex->role == ZMOE_WORKER && collective->missing != 0))
    return 0;
  const zmoe_header *due = &collective->header;
  int same = ex->role == ZMOE_WORKER ? routing == due->digest
                                     : header->digest == due->digest && header->dtype == due->dtype;
  return same && zmoe_key_compare(zmoe_key_of(header), zmoe_key_of(due)) == 0 &&
         header->chunks == 0 && header->rows == due->rows && header->width == due->width;
}

int zmoe_central_publish(zmoe_exchange *ex, const zmoe_call *call, const void *src,
                         zmoe_dtype src_dtype, uint64_t deadline_us, uint64_t *lost) {
  zmoe_collective *collective = open_collective(ex), made = {.partial = NULL};
  int rc = zmoe_collective_header(ex, call, &made.header);
  if (rc == ZMOE_OK && !is_due(ex, collective, &made.header, call->digest))
    rc = ZMOE_EINVAL;
  if (rc != ZMOE_OK)
    return rc;
  rc = zmoe_collective_encode(ex, &made, src, src_dtype, deadline_us, lost);
  if (rc != ZMOE_OK) {
    zmoe_slot_drop(&made.partial);
    return rc;
  }
  collective->header = made.header;
  collective->partial = made.partial;
  if (ex->role == ZMOE_LEADER)
    return ZMOE_OK;
  zmoe_held answer = zmoe_collective_whole(collective);
  collective->sent_at_us = zmoe_now_us();
  zmoe_collective_end(ex);
  int error = zmoe_peers_send_to(ex, 0, &answer);
  if (error != 0)
    ex->zmq_errno = error;
  return error == 0 ? ZMOE_OK : ZMOE_EZMQ;
}

/* ---- the leader: the sum -------------------------------------------------------------- */

int zmoe_central_sum(zmoe_exchange *ex, void *out, zmoe_dtype out_dtype) {
  const zmoe_collective *collective = open_collective(ex);
  const zmoe_header *ours = &collective->header;
  zmoe_dtype dtype = (zmoe_dtype)ours->dtype;
  size_t row_bytes = zmoe_payload_bytes(dtype, 1, ours->width);
  size_t out_bytes = zmoe_payload_bytes(out_dtype, 1, ours->width);
  zmoe_range row = zmoe_chunk(dtype, 1, ours->width, 1, 0);
  const uint8_t *at[ZMOE_MAX_NODES]; /* each rank's next row */
  const void *parts[ZMOE_MAX_NODES];
  for (uint32_t r = 0; r < ex->nodes; r++)
    at[r] = zmoe_frame_body(&ex->peers[r].partials[ex->collected % ZMOE_WINDOW]);
  at[0] = ours->payload_bytes > 0 ? zmoe_slot_payload(collective->partial) : NULL;
  int rc = ZMOE_OK;
  for (uint32_t i = 0; i < ours->rows && rc == ZMOE_OK; i++) {
    for (uint32_t r = 0; r < ex->nodes; r++) {
      int has_row = r == 0 || (ex->dispatched[i] & zmoe_bit(r)) != 0;
      parts[r] = has_row ? at[r] : NULL;
      at[r] = parts[r] != NULL ? at[r] + row_bytes : at[r];
    }
    rc = zmoe_sum_range((uint8_t *)out + i * out_bytes, out_dtype, parts, ex->nodes, dtype,
                        ours->width, &row, ex->isa);
  }
  return rc;
}
