/* The all-reduce of one layer: publish mine, collect everyone's, add in rank
 * order.
 *
 * Lock-step is what bounds the buffers: nobody publishes before having
 * collected the exchange before, so a peer is at most one ahead, and when ours
 * is collected, everybody has all of the one before it.  Two frames a peer and
 * two held slots of our own suffice.
 *
 * PUB/SUB drops silently.  A frame that is late is asked for again at the
 * sender's ROUTER, which answers out of a held slot. */
#include "platform.h"

#include "exchange_internal.h"

#include <stdlib.h>
#include <string.h>

#include "pool.h"

enum {
  /* One being filled, two held for resends, one in libzmq's hands; small ones
   * are cheap, so that a peer that is slow to read may leave some more there.
   * The leader of a centralised run also fills one for each worker. */
  LARGE_SLOTS = 4,
  SMALL_SLOTS = 16,
  SLOT_ALIGNMENT = 64,
};

/* ---- creation ------------------------------------------------------------- */

static int config_is_valid(const zmoe_exchange_config *config) {
  if (config->nodes < 2 || config->nodes > ZMOE_MAX_NODES || config->rank >= config->nodes)
    return 0;
  if (config->xpub == NULL || config->sub == NULL || config->router == NULL)
    return 0;
  if (config->resend_ms == 0 || config->resend_ms > 60000 || config->grace_ms > 3600000 ||
      config->max_payload_bytes > UINT32_MAX - ZMOE_HEADER_BYTES)
    return 0;
  for (uint32_t r = 0; r < config->nodes; r++)
    if (r != config->rank && (config->dealers[r] == NULL || config->monitors[r] == NULL))
      return 0;
  return zmoe_zmq_is_loaded();
}

static int create_pool(zmoe_exchange *ex, size_t small_bytes, size_t max_bytes) {
  uint32_t more = ex->role == ZMOE_LEADER ? ex->nodes - 1 : 0;
  zmoe_pool_class classes[2] = {{small_bytes, SMALL_SLOTS + more}, {max_bytes, LARGE_SLOTS + more}};
  int both = small_bytes < max_bytes;
  return zmoe_pool_create(classes + !both, 1u + (uint32_t)both, SLOT_ALIGNMENT, &ex->pool);
}

static void init_peers(zmoe_exchange *ex, const zmoe_exchange_config *config) {
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_peer *peer = &ex->peers[r];
    zmoe_zmq.msg_init(&peer->now.message);
    zmoe_zmq.msg_init(&peer->next.message);
    if (r == ex->rank)
      continue;
    peer->dealer = config->dealers[r];
    peer->monitor = config->monitors[r];
    zmoe_wire_presence(ex->session, r, peer->presence);
    ex->everyone |= zmoe_bit(r);
  }
}

/* The frames of the session first: whoever sees our presence knows that they
 * will reach us. */
static int subscribe(zmoe_exchange *ex) {
  void *awaited = zmoe_intake_socket(ex);
  uint8_t frame[ZMOE_HEADER_BYTES], presence[ZMOE_PRESENCE_BYTES];
  zmoe_header header = {.kind = ZMOE_KIND_PARTIAL, .session = ex->session};
  zmoe_wire_encode(&header, frame);
  zmoe_wire_presence(ex->session, ex->rank, presence);
  int wait_ms = ZMOE_FIRST_WAIT_MS;
  if (zmoe_zmq.setsockopt(awaited, ZMQ_RCVTIMEO, &wait_ms, sizeof wait_ms) < 0 ||
      zmoe_zmq.setsockopt(ex->sub, ZMQ_SUBSCRIBE, frame, ZMOE_TOPIC_BYTES) < 0 ||
      zmoe_zmq.setsockopt(ex->sub, ZMQ_SUBSCRIBE, presence, sizeof presence) < 0)
    return ZMOE_EZMQ;
  return ZMOE_OK;
}

