/* Layers whose rows come in micro-batches, two of which may be open at once. */
#include "common/platform.h"

#include "check.h"

#include <string.h>

#include "rig.h"

enum { NODES = 3, WIDTH = 32, FRAME_BYTES = ZMOE_HEADER_BYTES + 4 * WIDTH };

static rig_node nodes[NODES];

static int publish_micro_batch(uint32_t rank, zmoe_algorithm algorithm, uint32_t layer,
                               uint32_t batch) {
  static float data[RIG_MAX_BYTES / 4];
  zmoe_call call = rig_call(0, layer, 2, RIG_MAX_BYTES / 8, ZMOE_F32);
  call.micro_batch = batch, call.algorithm = algorithm;
  for (int i = 0; i < RIG_MAX_BYTES / 4; i++)
    data[i] = (float)(1 + rank + 10 * batch + 100 * layer);
  zmoe_fault fault;
  return zmoe_exchange_publish(nodes[rank].ex, &call, data, ZMOE_F32, RIG_PATIENCE_US, &fault);
}

static void expect_micro_batch(uint32_t layer, uint32_t batch, const float *sum) {
  float expected = (float)(1 + 2 + 3 + 3 * (10 * batch + 100 * layer));
  CHECK(sum[0] == expected && sum[RIG_MAX_BYTES / 4 - 1] == expected);
}

/* As many as may be open at once, of the largest size: the slots suffice. */
static void test_two_open(void) {
  static float sums[NODES][RIG_MAX_BYTES / 4];
  float *outs[] = {sums[0], sums[1], sums[2]};
  for (int algorithm = 0; algorithm < 2; algorithm++) {
    rig_open(nodes, (rig_options){.nodes = NODES, .resend_ms = 1000, .grace_ms = 1000});
    for (uint32_t layer = 0; layer < 20; layer++) {
      uint32_t count = 1 + layer % 4;
      for (uint32_t batch = 0; batch < count + 1; batch++) {
        for (uint32_t r = 0; r < NODES && batch < count; r++)
          CHECK_EQUAL(publish_micro_batch(r, (zmoe_algorithm)algorithm, layer, batch), ZMOE_OK);
        if (batch == 0)
          continue;
        rig_collect_all(nodes, NODES, outs);
        for (uint32_t r = 0; r < NODES; r++)
          expect_micro_batch(layer, batch - 1, sums[r]);
      }
    }
    for (uint32_t r = 0; r < NODES; r++) {
      zmoe_pool_stats stats;
      zmoe_exchange_pool_stats(nodes[r].ex, &stats);
      CHECK_EQUAL(stats.exhausted, 0);
    }
    rig_close(nodes, NODES);
  }
}

/* Rank 1 is as far ahead as it can be: two micro-batches of the next layer published. */
static void test_a_peer_that_is_ahead(void) {
  static float sum[RIG_MAX_BYTES / 4];
  zmoe_fault fault;
  rig_open(nodes, (rig_options){.nodes = NODES, .resend_ms = 1000, .grace_ms = 1000});
  for (uint32_t layer = 0; layer < 4; layer++) {
    for (uint32_t batch = 0; batch < 2; batch++)
      for (uint32_t r = 0; r < NODES; r++)
        if (layer == 0 || r != 1)
          CHECK_EQUAL(publish_micro_batch(r, ZMOE_DIRECT, layer, batch), ZMOE_OK);
    for (uint32_t i = 0; i < NODES; i++)
      for (uint32_t batch = 0; batch < 2; batch++) {
        uint32_t r = (i + 1) % NODES;
        CHECK_EQUAL(zmoe_exchange_collect(nodes[r].ex, sum, ZMOE_F32, RIG_PATIENCE_US, &fault),
                    ZMOE_OK); /* all that it needs has been sent */
        expect_micro_batch(layer, batch, sum);
        if (r == 1 && batch == 1 && layer < 3) {
          CHECK_EQUAL(publish_micro_batch(1, ZMOE_DIRECT, layer + 1, 0), ZMOE_OK);
          CHECK_EQUAL(publish_micro_batch(1, ZMOE_DIRECT, layer + 1, 1), ZMOE_OK);
        }
      }
  }
  zmoe_exchange_stats stats;
  zmoe_exchange_stats_get(nodes[0].ex, &stats);
  CHECK_EQUAL(stats.bad_stale, 0);
  CHECK_EQUAL(stats.resend_asked, 0);
  rig_close(nodes, NODES);
}

