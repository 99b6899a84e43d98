/* A worker of the centralised schedule: rows that are lost, late, wrong or hostile, and
 * a leader that is gone. */
#include "common/platform.h"

#include "central_rig.h"

/* Rank 1 is real. */
static void worker_with(uint32_t resend_ms, uint32_t grace_ms) {
  row_width = 4;
  open_nodes(NODES, 5, resend_ms, grace_ms);
}

/* (2, 4) f32: its pairs, then its rows. */
typedef struct rows_frame {
  zmoe_header header;
  int32_t pair_rows[3], pair_experts[3];
  float pair_weights[3], x[8];
} rows_frame;

static rows_frame rows_of(uint32_t step, uint32_t layer) {
  rows_frame frame = {
      .header = rig_header(0, step, layer),
      .pair_rows = {0, 0, 1},
      .pair_experts = {5, 2, 7},
      .pair_weights = {0.5f, 0.25f, 1},
      .x = {1, 2, 3, 4, 5, 6, 7, 8},
  };
  frame.header.kind = ZMOE_KIND_ROWS;
  frame.header.rows = 2;
  frame.header.payload_bytes = 3 * ZMOE_PAIR_BYTES + 32;
  return frame;
}

static void send_to_worker(const void *frame, size_t bytes) {
  uint8_t identity[ZMOE_PRESENCE_BYTES];
  zmoe_wire_presence(RIG_SESSION, 1, identity);
  rig_send(nodes[0].router, identity, sizeof identity, 1);
  rig_send(nodes[0].router, frame, bytes, 0);
}

enum { ROWS_BYTES = ZMOE_HEADER_BYTES + 3 * ZMOE_PAIR_BYTES + 32 };

static size_t encode_rows(const rows_frame *frame, uint8_t *out) {
  uint8_t *payload = out + ZMOE_HEADER_BYTES;
  memcpy(payload, frame->pair_rows, 12);
  memcpy(payload + 12, frame->pair_experts, 12);
  memcpy(payload + 24, frame->pair_weights, 12);
  memcpy(payload + 36, frame->x, 32);
  return rig_encode(&frame->header, out);
}

static void send_rows(const rows_frame *frame) {
  uint8_t bytes[ROWS_BYTES + 64] = {0};
  send_to_worker(bytes, encode_rows(frame, bytes));
}

static void expect_rows(const zmoe_dispatch_batch *got) {
  CHECK(got->rows == 2 && got->pairs == 3);
  CHECK(memcmp(got->x, (float[8]){1, 2, 3, 4, 5, 6, 7, 8}, 32) == 0);
  CHECK(got->pair_experts[0] == 6 && got->pair_experts[2] == 8);
}

/* Frames that cannot be used are dropped; the worker goes on waiting for a good one. */
static void test_hostile_rows(void) {
  for (int which = 0; which < 10; which++) {
    worker_with(1000, 1000);
    rows_frame frame = rows_of(0, 0);
    if (which == 0)
      frame.pair_rows[2] = 2;
    else if (which == 1)
      frame.pair_rows[0] = -1;
    else if (which == 2)
      frame.pair_rows[0] = 1, frame.pair_rows[1] = 0; /* out of order */
    else if (which == 3)
      frame.pair_experts[1] = EXPERTS;
    else if (which == 4)
      frame.pair_experts[1] = -1;
    else if (which == 5)
      frame.pair_experts[1] = 5; /* twice in a row */
    else if (which == 6)
      frame.pair_experts[1] = INT32_MIN;
    else if (which == 7)
      frame.header.dtype = ZMOE_Q8, frame.header.payload_bytes = 2 * 34 + ZMOE_PAIR_BYTES;
    else if (which == 9) /* of no rows, in what rows cannot have */
      frame.header.dtype = ZMOE_Q8, frame.header.rows = frame.header.payload_bytes = 0;
    send_rows(&frame);
    zmoe_dispatch_batch got = received(1, 0);
    zmoe_fault fault;
    if (which == 8) /* no room for so much */
      got.x_bytes = 31;
    zmoe_exchange_stats stats = {0};
    for (uint64_t until_us = rig_now_us() + RIG_PATIENCE_US; stats.bad_field == 0;) {
      CHECK(rig_now_us() < until_us);
      CHECK_EQUAL(receive_for(1, &got, 0, 0, 1000, &fault), ZMOE_ETIMEOUT);
      CHECK_EQUAL(fault.missing, 1);
      zmoe_exchange_stats_get(nodes[1].ex, &stats);
    }
    CHECK_EQUAL(stats.bad_field, 1);
    frame = rows_of(0, 0);
    send_rows(&frame);
    got = received(1, 0);
    CHECK_EQUAL(receive(1, &got, 0, 0), ZMOE_OK);
    expect_rows(&got);
    rig_close(nodes, NODES);
  }
}

