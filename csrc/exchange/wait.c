/* Waiting for the peers: what to look at, how long to look before sleeping, and
 * what ends the wait.
 *
 * A socket's descriptor becomes readable when libzmq has queued something for
 * it since it was last found empty.  Sending, or polling by others, may use up
 * that sign; so a sleep that brought nothing ends after a moment, and all
 * sockets are read once.  That is rare, and saves reading each of them, at a
 * system call or two, in every exchange. */
#include "common/platform.h"

#include "exchange_internal.h"

#include "pool.h"

#include <errno.h>
#include <sched.h>

enum {
  FIRST_SLEEP_US = 2000, /* the moment after which all sockets are read */
  STAY_US = 100000,      /* then the caller gets to look for signals: one may have
                          * come just before a sleep, and hence not ended it */
};

/* ---- the sockets ----------------------------------------------------------- */

enum { POLLED_SUB, POLLED_XPUB, POLLED_ROUTER, POLLED_FIRST_PEER };

static int poll_socket(zmoe_exchange *ex, void *socket, int peer) {
  int fd = -1;
  size_t bytes = sizeof fd;
  if (zmoe_zmq.getsockopt(socket, ZMQ_FD, &fd, &bytes) < 0)
    return ZMOE_EZMQ;
  ex->polled_peer[ex->n_polled] = (int16_t)peer;
  ex->polled[ex->n_polled++] = (struct pollfd){.fd = fd, .events = POLLIN};
  return ZMOE_OK;
}

int zmoe_wait_prepare(zmoe_exchange *ex) {
  int rc = poll_socket(ex, ex->sub, -1);
  rc = rc == ZMOE_OK ? poll_socket(ex, ex->xpub, -1) : rc;
  rc = rc == ZMOE_OK ? poll_socket(ex, ex->router, -1) : rc;
  for (uint32_t r = 0; r < ex->nodes && rc == ZMOE_OK; r++) {
    if (r == ex->rank)
      continue;
    rc = poll_socket(ex, ex->peers[r].dealer, (int)r);
    rc = rc == ZMOE_OK ? poll_socket(ex, ex->peers[r].monitor, (int)r) : rc;
  }
  return rc;
}

/* Reads the i-th socket of the poll set; 1 when it is empty then. */
static int read_polled(zmoe_exchange *ex, uint32_t i) {
  switch (i) {
  case POLLED_SUB:
    return zmoe_receive_partials(ex, ZMQ_DONTWAIT);
  case POLLED_XPUB:
    return zmoe_peers_subscriptions(ex);
  case POLLED_ROUTER:
    return zmoe_peers_routed(ex, ZMQ_DONTWAIT);
  default: {
    uint32_t rank = (uint32_t)ex->polled_peer[i];
    int is_dealer = (i - POLLED_FIRST_PEER) % 2 == 0;
    return is_dealer ? zmoe_receive_replies(ex, rank, ZMQ_DONTWAIT) : zmoe_peers_events(ex, rank);
  }
  }
}

int zmoe_wait_drain(zmoe_exchange *ex) {
  int empty = 1;
  for (uint32_t i = 0; i < ex->n_polled; i++)
    empty &= read_polled(ex, i);
  return empty;
}

/* When something is due whether or not a message comes. */
static uint64_t next_event_us(const zmoe_exchange *ex, uint64_t now_us, uint64_t until_us) {
  uint64_t missing = zmoe_missing(ex);
  for (uint32_t r = 0; r < ex->nodes; r++) {
    const zmoe_peer *peer = &ex->peers[r];
    if ((missing & zmoe_bit(r)) && peer->ask_at_us < until_us)
      until_us = peer->ask_at_us;
    uint64_t lost_at_us = peer->down_since_us + ex->grace_ms * UINT64_C(1000);
    if (peer->down_since_us != 0 && lost_at_us < until_us)
      until_us = lost_at_us;
  }
  return until_us > now_us ? until_us : now_us;
}

/* ---- sleeping --------------------------------------------------------------- */

static int read_all(zmoe_exchange *ex) {
  ex->unread = !zmoe_wait_drain(ex);
  ex->drained = 1;
  return ZMOE_OK;
}

static int sleep_and_read(zmoe_exchange *ex, uint64_t now_us, uint64_t until_us) {
  if (ex->unread)
    return read_all(ex);
  uint64_t span_us = next_event_us(ex, now_us, until_us) - now_us;
  if (!ex->drained && span_us > FIRST_SLEEP_US)
    span_us = FIRST_SLEEP_US;
  int ready = poll(ex->polled, ex->n_polled, (int)((span_us + 999) / 1000));
  if (ready < 0)
    return errno == EINTR ? ZMOE_EINTR : ZMOE_EZMQ;
  if (ready == 0)
    return ex->drained ? ZMOE_OK : read_all(ex);
  for (uint32_t i = 0; i < ex->n_polled; i++)
    if (ex->polled[i].revents != 0 && !read_polled(ex, i))
      ex->unread = 1;
  return ZMOE_OK;
}

