/* One exchange of ours after the other: publish, collect. */
#include "common/platform.h"

#include "exchange_internal.h"

#include <assert.h>
#include <string.h>

/* ---- whose slots are held --------------------------------------------------- */

void zmoe_slot_drop(zmoe_slot **slot) {
  if (*slot != NULL)
    zmoe_slot_release(*slot);
  *slot = NULL;
}

static void hold_from(zmoe_exchange *ex, uint64_t index) {
  for (; ex->held < index; ex->held++) {
    zmoe_collective *collective = zmoe_collective_at(ex, ex->held);
    zmoe_slot_drop(&collective->partial);
    zmoe_slot_drop(&collective->sum);
  }
}

void zmoe_collectives_clear(zmoe_exchange *ex) {
  hold_from(ex, ex->published);
  zmoe_central_release(ex);
  ex->published = ex->collected = ex->held = 0;
}

zmoe_held zmoe_collective_whole(const zmoe_collective *collective) {
  if (collective->partial == NULL)
    return (zmoe_held){.slot = NULL};
  return (zmoe_held){collective->partial, collective->header,
                     (uint8_t *)zmoe_slot_payload(collective->partial) - ZMOE_HEADER_BYTES};
}

/* ---- publish ---------------------------------------------------------------- */

/* A first micro-batch needs all before it collected; a further one belongs to the exchange
 * before, of which at most one may be open. */
int zmoe_collective_may_begin(zmoe_exchange *ex, const zmoe_header *header) {
  uint64_t open = ex->published - ex->collected;
  if (ex->published == 0)
    return header->micro_batch == 0;
  const zmoe_header *last = &zmoe_collective_at(ex, ex->published - 1)->header;
  if (header->micro_batch == 0)
    return open == 0 && zmoe_key_compare(zmoe_key_of(header), zmoe_key_of(last)) > 0;
  return open < ZMOE_WINDOW && header->step == last->step && header->layer == last->layer &&
         header->micro_batch == last->micro_batch + 1;
}

/* What a peer may still ask for; see exchange.c. */
static uint64_t first_wanted(zmoe_exchange *ex) {
  if (ex->collected == 0)
    return 0;
  const zmoe_header *last = &zmoe_collective_at(ex, ex->collected - 1)->header;
  return ex->collected - (last->micro_batch > 0 ? ZMOE_WINDOW : 1);
}

static int send_collective(zmoe_exchange *ex, const zmoe_collective *collective) {
  if (collective->header.chunks > 0)
    return zmoe_scatter_send(ex, collective);
  zmoe_held held = zmoe_collective_whole(collective);
  return zmoe_peers_send(ex, ex->xpub, &held);
}

zmoe_collective *zmoe_collective_begin(zmoe_exchange *ex, const zmoe_collective *made) {
  hold_from(ex, first_wanted(ex));
  zmoe_collective *collective = zmoe_collective_at(ex, ex->published++);
  *collective = *made;
  collective->missing = ex->everyone;
  collective->missing_sums = made->header.chunks > 0 ? ex->everyone : 0;
  collective->sent_at_us = zmoe_now_us();
  zmoe_resend_begin(ex, collective);
  return collective;
}

static int begin(zmoe_exchange *ex, const zmoe_collective *made, zmoe_fault *fault) {
  if (zmoe_is_open(ex))
    zmoe_wait_drain(ex); /* chunks of the micro-batch before may have come: its sum goes first */
  const zmoe_collective *collective = zmoe_collective_begin(ex, made);
  int error = send_collective(ex, collective);
  if (error != 0)
    ex->zmq_errno = error;
  zmoe_receive_promote(ex);
  zmoe_fault_set(ex, 0, fault);
  return error == 0 ? ZMOE_OK : ZMOE_EZMQ;
}

static int refuse(zmoe_exchange *ex, zmoe_collective *made, int rc, uint64_t lost,
                  zmoe_fault *fault) {
  zmoe_slot_drop(&made->partial);
  zmoe_slot_drop(&made->sum);
  zmoe_fault_publish(ex, rc, lost, fault);
  return rc;
}

