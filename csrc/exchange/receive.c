/* From a received message to an accepted frame.
 *
 * Nothing here trusts a sender: a frame is looked at only after its length,
 * magic, version, checksums and fields have been validated, and whatever does
 * not belong is counted by kind and dropped.  Each call reads a bounded number
 * of messages, so that a flood on one socket cannot starve the others. */
#include "common/platform.h"

#include "exchange_internal.h"

#include <errno.h>

enum { BATCH = 16 };

void zmoe_frame_drop(zmoe_frame *frame) {
  if (frame->full)
    zmoe_zmq.msg_close(&frame->message), zmoe_zmq.msg_init(&frame->message);
  frame->full = 0;
}

const void *zmoe_frame_body(zmoe_frame *frame) {
  if (!frame->full || frame->header.payload_bytes == 0)
    return NULL;
  return (const uint8_t *)zmoe_zmq.msg_data(&frame->message) + ZMOE_HEADER_BYTES;
}

static void frame_take(zmoe_frame *frame, zmq_msg_t *message, const zmoe_header *header) {
  zmoe_zmq.msg_move(&frame->message, message);
  frame->header = *header;
  frame->full = 1;
}

int zmoe_receive_message(zmoe_exchange *ex, zmq_msg_t *message, void *socket, int flags) {
  if (zmoe_zmq.msg_recv(message, socket, flags) >= 0)
    return 1;
  int error = zmoe_zmq.get_errno();
  if (error != EAGAIN && error != EINTR)
    ex->zmq_errno = error;
  return 0;
}

void zmoe_receive_skip(void *socket, zmq_msg_t *part) {
  while (zmoe_zmq.msg_more(part))
    if (zmoe_zmq.msg_recv(part, socket, ZMQ_DONTWAIT) < 0)
      return;
}

static void count_bad(zmoe_exchange_stats *stats, zmoe_wire_error error) {
  switch (error) {
  case ZMOE_WIRE_OK:
    break;
  case ZMOE_WIRE_SHORT:
    stats->bad_short++;
    break;
  case ZMOE_WIRE_MAGIC:
    stats->bad_magic++;
    break;
  case ZMOE_WIRE_VERSION_MISMATCH:
    stats->bad_version++;
    break;
  case ZMOE_WIRE_CHECKSUM:
    stats->bad_checksum++;
    break;
  case ZMOE_WIRE_FIELD:
    stats->bad_field++;
    break;
  case ZMOE_WIRE_OVERSIZED:
    stats->bad_oversized++;
    break;
  }
}

int zmoe_receive_header(zmoe_exchange *ex, zmq_msg_t *message, zmoe_header *out) {
  size_t bytes = zmoe_zmq.msg_size(message);
  ex->stats.frames_received++;
  ex->stats.bytes_received += bytes;
  zmoe_wire_error error =
      zmoe_wire_decode(zmoe_zmq.msg_data(message), bytes, ex->max_payload_bytes, out);
  count_bad(&ex->stats, error);
  if (error != ZMOE_WIRE_OK)
    return 0;
  if (out->session != ex->session || out->source >= ex->nodes || out->source == ex->rank) {
    ex->stats.bad_stranger++;
    return 0;
  }
  if (!zmoe_payload_is_intact(ex, zmoe_zmq.msg_data(message), out)) {
    ex->stats.bad_payload++; /* as if it had been lost: it is asked for again */
    return 0;
  }
  return 1;
}

/* ---- where a valid frame belongs ----------------------------------------- */

void zmoe_set_diverged(zmoe_exchange *ex, const zmoe_header *theirs) {
  uint64_t bit = zmoe_bit(theirs->source);
  if (ex->diverged == 0 || bit < (ex->diverged & -ex->diverged))
    ex->theirs = *theirs;
  ex->diverged |= bit;
}

/* It does an exchange that we have passed over; it will wait for us in vain. */
static void passed_over(zmoe_exchange *ex, const zmoe_header *theirs) {
  zmoe_set_diverged(ex, theirs);
  zmoe_resend_tell(ex, theirs);
}

static int same_exchange(const zmoe_exchange *ex, const zmoe_header *ours,
                         const zmoe_header *theirs) {
  if (ex->role == ZMOE_WORKER)
    return 1; /* what the leader dispatches is right */
  uint32_t rows = ex->role == ZMOE_LEADER ? ex->peers[theirs->source].rows.header.rows : ours->rows;
  return rows == theirs->rows && ours->width == theirs->width && ours->dtype == theirs->dtype &&
         ours->chunks == theirs->chunks && ours->digest == theirs->digest;
}

