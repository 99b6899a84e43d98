/* What the files of the exchange share: exchange.c (creation, and what bounds the
 * buffers), collective.c (publish, collect), scatter.c (the sum in chunks), central.c
 * (dispatch, receive), receive.c
 * (from a received message to an accepted frame), peers.c (the other sockets:
 * subscriptions, what goes from rank to rank, link events), resend.c and wait.c. */
#ifndef ZMOE_EXCHANGE_INTERNAL_H
#define ZMOE_EXCHANGE_INTERNAL_H

#include <poll.h>

#include "exchange/exchange.h"
#include "payload.h"
#include "zmq_api.h"

enum {
  ZMOE_COLLECTIVES = 2 * ZMOE_WINDOW, /* most that a peer may still be at, with those ahead of it */
  /* How long a collect looks at nothing but frames before it looks at all sockets. */
  ZMOE_FIRST_WAIT_MS = 2,
};

/* Place in the run, compared in this order.  Exchanges only ever move forward. */
typedef struct zmoe_key {
  uint32_t step, layer, micro_batch;
} zmoe_key;

typedef struct zmoe_frame {
  int full;
  zmoe_header header;
  zmq_msg_t message; /* initialised at all times */
} zmoe_frame;

/* A frame of ours to send; its slot is held for as long as a peer may ask for it. */
typedef struct zmoe_held {
  zmoe_slot *slot;
  zmoe_header header;
  uint8_t *frame; /* in the slot: the encoded header, then the payload */
} zmoe_held;

typedef enum zmoe_role {
  ZMOE_PEER,   /* of a decentralised run */
  ZMOE_LEADER, /* of a centralised one: awaits every worker's partial, at its ROUTER */
  ZMOE_WORKER, /* awaits the leader's rows, at its DEALER */
} zmoe_role;

typedef struct zmoe_peer {
  void *dealer, *monitor;
  uint8_t presence[ZMOE_PRESENCE_BYTES];
  /* Of the i-th exchange, if it is open, at i % ZMOE_WINDOW: its partial (or the
   * chunk of it that we add up), and its chunk of the sum. */
  zmoe_frame partials[ZMOE_WINDOW], sums[ZMOE_WINDOW];
  zmoe_frame early[ZMOE_WINDOW]; /* partials of exchanges that we have not begun */
  uint32_t subscriptions;        /* connections of its SUB to our XPUB */
  uint64_t down_since_us;        /* 0 while the link stands */
  uint64_t ask_at_us, ask_every_us;
  zmoe_header served; /* what it was sent last on request */
  uint64_t served_at_us;
  zmoe_held rows; /* what the leader dispatched to this worker in the open exchange */
} zmoe_peer;

/* One of our exchanges. */
typedef struct zmoe_collective {
  zmoe_header header; /* of our partial; every rank's must agree with it */
  /* Our partial as encoded: whole, or chunk by chunk, each behind its header.
   * NULL once nobody can ask for it any more, and in a centralised run as long as
   * it is not published. */
  zmoe_slot *partial;
  zmoe_slot *sum;                 /* with chunks: our chunk of the sum */
  uint32_t sum_bytes;             /* 0: all zeros */
  uint64_t missing, missing_sums; /* bit r: rank r's partial, its chunk of the sum is not here */
  uint64_t sent_at_us;            /* our latest frame */
} zmoe_collective;

struct zmoe_exchange {
  uint32_t rank, nodes;
  zmoe_role role;
  uint64_t session, everyone; /* bit mask of the peers */
  size_t max_payload_bytes;
  int scatter; /* there are slots for it */
  int no_payload_checksum;
  unsigned forks; /* zmoe_forks of the process that it belongs to */
  uint32_t spin_us, resend_ms, grace_ms;
  uint32_t spin_misses, spin_skip; /* spins in vain, and how many to leave out */
  zmoe_isa isa;
  void *xpub, *sub, *router;
  zmoe_pool *pool;

