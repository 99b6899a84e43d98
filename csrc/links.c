/* The sockets beside SUB: who has subscribed, who asks for a frame again, and
 * whose link is down. */
#include "platform.h"

#include "exchange_internal.h"

#include <errno.h>
#include <string.h>

enum {
  BATCH = 16,
  ASK_EVERY_MAX_MS = 500, /* upper end of the back-off */
};

/* ---- subscriptions --------------------------------------------------------
 * The XPUB hands every subscription to us and does nothing by itself
 * (ZMQ_XPUB_MANUAL).  Who names a rank of this session is given its frames;
 * others get nothing, and hence can hold no slot by not reading. */

static int rank_of_presence(const zmoe_exchange *ex, const void *presence, size_t bytes) {
  if (bytes != ZMOE_PRESENCE_BYTES)
    return -1;
  for (uint32_t r = 0; r < ex->nodes; r++)
    if (r != ex->rank && memcmp(ex->peers[r].presence, presence, bytes) == 0)
      return (int)r;
  return -1;
}

static void take_subscription(zmoe_exchange *ex, zmq_msg_t *message) {
  const uint8_t *at = zmoe_zmq.msg_data(message);
  size_t bytes = zmoe_zmq.msg_size(message);
  uint8_t frame[ZMOE_HEADER_BYTES];
  zmoe_header header = {.kind = ZMOE_KIND_PARTIAL, .session = ex->session};
  zmoe_wire_encode(&header, frame);
  int rank = bytes > 0 && at[0] <= 1 ? rank_of_presence(ex, at + 1, bytes - 1) : -1;
  if (rank >= 0 && at[0] == 1) {
    ex->peers[rank].subscriptions++;
    zmoe_zmq.setsockopt(ex->xpub, ZMQ_SUBSCRIBE, frame, ZMOE_TOPIC_BYTES);
  } else if (rank >= 0) {
    /* The end of an old connection may be noticed after the start of a new one. */
    ex->peers[rank].subscriptions -= ex->peers[rank].subscriptions > 0;
  } else if (bytes != 1 + ZMOE_TOPIC_BYTES || at[0] > 1 ||
             memcmp(at + 1, frame, ZMOE_TOPIC_BYTES) != 0) {
    ex->stats.bad_stranger++;
  }
}

int zmoe_links_subscriptions(zmoe_exchange *ex) {
  zmq_msg_t message;
  zmoe_zmq.msg_init(&message);
  int empty = 0;
  for (int i = 0; i < BATCH && !empty; i++) {
    if (!zmoe_intake_message(ex, &message, ex->xpub, ZMQ_DONTWAIT))
      empty = 1;
    else
      take_subscription(ex, &message);
  }
  zmoe_zmq.msg_close(&message);
  return empty;
}

uint64_t zmoe_exchange_subscribers(zmoe_exchange *ex) {
  uint64_t subscribed = 0;
  zmoe_links_subscriptions(ex);
  for (uint32_t r = 0; r < ex->nodes; r++)
    subscribed |= (uint64_t)(ex->peers[r].subscriptions > 0) << r;
  return subscribed;
}

/* A signal, whoever it is for, is no reason to leave a message half sent. */
static int send_bytes(void *socket, const void *data, size_t bytes, int flags) {
  int rc;
  do
    rc = zmoe_zmq.send(socket, data, bytes, flags);
  while (rc < 0 && zmoe_zmq.get_errno() == EINTR);
  return rc;
}

/* ---- resends -------------------------------------------------------------- */

static void release_slot(void *data, void *slot) {
  (void)data;
  zmoe_slot_release(slot);
}

int zmoe_links_send(zmoe_exchange *ex, void *socket, const zmoe_held *held) {
  uint8_t *frame = (uint8_t *)zmoe_slot_payload(held->slot) - ZMOE_HEADER_BYTES;
  size_t bytes = ZMOE_HEADER_BYTES + (size_t)held->header.payload_bytes;
  zmq_msg_t message;
  zmoe_slot_retain(held->slot);
  if (zmoe_zmq.msg_init_data(&message, frame, bytes, release_slot, held->slot) < 0) {
    zmoe_slot_release(held->slot);
    return ZMOE_EZMQ;
  }
  int rc;
  do
    rc = zmoe_zmq.msg_send(&message, socket, ZMQ_DONTWAIT);
  while (rc < 0 && zmoe_zmq.get_errno() == EINTR);
  if (rc < 0) {
    zmoe_zmq.msg_close(&message);
    return ZMOE_EZMQ;
  }
  ex->stats.frames_sent++;
  ex->stats.bytes_sent += bytes;
  return ZMOE_OK;
}