/* The place of an exchange among those whose collectives we remember, or -1. */
static int64_t find(zmoe_exchange *ex, zmoe_key key) {
  for (uint64_t i = ex->published; i-- > 0 && ex->published - i <= ZMOE_COLLECTIVES;)
    if (zmoe_key_compare(zmoe_key_of(&zmoe_collective_at(ex, i)->header), key) == 0)
      return (int64_t)i;
  return -1;
}

/* True for an exchange that lies between two of ours, as far as we remember. */
static int is_skipped(zmoe_exchange *ex, zmoe_key key) {
  uint64_t oldest = ex->published > ZMOE_COLLECTIVES ? ex->published - ZMOE_COLLECTIVES : 0;
  zmoe_key first = zmoe_key_of(&zmoe_collective_at(ex, oldest)->header);
  return oldest == 0 || zmoe_key_compare(key, first) > 0;
}

/* A partial of the i-th exchange, which is open, or a chunk of it. */
static void take_open(zmoe_exchange *ex, uint64_t i, zmq_msg_t *message,
                      const zmoe_header *header) {
  zmoe_collective *collective = zmoe_collective_at(ex, i);
  uint64_t bit = zmoe_bit(header->source);
  if (!same_exchange(ex, &collective->header, header)) {
    zmoe_set_diverged(ex, header);
  } else if (collective->missing & bit) {
    frame_take(&ex->peers[header->source].partials[i % ZMOE_WINDOW], message, header);
    collective->missing &= ~bit;
    if (collective->missing == 0 && header->chunks > 0)
      zmoe_scatter_sum(ex, i);
  } else {
    ex->stats.bad_stale++;
  }
}

/* A partial of an exchange that we have not begun. */
static void take_early(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header) {
  zmoe_frame *frames = ex->peers[header->source].early, *place = NULL;
  int is_duplicate = 0;
  for (int i = 0; i < ZMOE_WINDOW; i++)
    if (!frames[i].full)
      place = &frames[i];
    else if (zmoe_key_compare(zmoe_key_of(&frames[i].header), zmoe_key_of(header)) == 0)
      is_duplicate = 1;
  if (place == NULL || is_duplicate)
    ex->stats.bad_stale++;
  else
    frame_take(place, message, header);
}

static void take_partial(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header) {
  zmoe_key key = zmoe_key_of(header);
  int64_t i = find(ex, key);
  if (i >= 0 && (uint64_t)i >= ex->collected)
    take_open(ex, (uint64_t)i, message, header);
  else if (i >= 0)
    ex->stats.bad_stale++;
  else if (ex->published == 0 ||
           zmoe_key_compare(key, zmoe_key_of(&zmoe_collective_at(ex, ex->published - 1)->header)) >
               0)
    take_early(ex, message, header);
  else if (is_skipped(ex, key))
    passed_over(ex, header);
  else
    ex->stats.bad_stale++;
}

/* It needed our partial: only an open exchange can lack a chunk of the sum. */
static void take_sum(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header) {
  int64_t i = find(ex, zmoe_key_of(header));
  zmoe_collective *collective = zmoe_collective_at(ex, (uint64_t)i);
  uint64_t bit = zmoe_bit(header->source);
  if (i < 0 || (uint64_t)i < ex->collected) {
    ex->stats.bad_stale++;
  } else if (!same_exchange(ex, &collective->header, header)) {
    zmoe_set_diverged(ex, header);
  } else if (collective->missing_sums & bit) {
    frame_take(&ex->peers[header->source].sums[(uint64_t)i % ZMOE_WINDOW], message, header);
    collective->missing_sums &= ~bit;
  } else {
    ex->stats.bad_stale++;
  }
}

void zmoe_receive_promote(zmoe_exchange *ex) {
  uint64_t i = ex->published - 1;
  zmoe_key now = zmoe_key_of(&zmoe_collective_at(ex, i)->header);
  for (uint32_t r = 0; r < ex->nodes; r++) {
    for (int e = 0; e < ZMOE_WINDOW; e++) {
      zmoe_frame *early = &ex->peers[r].early[e];
      int order = early->full ? zmoe_key_compare(zmoe_key_of(&early->header), now) : 1;
      if (order == 0)
        take_open(ex, i, &early->message, &early->header);
      else if (order < 0)
        passed_over(ex, &early->header);
      if (order <= 0)
        zmoe_frame_drop(early);
    }
  }
}

