/* Lost frames, lost peers, and peers that are elsewhere. */
#include "common/platform.h"

#include "check.h"

#include <errno.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "exchange/exchange_internal.h"
#include "rig.h"

enum { FRAME_BYTES = ZMOE_HEADER_BYTES + 16 };

static rig_node nodes[3];

/* ---- resends ------------------------------------------------------------------- */

/* Reads one request at a puppet's ROUTER into `out`, whose sender must be rank 0; passes
 * over the empty messages of new connections. */
static void take_request(rig_node *puppet, zmoe_header *out) {
  uint8_t identity[64], expected[ZMOE_PRESENCE_BYTES], frame[FRAME_BYTES];
  zmoe_wire_presence(RIG_SESSION, 0, expected);
  int bytes;
  do {
    CHECK_EQUAL(rig_receive(puppet->router, identity, sizeof identity, RIG_PATIENCE_MS),
                sizeof expected);
    CHECK(memcmp(identity, expected, sizeof expected) == 0);
    bytes = rig_receive(puppet->router, frame, sizeof frame, RIG_PATIENCE_MS);
  } while (bytes == 0);
  CHECK_EQUAL(bytes, ZMOE_HEADER_BYTES);
  CHECK_EQUAL(zmoe_wire_decode(frame, ZMOE_HEADER_BYTES, 0, out), ZMOE_WIRE_OK);
  CHECK_EQUAL(out->kind, ZMOE_KIND_RESEND);
  CHECK_EQUAL(out->source, 0);
}

static void reply(rig_node *puppet, const zmoe_header *header, float value) {
  uint8_t identity[ZMOE_PRESENCE_BYTES], frame[FRAME_BYTES];
  zmoe_wire_presence(RIG_SESSION, 0, identity);
  rig_send(puppet->router, identity, sizeof identity, 1);
  rig_send(puppet->router, frame, rig_frame(header, value, frame), 0);
}

static int collect_for(rig_node *node, float *sum, uint64_t span_us, zmoe_fault *fault) {
  float sums[4];
  int rc = zmoe_exchange_collect(node->ex, sums, ZMOE_F32, span_us, fault);
  *sum = sums[0];
  return rc;
}

static void test_asks_for_a_lost_frame(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 5, .grace_ms = 1000});
  zmoe_fault fault;
  zmoe_header request, header = rig_header(1, 6, 2);
  zmoe_exchange_stats stats;
  float sum;
  uint64_t start_us = rig_now_us();
  CHECK_EQUAL(rig_node_publish(&nodes[0], 6, 2, 1), ZMOE_OK);
  do { /* it keeps on asking */
    CHECK_EQUAL(collect_for(&nodes[0], &sum, 5000, &fault), ZMOE_ETIMEOUT);
    zmoe_exchange_stats_get(nodes[0].ex, &stats);
  } while (stats.resend_asked < 4);
  CHECK(rig_now_us() - start_us >= 5000 * (1 + 2 + 4 + 8)); /* ever more seldom */
  take_request(&nodes[1], &request);
  CHECK_EQUAL(request.step, 6);
  CHECK_EQUAL(request.layer, 2);
  reply(&nodes[1], &header, 2);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 3);
  rig_close(nodes, 2);
}