int zmoe_exchange_create(const zmoe_exchange_config *config, zmoe_exchange **out) {
  *out = NULL;
  if (!config_is_valid(config))
    return ZMOE_EINVAL;
  zmoe_exchange *ex = calloc(1, sizeof *ex);
  if (ex == NULL)
    return ZMOE_ENOMEM;
  ex->rank = config->rank;
  ex->nodes = config->nodes;
  ex->session = config->session;
  ex->max_payload_bytes = config->max_payload_bytes;
  ex->spin_us = config->spin_us;
  ex->resend_ms = config->resend_ms;
  ex->grace_ms = config->grace_ms;
  ex->isa = zmoe_isa_best();
  ex->xpub = config->xpub;
  ex->sub = config->sub;
  ex->router = config->router;
  init_peers(ex, config);
  ex->role = config->scatter_rows == 0 ? ZMOE_PEER : ex->rank == 0 ? ZMOE_LEADER : ZMOE_WORKER;
  ex->scatter_rows = config->scatter_rows;
  int rc = create_pool(ex, config->small_payload_bytes, config->max_payload_bytes);
  if (rc == ZMOE_OK && ex->role == ZMOE_LEADER) {
    ex->touched = calloc(ex->scatter_rows, sizeof *ex->touched);
    ex->zeros = calloc(1, config->max_payload_bytes); /* its pages are never touched */
    rc = ex->touched != NULL && ex->zeros != NULL ? ZMOE_OK : ZMOE_ENOMEM;
  }
  rc = rc == ZMOE_OK ? zmoe_wait_prepare(ex) : rc;
  rc = rc == ZMOE_OK ? subscribe(ex) : rc;
  if (rc != ZMOE_OK) {
    zmoe_exchange_destroy(ex);
    return rc;
  }
  *out = ex;
  return ZMOE_OK;
}

void zmoe_held_release(zmoe_held *held) {
  if (held->slot != NULL)
    zmoe_slot_release(held->slot);
  held->slot = NULL;
}

void zmoe_exchange_destroy(zmoe_exchange *ex) {
  if (ex == NULL)
    return;
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_zmq.msg_close(&ex->peers[r].now.message);
    zmoe_zmq.msg_close(&ex->peers[r].next.message);
  }
  zmoe_held_release(&ex->held[0]);
  zmoe_held_release(&ex->held[1]);
  zmoe_central_release(ex);
  if (ex->pool != NULL)
    zmoe_pool_abandon(ex->pool);
  free(ex->touched);
  free(ex->zeros);
  free(ex);
}

int zmoe_exchange_begin_epoch(zmoe_exchange *ex, uint32_t epoch) {
  if (epoch < ex->epoch || (epoch == ex->epoch && ex->started))
    return ZMOE_EINVAL;
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_peer *peer = &ex->peers[r];
    zmoe_frame_drop(&peer->now);
    if (peer->next.header.epoch < epoch) /* a peer may have begun the epoch before us */
      zmoe_frame_drop(&peer->next);
  }
  zmoe_held_release(&ex->held[0]);
  zmoe_held_release(&ex->held[1]);
  zmoe_central_release(ex);
  ex->epoch = epoch;
  ex->started = ex->has_before = ex->collecting = ex->answering = 0;
  ex->missing = ex->diverged = 0;
  return ZMOE_OK;
}

/* ---- publish -------------------------------------------------------------- */

void zmoe_fault_set(const zmoe_exchange *ex, uint64_t lost, zmoe_fault *fault) {
  *fault = (zmoe_fault){
      .missing = ex->missing,
      .lost = lost,
      .diverged = ex->diverged,
      .zmq_errno = ex->zmq_errno,
      .epoch = ex->epoch,
      .step = ex->now.step,
      .layer = ex->now.layer,
      .theirs = ex->theirs,
  };
}

