/* The exchange: the sum of all ranks' partial outputs, once per MoE layer, over ZeroMQ.
 *
 * Three parts, bottom up: pool (pinned slots), wire (frame header) and exchange.
 * C11, libc only; the zmq_* functions are resolved at run time from a libzmq that
 * the process has already loaded, so that there is never a second one.
 *
 * Functions return ZMOE_OK or a negative zmoe_status for what a caller, a peer or
 * the network can cause; assert() is for broken invariants of our own.  Nothing is
 * allocated after the *_create calls.
 */
#ifndef ZMOE_EXCHANGE_H
#define ZMOE_EXCHANGE_H

#include <stddef.h>
#include <stdint.h>

#include "common/checksum.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/reduce.h"
#include "common/status.h"

#define ZMOE_WIRE_VERSION 3
#define ZMOE_HEADER_BYTES 64
#define ZMOE_PRESENCE_BYTES 18
#define ZMOE_PAIR_BYTES 12
#define ZMOE_TOPIC_BYTES 16 /* of a frame: what its readers subscribe to */

/* ---- pool: pinned slots, refcounted across threads ---------------------- */

typedef struct zmoe_pool zmoe_pool;

typedef struct zmoe_pool_class {
  size_t slot_bytes; /* payload bytes of each slot of the class */
  uint32_t slots;
} zmoe_pool_class;

typedef struct zmoe_pool_stats {
  uint64_t acquired, released, waits, exhausted;
  uint64_t locked_bytes; /* of total_bytes, how many the system let us lock */
  uint64_t total_bytes;
} zmoe_pool_stats;

typedef struct zmoe_slot zmoe_slot;

int zmoe_pool_create(const zmoe_pool_class *classes, uint32_t n_classes, size_t alignment,
                     zmoe_pool **out);
/* Every slot must have been released (asserted). */
void zmoe_pool_destroy(zmoe_pool *pool);
/* The smallest free slot that holds `bytes`, with one reference.  Waits until
 * `deadline_us` from now when all are taken, then ZMOE_EPOOL. */
int zmoe_pool_acquire(zmoe_pool *pool, size_t bytes, uint64_t deadline_us, zmoe_slot **out);
void zmoe_slot_retain(zmoe_slot *slot);
void zmoe_slot_release(zmoe_slot *slot);  /* any thread */
void *zmoe_slot_payload(zmoe_slot *slot); /* ZMOE_HEADER_BYTES of room lie before it */
size_t zmoe_slot_capacity(const zmoe_slot *slot);
void zmoe_pool_stats_get(const zmoe_pool *pool, zmoe_pool_stats *out);

/* ---- wire: one fixed little-endian header of 64 bytes ------------------- */

typedef enum zmoe_kind {
  ZMOE_KIND_PARTIAL = 1, /* one rank's partial sum of one layer */
  ZMOE_KIND_RESEND = 2,  /* please send your frame (step, layer) again */
  /* Answer to a RESEND for what the sender skipped: the header tells where it
   * is instead, `digest` repeats the request's step << 32 | layer. */
  ZMOE_KIND_ELSEWHERE = 3,
  ZMOE_KIND_SUM = 4, /* the sum of all ranks' partials, of the chunk that `source` adds up */
  /* What a worker of a centralised run is to compute of one layer: the rows and the
   * experts of its pairs in int32, their weights in f32, then its rows. */
  ZMOE_KIND_ROWS = 5,
} zmoe_kind;

typedef struct zmoe_header {
  uint8_t kind;
  uint8_t dtype;
  uint16_t source;  /* rank */
  uint64_t session; /* random per run: frames of other runs are strangers */
  uint32_t step;
  uint32_t layer; /* ordinal of the MoE layer, 0-based */
  uint32_t rows, width;
  uint32_t payload_bytes; /* those of rows x width in dtype, or of a chunk; or 0: all zeros;
                           * of ROWS also the pairs' */
  uint8_t micro_batch;    /* of a layer, from 0 */
  uint8_t chunks, chunk;  /* 0: the payload is whole; else it is chunk `chunk` of `chunks` */
  uint8_t busiest;        /* of ROWS: experts that the busiest rank computes, at most 255 */
  uint64_t digest;        /* of the routing that led here and, but in ROWS, of the plan */
  /* CRC-32C of the payload; 0 where the exchange has no_payload_checksum. */
  uint32_t payload_checksum;
} zmoe_header;

typedef enum zmoe_wire_error {
  ZMOE_WIRE_OK = 0,
  ZMOE_WIRE_SHORT, /* fewer bytes than a header, or than it announces */
  ZMOE_WIRE_MAGIC,
  ZMOE_WIRE_VERSION_MISMATCH,
  ZMOE_WIRE_CHECKSUM,
  ZMOE_WIRE_FIELD,    /* unknown kind or dtype, or sizes that contradict */
  ZMOE_WIRE_OVERSIZED /* more bytes than it announces or than allowed */
} zmoe_wire_error;