/* A frame with a flipped bit counts as lost: it is asked for until a sound one comes. */
static void test_asks_for_a_damaged_frame(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 5, .grace_ms = 1000});
  zmoe_fault fault;
  zmoe_header request, header = rig_header(1, 0, 0);
  uint8_t frame[FRAME_BYTES];
  float sum;
  uint64_t damaged = 0;
  for (uint32_t early = 0; early < 2; early++) {
    header.layer = early;
    if (!early)
      CHECK_EQUAL(rig_node_publish(&nodes[0], 0, header.layer, 1), ZMOE_OK);
    for (uint32_t bit = 0; bit < 8 * 16; bit += 1 + 8 * early) {
      rig_frame(&header, 2, frame);
      frame[ZMOE_HEADER_BYTES + bit / 8] ^= (uint8_t)(1u << bit % 8);
      rig_send(nodes[1].xpub, frame, FRAME_BYTES, 0);
      damaged++;
    }
    RIG_UNTIL(&nodes[0], bad_payload, damaged);
    if (early)
      CHECK_EQUAL(rig_node_publish(&nodes[0], 0, header.layer, 1), ZMOE_OK);
    CHECK_EQUAL(collect_for(&nodes[0], &sum, 20000, &fault), ZMOE_ETIMEOUT);
    take_request(&nodes[1], &request);
    CHECK_EQUAL(request.layer, header.layer);
    reply(&nodes[1], &header, 2);
    CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
    CHECK(sum == 3);
    while (rig_receive(nodes[1].router, frame, sizeof frame, 1) >= 0)
      ; /* requests that it made meanwhile */
  }
  rig_close(nodes, 2);
}

/* Where the links see to it, no payload is looked at: all checksums are 0. */
static void test_without_payload_checksums(void) {
  rig_open(
      nodes,
      (rig_options){
          .nodes = 2, .puppets = 2, .resend_ms = 1000, .grace_ms = 1000, .no_payload_checksum = 1});
  uint8_t frame[FRAME_BYTES];
  zmoe_header header = rig_header(1, 0, 0), ours;
  zmoe_fault fault;
  float sum;
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  CHECK_EQUAL(rig_receive(nodes[1].sub, frame, sizeof frame, RIG_PATIENCE_MS), FRAME_BYTES);
  CHECK_EQUAL(zmoe_wire_decode(frame, FRAME_BYTES, 16, &ours), ZMOE_WIRE_OK);
  CHECK_EQUAL(ours.payload_checksum, 0);
  rig_publish(&nodes[1], 0, 0, 2); /* with a checksum, and so from another kind of run */
  RIG_UNTIL(&nodes[0], bad_payload, 1);
  rig_frame(&header, 2, frame);
  zmoe_wire_encode(&header, frame);
  rig_send(nodes[1].xpub, frame, FRAME_BYTES, 0);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 3);
  rig_close(nodes, 2);
}

/* ---- when libzmq has no memory ----------------------------------------------------- */

static int refuse_init_data(zmq_msg_t *message, void *data, size_t size, zmq_free_fn *ffn,
                            void *hint) {
  (void)message, (void)data, (void)size, (void)ffn, (void)hint;
  errno = ENOMEM;
  return -1;
}

static int refuse_init_size(zmq_msg_t *message, size_t size) {
  (void)message, (void)size;
  errno = ENOMEM;
  return -1;
}

/* A reply that cannot be made leaves no half of it: the next one comes as it should. */
static void test_a_reply_without_memory(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1, .grace_ms = 1000});
  zmoe_zmq_api real = zmoe_zmq;
  zmoe_fault fault;
  uint8_t frame[FRAME_BYTES], sent[FRAME_BYTES];
  float sum;
  CHECK_EQUAL(rig_node_publish(&nodes[0], 5, 0, 1), ZMOE_OK);
  CHECK_EQUAL(rig_receive(nodes[1].sub, sent, FRAME_BYTES, RIG_PATIENCE_MS), FRAME_BYTES);
  /* An answer out of a slot, then one of a header alone: it did no layer 4. */
  for (uint32_t alone = 0; alone < 2; alone++) {
    zmoe_header request = rig_header(1, 5 - alone, 0);
    request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
    size_t bytes = rig_frame(&request, 0, frame), got = alone ? ZMOE_HEADER_BYTES : FRAME_BYTES;
    uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
    zmoe_exchange_stats before, after;
    zmoe_exchange_stats_get(nodes[0].ex, &before);
    zmoe_zmq.msg_init_data = refuse_init_data;
    zmoe_zmq.msg_init_size = refuse_init_size;
    collect_for(&nodes[0], &sum, 2000, &fault); /* until an answer is not too early */
    for (int i = 0; i < 3; i++)
      rig_send(nodes[1].dealers[0], frame, bytes, 0);
    do {
      CHECK(rig_now_us() < until_us);
      CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
      zmoe_exchange_stats_get(nodes[0].ex, &after);
    } while (after.frames_received < before.frames_received + 3);
    zmoe_zmq = real;
    int count;
    do {
      CHECK(rig_now_us() < until_us);
      rig_send(nodes[1].dealers[0], frame, bytes, 0);
      CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
    } while ((count = rig_receive(nodes[1].dealers[0], sent, sizeof sent, 1)) < 0);
    CHECK_EQUAL(count, got);
    while (rig_receive(nodes[1].dealers[0], sent, sizeof sent, 20) >= 0)
      ;
  }
  rig_close(nodes, 2);
}