/* Rows of another width, or more of them than there may be, would write past what the
 * caller has made for them: they are no layer of this worker. */
static void test_rows_of_another_shape(void) {
  for (int which = 0; which < 5; which++) {
    worker_with(1000, 1000);
    rows_frame frame = rows_of(0, 0);
    zmoe_dispatch_batch got = received(1, 0);
    zmoe_fault fault;
    if (which == 0)
      frame.header.rows = 8, frame.header.width = 1;
    else if (which == 1)
      frame.header.rows = 4, frame.header.width = 2;
    else if (which == 2) /* no data, yet a shape */
      frame.header.rows = 0, frame.header.width = UINT32_MAX, frame.header.payload_bytes = 0;
    else if (which == 3) /* all its data are pairs */
      frame.header.rows = 1000, frame.header.width = 0, frame.header.payload_bytes = 36;
    else
      frame.header.rows = ROWS + 1, frame.header.payload_bytes = (ROWS + 1) * 16 + 36;
    uint8_t bytes[ZMOE_HEADER_BYTES + (ROWS + 1) * 16 + 36] = {0};
    send_to_worker(bytes, encode_rows(&frame, bytes));
    CHECK_EQUAL(receive_for(1, &got, 0, 0, RIG_PATIENCE_US, &fault), ZMOE_EDIVERGED);
    CHECK(fault.diverged == 1 && fault.theirs.rows == frame.header.rows);
    rig_close(nodes, NODES);
  }
}

/* Sizes that contradict each other never come so far. */
static void test_contradicting_sizes(void) {
  worker_with(1000, 1000);
  uint8_t bytes[ROWS_BYTES + 8];
  rows_frame frame = rows_of(0, 0);
  zmoe_fault fault;
  zmoe_dispatch_batch got = received(1, 0);
  encode_rows(&frame, bytes);
  send_to_worker(bytes, ROWS_BYTES - 1);
  send_to_worker(bytes, ROWS_BYTES + 8);
  frame.header.payload_bytes -= 4; /* two and two thirds of a pair */
  send_rows(&frame);
  frame.header.payload_bytes = 16; /* fewer than its rows have */
  send_rows(&frame);
  frame.header.payload_bytes = 0; /* rows, but no data */
  send_rows(&frame);
  frame.header.rows = frame.header.width = UINT32_MAX;
  frame.header.payload_bytes = 68;
  send_rows(&frame);
  zmoe_exchange_stats stats = {0};
  for (uint64_t until_us = rig_now_us() + RIG_PATIENCE_US; stats.bad_field < 4;) {
    CHECK(rig_now_us() < until_us);
    CHECK_EQUAL(receive_for(1, &got, 0, 0, 1000, &fault), ZMOE_ETIMEOUT);
    zmoe_exchange_stats_get(nodes[1].ex, &stats);
  }
  CHECK_EQUAL(stats.bad_short, 1);
  CHECK_EQUAL(stats.bad_oversized, 1);
  CHECK_EQUAL(stats.bad_field, 4);
  frame = rows_of(0, 0);
  send_rows(&frame);
  CHECK_EQUAL(receive(1, &got, 0, 0), ZMOE_OK);
  expect_rows(&got);
  rig_close(nodes, NODES);
}

/* A sender's mistakes, not the wire's: the checksums are right. */
static void test_random_damage(void) {
  worker_with(1000, 1000);
  zmoe_dispatch_batch got = received(1, 0);
  zmoe_fault fault;
  uint32_t layer = 0;
  for (uint32_t i = 0; i < 500; i++) {
    uint8_t bytes[ROWS_BYTES];
    rows_frame frame = rows_of(0, layer);
    size_t n = encode_rows(&frame, bytes);
    for (uint32_t damages = 1 + draw(3); damages > 0; damages--)
      bytes[ZMOE_HEADER_BYTES + draw(24)] ^= (uint8_t)(1u << draw(8)); /* rows and experts */
    rig_encode(&frame.header, bytes);
    send_to_worker(bytes, draw(16) == 0 ? draw((uint32_t)n) : n);
    int rc = receive_for(1, &got, 0, layer, 1000, &fault);
    CHECK(rc == ZMOE_OK || rc == ZMOE_ETIMEOUT);
    if (rc == ZMOE_ETIMEOUT)
      continue;
    for (uint32_t p = 0; p < got.pairs; p++)
      CHECK(got.pair_rows[p] >= 0 && got.pair_rows[p] < (int32_t)got.rows &&
            got.pair_experts[p] >= 1 && got.pair_experts[p] <= EXPERTS);
    CHECK_EQUAL(answer(1, &got, 0, layer++, ZMOE_F32, NULL), ZMOE_OK);
  }
  zmoe_exchange_stats stats;
  zmoe_exchange_stats_get(nodes[1].ex, &stats);
  CHECK(layer > 0 && stats.bad_field > 0 && stats.bad_short > 0);
  rig_close(nodes, NODES);
}