int zmoe_exchange_slot(zmoe_exchange *ex, size_t payload_bytes, uint64_t deadline_us,
                       zmoe_slot **out) {
  *out = NULL;
  if (payload_bytes > ex->max_payload_bytes)
    return ZMOE_EINVAL;
  return zmoe_pool_acquire(ex->pool, payload_bytes, deadline_us, out);
}

/* Moves on to the exchange of `header`, whose slot is now ours to hold. */
void zmoe_advance(zmoe_exchange *ex, zmoe_slot *slot, const zmoe_header *header) {
  zmoe_held_release(&ex->held[1]);
  ex->held[1] = ex->held[0];
  ex->held[0] = (zmoe_held){slot, *header};
  ex->has_before = ex->started;
  ex->before = ex->now;
  ex->now = zmoe_key_of(header);
  ex->started = ex->collecting = 1;
  ex->missing = ex->everyone;
  ex->published_at_us = zmoe_now_us();
  for (uint32_t r = 0; r < ex->nodes; r++) {
    ex->peers[r].ask_at_us = ex->published_at_us + ex->resend_ms * UINT64_C(1000);
    ex->peers[r].ask_every_us = ex->resend_ms * UINT64_C(2000);
  }
}

static int publish(zmoe_exchange *ex, zmoe_slot *slot, const zmoe_header *header,
                   zmoe_fault *fault) {
  if (ex->role != ZMOE_PEER) {
    int status = zmoe_central_publish(ex, slot, header);
    if (status != ZMOE_OK)
      zmoe_slot_release(slot);
    zmoe_fault_set(ex, 0, fault);
    return status;
  }
  if (ex->collecting || (ex->started && zmoe_key_compare(zmoe_key_of(header), ex->now) <= 0)) {
    zmoe_slot_release(slot);
    zmoe_fault_set(ex, 0, fault);
    return ZMOE_EINVAL;
  }
  zmoe_wire_encode(header, (uint8_t *)zmoe_slot_payload(slot) - ZMOE_HEADER_BYTES);
  zmoe_advance(ex, slot, header);
  int rc = zmoe_links_send(ex, ex->xpub, &ex->held[0]);
  if (rc != ZMOE_OK)
    ex->zmq_errno = zmoe_zmq.get_errno();
  zmoe_intake_promote(ex);
  zmoe_fault_set(ex, 0, fault);
  return rc;
}

int zmoe_header_make(const zmoe_exchange *ex, uint32_t step, uint32_t layer, uint32_t rows,
                     uint32_t width, zmoe_dtype dtype, uint64_t digest, zmoe_header *out) {
  uint64_t elements = (uint64_t)rows * width;
  size_t dtype_bytes = zmoe_dtype_bytes(dtype);
  if (dtype_bytes == 0 || elements > ex->max_payload_bytes / dtype_bytes)
    return ZMOE_EINVAL;
  *out = (zmoe_header){
      .kind = ZMOE_KIND_PARTIAL,
      .dtype = (uint8_t)dtype,
      .source = (uint16_t)ex->rank,
      .session = ex->session,
      .epoch = ex->epoch,
      .step = step,
      .layer = layer,
      .rows = rows,
      .width = width,
      .payload_bytes = (uint32_t)(elements * dtype_bytes),
      .digest = digest,
  };
  return ZMOE_OK;
}

int zmoe_exchange_publish_slot(zmoe_exchange *ex, zmoe_slot *slot, uint32_t step, uint32_t layer,
                               uint32_t rows, uint32_t width, zmoe_dtype dtype, uint64_t digest,
                               zmoe_fault *fault) {
  zmoe_header header;
  int rc = zmoe_header_make(ex, step, layer, rows, width, dtype, digest, &header);
  if (rc != ZMOE_OK || header.payload_bytes > zmoe_slot_capacity(slot)) {
    zmoe_slot_release(slot);
    zmoe_fault_set(ex, 0, fault);
    return ZMOE_EINVAL;
  }
  return publish(ex, slot, &header, fault);
}