static void test_order(void) {
  rig_open(nodes, (rig_options){.nodes = NODES, .resend_ms = 1000, .grace_ms = 1000});
  CHECK_EQUAL(publish_micro_batch(0, ZMOE_DIRECT, 0, 1), ZMOE_EINVAL); /* begins with 0 */
  CHECK_EQUAL(publish_micro_batch(0, ZMOE_DIRECT, 0, 0), ZMOE_OK);
  CHECK_EQUAL(publish_micro_batch(0, ZMOE_DIRECT, 1, 0), ZMOE_EINVAL); /* the next layer waits */
  CHECK_EQUAL(publish_micro_batch(0, ZMOE_DIRECT, 1, 1), ZMOE_EINVAL);
  CHECK_EQUAL(publish_micro_batch(0, ZMOE_DIRECT, 0, 2), ZMOE_EINVAL); /* none is left out */
  CHECK_EQUAL(publish_micro_batch(0, ZMOE_DIRECT, 0, 1), ZMOE_OK);
  CHECK_EQUAL(publish_micro_batch(0, ZMOE_DIRECT, 0, 2), ZMOE_EINVAL); /* two are open */
  rig_close(nodes, NODES);
}

/* Of the i-th exchange of layers of two micro-batches. */
static zmoe_header header_of(zmoe_kind kind, uint32_t i) {
  zmoe_header header = rig_header(1, 0, i / 2);
  header.kind = (uint8_t)kind, header.micro_batch = (uint8_t)(i % 2);
  header.width = WIDTH, header.payload_bytes = kind == ZMOE_KIND_PARTIAL ? 4 * WIDTH : 0;
  return header;
}

/* The puppet asks for the i-th exchange until it gets it, bit for bit. */
static void ask_until_served(uint32_t i, const uint8_t *expected) {
  uint8_t frame[FRAME_BYTES];
  zmoe_fault fault;
  zmoe_header request = header_of(ZMOE_KIND_RESEND, i);
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  do {
    CHECK(rig_now_us() < until_us);
    zmoe_wire_encode(&request, frame);
    rig_send(nodes[1].dealers[0], frame, ZMOE_HEADER_BYTES, 0);
    CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
  } while (rig_receive(nodes[1].dealers[0], frame, sizeof frame, 1) != FRAME_BYTES ||
           memcmp(frame, expected, FRAME_BYTES) != 0);
}

/* A peer that is at the first micro-batch of a layer may ask for it while we are at the
 * second one of the next. */
static void test_frames_are_held(void) {
  static uint8_t sent[4][FRAME_BYTES];
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1, .grace_ms = 1000});
  for (uint32_t i = 0; i < 4; i++) {
    float data[WIDTH] = {1}, sum[WIDTH];
    uint8_t frame[FRAME_BYTES] = {0};
    zmoe_fault fault;
    zmoe_call call = rig_call(0, i / 2, 1, WIDTH, ZMOE_F32);
    call.micro_batch = i % 2;
    CHECK_EQUAL(rig_node_send(&nodes[0], &call, data), ZMOE_OK);
    CHECK_EQUAL(rig_receive(nodes[1].sub, sent[i], FRAME_BYTES, 5000), FRAME_BYTES);
    zmoe_header theirs = header_of(ZMOE_KIND_PARTIAL, i);
    rig_send(nodes[1].xpub, frame, rig_encode(&theirs, frame), 0);
    for (uint32_t held = 0; held <= i; held++)
      ask_until_served(held, sent[held]);
    for (int batch = 0; batch < 2 && i % 2 == 1; batch++)
      CHECK_EQUAL(zmoe_exchange_collect(nodes[0].ex, sum, ZMOE_F32, RIG_PATIENCE_US, &fault),
                  ZMOE_OK);
  }
  rig_close(nodes, 2);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"two open, of the largest size", test_two_open},
      {"a peer two micro-batches ahead", test_a_peer_that_is_ahead},
      {"micro-batches out of order are refused", test_order},
      {"micro-batches are held for as long as they may be asked for", test_frames_are_held},
  };
  rig_start(argc, argv);
  RUN(tests);
  rig_stop();
  return 0;
}