/* Rows of which a bit was flipped on the way are asked for again. */
static void test_damaged_rows(void) {
  worker_with(5, 1000);
  uint8_t bytes[ROWS_BYTES], identity[64], request[256];
  rows_frame frame = rows_of(0, 0);
  zmoe_dispatch_batch got = received(1, 0);
  zmoe_fault fault;
  zmoe_exchange_stats stats = {0};
  encode_rows(&frame, bytes);
  bytes[ZMOE_HEADER_BYTES + 3 * ZMOE_PAIR_BYTES] ^= 1; /* in the first number of a row */
  send_to_worker(bytes, ROWS_BYTES);
  for (uint64_t until_us = rig_now_us() + RIG_PATIENCE_US; stats.bad_payload == 0;) {
    CHECK(rig_now_us() < until_us);
    CHECK_EQUAL(receive_for(1, &got, 0, 0, 1000, &fault), ZMOE_ETIMEOUT);
    zmoe_exchange_stats_get(nodes[1].ex, &stats);
  }
  while (rig_receive(nodes[0].router, identity, sizeof identity, 1) < 0)
    CHECK_EQUAL(receive_for(1, &got, 0, 0, 1000, &fault), ZMOE_ETIMEOUT);
  CHECK_EQUAL(rig_receive(nodes[0].router, request, sizeof request, 5000), ZMOE_HEADER_BYTES);
  send_rows(&frame);
  CHECK_EQUAL(receive(1, &got, 0, 0), ZMOE_OK);
  expect_rows(&got);
  rig_close(nodes, NODES);
}

/* By another way, of another kind or rank. */
static void test_what_does_not_belong_to_a_worker(void) {
  worker_with(1000, 1000);
  uint8_t bytes[ROWS_BYTES], identity[ZMOE_PRESENCE_BYTES];
  rows_frame frame = rows_of(0, 0);
  zmoe_wire_presence(RIG_SESSION, 1, identity);
  size_t n = encode_rows(&frame, bytes);
  rig_send(nodes[0].xpub, bytes, n, 0);
  RIG_UNTIL(&nodes[1], bad_field, 1);
  rig_send(nodes[0].dealers[1], bytes, n, 0);
  RIG_UNTIL(&nodes[1], bad_field, 2);
  frame.header.source = 2; /* rank 2 leads nobody */
  n = encode_rows(&frame, bytes);
  rig_send(nodes[2].router, identity, sizeof identity, 1);
  rig_send(nodes[2].router, bytes, n, 0);
  RIG_UNTIL(&nodes[1], bad_field, 3);
  send_to_worker(bytes, n);
  RIG_UNTIL(&nodes[1], bad_stranger, 1);
  rig_publish(&nodes[2], 0, 0, 64);
  RIG_UNTIL(&nodes[1], bad_field, 4);
  frame = rows_of(0, 0);
  send_rows(&frame);
  zmoe_dispatch_batch got = received(1, 0);
  CHECK_EQUAL(receive(1, &got, 0, 0), ZMOE_OK);
  expect_rows(&got);
  rig_close(nodes, NODES);
}

/* Rows may come before a worker waits for them, but only for the place where it is. */
static void test_rows_of_another_place(void) {
  zmoe_dispatch_batch got;
  zmoe_fault fault;
  rows_frame frame;
  worker_with(1000, 1000);
  frame = rows_of(3, 0);
  send_rows(&frame);
  RIG_UNTIL(&nodes[1], frames_received, 1);
  got = received(1, 0);
  CHECK_EQUAL(receive(1, &got, 3, 0), ZMOE_OK);
  expect_rows(&got);
  CHECK_EQUAL(answer(1, &got, 3, 0, ZMOE_F32, NULL), ZMOE_OK);
  frame = rows_of(3, 2); /* of a later one */
  send_rows(&frame);
  CHECK_EQUAL(receive_for(1, &got, 3, 1, 20000, &fault), ZMOE_ETIMEOUT);
  frame = rows_of(3, 1);
  send_rows(&frame);
  CHECK_EQUAL(receive(1, &got, 3, 1), ZMOE_OK);
  CHECK_EQUAL(answer(1, &got, 3, 1, ZMOE_F32, NULL), ZMOE_OK);
  CHECK_EQUAL(receive_for(1, &got, 3, 3, 20000, &fault), ZMOE_EDIVERGED); /* we skip layer 2 */
  CHECK(fault.diverged == 1 && fault.theirs.layer == 2);
  rig_close(nodes, NODES);
  worker_with(1000, 1000);
  frame = rows_of(0, 0);
  send_rows(&frame);
  got = received(1, 1 << 7); /* that expert is another's here */
  CHECK_EQUAL(receive_for(1, &got, 0, 0, RIG_PATIENCE_US, &fault), ZMOE_EDIVERGED);
  CHECK(fault.diverged == 1 && fault.theirs.kind == ZMOE_KIND_ROWS);
  rig_close(nodes, NODES);
}