int zmoe_exchange_publish(zmoe_exchange *ex, const void *src, zmoe_dtype src_dtype, uint32_t step,
                          uint32_t layer, uint32_t rows, uint32_t width, zmoe_dtype wire_dtype,
                          uint64_t digest, uint64_t deadline_us, zmoe_fault *fault) {
  zmoe_header header;
  zmoe_slot *slot;
  int rc = zmoe_header_make(ex, step, layer, rows, width, wire_dtype, digest, &header);
  if (src == NULL)
    header.payload_bytes = 0;
  if (rc == ZMOE_OK)
    rc = zmoe_exchange_slot(ex, header.payload_bytes, deadline_us, &slot);
  if (rc != ZMOE_OK) {
    zmoe_fault_set(ex, 0, fault);
    return rc;
  }
  if (src != NULL)
    rc = zmoe_convert(zmoe_slot_payload(slot), wire_dtype, src, src_dtype, (size_t)rows * width,
                      ex->isa);
  if (rc != ZMOE_OK) {
    zmoe_slot_release(slot);
    zmoe_fault_set(ex, 0, fault);
    return rc;
  }
  return publish(ex, slot, &header, fault);
}

/* ---- collect --------------------------------------------------------------- */

const void *zmoe_payload_of(zmoe_exchange *ex, uint32_t rank) {
  if (rank == ex->rank)
    return ex->held[0].header.payload_bytes > 0 ? zmoe_slot_payload(ex->held[0].slot) : NULL;
  zmoe_frame *frame = &ex->peers[rank].now;
  if (frame->header.payload_bytes == 0)
    return NULL;
  return (const uint8_t *)zmoe_zmq.msg_data(&frame->message) + ZMOE_HEADER_BYTES;
}

static int sum(zmoe_exchange *ex, void *out, zmoe_dtype out_dtype) {
  const void *parts[ZMOE_MAX_NODES];
  const zmoe_header *ours = &ex->held[0].header;
  for (uint32_t r = 0; r < ex->nodes; r++)
    parts[r] = zmoe_payload_of(ex, r);
  return zmoe_reduce(out, out_dtype, parts, ex->nodes, (zmoe_dtype)ours->dtype,
                     (size_t)ours->rows * ours->width, ex->isa);
}

int zmoe_exchange_collect(zmoe_exchange *ex, void *out, zmoe_dtype out_dtype, uint64_t deadline_us,
                          zmoe_fault *fault) {
  uint64_t lost = 0;
  int is_ours = ex->collecting && ex->held[0].slot != NULL; /* published, that is */
  int rc = is_ours && zmoe_dtype_bytes(out_dtype) != 0 ? zmoe_wait_for_all(ex, deadline_us, &lost)
                                                       : ZMOE_EINVAL;
  if (rc == ZMOE_OK) {
    rc = ex->role == ZMOE_LEADER ? zmoe_central_sum(ex, out, out_dtype) : sum(ex, out, out_dtype);
    for (uint32_t r = 0; r < ex->nodes; r++)
      zmoe_frame_drop(&ex->peers[r].now);
    ex->collecting = 0;
    ex->stats.exchanges++;
  }
  if (rc != ZMOE_OK)
    zmoe_fault_set(ex, lost, fault);
  return rc;
}

/* ---- between exchanges ------------------------------------------------------ */

int zmoe_exchange_service(zmoe_exchange *ex, zmoe_fault *fault) {
  zmoe_wait_drain(ex);
  uint64_t lost = 0;
  int rc = zmoe_wait_trouble(ex, zmoe_now_us(), UINT64_MAX, &lost);
  if (rc != ZMOE_OK)
    zmoe_fault_set(ex, lost, fault);
  return rc;
}

void zmoe_exchange_stats_get(const zmoe_exchange *ex, zmoe_exchange_stats *out) {
  *out = ex->stats;
}

void zmoe_exchange_pool_stats(const zmoe_exchange *ex, zmoe_pool_stats *out) {
  zmoe_pool_stats_get(ex->pool, out);
}
