/* The all-reduce of one layer: publish mine, collect everyone's, add in rank
 * order.
 *
 * Two algorithms.  Direct: every rank publishes its whole partial to all, and adds
 * up N of them.  Scatter (scatter.c): each rank sends chunk c of its partial to
 * rank c alone, who adds up N chunks, and publishes that chunk of the sum.
 *
 * Lock-step is what bounds the buffers.  Call a rank's exchanges 0, 1, 2, ...; the
 * micro-batches of one layer count each.  A first one is published when all before it are
 * collected, a further one when all but the one before it are: at most W = 2 are
 * open, published and not yet collected (ZMOE_WINDOW).  A rank that has collected i
 * had something of i from everybody, so everybody had published i.
 *
 * What we may receive.  A peer has collected at most what we have published, say p,
 * so it has published at most p + W: its partials are of our open exchanges, or of
 * the W after them, which wait in peer->early.  Its chunk of the sum needs our
 * chunk of the partial, so it is of an exchange that we have published; and of one
 * that we have collected we have it.  Hence W partials, W sums, W early a peer.
 *
 * What we may be asked for.  If we have collected up to c - 1, every peer has
 * published c - 1, and so it has collected all before c - 1 if that was a first
 * micro-batch, else all before c - W (first_wanted in collective.c).  With W open that leaves
 * 2 W collectives (ZMOE_COLLECTIVES); where layers are not split, two.  Chunks of a partial
 * can be asked for only until we have everybody's sums, since those were made of
 * them.
 *
 * Hence the slots.  Partials: 2 W held, one being filled, one in libzmq's hands.
 * Sums, where scatter is announced: as many, each of a chunk.  One is taken when the
 * partial is published, so that adding up never waits for one.
 *
 * PUB/SUB drops silently, and a DEALER whose link is down takes nothing.  A frame
 * that is late is asked for again at the sender's ROUTER, which answers out of a
 * held slot; first the partial, then the sum. */
#include "common/platform.h"

#include "exchange_internal.h"

#include <pthread.h>
#include <stdlib.h>

#include "pool.h"

enum {
  LARGE_SLOTS = ZMOE_COLLECTIVES + 2, /* see above */
  DECODE_SLOTS = 16,
  SLOT_ALIGNMENT = 64,
};

/* ---- payload checksums ------------------------------------------------------ */

static uint32_t checksum_of(const zmoe_exchange *ex, const void *frame, uint32_t payload_bytes) {
  return ex->no_payload_checksum
             ? 0
             : zmoe_crc32c((const uint8_t *)frame + ZMOE_HEADER_BYTES, payload_bytes, ex->isa);
}

void zmoe_held_encode(const zmoe_exchange *ex, zmoe_held *held) {
  held->header.payload_checksum = checksum_of(ex, held->frame, held->header.payload_bytes);
  zmoe_wire_encode(&held->header, held->frame);
}

int zmoe_held_fill(const zmoe_exchange *ex, zmoe_held *held, const void *src, zmoe_dtype src_dtype,
                   const zmoe_range *range) {
  zmoe_header *header = &held->header;
  int for_nobody = ex->role == ZMOE_LEADER; /* its own partial */
  uint32_t *checksum = ex->no_payload_checksum || for_nobody ? NULL : &header->payload_checksum;
  int rc = header->payload_bytes == 0
               ? ZMOE_OK
               : zmoe_encode_range(held->frame + ZMOE_HEADER_BYTES, (zmoe_dtype)header->dtype, src,
                                   src_dtype, header->width, range, checksum, ex->isa);
  zmoe_wire_encode(header, held->frame);
  return rc;
}

int zmoe_payload_is_intact(const zmoe_exchange *ex, const void *frame, const zmoe_header *header) {
  return header->payload_checksum == checksum_of(ex, frame, header->payload_bytes);
}

/* ---- forks -------------------------------------------------------------------- */

unsigned zmoe_forks;
static pthread_once_t watch_once = PTHREAD_ONCE_INIT;
static int watch_error;

static void count_fork(void) {
  zmoe_forks++;
}