static void test_a_worker_asks_for_lost_rows(void) {
  worker_with(5, 1000);
  zmoe_dispatch_batch got = received(1, 0);
  zmoe_fault fault;
  uint8_t identity[64], frame[256];
  zmoe_header request;
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  do {
    CHECK(rig_now_us() < until_us);
    CHECK_EQUAL(receive_for(1, &got, 6, 2, 1000, &fault), ZMOE_ETIMEOUT);
    CHECK(fault.missing == 1 && fault.step == 6 && fault.layer == 2);
  } while (rig_receive(nodes[0].router, identity, sizeof identity, 1) < 0);
  CHECK_EQUAL(rig_receive(nodes[0].router, frame, sizeof frame, 5000), ZMOE_HEADER_BYTES);
  CHECK_EQUAL(zmoe_wire_decode(frame, ZMOE_HEADER_BYTES, 0, &request), ZMOE_WIRE_OK);
  CHECK(request.kind == ZMOE_KIND_RESEND && request.source == 1);
  CHECK(request.step == 6 && request.layer == 2);
  rows_frame rows = rows_of(6, 2);
  send_rows(&rows);
  CHECK_EQUAL(receive(1, &got, 6, 2), ZMOE_OK);
  expect_rows(&got);
  rig_close(nodes, NODES);
}