/* ---- reading ------------------------------------------------------------- */

/* We are past an exchange that the sender asked us for. */
static void take_elsewhere(zmoe_exchange *ex, const zmoe_header *header) {
  const zmoe_header *oldest = &zmoe_collective_at(ex, ex->collected)->header;
  if ((zmoe_missing(ex) & zmoe_bit(header->source)) &&
      header->digest == ((uint64_t)oldest->step << 32 | oldest->layer))
    zmoe_set_diverged(ex, header);
  else
    ex->stats.bad_stale++;
}

/* The way by which a frame came: published for all, sent to our ROUTER, or sent
 * to our DEALER as the answer to a request. */
enum way { TO_ALL, ROUTED, ANSWER };

/* Whether it is a whole frame of the kind that each exchange needs of this rank. */
static int is_awaited(const zmoe_exchange *ex, const zmoe_header *header, enum way way) {
  if (header->chunks > 0)
    return 0;
  if (ex->role == ZMOE_WORKER)
    return header->kind == ZMOE_KIND_ROWS && header->source == 0 && way == ANSWER;
  return header->kind == ZMOE_KIND_PARTIAL && way != (ex->role == ZMOE_LEADER ? TO_ALL : ROUTED);
}

static void take_frame(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header,
                       enum way way) {
  int in_chunks = header->chunks > 0 && ex->role == ZMOE_PEER;
  int for_us = in_chunks && header->chunk == ex->rank;
  int theirs = in_chunks && header->chunk == header->source;
  if (is_awaited(ex, header, way))
    take_partial(ex, message, header);
  else if (header->kind == ZMOE_KIND_PARTIAL && for_us && way != TO_ALL)
    take_partial(ex, message, header);
  else if (header->kind == ZMOE_KIND_SUM && theirs && way != ROUTED)
    take_sum(ex, message, header);
  else if (header->kind == ZMOE_KIND_ELSEWHERE && way == ANSWER)
    take_elsewhere(ex, header);
  else
    ex->stats.bad_field++;
}

void zmoe_receive_routed(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header) {
  take_frame(ex, message, header, ROUTED);
}

/* `link` is the rank that the socket leads to, or -1 when it leads to all. */
static int receive_from(zmoe_exchange *ex, void *socket, int link, int flags) {
  zmq_msg_t message;
  zmoe_zmq.msg_init(&message);
  int empty = 0;
  for (int i = 0; i < BATCH && !empty; i++) {
    if (!zmoe_receive_message(ex, &message, socket, flags)) {
      empty = 1;
      break;
    }
    zmoe_header header;
    if (zmoe_zmq.msg_more(&message)) {
      ex->stats.bad_field++;
      zmoe_receive_skip(socket, &message);
    } else if (zmoe_receive_header(ex, &message, &header)) {
      if (link >= 0 && header.source != link)
        ex->stats.bad_stranger++;
      else
        take_frame(ex, &message, &header, link >= 0 ? ANSWER : TO_ALL);
    }
    /* The last frame that we wait for: what follows can wait too. */
    if (socket == zmoe_receive_socket(ex) && zmoe_is_open(ex) && zmoe_missing(ex) == 0)
      break;
  }
  zmoe_zmq.msg_close(&message);
  return empty;
}

int zmoe_receive_partials(zmoe_exchange *ex, int flags) {
  return receive_from(ex, ex->sub, -1, flags);
}

int zmoe_receive_replies(zmoe_exchange *ex, uint32_t link, int flags) {
  return receive_from(ex, ex->peers[link].dealer, (int)link, flags);
}

void *zmoe_receive_socket(const zmoe_exchange *ex) {
  if (ex->role == ZMOE_LEADER)
    return ex->router;
  return ex->role == ZMOE_WORKER ? ex->peers[0].dealer : ex->sub;
}

int zmoe_receive_awaited(zmoe_exchange *ex, int flags) {
  if (ex->role == ZMOE_LEADER)
    return zmoe_peers_routed(ex, flags);
  return ex->role == ZMOE_WORKER ? zmoe_receive_replies(ex, 0, flags)
                                 : zmoe_receive_partials(ex, flags);
}