int zmoe_collective_header(const zmoe_exchange *ex, const zmoe_call *call, zmoe_header *out) {
  if (zmoe_is_forked(ex))
    return ZMOE_EFORK;
  uint64_t bytes = zmoe_payload_bytes(call->wire_dtype, call->rows, call->width);
  int integers = call->wire_dtype == (zmoe_dtype)ZMOE_I32; /* only whole, only among peers */
  if (bytes > ex->max_payload_bytes || call->micro_batch > UINT8_MAX ||
      call->algorithm > (ex->scatter && !integers ? ZMOE_SCATTER : ZMOE_DIRECT) ||
      (integers && ex->role != ZMOE_PEER))
    return ZMOE_EINVAL;
  *out = (zmoe_header){
      .kind = ZMOE_KIND_PARTIAL,
      .dtype = (uint8_t)call->wire_dtype,
      .source = (uint16_t)ex->rank,
      .session = ex->session,
      .step = call->step,
      .layer = call->layer,
      .rows = call->rows,
      .width = call->width,
      .payload_bytes = (uint32_t)bytes,
      .micro_batch = (uint8_t)call->micro_batch,
      .chunks = (uint8_t)(call->algorithm == ZMOE_SCATTER ? ex->nodes : 0),
      .digest = call->digest ^ call->plan,
  };
  return ZMOE_OK;
}

/* The header of an exchange that begins with being published. */
static int make_header(zmoe_exchange *ex, const zmoe_call *call, zmoe_header *out) {
  int rc = zmoe_collective_header(ex, call, out);
  if (rc == ZMOE_OK && (ex->role != ZMOE_PEER || !zmoe_collective_may_begin(ex, out)))
    rc = ZMOE_EINVAL;
  return rc;
}

static int acquire(zmoe_exchange *ex, uint64_t deadline_us, zmoe_collective *made, uint64_t *lost) {
  const zmoe_header *header = &made->header;
  if (header->chunks == 0)
    return zmoe_wait_slot(ex, header->payload_bytes, deadline_us, &made->partial, lost);
  zmoe_range own =
      zmoe_chunk((zmoe_dtype)header->dtype, header->rows, header->width, header->chunks, ex->rank);
  size_t bytes = zmoe_scatter_slot_bytes(header->payload_bytes, header->chunks);
  int rc = zmoe_wait_slot(ex, bytes, deadline_us, &made->partial, lost);
  return rc == ZMOE_OK ? zmoe_wait_slot(ex, own.bytes, deadline_us, &made->sum, lost) : rc;
}

static int encode(zmoe_exchange *ex, zmoe_collective *made, const void *src, zmoe_dtype src_dtype) {
  const zmoe_header *header = &made->header;
  if (zmoe_item_bytes(src_dtype) == 0)
    return ZMOE_EINVAL;
  if (header->chunks > 0)
    return zmoe_scatter_encode(ex, made, src, src_dtype);
  zmoe_held held = zmoe_collective_whole(made);
  zmoe_range all = zmoe_chunk((zmoe_dtype)header->dtype, header->rows, header->width, 1, 0);
  return zmoe_held_fill(ex, &held, src, src_dtype, &all);
}

int zmoe_collective_encode(zmoe_exchange *ex, zmoe_collective *made, const void *src,
                           zmoe_dtype src_dtype, uint64_t deadline_us, uint64_t *lost) {
  if (src == NULL)
    made->header.payload_bytes = 0;
  int rc = acquire(ex, deadline_us, made, lost);
  return rc == ZMOE_OK ? encode(ex, made, src, src_dtype) : rc;
}

int zmoe_exchange_publish(zmoe_exchange *ex, const zmoe_call *call, const void *src,
                          zmoe_dtype src_dtype, uint64_t deadline_us, zmoe_fault *fault) {
  uint64_t lost = 0;
  if (ex->role != ZMOE_PEER) {
    int status = zmoe_central_publish(ex, call, src, src_dtype, deadline_us, &lost);
    zmoe_fault_publish(ex, status, lost, fault);
    return status;
  }
  zmoe_collective made = {.partial = NULL};
  int rc = make_header(ex, call, &made.header);
  if (rc == ZMOE_OK)
    hold_from(ex, first_wanted(ex)); /* the slot let go last is still in the cache */
  if (rc == ZMOE_OK)
    rc = zmoe_collective_encode(ex, &made, src, src_dtype, deadline_us, &lost);
  return rc == ZMOE_OK ? begin(ex, &made, fault) : refuse(ex, &made, rc, lost, fault);
}

/* ---- collect ---------------------------------------------------------------- */

/* Every rank's partial of the i-th exchange, which is whole; NULL is all zeros. */
static void whole_parts(zmoe_exchange *ex, uint64_t index, const void *parts[ZMOE_MAX_NODES]) {
  const zmoe_collective *collective = zmoe_collective_at(ex, index);
  for (uint32_t r = 0; r < ex->nodes; r++)
    parts[r] = zmoe_frame_body(&ex->peers[r].partials[index % ZMOE_WINDOW]);
  int is_zero = collective->header.payload_bytes == 0;
  parts[ex->rank] = is_zero ? NULL : zmoe_slot_payload(collective->partial);
}