/* ---- when the process is forked ---------------------------------------------------- */

static void use_in_child(void) {
  zmoe_exchange *ex = nodes[0].ex;
  zmoe_call call = rig_call(0, 1, 1, 4, ZMOE_F32);
  zmoe_dispatch_batch received = {.x = NULL};
  zmoe_routed routed = {.x = NULL};
  zmoe_fault fault;
  float data[4] = {0};
  CHECK_EQUAL(zmoe_exchange_collect(ex, data, ZMOE_F32, UINT64_MAX, &fault), ZMOE_EFORK);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &call, data, ZMOE_F32, UINT64_MAX, &fault), ZMOE_EFORK);
  CHECK_EQUAL(zmoe_exchange_dispatch(ex, &call, &routed, UINT64_MAX, &fault), ZMOE_EFORK);
  CHECK_EQUAL(zmoe_exchange_receive(ex, &received, 0, 1, UINT64_MAX, &fault), ZMOE_EFORK);
  CHECK_EQUAL(zmoe_exchange_service(ex, &fault), ZMOE_EFORK);
  CHECK_EQUAL(zmoe_exchange_links(ex), 0);
  CHECK_EQUAL(zmoe_exchange_subscribers(ex), 0);
  zmoe_exchange_destroy(ex);
}

static void test_a_forked_child(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1000, .grace_ms = 1000});
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    use_in_child();
    _exit(0);
  }
  int status;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  zmoe_fault fault;
  float sum;
  rig_publish(&nodes[1], 0, 0, 2); /* the parent's goes on */
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 3);
  rig_close(nodes, 2);
}

/* A puppet asks for what may be lost until it gets it, bit for bit. */
static void ask_until_served(uint32_t layer, const uint8_t *expected) {
  uint8_t frame[FRAME_BYTES];
  zmoe_fault fault;
  zmoe_header request = rig_header(1, 0, layer);
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
  do {
    CHECK(rig_now_us() < until_us);
    rig_send(nodes[1].dealers[0], frame, rig_frame(&request, 0, frame), 0);
    CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
    /* What comes may still be an answer to the request before. */
  } while (rig_receive(nodes[1].dealers[0], frame, sizeof frame, 1) != FRAME_BYTES ||
           memcmp(frame, expected, FRAME_BYTES) != 0);
}

static void test_answers_out_of_held_slots(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1, .grace_ms = 1000});
  zmoe_fault fault;
  float sum;
  uint8_t sent[3][FRAME_BYTES];
  for (uint32_t layer = 0; layer < 3; layer++) {
    CHECK_EQUAL(rig_node_publish(&nodes[0], 0, layer, (float)layer), ZMOE_OK);
    CHECK_EQUAL(rig_receive(nodes[1].sub, sent[layer], FRAME_BYTES, RIG_PATIENCE_MS), FRAME_BYTES);
    rig_publish(&nodes[1], 0, layer, 1);
    CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  }
  ask_until_served(1, sent[1]);
  ask_until_served(2, sent[2]);
  rig_close(nodes, 2);
}

/* Requests that crossed the frame on its way, or that are for what is yet to
 * come, are not answered: each would cost the whole payload. */
