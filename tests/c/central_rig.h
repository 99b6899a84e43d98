/* What the tests of the centralised schedule share: nodes of it, and what a worker
 * does by hand. */
#ifndef ZMOE_CENTRAL_RIG_H
#define ZMOE_CENTRAL_RIG_H

#include "check.h"

#include <string.h>

#include "rig.h"

enum {
  ROWS = 16,
  WIDTH = 36,
  TOP_K = 3,
  EXPERTS = 8,
  PAIRS = ROWS * TOP_K,
  NODES = 3,
  ANSWER_BYTES = ZMOE_HEADER_BYTES + 16, /* of (1, 4) f32 */
};

static rig_node nodes[8];

static void open_nodes(uint32_t n, uint64_t puppets, uint32_t resend_ms, uint32_t grace_ms) {
  rig_open(nodes, (rig_options){.nodes = n,
                                .puppets = puppets,
                                .resend_ms = resend_ms,
                                .grace_ms = grace_ms,
                                .dispatch_rows = ROWS});
}

/* ---- a worker ------------------------------------------------------------------- */

/* Room for what it receives; expert e is its own, as number e + 1, unless `others`
 * has it. */
static struct room {
  uint8_t x[RIG_MAX_BYTES];
  int32_t pair_rows[PAIRS], pair_experts[PAIRS], local[EXPERTS];
  float pair_weights[PAIRS];
} rooms[8];

static uint32_t row_width = WIDTH; /* of what a worker expects */

static zmoe_dispatch_batch received(uint32_t rank, uint64_t others) {
  struct room *room = &rooms[rank];
  memset(room, 0xee, sizeof *room);
  for (int32_t e = 0; e < EXPERTS; e++)
    room->local[e] = others >> e & 1 ? -1 : e + 1;
  return (zmoe_dispatch_batch){.x = room->x,
                               .pair_rows = room->pair_rows,
                               .pair_experts = room->pair_experts,
                               .pair_weights = room->pair_weights,
                               .x_bytes = sizeof room->x,
                               .max_pairs = PAIRS,
                               .experts = EXPERTS,
                               .local = room->local,
                               .width = row_width};
}

static int receive_for(uint32_t rank, zmoe_dispatch_batch *out, uint32_t step, uint32_t layer,
                       uint64_t span_us, zmoe_fault *fault) {
  uint64_t until_us = rig_now_us() + span_us;
  int rc;
  do {
    uint64_t now_us = rig_now_us();
    rc = zmoe_exchange_receive(nodes[rank].ex, out, step, layer,
                               until_us > now_us ? until_us - now_us : 0, fault);
  } while (rc == ZMOE_EINTR);
  return rc;
}

static int receive(uint32_t rank, zmoe_dispatch_batch *out, uint32_t step, uint32_t layer) {
  zmoe_fault fault;
  return receive_for(rank, out, step, layer, RIG_PATIENCE_US, &fault);
}

static int answer(uint32_t rank, const zmoe_dispatch_batch *got, uint32_t step, uint32_t layer,
                  zmoe_dtype wire, const float *partial) {
  zmoe_fault fault;
  zmoe_call call = rig_call(step, layer, got->rows, got->width, wire);
  call.digest = got->digest;
  return zmoe_exchange_publish(nodes[rank].ex, &call, partial, ZMOE_F32, RIG_PATIENCE_US, &fault);
}

static uint64_t state = 88172645463325252u;

static uint32_t draw(uint32_t below) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (uint32_t)(state % below);
}

#endif
