/* Lost frames: asking a peer for its own, answering out of our slots. */
#include "common/platform.h"

#include "exchange_internal.h"

enum {
  /* Upper end of the back-off, for what is small.  A peer that computes for minutes
   * must not find so many requests that they stop its ROUTER, and heartbeats with it: in
   * 2 minutes there are 80, and the ROUTER takes 128 (zmoe/exchange/sockets.py). */
  ASK_EVERY_MAX_US = 2000000,
  SLOWEST_BYTES_PER_US = 10, /* of a link: what takes longer is asked for in vain */
};

/* How long a frame of the collective may take to come. */
static uint64_t patience_us(const zmoe_exchange *ex, const zmoe_collective *collective) {
  uint64_t bytes = (uint64_t)collective->header.payload_bytes * ex->nodes;
  return ex->resend_ms * UINT64_C(1000) + bytes / SLOWEST_BYTES_PER_US;
}

/* ---- answering -------------------------------------------------------------- */

static int same_frame(const zmoe_header *a, const zmoe_header *b) {
  return zmoe_key_compare(zmoe_key_of(a), zmoe_key_of(b)) == 0 && a->chunks == b->chunks &&
         a->chunk == b->chunk;
}

/* True when the frame was sent a moment ago: requests under way meanwhile, for
 * instance while we computed, need no answer. */
static int just_sent(const zmoe_exchange *ex, const zmoe_collective *collective, zmoe_peer *peer,
                     const zmoe_header *request) {
  uint64_t now_us = zmoe_now_us(), moment_us = patience_us(ex, collective) / 2;
  if (now_us - collective->sent_at_us < moment_us)
    return 1;
  if (same_frame(request, &peer->served) && now_us - peer->served_at_us < moment_us)
    return 1;
  peer->served = *request;
  peer->served_at_us = now_us;
  return 0;
}

void zmoe_resend_tell(zmoe_exchange *ex, const zmoe_header *theirs) {
  zmoe_header here = zmoe_collective_at(ex, ex->published - 1)->header;
  here.kind = ZMOE_KIND_ELSEWHERE;
  here.payload_bytes = 0;
  here.digest = (uint64_t)theirs->step << 32 | theirs->layer;
  zmoe_peers_header_back(ex, theirs->source, &here);
}

/* The collective that a request is for, if its frames are still held. */
static zmoe_collective *held_round(zmoe_exchange *ex, const zmoe_header *request) {
  for (uint64_t i = ex->held; i < ex->published; i++) {
    zmoe_collective *collective = zmoe_collective_at(ex, i);
    if (zmoe_key_compare(zmoe_key_of(&collective->header), zmoe_key_of(request)) == 0)
      return collective;
  }
  return NULL;
}

/* What a request for a frame of `collective` gets; no slot: it is not there. */
static zmoe_held wanted(const zmoe_exchange *ex, const zmoe_collective *collective,
                        const zmoe_header *request) {
  const zmoe_held *rows = &ex->peers[request->source].rows;
  if (ex->role == ZMOE_LEADER &&
      zmoe_key_compare(zmoe_key_of(&rows->header), zmoe_key_of(request)) != 0)
    return (zmoe_held){.slot = NULL};
  if (ex->role == ZMOE_LEADER)
    return *rows;
  if (request->chunks == 0)
    return zmoe_collective_whole(collective);
  if (request->chunk == ex->rank && collective->missing == 0)
    return zmoe_scatter_own_sum(ex, collective);
  if (request->chunk == request->source && collective->partial != NULL)
    return zmoe_scatter_partial(collective, request->chunk);
  return (zmoe_held){.slot = NULL};
}

void zmoe_resend_answer(zmoe_exchange *ex, const zmoe_header *request) {
  zmoe_collective *collective = held_round(ex, request);
  int is_ahead =
      ex->published == 0 ||
      zmoe_key_compare(zmoe_key_of(request),
                       zmoe_key_of(&zmoe_collective_at(ex, ex->published - 1)->header)) > 0;
  if (is_ahead) {
    ex->stats.resend_unknown++; /* not there yet: it will be published */
  } else if (collective == NULL || collective->header.chunks != request->chunks) {
    ex->stats.resend_unknown++; /* we did not do that exchange, or not like this */
    zmoe_resend_tell(ex, request);
  } else {
    zmoe_held held = wanted(ex, collective, request);
    if (held.slot == NULL)
      ex->stats.resend_unknown++;
    else if (!just_sent(ex, collective, &ex->peers[request->source], request))
      ex->stats.resend_served += zmoe_peers_send_back(ex, request->source, &held) == 0;
  }
}

uint64_t zmoe_resend_askers(zmoe_exchange *ex) {
  uint64_t askers = 0;
  for (uint32_t r = 0; r < ex->nodes; r++)
    if (ex->peers[r].served_at_us != 0 && held_round(ex, &ex->peers[r].served) != NULL)
      askers |= zmoe_bit(r);
  return askers;
}

/* ---- asking ----------------------------------------------------------------- */

/* Asks rank r for its partial, or when that is here, for its chunk of the sum. */
static int ask(zmoe_exchange *ex, uint32_t r) {
  const zmoe_collective *oldest = zmoe_collective_at(ex, ex->collected);
  zmoe_header request = oldest->header;
  request.kind = ZMOE_KIND_RESEND;
  request.payload_bytes = 0;
  if (request.chunks > 0)
    request.chunk = (uint8_t)(oldest->missing & zmoe_bit(r) ? ex->rank : r);
  return zmoe_peers_header_to(ex, r, &request);
}

void zmoe_resend_begin(zmoe_exchange *ex, const zmoe_collective *collective) {
  uint64_t span_us = patience_us(ex, collective);
  for (uint32_t r = 0; r < ex->nodes; r++) {
    ex->peers[r].ask_at_us = collective->sent_at_us + span_us;
    ex->peers[r].ask_every_us = 2 * span_us;
  }
}

void zmoe_resend_renew(zmoe_exchange *ex, uint32_t rank) {
  ex->peers[rank].ask_at_us = 0;
  ex->peers[rank].ask_every_us = 2 * patience_us(ex, zmoe_collective_at(ex, ex->collected));
}

void zmoe_resend_ask(zmoe_exchange *ex, uint64_t now_us) {
  uint64_t missing = zmoe_missing(ex);
  for (uint32_t r = 0; r < ex->nodes; r++) {
    zmoe_peer *peer = &ex->peers[r];
    if (!(missing & zmoe_bit(r)) || now_us < peer->ask_at_us)
      continue;
    peer->ask_at_us = now_us + peer->ask_every_us;
    if (peer->ask_every_us < ASK_EVERY_MAX_US / 2)
      peer->ask_every_us *= 2;
    ex->stats.resend_asked += (uint64_t)ask(ex, r);
  }
}