static int add_whole(zmoe_exchange *ex, uint64_t index, void *out, zmoe_dtype out_dtype) {
  const zmoe_header *ours = &zmoe_collective_at(ex, index)->header;
  const void *parts[ZMOE_MAX_NODES];
  whole_parts(ex, index, parts);
  zmoe_dtype dtype = (zmoe_dtype)ours->dtype;
  zmoe_range all = zmoe_chunk(dtype, ours->rows, ours->width, 1, 0);
  return zmoe_sum_range(out, out_dtype, parts, ex->nodes, dtype, ours->width, &all, ex->isa);
}

/* Of chunks, nobody can lack one any more: whoever did could not have added up its
 * part of the sum.  The leader's own partial was for nobody. */
void zmoe_collective_end(zmoe_exchange *ex) {
  uint64_t index = ex->collected++;
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_frame_drop(&ex->peers[r].partials[index % ZMOE_WINDOW]);
    zmoe_frame_drop(&ex->peers[r].sums[index % ZMOE_WINDOW]);
  }
  zmoe_collective *collective = zmoe_collective_at(ex, index);
  if (collective->header.chunks > 0 || ex->role == ZMOE_LEADER)
    zmoe_slot_drop(&collective->partial);
  if (ex->role == ZMOE_LEADER)
    zmoe_central_release(ex);
  ex->stats.exchanges++;
}

/* Until the oldest open exchange, which is to have a partial of ours, has all frames. */
static int wait_for_oldest(zmoe_exchange *ex, int is_possible, uint64_t deadline_us,
                           zmoe_fault *fault) {
  uint64_t lost = 0;
  int is_ours = zmoe_is_open(ex) && ex->role != ZMOE_WORKER &&
                zmoe_collective_at(ex, ex->collected)->partial != NULL; /* but to a leader */
  int rc = ZMOE_EINVAL;
  if (zmoe_is_forked(ex))
    rc = ZMOE_EFORK;
  else if (is_ours && is_possible)
    rc = zmoe_wait_for_all(ex, deadline_us, &lost);
  if (rc != ZMOE_OK)
    zmoe_fault_set(ex, lost, fault);
  return rc;
}

int zmoe_exchange_collect(zmoe_exchange *ex, void *out, zmoe_dtype out_dtype, uint64_t deadline_us,
                          zmoe_fault *fault) {
  uint64_t index = ex->collected;
  int integers = zmoe_collective_at(ex, index)->header.dtype == ZMOE_I32;
  int is_possible = integers == (out_dtype == (zmoe_dtype)ZMOE_I32);
  int rc = wait_for_oldest(ex, is_possible && zmoe_item_bytes(out_dtype) != 0, deadline_us, fault);
  if (rc != ZMOE_OK)
    return rc;
  if (ex->role == ZMOE_LEADER)
    rc = zmoe_central_sum(ex, out, out_dtype);
  else if (zmoe_collective_at(ex, index)->header.chunks > 0)
    rc = zmoe_scatter_gather(ex, index, out, out_dtype);
  else
    rc = add_whole(ex, index, out, out_dtype);
  assert(rc == ZMOE_OK);
  zmoe_collective_end(ex);
  return rc;
}

int zmoe_exchange_gather(zmoe_exchange *ex, void *out, size_t stride, uint64_t deadline_us,
                         zmoe_fault *fault) {
  uint64_t index = ex->collected;
  const zmoe_header *ours = &zmoe_collective_at(ex, index)->header;
  int is_whole = ex->role == ZMOE_PEER && ours->chunks == 0;
  int rc = wait_for_oldest(ex, is_whole, deadline_us, fault);
  if (rc != ZMOE_OK)
    return rc;
  const void *parts[ZMOE_MAX_NODES];
  whole_parts(ex, index, parts);
  size_t bytes = zmoe_payload_bytes((zmoe_dtype)ours->dtype, ours->rows, ours->width);
  for (uint32_t r = 0; r < ex->nodes; r++) {
    uint8_t *to = (uint8_t *)out + r * stride;
    if (parts[r] != NULL)
      memcpy(to, parts[r], bytes);
    else
      memset(to, 0, bytes);
  }
  zmoe_collective_end(ex);
  return rc;
}