/* True when the frame was sent a moment ago: requests under way meanwhile, for
 * instance while we computed, need no answer. */
static int just_sent(const zmoe_exchange *ex, zmoe_peer *peer, zmoe_key key) {
  uint64_t now_us = zmoe_now_us(), moment_us = ex->resend_ms * UINT64_C(500);
  if (zmoe_key_compare(key, ex->now) == 0 && now_us - ex->published_at_us < moment_us)
    return 1;
  if (zmoe_key_compare(key, peer->served) == 0 && now_us - peer->served_at_us < moment_us)
    return 1;
  peer->served = key;
  peer->served_at_us = now_us;
  return 0;
}

void zmoe_links_tell(zmoe_exchange *ex, const zmoe_header *theirs) {
  uint8_t frame[ZMOE_HEADER_BYTES];
  zmoe_header here = ex->held[0].header;
  here.kind = ZMOE_KIND_ELSEWHERE;
  here.payload_bytes = 0;
  here.digest = (uint64_t)theirs->step << 32 | theirs->layer;
  zmoe_wire_encode(&here, frame);
  if (send_bytes(ex->router, ex->peers[theirs->source].presence, ZMOE_PRESENCE_BYTES,
                 ZMQ_DONTWAIT | ZMQ_SNDMORE) >= 0)
    send_bytes(ex->router, frame, sizeof frame, ZMQ_DONTWAIT);
}

int zmoe_links_send_to(zmoe_exchange *ex, const zmoe_peer *peer, const zmoe_held *held) {
  return send_bytes(ex->router, peer->presence, ZMOE_PRESENCE_BYTES, ZMQ_DONTWAIT | ZMQ_SNDMORE) >=
             0 &&
         zmoe_links_send(ex, ex->router, held) == ZMOE_OK;
}

/* Our frame of exchange `key` for a peer; NULL when we did not do that one. */
static const zmoe_held *held_for(const zmoe_exchange *ex, const zmoe_peer *peer, zmoe_key key) {
  if (zmoe_key_compare(key, ex->now) == 0)
    return ex->role == ZMOE_LEADER ? &peer->rows : &ex->held[0];
  int is_before = ex->has_before && zmoe_key_compare(key, ex->before) == 0;
  return is_before && ex->role != ZMOE_LEADER ? &ex->held[1] : NULL;
}

static void answer(zmoe_exchange *ex, zmoe_peer *peer, const zmoe_header *request) {
  zmoe_key key = zmoe_key_of(request);
  const zmoe_held *held = ex->started ? held_for(ex, peer, key) : NULL;
  int is_later = !ex->started || zmoe_key_compare(key, ex->now) > 0;
  if (is_later || (held != NULL && held->slot == NULL)) {
    ex->stats.resend_unknown++; /* not there yet: it will be published; or it is no more awaited */
    return;
  }
  if (just_sent(ex, peer, key))
    return;
  if (held != NULL) {
    ex->stats.resend_served += (uint64_t)zmoe_links_send_to(ex, peer, held);
    return;
  }
  ex->stats.resend_unknown++; /* we did not do that exchange */
  zmoe_links_tell(ex, request);
}

/* One message on the ROUTER: the routing id of the sender, then its request. */
static void take_request(zmoe_exchange *ex, zmq_msg_t *part) {
  zmoe_header request;
  int rank = rank_of_presence(ex, zmoe_zmq.msg_data(part), zmoe_zmq.msg_size(part));
  if (!zmoe_zmq.msg_more(part) || !zmoe_intake_message(ex, part, ex->router, ZMQ_DONTWAIT))
    return;
  if (zmoe_zmq.msg_more(part)) {
    ex->stats.bad_field++;
    zmoe_intake_skip(ex->router, part);
  } else if (zmoe_intake_header(ex, part, &request)) {
    if (rank != request.source)
      ex->stats.bad_stranger++;
    else if (request.kind == ZMOE_KIND_PARTIAL && ex->role == ZMOE_LEADER)
      zmoe_intake_frame(ex, part, &request);
    else if (request.kind != ZMOE_KIND_RESEND)
      ex->stats.bad_field++;
    else if (request.epoch < ex->epoch)
      ex->stats.bad_stale++;
    else
      answer(ex, &ex->peers[rank], &request);
  }
}