/* ---- until a slot is free ------------------------------------------------------ */

int zmoe_wait_slot(zmoe_exchange *ex, size_t bytes, uint64_t deadline_us, zmoe_slot **out,
                   uint64_t *lost) {
  uint64_t span_us = deadline_us < STAY_US ? deadline_us : STAY_US;
  int rc = zmoe_pool_acquire(ex->pool, bytes, span_us, out);
  if (rc != ZMOE_EPOOL)
    return rc;
  zmoe_wait_drain(ex);
  rc = zmoe_wait_trouble(ex, zmoe_now_us(), UINT64_MAX, lost);
  if (rc != ZMOE_OK)
    return rc;
  return span_us < deadline_us ? ZMOE_EINTR : ZMOE_EPOOL;
}

/* ---- until all frames are here ----------------------------------------------- */

int zmoe_wait_trouble(zmoe_exchange *ex, uint64_t now_us, uint64_t until_us, uint64_t *lost) {
  if (ex->diverged != 0)
    return ZMOE_EDIVERGED;
  if (ex->zmq_errno != 0)
    return ZMOE_EZMQ;
  *lost = zmoe_peers_lost(ex, now_us);
  if (*lost != 0)
    return ZMOE_EPEER;
  return now_us >= until_us ? ZMOE_ETIMEOUT : ZMOE_OK;
}

/* A peer usually answers within the time that falling asleep and waking up
 * would take: look for its frame a while before sleeping, in turns with whoever
 * needs this core, which may be libzmq's own thread.  Where looking did not help
 * the last times, since peers are late, it is tried ever more seldom; and not at all for
 * large frames, which would be copied by libzmq's thread on this core meanwhile. */
static void spin(zmoe_exchange *ex, uint64_t now_us) {
  enum { MISSES_MAX = 6, BYTES_MAX = 128 << 10 };
  if (ex->spin_us == 0 || zmoe_collective_at(ex, ex->collected)->header.payload_bytes > BYTES_MAX)
    return;
  if (ex->spin_skip > 0) {
    ex->spin_skip--;
    return;
  }
  for (uint64_t until_us = now_us + ex->spin_us; now_us < until_us; now_us = zmoe_now_us()) {
    sched_yield();
    zmoe_receive_awaited(ex, ZMQ_DONTWAIT);
    if (zmoe_awaits_chunks(ex))
      zmoe_peers_routed(ex, ZMQ_DONTWAIT);
    if (zmoe_missing(ex) == 0 || ex->diverged != 0) {
      ex->spin_misses = 0;
      return;
    }
  }
  ex->spin_misses += ex->spin_misses < MISSES_MAX;
  ex->spin_skip = (1u << ex->spin_misses) - 1;
}

static int wait_for_all(zmoe_exchange *ex, uint64_t now_us, uint64_t deadline_us, uint64_t *lost) {
  uint64_t until_us = zmoe_later_us(now_us, deadline_us), leave_us = now_us + STAY_US;
  ex->drained = 0;
  ex->unread = zmoe_missing(ex) != 0 && !zmoe_receive_awaited(ex, ZMQ_DONTWAIT);
  if (zmoe_missing(ex) != 0)
    spin(ex, now_us);
  /* In most exchanges this is all: sleeps on one descriptor, inside libzmq. */
  if (zmoe_missing(ex) != 0 && !zmoe_awaits_chunks(ex) && ex->diverged == 0 &&
      deadline_us > 40000 * ZMOE_FIRST_WAIT_MS)
    ex->unread = !zmoe_receive_awaited(ex, 0);
  while (zmoe_missing(ex) != 0 || ex->diverged != 0) {
    now_us = zmoe_now_us();
    int rc = zmoe_wait_trouble(ex, now_us, until_us, lost);
    if (rc == ZMOE_OK && now_us >= leave_us)
      rc = ZMOE_EINTR;
    if (rc != ZMOE_OK)
      return rc;
    zmoe_resend_ask(ex, now_us);
    rc = sleep_and_read(ex, now_us, until_us < leave_us ? until_us : leave_us);
    if (rc != ZMOE_OK)
      return rc;
  }
  return ZMOE_OK;
}

int zmoe_wait_for_all(zmoe_exchange *ex, uint64_t deadline_us, uint64_t *lost) {
  uint64_t begun_us = zmoe_now_us();
  int rc = wait_for_all(ex, begun_us, deadline_us, lost);
  ex->stats.waited_us += zmoe_now_us() - begun_us;
  return rc;
}