static void test_needless_requests(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 60000, .grace_ms = 1000});
  uint8_t frame[FRAME_BYTES];
  zmoe_header request = rig_header(1, 0, 0);
  request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
  size_t bytes = rig_frame(&request, 0, frame);
  rig_send(nodes[1].dealers[0], frame, bytes, 0);
  RIG_UNTIL(&nodes[0], resend_unknown, 1);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  for (int i = 0; i < 3; i++)
    rig_send(nodes[1].dealers[0], frame, bytes, 0);
  RIG_UNTIL(&nodes[0], frames_received, 4);
  CHECK_EQUAL(rig_receive(nodes[1].dealers[0], frame, sizeof frame, 20), -1);
  zmoe_exchange_stats stats;
  zmoe_exchange_stats_get(nodes[0].ex, &stats);
  CHECK_EQUAL(stats.resend_served, 0);
  rig_close(nodes, 2);
}

/* The frame of this exchange is lost, but the peer, who has ours, goes on. */
static void test_lost_behind_the_next_one(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1, .grace_ms = 1000});
  zmoe_fault fault;
  zmoe_header request, header = rig_header(1, 0, 0);
  float sum;
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  rig_publish(&nodes[1], 0, 1, 16);
  zmoe_exchange_stats stats;
  do {
    CHECK_EQUAL(collect_for(&nodes[0], &sum, 3000, &fault), ZMOE_ETIMEOUT);
    zmoe_exchange_stats_get(nodes[0].ex, &stats);
  } while (stats.resend_asked == 0);
  take_request(&nodes[1], &request);
  CHECK_EQUAL(request.layer, 0);
  reply(&nodes[1], &header, 2);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 3);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 1, 1), ZMOE_OK);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 17);
  rig_close(nodes, 2);
}

/* It has collected all it needs and only serves. */
static void test_an_idle_peer_serves(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1, .grace_ms = 1000});
  zmoe_fault fault;
  float sum;
  uint8_t sent[FRAME_BYTES];
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  CHECK_EQUAL(rig_receive(nodes[1].sub, sent, FRAME_BYTES, RIG_PATIENCE_MS), FRAME_BYTES);
  rig_publish(&nodes[1], 0, 0, 1);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  ask_until_served(0, sent);
  rig_close(nodes, 2);
}

/* ---- links ---------------------------------------------------------------------- */

static void test_a_dead_peer(void) {
  rig_open(nodes, (rig_options){.nodes = 3, .puppets = 6, .resend_ms = 20, .grace_ms = 30});
  zmoe_fault fault;
  float sum;
  CHECK_EQUAL(rig_node_publish(&nodes[0], 2, 3, 1), ZMOE_OK);
  rig_publish(&nodes[1], 2, 3, 1);
  rig_kill(&nodes[2]);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_EPEER);
  CHECK_EQUAL(fault.lost, 4);
  CHECK_EQUAL(fault.step, 2);
  CHECK_EQUAL(fault.layer, 3);
  CHECK_EQUAL(zmoe_exchange_subscribers(nodes[0].ex), 2);
  rig_close(nodes, 3);
}

static void test_a_dead_peer_between_exchanges(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 20, .grace_ms = 0});
  zmoe_fault fault;
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
  rig_kill(&nodes[1]);
  while (zmoe_exchange_service(nodes[0].ex, &fault) == ZMOE_OK)
    CHECK(rig_now_us() < until_us);
  CHECK_EQUAL(fault.lost, 2);
  rig_close(nodes, 2);
}

/* Its process lived on, only the connection broke: the run does too. */
static void test_a_link_returns(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 5, .grace_ms = 10000});
  zmoe_fault fault;
  zmoe_exchange_stats stats;
  float sum;
  uint8_t frame[FRAME_BYTES];
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  rig_kill(&nodes[1]);
  while (collect_for(&nodes[0], &sum, 1000, &fault) == ZMOE_ETIMEOUT) {
    zmoe_exchange_stats_get(nodes[0].ex, &stats);
    if (stats.link_drops == 1)
      break;
  }
  CHECK_EQUAL(stats.link_drops, 1);
  rig_revive(&nodes[1], nodes);
  rig_publish(&nodes[1], 0, 0, 2);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 3);
  rig_wait_ready(&nodes[0]);
  zmoe_exchange_stats_get(nodes[0].ex, &stats);
  CHECK_EQUAL(stats.link_returns, 1);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 1, 1), ZMOE_OK); /* and our frames reach it */
  CHECK_EQUAL(rig_receive(nodes[1].sub, frame, sizeof frame, RIG_PATIENCE_MS), FRAME_BYTES);
  rig_close(nodes, 2);
}

