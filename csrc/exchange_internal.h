/* What the files of the exchange share: exchange.c (publish, collect, reduce),
 * central.c (scatter, receive), intake.c (from a received message to an accepted
 * frame), links.c (the other sockets: subscriptions, resends, link events) and
 * wait.c. */
#ifndef ZMOE_EXCHANGE_INTERNAL_H
#define ZMOE_EXCHANGE_INTERNAL_H

#include <poll.h>

#include "zmoe.h"
#include "zmq_api.h"

/* How long a collect looks at nothing but frames before it looks at all sockets. */
enum { ZMOE_FIRST_WAIT_MS = 2 };

/* Place in the run, compared in this order.  Exchanges only ever move forward. */
typedef struct zmoe_key {
  uint32_t epoch, step, layer;
} zmoe_key;

typedef struct zmoe_frame {
  int full;
  zmoe_header header;
  zmq_msg_t message; /* initialised at all times */
} zmoe_frame;

/* A frame of ours that a peer may still ask for. */
typedef struct zmoe_held {
  zmoe_slot *slot; /* NULL: none */
  zmoe_header header;
} zmoe_held;

typedef enum zmoe_role {
  ZMOE_PEER,   /* of a decentralised run */
  ZMOE_LEADER, /* of a centralised one: awaits every worker's partial, at its ROUTER */
  ZMOE_WORKER, /* awaits the leader's rows, at its DEALER */
} zmoe_role;

typedef struct zmoe_peer {
  void *dealer, *monitor;
  uint8_t presence[ZMOE_PRESENCE_BYTES];
  /* Lock-step: nobody publishes an exchange before having collected all of the
   * one before, so that a peer is at most one ahead of us. */
  zmoe_frame now, next;
  uint32_t subscriptions; /* connections of its SUB to our XPUB */
  uint64_t down_since_us; /* 0 while the link stands */
  uint64_t ask_at_us, ask_every_us;
  zmoe_key served;
  uint64_t served_at_us;
  zmoe_held rows; /* what the leader sent to this worker in the exchange under way */
} zmoe_peer;

struct zmoe_exchange {
  uint32_t rank, nodes;
  zmoe_role role;
  uint64_t session, everyone; /* bit mask of the peers */
  size_t max_payload_bytes;
  uint32_t spin_us, resend_ms, grace_ms;
  uint32_t spin_misses, spin_skip; /* spins in vain, and how many to leave out */
  zmoe_isa isa;
  void *xpub, *sub, *router;
  zmoe_pool *pool;

  uint32_t epoch;
  int started;    /* something was published in this epoch: now is valid */
  int has_before; /* ... and something before it: before is valid */
  int collecting; /* published or scattered, not yet collected; a worker: receiving */
  int answering;  /* a worker: received, not yet published */
  zmoe_key now, before;
  uint64_t published_at_us;
  zmoe_held held[2]; /* [0] of `now`, where a slot may be yet to come, [1] of `before` */
  uint64_t missing, diverged;
  zmoe_header theirs; /* of the lowest rank in `diverged` */

  uint32_t scatter_rows;
  uint64_t *touched; /* the leader, by row: the ranks that got it */
  void *zeros;       /* a row of them */

  uint64_t linked;
  int32_t zmq_errno; /* of the first failure that waiting cannot mend */
  int unread;        /* a socket holds messages that its descriptor won't tell of */
  int drained;       /* in this collect, all of them were found empty */
  zmoe_exchange_stats stats;
  uint32_t n_polled;
  struct pollfd polled[3 + 2 * ZMOE_MAX_NODES];
  int16_t polled_peer[3 + 2 * ZMOE_MAX_NODES];
  zmoe_peer peers[ZMOE_MAX_NODES];
};

static inline zmoe_key zmoe_key_of(const zmoe_header *header) {
  return (zmoe_key){header->epoch, header->step, header->layer};
}

static inline int zmoe_key_compare(zmoe_key a, zmoe_key b) {
  if (a.epoch != b.epoch)
    return a.epoch < b.epoch ? -1 : 1;
  if (a.step != b.step)
    return a.step < b.step ? -1 : 1;
  if (a.layer != b.layer)
    return a.layer < b.layer ? -1 : 1;
  return 0;
}

static inline uint64_t zmoe_bit(uint32_t rank) {
  return UINT64_C(1) << rank;
}

/* ---- exchange.c ------------------------------------------------------------ */