  /* Exchanges: `collected` <= i < `published` are open.  The i-th is
   * at i % ZMOE_COLLECTIVES; those before `held` have lost their slots. */
  uint64_t published, collected, held;
  zmoe_collective collectives[ZMOE_COLLECTIVES];
  uint32_t dispatch_rows;
  uint64_t *dispatched; /* the leader, by row: the ranks that got it */
  uint64_t diverged;
  zmoe_header theirs; /* of the lowest rank in `diverged` */

  uint64_t linked;   /* our DEALER to that rank stands */
  uint64_t routable; /* our ROUTER has heard that rank, and can send to it */
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
  return (zmoe_key){header->step, header->layer, header->micro_batch};
}

static inline int zmoe_key_compare(zmoe_key a, zmoe_key b) {
  if (a.step != b.step)
    return a.step < b.step ? -1 : 1;
  if (a.layer != b.layer)
    return a.layer < b.layer ? -1 : 1;
  if (a.micro_batch != b.micro_batch)
    return a.micro_batch < b.micro_batch ? -1 : 1;
  return 0;
}

/* How often this process was forked from another that had an exchange. */
extern unsigned zmoe_forks;

/* A forked child has neither libzmq's threads nor a right to its sockets. */
static inline int zmoe_is_forked(const zmoe_exchange *ex) {
  return ex->forks != zmoe_forks;
}

static inline uint64_t zmoe_bit(uint32_t rank) {
  return UINT64_C(1) << rank;
}

static inline zmoe_collective *zmoe_collective_at(zmoe_exchange *ex, uint64_t index) {
  return &ex->collectives[index % ZMOE_COLLECTIVES];
}

static inline int zmoe_is_open(const zmoe_exchange *ex) {
  return ex->collected < ex->published;
}

/* The ranks of whom the oldest open exchange lacks something. */
static inline uint64_t zmoe_missing(const zmoe_exchange *ex) {
  const zmoe_collective *oldest = &ex->collectives[ex->collected % ZMOE_COLLECTIVES];
  return zmoe_is_open(ex) ? oldest->missing | oldest->missing_sums : 0;
}

/* It lacks chunks of partials, which come from rank to rank. */
static inline int zmoe_awaits_chunks(const zmoe_exchange *ex) {
  const zmoe_collective *oldest = &ex->collectives[ex->collected % ZMOE_COLLECTIVES];
  return zmoe_is_open(ex) && oldest->missing != 0 && oldest->header.chunks > 0;
}

/* ---- exchange.c ------------------------------------------------------------ */

/* Encodes the header of a frame whose payload is in its place. */
void zmoe_held_encode(const zmoe_exchange *ex, zmoe_held *held);
/* Encodes a range of rows as the payload of a frame, and its header; `src` is the beginning of
 * the range. */
int zmoe_held_fill(const zmoe_exchange *ex, zmoe_held *held, const void *src, zmoe_dtype src_dtype,
                   const zmoe_range *range);
/* Whether a valid frame has the payload that its sender gave it. */
int zmoe_payload_is_intact(const zmoe_exchange *ex, const void *frame, const zmoe_header *header);

void zmoe_fault_set(zmoe_exchange *ex, uint64_t lost, zmoe_fault *fault);
/* The same after publishing gave `rc`. */
void zmoe_fault_publish(zmoe_exchange *ex, int rc, uint64_t lost, zmoe_fault *fault);

/* ---- collective.c --------------------------------------------------------------- */

/* Forgets all collectives; their slots are released. */
void zmoe_collectives_clear(zmoe_exchange *ex);
/* Our partial as it was published; no slot when the collective has none. */
zmoe_held zmoe_collective_whole(const zmoe_collective *collective);
/* The header of our partial; ZMOE_EINVAL for a call that is out of range. */
int zmoe_collective_header(const zmoe_exchange *ex, const zmoe_call *call, zmoe_header *out);
/* Takes slots for the partial of `made` and encodes src into them; NULL is all zeros.
 * When it fails, the caller drops the slots. */