static void watch_forks(void) {
  watch_error = pthread_atfork(NULL, NULL, count_fork);
}

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

typedef struct class_list {
  zmoe_pool_class classes[4];
  uint32_t count;
} class_list;

/* Adds a class where it is larger than those before it; else these serve. */
static void add_class(class_list *list, size_t slot_bytes, uint32_t slots) {
  if (list->count == 0 || slot_bytes > list->classes[list->count - 1].slot_bytes)
    list->classes[list->count++] = (zmoe_pool_class){slot_bytes, slots};
}

/* `chunks`: those of a scattered payload, else 1.  Decode frames are cheap to have more of:
 * a peer that is slow to read may leave some with libzmq. */
static int create_pool(zmoe_exchange *ex, const zmoe_exchange_config *config) {
  uint32_t chunks = ex->scatter ? ex->nodes : 1, few = LARGE_SLOTS, many = DECODE_SLOTS;
  if (ex->role == ZMOE_LEADER) /* a frame for each worker, its own partial, one with libzmq */
    few = ex->nodes + 1, many = 2 * ex->nodes + DECODE_SLOTS;
  else if (ex->role == ZMOE_WORKER) /* see above, for a window of one */
    few = 3;
  size_t large_bytes = zmoe_scatter_slot_bytes(ex->max_payload_bytes, chunks);
  size_t batch_bytes = zmoe_scatter_slot_bytes(config->batch_payload_bytes, chunks);
  class_list list = {.count = 0};
  if (config->small_payload_bytes < large_bytes)
    add_class(&list, config->small_payload_bytes, many);
  if (config->batch_payload_bytes > config->small_payload_bytes && batch_bytes < large_bytes)
    add_class(&list, batch_bytes, many);
  size_t sum_bytes = zmoe_chunk_most(ex->max_payload_bytes, chunks);
  if (ex->scatter && sum_bytes < large_bytes)
    add_class(&list, sum_bytes, few);
  add_class(&list, large_bytes, few);
  return zmoe_pool_create(list.classes, list.count, SLOT_ALIGNMENT, &ex->pool);
}

static void init_peers(zmoe_exchange *ex, const zmoe_exchange_config *config) {
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_peer *peer = &ex->peers[r];
    for (int i = 0; i < ZMOE_WINDOW; i++) {
      zmoe_zmq.msg_init(&peer->partials[i].message);
      zmoe_zmq.msg_init(&peer->sums[i].message);
      zmoe_zmq.msg_init(&peer->early[i].message);
    }
    if (r == ex->rank)
      continue;
    peer->dealer = config->dealers[r];
    peer->monitor = config->monitors[r];
    zmoe_wire_presence(ex->session, r, peer->presence);
    ex->everyone |= zmoe_bit(r);
  }
}

static int init_role(zmoe_exchange *ex, const zmoe_exchange_config *config) {
  ex->dispatch_rows = config->dispatch_rows;
  if (ex->dispatch_rows == 0)
    return ZMOE_OK; /* ZMOE_PEER */
  ex->role = ex->rank == 0 ? ZMOE_LEADER : ZMOE_WORKER;
  if (ex->role == ZMOE_WORKER)
    return ZMOE_OK;
  ex->dispatched = calloc(ex->dispatch_rows, sizeof *ex->dispatched);
  return ex->dispatched != NULL ? ZMOE_OK : ZMOE_ENOMEM;
}

/* The frames of the session first: whoever sees our presence knows that they
 * will reach us. */
static int subscribe(zmoe_exchange *ex) {
  uint8_t frame[ZMOE_HEADER_BYTES], presence[ZMOE_PRESENCE_BYTES];
  zmoe_header header = {.kind = ZMOE_KIND_PARTIAL, .session = ex->session};
  zmoe_wire_encode(&header, frame);
  zmoe_wire_presence(ex->session, ex->rank, presence);
  int wait_ms = ZMOE_FIRST_WAIT_MS;
  if (zmoe_zmq.setsockopt(zmoe_receive_socket(ex), ZMQ_RCVTIMEO, &wait_ms, sizeof wait_ms) < 0 ||
      zmoe_zmq.setsockopt(ex->sub, ZMQ_SUBSCRIBE, frame, ZMOE_TOPIC_BYTES) < 0 ||
      zmoe_zmq.setsockopt(ex->sub, ZMQ_SUBSCRIBE, presence, sizeof presence) < 0)
    return ZMOE_EZMQ;
  return ZMOE_OK;
}