int zmoe_header_make(const zmoe_exchange *ex, uint32_t step, uint32_t layer, uint32_t rows,
                     uint32_t width, zmoe_dtype dtype, uint64_t digest, zmoe_header *out);
/* Moves on to the exchange of `header`, whose slot, if there is one already, is
 * now ours to hold. */
void zmoe_advance(zmoe_exchange *ex, zmoe_slot *slot, const zmoe_header *header);
void zmoe_held_release(zmoe_held *held);
void zmoe_fault_set(const zmoe_exchange *ex, uint64_t lost, zmoe_fault *fault);
/* What `rank` contributed to the exchange under way, NULL for zeros. */
const void *zmoe_payload_of(zmoe_exchange *ex, uint32_t rank);

/* ---- central.c ------------------------------------------------------------- */

/* Takes up the leader's own partial, or sends a worker's; ZMOE_EINVAL out of turn. */
int zmoe_central_publish(zmoe_exchange *ex, zmoe_slot *slot, const zmoe_header *header);
/* The sum over the leader's rows, once every frame is here. */
int zmoe_central_sum(zmoe_exchange *ex, void *out, zmoe_dtype out_dtype);
void zmoe_central_release(zmoe_exchange *ex);

/* ---- intake.c ------------------------------------------------------------ */

/* Reads at most a few messages; returns 1 when the socket has no more. */
int zmoe_intake_partials(zmoe_exchange *ex);
int zmoe_intake_replies(zmoe_exchange *ex, uint32_t link);
/* The same for the socket where the awaited frames come, the first of which is
 * waited for with `flags` 0: ZMOE_FIRST_WAIT_MS at most. */
int zmoe_intake_awaited(zmoe_exchange *ex, int flags);
void *zmoe_intake_socket(const zmoe_exchange *ex);
/* Takes up a valid frame that came over a control link. */
void zmoe_intake_frame(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header);
void zmoe_set_diverged(zmoe_exchange *ex, const zmoe_header *theirs);
/* Takes one message without waiting; 0 when there is none. */
int zmoe_intake_message(zmoe_exchange *ex, zmq_msg_t *message, void *socket, int flags);
/* Counts and decodes a frame of this session, from a rank other than ours;
 * returns 0 when it is anything else. */
int zmoe_intake_header(zmoe_exchange *ex, zmq_msg_t *message, zmoe_header *out);
/* Reads and drops the rest of a message of several parts. */
void zmoe_intake_skip(void *socket, zmq_msg_t *part);
/* Takes up what arrived early for the exchange that has just begun. */
void zmoe_intake_promote(zmoe_exchange *ex);
void zmoe_frame_drop(zmoe_frame *frame);

/* ---- links.c ------------------------------------------------------------- */

int zmoe_links_subscriptions(zmoe_exchange *ex);
/* Also the partials of workers; `flags` are those of the first receive. */
int zmoe_links_requests(zmoe_exchange *ex, int flags);
int zmoe_links_events(zmoe_exchange *ex, uint32_t rank);
/* Bit r: the link to r has been down for longer than grace allows. */
uint64_t zmoe_links_lost(const zmoe_exchange *ex, uint64_t now_us);
/* Asks the ranks in `missing` whose time has come for their frames. */
void zmoe_links_ask(zmoe_exchange *ex, uint64_t now_us);
/* Tells a rank that waits at `theirs` for a frame of ours that we are past it,
 * without ever having done that exchange. */
void zmoe_links_tell(zmoe_exchange *ex, const zmoe_header *theirs);
/* Sends a held frame to one socket; the slot gains a reference until sent. */
int zmoe_links_send(zmoe_exchange *ex, void *socket, const zmoe_held *held);
/* Sends it through the ROUTER to one peer; 0 when it could not be. */
int zmoe_links_send_to(zmoe_exchange *ex, const zmoe_peer *peer, const zmoe_held *held);

/* ---- wait.c ---------------------------------------------------------------- */

/* Fills the poll set; ZMOE_EZMQ when one is no socket. */
int zmoe_wait_prepare(zmoe_exchange *ex);
/* Reads all sockets until they are empty; 0 when some are not yet. */
int zmoe_wait_drain(zmoe_exchange *ex);
/* What ends a wait, or ZMOE_OK to go on. */
int zmoe_wait_trouble(const zmoe_exchange *ex, uint64_t now_us, uint64_t until_us, uint64_t *lost);
/* Until every peer's frame is here. */
int zmoe_wait_for_all(zmoe_exchange *ex, uint64_t deadline_us, uint64_t *lost);

#endif