int zmoe_links_requests(zmoe_exchange *ex, int flags) {
  zmq_msg_t part;
  zmoe_zmq.msg_init(&part);
  int empty = 0;
  for (int i = 0; i < BATCH && !empty; i++) {
    if (!zmoe_intake_message(ex, &part, ex->router, flags))
      empty = 1;
    else
      take_request(ex, &part);
    flags = ZMQ_DONTWAIT;
    if (ex->role == ZMOE_LEADER && ex->collecting && ex->missing == 0)
      break; /* as in intake() */
  }
  zmoe_zmq.msg_close(&part);
  return empty;
}

void zmoe_links_ask(zmoe_exchange *ex, uint64_t now_us) {
  uint8_t frame[ZMOE_HEADER_BYTES];
  zmoe_header request = ex->held[0].header;
  request.kind = ZMOE_KIND_RESEND;
  request.source = (uint16_t)ex->rank;
  request.payload_bytes = 0;
  zmoe_wire_encode(&request, frame);
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_peer *peer = &ex->peers[r];
    if (!(ex->missing & zmoe_bit(r)) || now_us < peer->ask_at_us)
      continue;
    peer->ask_at_us = now_us + peer->ask_every_us;
    peer->ask_every_us *= 2;
    if (peer->ask_every_us > ASK_EVERY_MAX_MS * UINT64_C(1000))
      peer->ask_every_us = ASK_EVERY_MAX_MS * UINT64_C(1000);
    if (send_bytes(peer->dealer, frame, sizeof frame, ZMQ_DONTWAIT) >= 0)
      ex->stats.resend_asked++;
  }
}

/* ---- link events ---------------------------------------------------------- */

int zmoe_links_events(zmoe_exchange *ex, uint32_t rank) {
  zmoe_peer *peer = &ex->peers[rank];
  zmq_msg_t part;
  zmoe_zmq.msg_init(&part);
  int empty = 0;
  for (int i = 0; i < BATCH && !empty; i++) {
    if (!zmoe_intake_message(ex, &part, peer->monitor, ZMQ_DONTWAIT)) {
      empty = 1;
      break;
    }
    uint16_t event = 0;
    if (zmoe_zmq.msg_size(&part) >= sizeof event)
      memcpy(&event, zmoe_zmq.msg_data(&part), sizeof event);
    zmoe_intake_skip(peer->monitor, &part); /* the address */
    if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) {
      ex->stats.link_returns += peer->down_since_us != 0;
      ex->linked |= zmoe_bit(rank);
      peer->down_since_us = 0;
    } else if (event == ZMQ_EVENT_DISCONNECTED && (ex->linked & zmoe_bit(rank))) {
      ex->stats.link_drops++;
      ex->linked &= ~zmoe_bit(rank);
      peer->down_since_us = zmoe_now_us();
    }
  }
  zmoe_zmq.msg_close(&part);
  return empty;
}

uint64_t zmoe_exchange_links(zmoe_exchange *ex) {
  for (uint32_t r = 0; r < ex->nodes; r++)
    if (r != ex->rank)
      zmoe_links_events(ex, r);
  return ex->linked;
}

uint64_t zmoe_links_lost(const zmoe_exchange *ex, uint64_t now_us) {
  uint64_t lost = 0;
  if (ex->linked == ex->everyone)
    return 0;
  for (uint32_t r = 0; r < ex->nodes; r++) {
    uint64_t since_us = ex->peers[r].down_since_us;
    if (since_us != 0 && now_us - since_us >= ex->grace_ms * UINT64_C(1000))
      lost |= zmoe_bit(r);
  }
  return lost;
}