/* It came back within the grace, while the node computed. */
static void test_a_link_that_returned_unseen(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1000, .grace_ms = 300});
  zmoe_fault fault;
  float sum;
  int fd;
  size_t bytes = sizeof fd;
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  rig_kill(&nodes[1]);
  RIG_UNTIL(&nodes[0], link_drops, 1);
  rig_return(&nodes[1], nodes);
  CHECK_EQUAL(zmoe_zmq.getsockopt(nodes[0].monitors[1], ZMQ_FD, &fd, &bytes), 0);
  struct pollfd returned = {.fd = fd, .events = POLLIN};
  CHECK_EQUAL(poll(&returned, 1, RIG_PATIENCE_MS), 1);
  usleep(400000);
  CHECK_EQUAL(collect_for(&nodes[0], &sum, 1000, &fault), ZMOE_ETIMEOUT);
  CHECK_EQUAL(fault.lost, 0);
  rig_close(nodes, 2);
}

/* A peer waits for the probe of a node that knows the link to stand and does nothing more. */
static void test_a_new_link_is_probed_at_once(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1000, .grace_ms = 60000});
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  uint8_t identity[64];
  rig_kill(&nodes[1]);
  while (zmoe_exchange_links(nodes[0].ex) != 0)
    CHECK(rig_now_us() < until_us);
  rig_return(&nodes[1], nodes);
  while (!(nodes[0].ex->linked & 2)) {
    CHECK(rig_now_us() < until_us);
    zmoe_peers_events(nodes[0].ex, 1);
  }
  CHECK(rig_receive(nodes[1].router, identity, sizeof identity, RIG_PATIENCE_MS) > 0);
  rig_close(nodes, 2);
}

/* What it lost is asked for at once, however long the patience is. */
static void test_a_link_that_returned_is_asked(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 60000, .grace_ms = 60000});
  zmoe_fault fault;
  zmoe_exchange_stats stats;
  zmoe_header request;
  float sum;
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US / 2;
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  rig_kill(&nodes[1]);
  while (zmoe_exchange_links(nodes[0].ex) != 0)
    CHECK(rig_now_us() < until_us);
  rig_revive(&nodes[1], nodes);
  do {
    CHECK_EQUAL(collect_for(&nodes[0], &sum, 5000, &fault), ZMOE_ETIMEOUT);
    zmoe_exchange_stats_get(nodes[0].ex, &stats);
    CHECK(rig_now_us() < until_us);
  } while (stats.resend_asked == 0);
  take_request(&nodes[1], &request);
  rig_close(nodes, 2);
}

/* A link that was down once is not held against it when another one breaks. */
static void test_only_the_lost_are_named(void) {
  rig_open(nodes, (rig_options){.nodes = 3, .puppets = 6, .resend_ms = 1000, .grace_ms = 20});
  zmoe_fault fault;
  float sum;
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  rig_kill(&nodes[1]);
  while (zmoe_exchange_links(nodes[0].ex) != 4)
    CHECK(rig_now_us() < until_us);
  rig_revive(&nodes[1], nodes);
  rig_wait_ready(&nodes[0]);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  rig_kill(&nodes[2]);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_EPEER);
  CHECK_EQUAL(fault.lost, 4);
  rig_close(nodes, 3);
}

/* ---- divergence -------------------------------------------------------------------- */