void zmoe_wire_encode(const zmoe_header *header, uint8_t out[ZMOE_HEADER_BYTES]);
/* How rank `rank` of a run names itself: its subscription to every XPUB, and
 * its routing id (ZMQ_ROUTING_ID) with every ROUTER. */
void zmoe_wire_presence(uint64_t session, uint32_t rank, uint8_t out[ZMOE_PRESENCE_BYTES]);
/* Validates a frame of `frame_bytes` bytes but for its payload's checksum: touches only
 * the header. */
zmoe_wire_error zmoe_wire_decode(const void *frame, size_t frame_bytes, size_t max_payload_bytes,
                                 zmoe_header *out);

/* ---- exchange: the all-reduce of one layer ------------------------------ */

/* Resolve zmq_* from `library` (pyzmq's backend module, or a libzmq).  Once per
 * process, before any exchange.  On failure writes one line into `error`. */
int zmoe_zmq_load(const char *library, char *error, size_t error_bytes);

typedef struct zmoe_exchange zmoe_exchange;

typedef struct zmoe_exchange_config {
  uint32_t rank, nodes;
  uint64_t session;
  size_t max_payload_bytes;   /* of one frame */
  size_t small_payload_bytes; /* of one row: its own size class */
  size_t batch_payload_bytes; /* of a row of every sequence: likewise; 0: of one row at most */
  int scatter;                /* 1 when ZMOE_SCATTER may be asked for, which takes more slots */
  /* Sockets, created, bound and connected by the caller, used from here on by
   * one thread at a time.  The XPUB has ZMQ_XPUB_MANUAL set: only who names this
   * session is sent anything.  dealers[r] (routing id: our presence; ZMQ_PROBE_ROUTER set) and
   * monitors[r] (PAIR, the events HANDSHAKE_SUCCEEDED and DISCONNECTED of
   * dealers[r]) are NULL at r == rank. */
  void *xpub, *sub, *router;
  void *const *dealers;
  void *const *monitors;
  /* 0, or in a centralised run, where rank 0 leads, the most rows of an exchange. */
  uint32_t dispatch_rows;
  uint32_t spin_us;   /* look for frames this long before sleeping; less when in vain */
  uint32_t resend_ms; /* ask for a missing frame after this long, then back off */
  uint32_t grace_ms;  /* a closed link may come back this long before it is lost */
  /* 1: payloads carry no checksum, since the links themselves find damage.  The same on
   * every rank. */
  int no_payload_checksum;
} zmoe_exchange_config;

typedef struct zmoe_fault {
  uint64_t missing;  /* bit r: nothing from rank r for this layer yet; after ZMOE_EPOOL,
                      * rank r had to be sent again what we still hold */
  uint64_t lost;     /* bit r: the link to rank r is gone */
  uint64_t diverged; /* bit r: rank r is elsewhere, see theirs */
  int32_t zmq_errno;
  uint32_t step, layer; /* where we are */
  zmoe_header theirs;   /* of the lowest diverged rank */
} zmoe_fault;

typedef struct zmoe_exchange_stats {
  uint64_t exchanges, frames_sent, frames_received, bytes_sent, bytes_received;
  uint64_t bad_short, bad_magic, bad_version, bad_checksum, bad_field, bad_oversized;
  uint64_t bad_payload;  /* damaged: the checksum of the header is right, the payload's is not */
  uint64_t bad_stranger; /* another session, an unknown rank, a wrong link */
  uint64_t bad_stale;    /* an old step, or a duplicate */
  uint64_t resend_asked, resend_served, resend_unknown;
  uint64_t link_drops, link_returns;
  uint64_t waited_us; /* for what peers had to send */
} zmoe_exchange_stats;

/* Subscribes `sub` to the session, allocates all that the exchange ever needs. */
int zmoe_exchange_create(const zmoe_exchange_config *config, zmoe_exchange **out);
/* Never blocks.  Slots still with libzmq are freed by its last release.  Close
 * the sockets after it, not before.  In a forked child, which has a copy of the
 * parent's exchange, this frees nothing, and all else fails with ZMOE_EFORK. */
void zmoe_exchange_destroy(zmoe_exchange *ex);

/* Bit r: rank r has subscribed to our frames.  Reads pending subscriptions. */
uint64_t zmoe_exchange_subscribers(zmoe_exchange *ex);
/* Bit r: our control link to rank r stands, and theirs has reached our ROUTER, which
 * can answer it.  Reads pending events and messages. */
uint64_t zmoe_exchange_links(zmoe_exchange *ex);

/* Most exchanges that are published and not yet collected. */
#define ZMOE_WINDOW 2