int zmoe_collective_encode(zmoe_exchange *ex, zmoe_collective *made, const void *src,
                           zmoe_dtype src_dtype, uint64_t deadline_us, uint64_t *lost);
/* Whether an exchange may come next. */
int zmoe_collective_may_begin(zmoe_exchange *ex, const zmoe_header *header);
/* Takes over the slots of `made`, as the latest exchange; nothing is sent. */
zmoe_collective *zmoe_collective_begin(zmoe_exchange *ex, const zmoe_collective *made);
/* Done with the oldest open exchange. */
void zmoe_collective_end(zmoe_exchange *ex);
void zmoe_slot_drop(zmoe_slot **slot);

/* ---- scatter.c ------------------------------------------------------------- */

/* Bytes of a slot for a partial of so many bytes, in so many chunks. */
size_t zmoe_scatter_slot_bytes(size_t payload_bytes, uint32_t chunks);
/* Encodes src into the collective's slot, chunk by chunk; NULL is all zeros. */
int zmoe_scatter_encode(zmoe_exchange *ex, zmoe_collective *collective, const void *src,
                        zmoe_dtype src_dtype);
/* Sends each rank the chunk that it adds up; 0, or an errno. */
int zmoe_scatter_send(zmoe_exchange *ex, const zmoe_collective *collective);
/* The i-th exchange has all partials: adds up our chunk and publishes it. */
void zmoe_scatter_sum(zmoe_exchange *ex, uint64_t index);
/* The i-th exchange has all chunks of the sum: writes it to `out`. */
int zmoe_scatter_gather(zmoe_exchange *ex, uint64_t index, void *out, zmoe_dtype out_dtype);
/* Our frame that holds chunk `chunk` of the partial, or our chunk of the sum. */
zmoe_held zmoe_scatter_partial(const zmoe_collective *collective, uint32_t chunk);
zmoe_held zmoe_scatter_own_sum(const zmoe_exchange *ex, const zmoe_collective *collective);

/* ---- central.c ------------------------------------------------------------- */

/* The leader's own partial, or a worker's answer; NULL is all zeros. */
int zmoe_central_publish(zmoe_exchange *ex, const zmoe_call *call, const void *src,
                         zmoe_dtype src_dtype, uint64_t deadline_us, uint64_t *lost);
/* The open exchange has all answers: writes the sum to `out`. */
int zmoe_central_sum(zmoe_exchange *ex, void *out, zmoe_dtype out_dtype);
/* Nobody can ask for what was dispatched any more. */
void zmoe_central_release(zmoe_exchange *ex);

/* ---- receive.c ------------------------------------------------------------ */

/* Reads at most a few messages.  Without ZMQ_DONTWAIT each is waited for, ZMOE_FIRST_WAIT_MS
 * at most, until all that are awaited are here.  Returns 1 when the socket has no more. */
int zmoe_receive_partials(zmoe_exchange *ex, int flags);
int zmoe_receive_replies(zmoe_exchange *ex, uint32_t link, int flags);
/* The same for the socket by which the awaited frames come. */
int zmoe_receive_awaited(zmoe_exchange *ex, int flags);
void *zmoe_receive_socket(const zmoe_exchange *ex);
void zmoe_set_diverged(zmoe_exchange *ex, const zmoe_header *theirs);
/* Takes one message without waiting; 0 when there is none. */
int zmoe_receive_message(zmoe_exchange *ex, zmq_msg_t *message, void *socket, int flags);
/* Takes what a rank sent to us alone, at our ROUTER; may move the message away. */
void zmoe_receive_routed(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header);
/* Counts and decodes a frame of this session, from a rank other than ours;
 * returns 0 when it is anything else. */