static void expect_divergence(const zmoe_header *theirs) {
  zmoe_fault fault;
  float sum;
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_EDIVERGED);
  CHECK_EQUAL(fault.diverged, 2);
  CHECK_EQUAL(fault.theirs.source, 1);
  CHECK_EQUAL(fault.theirs.step, theirs->step);
  CHECK_EQUAL(fault.theirs.layer, theirs->layer);
  CHECK_EQUAL(fault.theirs.rows, theirs->rows);
}

static void with_header(zmoe_header theirs, int early) {
  uint8_t frame[FRAME_BYTES + 16] = {0};
  rig_open(nodes, (rig_options){.nodes = 2, .puppets = 2, .resend_ms = 1000, .grace_ms = 1000});
  size_t bytes = rig_encode(&theirs, frame);
  if (early) {
    rig_send(nodes[1].xpub, frame, bytes, 0);
    RIG_UNTIL(&nodes[0], frames_received, 1);
  }
  CHECK_EQUAL(rig_node_publish(&nodes[0], 5, 5, 1), ZMOE_OK);
  if (!early)
    rig_send(nodes[1].xpub, frame, bytes, 0);
  expect_divergence(&theirs);
  rig_close(nodes, 2);
}

static void test_disagreement(void) {
  for (int early = 0; early < 2; early++) {
    zmoe_header header = rig_header(1, 5, 5);
    header.digest = 1;
    with_header(header, early);
    header = rig_header(1, 5, 5), header.dtype = ZMOE_BF16, header.payload_bytes = 8;
    with_header(header, early);
    header = rig_header(1, 5, 5), header.rows = 2, header.payload_bytes = 32;
    with_header(header, early);
    header = rig_header(1, 5, 5), header.rows = 2, header.payload_bytes = 0;
    with_header(header, early);
    header = rig_header(1, 5, 4); /* an exchange that we did not do */
    with_header(header, early);
  }
}

/* Each of two real nodes skips what the other does: the one that is behind
 * learns it by asking. */
static void test_elsewhere(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .resend_ms = 1, .grace_ms = 1000});
  zmoe_fault fault[2];
  float sum;
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 4, 1), ZMOE_OK);
  CHECK_EQUAL(rig_node_publish(&nodes[1], 0, 5, 1), ZMOE_OK);
  int rc[2] = {ZMOE_ETIMEOUT, ZMOE_ETIMEOUT};
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  while (rc[0] != ZMOE_EDIVERGED || rc[1] != ZMOE_EDIVERGED) {
    for (int r = 0; r < 2; r++)
      rc[r] = collect_for(&nodes[r], &sum, 2000, &fault[r]);
    CHECK(rig_now_us() < until_us);
  }
  CHECK_EQUAL(fault[0].theirs.layer, 5);
  CHECK_EQUAL(fault[1].theirs.layer, 4);
  CHECK_EQUAL(fault[0].layer, 4);
  rig_close(nodes, 2);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"a lost frame is asked for", test_asks_for_a_lost_frame},
      {"and for a damaged one", test_asks_for_a_damaged_frame},
      {"without payload checksums", test_without_payload_checksums},
      {"a reply without memory", test_a_reply_without_memory},
      {"a forked child", test_a_forked_child},
      {"and answered out of held slots", test_answers_out_of_held_slots},
      {"needless requests are not answered", test_needless_requests},
      {"also when the next one came already", test_lost_behind_the_next_one},
      {"also by a peer that is idle", test_an_idle_peer_serves},
      {"a dead peer is named after the grace", test_a_dead_peer},
      {"also between exchanges", test_a_dead_peer_between_exchanges},
      {"a link that returns in time", test_a_link_returns},
      {"or has returned while nobody looked", test_a_link_that_returned_unseen},
      {"which is asked at once", test_a_link_that_returned_is_asked},
      {"a new link is probed at once", test_a_new_link_is_probed_at_once},
      {"only the lost are named", test_only_the_lost_are_named},
      {"another routing, dtype, shape or layer", test_disagreement},
      {"two nodes at different exchanges", test_elsewhere},
  };
  rig_start(argc, argv);
  RUN(tests);
  rig_stop();
  return 0;
}
