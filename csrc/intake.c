/* From a received message to an accepted frame.
 *
 * Nothing here trusts a sender: a frame is looked at only after its length,
 * magic, version, checksum and fields have been validated, and whatever does
 * not belong is counted by kind and dropped.  Each call reads a bounded number
 * of messages, so that a flood on one socket cannot starve the others. */
#include "platform.h"

#include "exchange_internal.h"

#include <errno.h>

enum { BATCH = 16 };

void zmoe_frame_drop(zmoe_frame *frame) {
  if (frame->full)
    zmoe_zmq.msg_close(&frame->message), zmoe_zmq.msg_init(&frame->message);
  frame->full = 0;
}

static void frame_take(zmoe_frame *frame, zmq_msg_t *message, const zmoe_header *header) {
  zmoe_zmq.msg_move(&frame->message, message);
  frame->header = *header;
  frame->full = 1;
}

int zmoe_intake_message(zmoe_exchange *ex, zmq_msg_t *message, void *socket, int flags) {
  if (zmoe_zmq.msg_recv(message, socket, flags) >= 0)
    return 1;
  int error = zmoe_zmq.get_errno();
  if (error != EAGAIN && error != EINTR)
    ex->zmq_errno = error;
  return 0;
}

void zmoe_intake_skip(void *socket, zmq_msg_t *part) {
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

int zmoe_intake_header(zmoe_exchange *ex, zmq_msg_t *message, zmoe_header *out) {
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
  zmoe_links_tell(ex, theirs);
}

static int same_exchange(const zmoe_exchange *ex, const zmoe_header *theirs) {
  const zmoe_header *ours = &ex->held[0].header;
  if (ex->role == ZMOE_WORKER)
    return 1; /* the leader is always right */
  uint32_t rows = ex->role == ZMOE_LEADER ? ex->peers[theirs->source].rows.header.rows : ours->rows;
  return rows == theirs->rows && ours->width == theirs->width && ours->dtype == theirs->dtype &&
         ours->digest == theirs->digest;
}

/* A frame of the exchange that we are collecting. */
static void take_now(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header) {
  uint64_t bit = zmoe_bit(header->source);
  if (!same_exchange(ex, header)) {
    zmoe_set_diverged(ex, header);
    return;
  }
  frame_take(&ex->peers[header->source].now, message, header);
  ex->missing &= ~bit;
}

static void take_frame(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header) {
  zmoe_peer *peer = &ex->peers[header->source];
  zmoe_key key = zmoe_key_of(header);
  int order = ex->started ? zmoe_key_compare(key, ex->now) : 1;
  if (order == 0 && (ex->missing & zmoe_bit(header->source))) {
    take_now(ex, message, header);
  } else if (order > 0 && key.epoch >= ex->epoch &&
             (!peer->next.full || zmoe_key_compare(key, zmoe_key_of(&peer->next.header)) > 0)) {
    /* Normally there is none yet; a later epoch replaces one that was given up. */
    zmoe_frame_drop(&peer->next);
    frame_take(&peer->next, message, header);
  } else if (order < 0 && key.epoch == ex->epoch &&
             (!ex->has_before || zmoe_key_compare(key, ex->before) > 0)) {
    passed_over(ex, header);
  } else {
    ex->stats.bad_stale++;
  }
}

void zmoe_intake_promote(zmoe_exchange *ex) {
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_frame *next = &ex->peers[r].next;
    if (!next->full)
      continue;
    int order = zmoe_key_compare(zmoe_key_of(&next->header), ex->now);
    if (order == 0)
      take_now(ex, &next->message, &next->header);
    else if (order < 0)
      passed_over(ex, &next->header);
    if (order <= 0)
      zmoe_frame_drop(next);
  }
}

/* ---- reading ------------------------------------------------------------- */

/* Whether a frame is of the kind that this rank awaits from that one. */
static int is_awaited(const zmoe_exchange *ex, const zmoe_header *header) {
  if (ex->role == ZMOE_WORKER)
    return header->kind == ZMOE_KIND_ROWS && header->source == 0;
  return header->kind == ZMOE_KIND_PARTIAL;
}

void zmoe_intake_frame(zmoe_exchange *ex, zmq_msg_t *message, const zmoe_header *header) {
  if (is_awaited(ex, header))
    take_frame(ex, message, header);
  else
    ex->stats.bad_field++;
}

static void take_elsewhere(zmoe_exchange *ex, const zmoe_header *header) {
  uint64_t asked = (uint64_t)ex->now.step << 32 | ex->now.layer;
  if (ex->collecting && (ex->missing & zmoe_bit(header->source)) && header->epoch == ex->epoch &&
      header->digest == asked)
    zmoe_set_diverged(ex, header);
  else
    ex->stats.bad_stale++;
}

/* `link` is the rank that the socket leads to, or -1 when it leads to all. */
/* `flags` are those of the first receive. */
static int intake(zmoe_exchange *ex, void *socket, int link, int flags) {
  zmq_msg_t message;
  zmoe_zmq.msg_init(&message);
  int empty = 0;
  for (int i = 0; i < BATCH && !empty; i++) {
    if (!zmoe_intake_message(ex, &message, socket, flags)) {
      empty = 1;
      break;
    }
    flags = ZMQ_DONTWAIT;
    zmoe_header header;
    if (zmoe_zmq.msg_more(&message)) {
      ex->stats.bad_field++;
      zmoe_intake_skip(socket, &message);
    } else if (zmoe_intake_header(ex, &message, &header)) {
      if (link >= 0 && header.source != link)
        ex->stats.bad_stranger++;
      else if (link >= 0 && header.kind == ZMOE_KIND_ELSEWHERE)
        take_elsewhere(ex, &header);
      else if (link >= 0 || ex->role == ZMOE_PEER)
        zmoe_intake_frame(ex, &message, &header);
      else
        ex->stats.bad_field++;
    }
    /* The last frame that we wait for: what follows can wait too. */
    if (socket == zmoe_intake_socket(ex) && ex->collecting && ex->missing == 0)
      break;
  }
  zmoe_zmq.msg_close(&message);
  return empty;
}

void *zmoe_intake_socket(const zmoe_exchange *ex) {
  switch (ex->role) {
  case ZMOE_LEADER:
    return ex->router;
  case ZMOE_WORKER:
    return ex->peers[0].dealer;
  case ZMOE_PEER:
    break;
  }
  return ex->sub;
}

int zmoe_intake_awaited(zmoe_exchange *ex, int flags) {
  if (ex->role == ZMOE_LEADER)
    return zmoe_links_requests(ex, flags);
  return intake(ex, zmoe_intake_socket(ex), ex->role == ZMOE_WORKER ? 0 : -1, flags);
}

int zmoe_intake_partials(zmoe_exchange *ex) {
  return intake(ex, ex->sub, -1, ZMQ_DONTWAIT);
}

int zmoe_intake_replies(zmoe_exchange *ex, uint32_t link) {
  return intake(ex, ex->peers[link].dealer, (int)link, ZMQ_DONTWAIT);
}
