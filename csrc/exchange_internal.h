/* What the files of the exchange share: exchange.c (publish, collect, reduce),
 * intake.c (from a received message to an accepted frame), links.c (the other
 * sockets: subscriptions, resends, link events) and wait.c. */
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
} zmoe_peer;

/* A frame of ours that is sent, and sent again to a peer that asks for it. */
typedef struct zmoe_held {
  zmoe_slot *slot; /* NULL: none */
  zmoe_header header;
  uint8_t *frame; /* in the slot: the encoded header, then the payload */
} zmoe_held;

struct zmoe_exchange {
  uint32_t rank, nodes;
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
  int collecting; /* published, not yet collected */
  zmoe_key now, before;
  uint64_t published_at_us;
  zmoe_held held[2]; /* [0] of `now`, [1] of `before` */
  uint64_t missing, diverged;
  zmoe_header theirs; /* of the lowest rank in `diverged` */

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

/* ---- intake.c ------------------------------------------------------------ */

/* Reads at most a few messages; returns 1 when the socket has no more. */
int zmoe_intake_partials(zmoe_exchange *ex);
/* The same, but waits for the first: ZMOE_FIRST_WAIT_MS at most. */
int zmoe_intake_wait(zmoe_exchange *ex);
int zmoe_intake_replies(zmoe_exchange *ex, uint32_t link);
/* Takes one message without waiting; 0 when there is none. */
int zmoe_intake_message(zmoe_exchange *ex, zmq_msg_t *message, void *socket, int flags);
/* Takes what a rank sent to us alone, at our ROUTER; may move the message away. */
void zmoe_intake_routed(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header);
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
int zmoe_links_routed(zmoe_exchange *ex);
int zmoe_links_events(zmoe_exchange *ex, uint32_t rank);
/* Bit r: the link to r has been down for longer than grace allows. */
uint64_t zmoe_links_lost(const zmoe_exchange *ex, uint64_t now_us);
/* Asks the ranks in `missing` whose time has come for their frames. */
void zmoe_links_ask(zmoe_exchange *ex, uint64_t now_us);
/* Tells a rank that waits at `theirs` for a frame of ours that we are past it,
 * without ever having done that exchange. */
void zmoe_links_tell(zmoe_exchange *ex, const zmoe_header *theirs);
/* Sends a held frame to one socket; 0, or the errno.  The slot gains a reference
 * until it is sent. */
int zmoe_links_send(zmoe_exchange *ex, void *socket, const zmoe_held *held);
/* The same to one rank, without copying: by our DEALER to its ROUTER.  A link
 * that is down or full is no failure: the rank asks for what it misses. */
int zmoe_links_send_to(zmoe_exchange *ex, uint32_t rank, const zmoe_held *held);
/* The other way, which answers take: by our ROUTER to its DEALER.  Who is gone
 * is sent nothing. */
int zmoe_links_send_back(zmoe_exchange *ex, uint32_t rank, const zmoe_held *held);

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