static void test_a_worker_answers_again(void) {
  worker_with(1, 1000);
  static const float partial[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  uint8_t sent[2][256], identity[64];
  zmoe_dispatch_batch got = received(1, 0);
  zmoe_fault fault;
  zmoe_header request = rig_header(0, 0, 0);
  request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
  uint8_t ask[ANSWER_BYTES];
  size_t bytes = rig_frame(&request, 0, ask);
  rows_frame frame = rows_of(0, 0);
  send_rows(&frame);
  CHECK_EQUAL(receive(1, &got, 0, 0), ZMOE_OK);
  rig_send(nodes[0].dealers[1], ask, bytes, 0); /* it is still at it */
  RIG_UNTIL(&nodes[1], resend_unknown, 1);
  for (uint32_t layer = 0; layer < 2; layer++) {
    CHECK_EQUAL(answer(1, &got, 0, layer, ZMOE_F32, partial), ZMOE_OK);
    int got_bytes;
    do { /* before it, on a busy machine, requests for rows that were late */
      CHECK(rig_receive(nodes[0].router, identity, sizeof identity, 5000) > 0);
      got_bytes = rig_receive(nodes[0].router, sent[layer], 256, 5000);
    } while (got_bytes == ZMOE_HEADER_BYTES);
    CHECK_EQUAL(got_bytes, ZMOE_HEADER_BYTES + 32);
    CHECK(memcmp(sent[layer] + ZMOE_HEADER_BYTES, partial, 32) == 0);
    request.layer = layer;
    bytes = rig_frame(&request, 0, ask);
    uint8_t again[256];
    uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
    do {
      CHECK(rig_now_us() < until_us);
      rig_send(nodes[0].dealers[1], ask, bytes, 0);
      CHECK_EQUAL(zmoe_exchange_service(nodes[1].ex, &fault), ZMOE_OK);
    } while (rig_receive(nodes[0].dealers[1], again, sizeof again, 1) != ZMOE_HEADER_BYTES + 32 ||
             memcmp(again, sent[layer], ZMOE_HEADER_BYTES + 32) != 0);
    if (layer == 0) {
      frame = rows_of(0, 1);
      send_rows(&frame);
      CHECK_EQUAL(receive(1, &got, 0, 1), ZMOE_OK);
    }
  }
  rig_close(nodes, NODES);
}

static void test_a_dead_leader_is_named(void) {
  worker_with(20, 30);
  zmoe_dispatch_batch got = received(1, 0);
  zmoe_fault fault;
  rig_kill(&nodes[0]);
  CHECK_EQUAL(receive_for(1, &got, 1, 0, RIG_PATIENCE_US, &fault), ZMOE_EPEER);
  CHECK(fault.lost == 1 && fault.step == 1 && fault.layer == 0);
  rig_close(nodes, NODES);
}

/* The leader's link breaks while the worker computes, and comes back. */
static void test_a_link_returns(void) {
  worker_with(5, 10000);
  static const float partial[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  rows_frame frame = rows_of(0, 0);
  zmoe_dispatch_batch got = received(1, 0);
  zmoe_fault fault;
  zmoe_exchange_stats stats;
  send_rows(&frame);
  CHECK_EQUAL(receive(1, &got, 0, 0), ZMOE_OK);
  rig_kill(&nodes[0]);
  do {
    CHECK_EQUAL(zmoe_exchange_service(nodes[1].ex, &fault), ZMOE_OK);
    zmoe_exchange_stats_get(nodes[1].ex, &stats);
  } while (stats.link_drops == 0);
  CHECK_EQUAL(answer(1, &got, 0, 0, ZMOE_F32, partial), ZMOE_OK);
  rig_revive(&nodes[0], nodes);
  uint8_t ask[ANSWER_BYTES], again[256];
  zmoe_header request = rig_header(0, 0, 0);
  request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
  size_t bytes = rig_frame(&request, 0, ask);
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  do {
    CHECK(rig_now_us() < until_us);
    rig_send(nodes[0].dealers[1], ask, bytes, 0);
    CHECK_EQUAL(zmoe_exchange_service(nodes[1].ex, &fault), ZMOE_OK);
  } while (rig_receive(nodes[0].dealers[1], again, sizeof again, 1) != ZMOE_HEADER_BYTES + 32);
  CHECK(memcmp(again + ZMOE_HEADER_BYTES, partial, 32) == 0);
  rig_close(nodes, NODES);
}

static void test_mistakes_of_a_worker(void) {
  worker_with(1000, 1000);
  static const float partial[8] = {0};
  zmoe_exchange *ex = nodes[1].ex;
  zmoe_fault fault;
  float sum[8];
  zmoe_dispatch_batch got = received(1, 0);
  zmoe_routed routed = {partial, NULL, NULL, NULL, 0, ZMOE_F32, 0};
  zmoe_call call = rig_call(1, 0, 2, 4, ZMOE_F32), other;
  CHECK_EQUAL(zmoe_exchange_dispatch(ex, &call, &routed, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &call, partial, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(receive_for(1, &got, 1, 0, 1000, &fault), ZMOE_ETIMEOUT);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &call, partial, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(receive_for(1, &got, 1, 1, 0, &fault), ZMOE_EINVAL); /* it waits for another */
  rows_frame frame = rows_of(1, 0);
  send_rows(&frame);
  CHECK_EQUAL(receive(1, &got, 1, 0), ZMOE_OK);
  CHECK_EQUAL(receive(1, &got, 1, 0), ZMOE_EINVAL); /* twice */
  CHECK_EQUAL(zmoe_exchange_collect(ex, sum, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  other = call, other.rows = 1;
  CHECK_EQUAL(zmoe_exchange_publish(ex, &other, partial, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  other = call, other.layer = 1;
  CHECK_EQUAL(zmoe_exchange_publish(ex, &other, partial, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  other = call, other.digest = 1;
  CHECK_EQUAL(zmoe_exchange_publish(ex, &other, partial, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &call, partial, ZMOE_F32, 0, &fault), ZMOE_OK);
  CHECK_EQUAL(receive(1, &got, 1, 0), ZMOE_EINVAL); /* never backwards */
  rig_close(nodes, NODES);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"pairs that cannot be trusted", test_hostile_rows},
      {"rows of another shape", test_rows_of_another_shape},
      {"contradicting sizes", test_contradicting_sizes},
      {"random pairs", test_random_damage},
      {"damaged rows", test_damaged_rows},
      {"what does not belong to a worker", test_what_does_not_belong_to_a_worker},
      {"rows of another place, or for another's experts", test_rows_of_another_place},
      {"a worker asks for lost rows", test_a_worker_asks_for_lost_rows},
      {"and answers again", test_a_worker_answers_again},
      {"a dead leader is named", test_a_dead_leader_is_named},
      {"a link that returns", test_a_link_returns},
      {"mistakes are refused", test_mistakes_of_a_worker},
  };
  rig_start(argc, argv);
  RUN(tests);
  rig_stop();
  return 0;
}
