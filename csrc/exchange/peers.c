/* The sockets beside SUB: who has subscribed, what goes from rank to rank, and
 * whose link is down. */
#include "common/platform.h"

#include "exchange_internal.h"

#include <errno.h>
#include <string.h>

enum { BATCH = 16 };

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

int zmoe_peers_subscriptions(zmoe_exchange *ex) {
  zmq_msg_t message;
  zmoe_zmq.msg_init(&message);
  int empty = 0;
  for (int i = 0; i < BATCH && !empty; i++) {
    if (!zmoe_receive_message(ex, &message, ex->xpub, ZMQ_DONTWAIT))
      empty = 1;
    else
      take_subscription(ex, &message);
  }
  zmoe_zmq.msg_close(&message);
  return empty;
}

uint64_t zmoe_exchange_subscribers(zmoe_exchange *ex) {
  if (zmoe_is_forked(ex))
    return 0;
  uint64_t subscribed = 0;
  zmoe_peers_subscriptions(ex);
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

/* ---- from rank to rank ------------------------------------------------------ */

static void release_slot(void *data, void *slot) {
  (void)data;
  zmoe_slot_release(slot);
}

static size_t bytes_of(const zmoe_held *held) {
  return ZMOE_HEADER_BYTES + (size_t)held->header.payload_bytes;
}

/* A message of a held frame, whose slot gains a reference; 0, or the errno. */
static int make_message(zmq_msg_t *message, const zmoe_held *held) {
  zmoe_slot_retain(held->slot);
  if (zmoe_zmq.msg_init_data(message, held->frame, bytes_of(held), release_slot, held->slot) == 0)
    return 0;
  int error = zmoe_zmq.get_errno();
  zmoe_slot_release(held->slot);
  return error;
}

/* Sends a message, or closes it; 0, or the errno. */
static int send_message(void *socket, zmq_msg_t *message) {
  int rc;
  do
    rc = zmoe_zmq.msg_send(message, socket, ZMQ_DONTWAIT);
  while (rc < 0 && zmoe_zmq.get_errno() == EINTR);
  if (rc >= 0)
    return 0;
  int error = zmoe_zmq.get_errno();
  zmoe_zmq.msg_close(message);
  return error;
}

static int count_sent(zmoe_exchange *ex, const zmoe_held *held, int error) {
  ex->stats.frames_sent += error == 0;
  ex->stats.bytes_sent += error == 0 ? bytes_of(held) : 0;
  return error;
}

int zmoe_peers_send(zmoe_exchange *ex, void *socket, const zmoe_held *held) {
  zmq_msg_t message;
  int error = make_message(&message, held);
  return error != 0 ? error : count_sent(ex, held, send_message(socket, &message));
}

int zmoe_peers_send_to(zmoe_exchange *ex, uint32_t rank, const zmoe_held *held) {
  int error = zmoe_peers_send(ex, ex->peers[rank].dealer, held);
  return error == EAGAIN ? 0 : error;
}

/* Sends a message by the ROUTER, or closes it; 0, or the errno.  It is made before the
 * address is sent: failing afterwards would leave the ROUTER within a message, and the
 * next one would become part of it. */
static int send_to_address(zmoe_exchange *ex, uint32_t rank, zmq_msg_t *message) {
  const uint8_t *presence = ex->peers[rank].presence;
  int flags = ZMQ_DONTWAIT | ZMQ_SNDMORE;
  if (send_bytes(ex->router, presence, ZMOE_PRESENCE_BYTES, flags) >= 0)
    return send_message(ex->router, message);
  int error = zmoe_zmq.get_errno();
  zmoe_zmq.msg_close(message);
  return error;
}

int zmoe_peers_send_back(zmoe_exchange *ex, uint32_t rank, const zmoe_held *held) {
  zmq_msg_t message;
  int error = make_message(&message, held);
  return error != 0 ? error : count_sent(ex, held, send_to_address(ex, rank, &message));
}

int zmoe_peers_header_to(zmoe_exchange *ex, uint32_t rank, const zmoe_header *header) {
  uint8_t frame[ZMOE_HEADER_BYTES];
  zmoe_wire_encode(header, frame);
  return send_bytes(ex->peers[rank].dealer, frame, sizeof frame, ZMQ_DONTWAIT) >= 0;
}

int zmoe_peers_header_back(zmoe_exchange *ex, uint32_t rank, const zmoe_header *header) {
  zmq_msg_t message;
  if (zmoe_zmq.msg_init_size(&message, ZMOE_HEADER_BYTES) < 0)
    return 0;
  zmoe_wire_encode(header, zmoe_zmq.msg_data(&message));
  return send_to_address(ex, rank, &message) == 0;
}

/* One message on the ROUTER: the routing id of the sender, then its frame.  An empty
 * one is what libzmq sends for a peer when it connects (ZMQ_PROBE_ROUTER): from then
 * on the ROUTER knows the peer's address, without which it drops what is for it. */
static void take_routed(zmoe_exchange *ex, zmq_msg_t *part) {
  zmoe_header header;
  int rank = rank_of_presence(ex, zmoe_zmq.msg_data(part), zmoe_zmq.msg_size(part));
  if (!zmoe_zmq.msg_more(part) || !zmoe_receive_message(ex, part, ex->router, ZMQ_DONTWAIT))
    return;
  if (zmoe_zmq.msg_more(part)) {
    ex->stats.bad_field++;
    zmoe_receive_skip(ex->router, part);
  } else if (rank >= 0 && zmoe_zmq.msg_size(part) == 0) {
    ex->routable |= zmoe_bit((uint32_t)rank);
    zmoe_resend_renew(ex, (uint32_t)rank); /* what came by its old connection may be lost */
  } else if (zmoe_receive_header(ex, part, &header)) {
    if (rank != header.source)
      ex->stats.bad_stranger++;
    else if (header.kind == ZMOE_KIND_RESEND)
      zmoe_resend_answer(ex, &header);
    else
      zmoe_receive_routed(ex, part, &header);
  }
}

int zmoe_peers_routed(zmoe_exchange *ex, int flags) {
  zmq_msg_t part;
  zmoe_zmq.msg_init(&part);
  int empty = 0;
  for (int i = 0; i < BATCH && !empty; i++) {
    if (!zmoe_receive_message(ex, &part, ex->router, flags))
      empty = 1;
    else
      take_routed(ex, &part);
    if (ex->role == ZMOE_LEADER && zmoe_is_open(ex) && zmoe_missing(ex) == 0)
      break; /* as receive_from() does */
  }
  zmoe_zmq.msg_close(&part);
  return empty;
}

/* ---- link events ---------------------------------------------------------- */

void zmoe_peers_take_up(void *socket) {
  int events;
  size_t bytes = sizeof events;
  zmoe_zmq.getsockopt(socket, ZMQ_EVENTS, &events, &bytes);
}

int zmoe_peers_events(zmoe_exchange *ex, uint32_t rank) {
  zmoe_peer *peer = &ex->peers[rank];
  zmq_msg_t part;
  zmoe_zmq.msg_init(&part);
  int empty = 0;
  for (int i = 0; i < BATCH && !empty; i++) {
    if (!zmoe_receive_message(ex, &part, peer->monitor, ZMQ_DONTWAIT)) {
      empty = 1;
      break;
    }
    uint16_t event = 0;
    if (zmoe_zmq.msg_size(&part) >= sizeof event)
      memcpy(&event, zmoe_zmq.msg_data(&part), sizeof event);
    zmoe_receive_skip(peer->monitor, &part); /* the address */
    if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) {
      if (peer->down_since_us != 0) {
        ex->stats.link_returns++;
        zmoe_resend_renew(ex, rank);
      }
      ex->linked |= zmoe_bit(rank);
      peer->down_since_us = 0;
      /* The peer waits for the probe, and we may be idle from now on. */
      zmoe_peers_take_up(peer->dealer);
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
  if (zmoe_is_forked(ex))
    return 0;
  zmoe_wait_drain(ex);
  return ex->linked & ex->routable;
}

static int is_overdue(const zmoe_exchange *ex, uint32_t rank, uint64_t now_us) {
  uint64_t since_us = ex->peers[rank].down_since_us;
  return since_us != 0 && now_us >= since_us + ex->grace_ms * UINT64_C(1000);
}

/* A link may have come back while this rank computed: its events are read before it is lost. */
uint64_t zmoe_peers_lost(zmoe_exchange *ex, uint64_t now_us) {
  uint64_t lost = 0;
  if (ex->linked == ex->everyone)
    return 0;
  for (uint32_t r = 0; r < ex->nodes; r++) {
    if (is_overdue(ex, r, now_us))
      zmoe_peers_events(ex, r);
    if (is_overdue(ex, r, now_us))
      lost |= zmoe_bit(r);
  }
  return lost;
}