typedef enum zmoe_algorithm {
  ZMOE_DIRECT = 0,  /* whole partials to all: the fewest messages */
  ZMOE_SCATTER = 1, /* reduce-scatter, all-gather: the fewest bytes for three nodes or more */
} zmoe_algorithm;

/* Which exchange, and of what; the same on every rank.  Order is by step, layer,
 * micro-batch.  A layer's rows may come in several micro-batches, 0, 1, ...: a further one may
 * be published while the one before it is not yet collected. */
typedef struct zmoe_call {
  uint32_t step, layer, micro_batch;
  uint32_t rows, width;
  zmoe_dtype wire_dtype;
  zmoe_algorithm algorithm;
  uint64_t digest; /* of the routing */
  uint64_t plan;   /* of the step's plan, as this rank has it: its partial shows both */
} zmoe_call;

/* Encode src (rows x width) in the wire's dtype and publish it.  src NULL: this
 * rank adds nothing.  When no slot is free, nothing is published: after ZMOE_EINTR
 * (within 100 ms; peers have been answered) call again to go on waiting. */
int zmoe_exchange_publish(zmoe_exchange *ex, const zmoe_call *call, const void *src,
                          zmoe_dtype src_dtype, uint64_t deadline_us, zmoe_fault *fault);
/* Wait for the oldest exchange that was published and not collected, and write the
 * sum, in rank order, of all ranks' encoded partials, rounded to the wire's dtype.  A
 * row's sum is the same bits whatever the other rows, the algorithm and the parts.
 * `deadline_us` is from now.
 * After ZMOE_EINTR (a signal, or 100 ms without one: the caller may have missed
 * one) call again to go on waiting. */
int zmoe_exchange_collect(zmoe_exchange *ex, void *out, zmoe_dtype out_dtype, uint64_t deadline_us,
                          zmoe_fault *fault);
/* The same for every rank's partial as it travelled, instead of their sum: rank r's goes to
 * `out` + r * `stride` bytes.  Of ZMOE_DIRECT, decentralised. */
int zmoe_exchange_gather(zmoe_exchange *ex, void *out, size_t stride, uint64_t deadline_us,
                         zmoe_fault *fault);

/* ---- the centralised schedule ------------------------------------------------
 * The leader has all rows and routes them.  In each exchange it dispatches to
 * every worker the rows that it has experts for, publishes its own partial and
 * collects, as above; a worker receives, and publishes its partial of the rows
 * that it received.  That makes two messages a worker, empty ones included: from
 * the leader's ROUTER to the worker's DEALER, and back.  ZMOE_DIRECT, one micro-batch. */

typedef struct zmoe_routed {
  const void *x;         /* (rows, width) of x_dtype */
  const int32_t *ids;    /* (rows, top_k): the chosen experts */
  const float *weights;  /* (rows, top_k) */
  const uint64_t *ranks; /* (rows, top_k) bit r: rank r computes this pair */
  uint32_t top_k;
  zmoe_dtype x_dtype;
  uint32_t busiest; /* experts that the rank with most of them computes */
} zmoe_routed;

int zmoe_exchange_dispatch(zmoe_exchange *ex, const zmoe_call *call, const zmoe_routed *routed,
                           uint64_t deadline_us, zmoe_fault *fault);

/* A worker's rows, renumbered from 0, and its pairs, ordered by row. */
typedef struct zmoe_dispatch_batch {
  /* Room, this rank's number of each expert (-1 for another's), and how wide the
   * rows of this layer are. */
  void *x;
  int32_t *pair_rows, *pair_experts;
  float *pair_weights;
  size_t x_bytes;
  uint32_t max_pairs, experts;
  const int32_t *local; /* (experts) */
  uint32_t width;
  /* What came; pair_experts in this rank's numbers. */
  uint32_t rows, pairs, busiest;
  zmoe_dtype dtype;
  uint64_t digest; /* to be published with */
} zmoe_dispatch_batch;

/* Wait for the leader's rows; call again after ZMOE_EINTR.  ZMOE_EDIVERGED also
 * for a pair whose expert is another rank's, for rows of another width and for more
 * rows than dispatch_rows.  What does not fit the room is dropped, as a bad frame. */
int zmoe_exchange_receive(zmoe_exchange *ex, zmoe_dispatch_batch *out, uint32_t step,
                          uint32_t layer, uint64_t deadline_us, zmoe_fault *fault);

/* ---- between exchanges --------------------------------------------------------- */

/* Answer resend requests, watch the links.  Never blocks. */
int zmoe_exchange_service(zmoe_exchange *ex, zmoe_fault *fault);
void zmoe_exchange_stats_get(const zmoe_exchange *ex, zmoe_exchange_stats *out);
void zmoe_exchange_pool_stats(const zmoe_exchange *ex, zmoe_pool_stats *out);

#endif