int zmoe_exchange_create(const zmoe_exchange_config *config, zmoe_exchange **out) {
  *out = NULL;
  if (!config_is_valid(config))
    return ZMOE_EINVAL;
  pthread_once(&watch_once, watch_forks);
  zmoe_exchange *ex = watch_error == 0 ? calloc(1, sizeof *ex) : NULL;
  if (ex == NULL)
    return ZMOE_ENOMEM;
  ex->rank = config->rank;
  ex->nodes = config->nodes;
  ex->session = config->session;
  ex->max_payload_bytes = config->max_payload_bytes;
  ex->scatter = config->scatter;
  ex->no_payload_checksum = config->no_payload_checksum;
  ex->forks = zmoe_forks;
  ex->spin_us = config->spin_us;
  ex->resend_ms = config->resend_ms;
  ex->grace_ms = config->grace_ms;
  ex->isa = zmoe_isa_best();
  ex->xpub = config->xpub;
  ex->sub = config->sub;
  ex->router = config->router;
  init_peers(ex, config);
  int rc = init_role(ex, config);
  rc = rc == ZMOE_OK ? create_pool(ex, config) : rc;
  rc = rc == ZMOE_OK ? zmoe_wait_prepare(ex) : rc;
  rc = rc == ZMOE_OK ? subscribe(ex) : rc;
  if (rc != ZMOE_OK) {
    zmoe_exchange_destroy(ex);
    return rc;
  }
  *out = ex;
  return ZMOE_OK;
}

void zmoe_exchange_destroy(zmoe_exchange *ex) {
  if (ex == NULL || zmoe_is_forked(ex))
    return;
  for (uint32_t r = 0; r < ex->nodes; r++)
    for (int i = 0; i < ZMOE_WINDOW; i++) {
      zmoe_zmq.msg_close(&ex->peers[r].partials[i].message);
      zmoe_zmq.msg_close(&ex->peers[r].sums[i].message);
      zmoe_zmq.msg_close(&ex->peers[r].early[i].message);
    }
  zmoe_collectives_clear(ex);
  if (ex->pool != NULL)
    zmoe_pool_abandon(ex->pool);
  free(ex->dispatched);
  free(ex);
}

/* ---- between exchanges ------------------------------------------------------ */

void zmoe_fault_set(zmoe_exchange *ex, uint64_t lost, zmoe_fault *fault) {
  /* Where we are: at the oldest open exchange, or at the last one. */
  uint64_t at = zmoe_is_open(ex) || ex->published == 0 ? ex->collected : ex->published - 1;
  const zmoe_header *here = &zmoe_collective_at(ex, at)->header;
  *fault = (zmoe_fault){
      .missing = zmoe_missing(ex),
      .lost = lost,
      .diverged = ex->diverged,
      .zmq_errno = ex->zmq_errno,
      .step = here->step,
      .layer = here->layer,
      .theirs = ex->theirs,
  };
}

void zmoe_fault_publish(zmoe_exchange *ex, int rc, uint64_t lost, zmoe_fault *fault) {
  zmoe_fault_set(ex, lost, fault);
  if (rc == ZMOE_EPOOL)
    fault->missing = zmoe_resend_askers(ex);
}

int zmoe_exchange_service(zmoe_exchange *ex, zmoe_fault *fault) {
  uint64_t lost = 0;
  int rc = ZMOE_EFORK;
  if (!zmoe_is_forked(ex)) {
    zmoe_wait_drain(ex);
    rc = zmoe_wait_trouble(ex, zmoe_now_us(), UINT64_MAX, &lost);
  }
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