int zmoe_receive_header(zmoe_exchange *ex, zmq_msg_t *message, zmoe_header *out);
/* Reads and drops the rest of a message of several parts. */
void zmoe_receive_skip(void *socket, zmq_msg_t *part);
/* Takes up what arrived early for the exchange that was just published. */
void zmoe_receive_promote(zmoe_exchange *ex);
void zmoe_frame_drop(zmoe_frame *frame);
/* Its payload; NULL when it is all zeros, or there is no frame. */
const void *zmoe_frame_body(zmoe_frame *frame);

/* ---- peers.c ------------------------------------------------------------- */

int zmoe_peers_subscriptions(zmoe_exchange *ex);
int zmoe_peers_routed(zmoe_exchange *ex, int flags); /* see zmoe_receive_partials */
int zmoe_peers_events(zmoe_exchange *ex, uint32_t rank);
/* Lets a socket take up its new connections, which libzmq does only within a call on it. */
void zmoe_peers_take_up(void *socket);
/* Bit r: the link to r has been down for longer than grace allows. */
uint64_t zmoe_peers_lost(zmoe_exchange *ex, uint64_t now_us);
/* Sends a held frame to one socket; 0, or the errno.  The slot gains a reference
 * until it is sent. */
int zmoe_peers_send(zmoe_exchange *ex, void *socket, const zmoe_held *held);
/* The same to one rank, without copying: by our DEALER to its ROUTER.  A link
 * that is down or full is no failure: the rank asks for what it misses. */
int zmoe_peers_send_to(zmoe_exchange *ex, uint32_t rank, const zmoe_held *held);
/* The other way, which answers take: by our ROUTER to its DEALER.  Who is gone
 * is sent nothing. */
int zmoe_peers_send_back(zmoe_exchange *ex, uint32_t rank, const zmoe_held *held);
/* A header alone, by either way; 0 when it was not taken. */
int zmoe_peers_header_to(zmoe_exchange *ex, uint32_t rank, const zmoe_header *header);
int zmoe_peers_header_back(zmoe_exchange *ex, uint32_t rank, const zmoe_header *header);

/* ---- resend.c -------------------------------------------------------------- */

/* Sets when to ask for what is missing of a collective that begins. */
void zmoe_resend_begin(zmoe_exchange *ex, const zmoe_collective *collective);
/* The link to a rank has come back, and may have lost what is missing: asks at once. */
void zmoe_resend_renew(zmoe_exchange *ex, uint32_t rank);
/* Asks the ranks of whom something is missing, and whose time has come, for it. */
void zmoe_resend_ask(zmoe_exchange *ex, uint64_t now_us);
void zmoe_resend_answer(zmoe_exchange *ex, const zmoe_header *request);
/* The ranks that asked for a frame that we still hold. */
uint64_t zmoe_resend_askers(zmoe_exchange *ex);
/* Tells a rank that waits at `theirs` for a frame of ours that we are past it,
 * without ever having done that exchange. */
void zmoe_resend_tell(zmoe_exchange *ex, const zmoe_header *theirs);

/* ---- wait.c ---------------------------------------------------------------- */

/* Fills the poll set; ZMOE_EZMQ when one is no socket. */
int zmoe_wait_prepare(zmoe_exchange *ex);
/* Reads all sockets until they are empty; 0 when some are not yet. */
int zmoe_wait_drain(zmoe_exchange *ex);
/* What ends a wait, or ZMOE_OK to go on. */
int zmoe_wait_trouble(zmoe_exchange *ex, uint64_t now_us, uint64_t until_us, uint64_t *lost);
/* A slot, or why there is none: a peer's loss; ZMOE_EINTR well before the deadline. */
int zmoe_wait_slot(zmoe_exchange *ex, size_t bytes, uint64_t deadline_us, zmoe_slot **out,
                   uint64_t *lost);
/* Until the oldest open exchange has every peer's frames. */
int zmoe_wait_for_all(zmoe_exchange *ex, uint64_t deadline_us, uint64_t *lost);

#endif
