/* What does not belong is counted by kind and dropped, and harms nothing. */
#include "common/platform.h"

#include "check.h"

#include <string.h>

#include "rig.h"

enum { FRAME_BYTES = ZMOE_HEADER_BYTES + 16 };

static rig_node nodes[3];

/* Node 0 is real, 1 and 2 are puppets; its own (0, 0) is published. */
static void begin(void) {
  rig_open(nodes, (rig_options){.nodes = 3, .puppets = 6, .resend_ms = 5000, .grace_ms = 1000});
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
}

/* After all the abuse, an exchange still works. */
static void finish(void) {
  float sum;
  zmoe_fault fault;
  rig_publish(&nodes[1], 0, 0, 2);
  rig_publish(&nodes[2], 0, 0, 4);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 7);
  rig_close(nodes, 3);
}

static void send_header(const zmoe_header *header) {
  uint8_t frame[FRAME_BYTES];
  rig_send(nodes[1].xpub, frame, rig_frame(header, 9, frame), 0);
}

/* Only what begins like a frame of the session passes the subscription, so
 * each kind of damage keeps the first 16 bytes, as far as it can. */
static void test_damaged_frames(void) {
  begin();
  uint8_t frame[FRAME_BYTES + 1] = {0};
  zmoe_header header = rig_header(1, 0, 0);
  rig_frame(&header, 9, frame);
  rig_send(nodes[1].xpub, frame, ZMOE_TOPIC_BYTES, 0);
  rig_send(nodes[1].xpub, frame, FRAME_BYTES - 1, 0);
  RIG_UNTIL(&nodes[0], bad_short, 2);
  rig_send(nodes[1].xpub, frame, FRAME_BYTES + 1, 0);
  RIG_UNTIL(&nodes[0], bad_oversized, 1);
  frame[20] ^= 1;
  rig_send(nodes[1].xpub, frame, FRAME_BYTES, 0);
  RIG_UNTIL(&nodes[0], bad_checksum, 1);
  header.dtype = 77;
  send_header(&header);
  header.dtype = ZMOE_F32, header.rows = 2;
  send_header(&header);
  RIG_UNTIL(&nodes[0], bad_field, 2);
  finish();
}

static void test_misplaced_frames(void) {
  begin();
  zmoe_header header = rig_header(0, 0, 0); /* our own rank */
  send_header(&header);
  header.source = 3; /* none of this run */
  send_header(&header);
  RIG_UNTIL(&nodes[0], bad_stranger, 2);
  uint8_t frame[FRAME_BYTES];
  header = rig_header(1, 0, 0);
  size_t bytes = rig_frame(&header, 9, frame);
  rig_send(nodes[1].xpub, frame, bytes, 1); /* a message of two parts */
  rig_send(nodes[1].xpub, frame, bytes, 0);
  RIG_UNTIL(&nodes[0], bad_field, 1);
  finish();
}

static void test_replays(void) {
  begin();
  float sum;
  zmoe_fault fault;
  rig_publish(&nodes[1], 0, 0, 2);
  rig_publish(&nodes[1], 0, 0, 64); /* the first one counts */
  RIG_UNTIL(&nodes[0], bad_stale, 1);
  rig_publish(&nodes[2], 0, 0, 4);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 7);
  rig_publish(&nodes[2], 0, 0, 4); /* again, after the exchange */
  RIG_UNTIL(&nodes[0], bad_stale, 2);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 1, 1), ZMOE_OK);
  rig_publish(&nodes[2], 0, 0, 64); /* and during the next one */
  RIG_UNTIL(&nodes[0], bad_stale, 3);
  rig_publish(&nodes[1], 0, 1, 2);
  rig_publish(&nodes[2], 0, 1, 4);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 7);
  rig_close(nodes, 3);
}

/* Rank 1's ROUTER answers with a frame of rank 2, and one of another run. */
static void test_a_reply_on_the_wrong_link(void) {
  begin();
  uint8_t frame[FRAME_BYTES], identity[ZMOE_PRESENCE_BYTES];
  zmoe_header header = rig_header(2, 0, 0);
  size_t bytes = rig_frame(&header, 9, frame);
  zmoe_wire_presence(RIG_SESSION, 0, identity);
  rig_send(nodes[1].router, identity, sizeof identity, 1);
  rig_send(nodes[1].router, frame, bytes, 0);
  header = rig_header(1, 0, 0);
  header.session++;
  rig_send(nodes[1].router, identity, sizeof identity, 1);
  rig_send(nodes[1].router, frame, rig_frame(&header, 9, frame), 0);
  RIG_UNTIL(&nodes[0], bad_stranger, 2);
  header = rig_header(1, 0, 0);
  header.kind = ZMOE_KIND_RESEND, header.payload_bytes = 0; /* no reply at all */
  bytes = rig_frame(&header, 9, frame);
  rig_send(nodes[1].router, identity, sizeof identity, 1);
  rig_send(nodes[1].router, frame, bytes, 0);
  RIG_UNTIL(&nodes[0], bad_field, 1);
  finish();
}

/* Who connects to our ROUTER may send what it likes. */
static void test_strangers_at_the_router(void) {
  begin();
  void *stranger = rig_socket(ZMQ_DEALER, nodes[0].control);
  uint8_t frame[FRAME_BYTES] = {0};
  rig_send(stranger, frame, 0, 0);
  rig_send(stranger, frame, 3, 0);
  RIG_UNTIL(&nodes[0], bad_short, 2);
  rig_send(stranger, frame, ZMOE_HEADER_BYTES, 0);
  RIG_UNTIL(&nodes[0], bad_magic, 1);
  zmoe_header header = rig_header(1, 0, 0);
  rig_frame(&header, 9, frame);
  frame[4] = 9;
  rig_send(stranger, frame, FRAME_BYTES, 0);
  RIG_UNTIL(&nodes[0], bad_version, 1);
  for (int i = 0; i < 100; i++)
    rig_send(stranger, frame, FRAME_BYTES, i < 99); /* one message of a hundred parts */
  RIG_UNTIL(&nodes[0], bad_field, 1);
  /* A faultless request, but nobody we know sent it. */
  header.kind = ZMOE_KIND_RESEND, header.payload_bytes = 0;
  rig_send(stranger, frame, rig_frame(&header, 9, frame), 0);
  header.session++;
  rig_send(stranger, frame, rig_frame(&header, 9, frame), 0);
  RIG_UNTIL(&nodes[0], bad_stranger, 2);
  CHECK_EQUAL(rig_receive(stranger, frame, sizeof frame, 20), -1); /* and gets no answer */
  rig_close_socket(stranger);
  /* Rank 1's own link, but it asks in the name of rank 2; and a partial there. */
  header = rig_header(2, 0, 0);
  header.kind = ZMOE_KIND_RESEND, header.payload_bytes = 0;
  rig_send(nodes[1].dealers[0], frame, rig_frame(&header, 9, frame), 0);
  RIG_UNTIL(&nodes[0], bad_stranger, 3);
  header = rig_header(1, 0, 0);
  rig_send(nodes[1].dealers[0], frame, rig_frame(&header, 9, frame), 0);
  RIG_UNTIL(&nodes[0], bad_field, 2);
  finish();
}

/* Who subscribes without naming a rank of the session is sent nothing. */
static void test_strangers_at_the_xpub(void) {
  begin();
  void *stranger = rig_socket(ZMQ_SUB, nodes[0].data);
  uint8_t presence[ZMOE_PRESENCE_BYTES];
  zmoe_wire_presence(RIG_SESSION + 1, 1, presence);
  rig_subscribe(stranger, "", 0);
  rig_subscribe(stranger, "ZMOE", 4);
  rig_subscribe(stranger, presence, sizeof presence);
  zmoe_wire_presence(RIG_SESSION, 0, presence); /* our own rank */
  rig_subscribe(stranger, presence, sizeof presence);
  zmoe_wire_presence(RIG_SESSION, 3, presence); /* one too many */
  rig_subscribe(stranger, presence, sizeof presence);
  memset(presence, 0, sizeof presence);
  rig_subscribe(stranger, presence, sizeof presence);
  RIG_UNTIL(&nodes[0], bad_stranger, 6);
  CHECK_EQUAL(zmoe_exchange_subscribers(nodes[0].ex), 6);
  rig_publish(&nodes[1], 0, 0, 2);
  rig_publish(&nodes[2], 0, 0, 4);
  float sum;
  zmoe_fault fault;
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 1, 0, 1), ZMOE_OK);
  uint8_t frame[FRAME_BYTES];
  for (int i = 0; i < 2; i++) /* rank 1 has both frames, the stranger none */
    CHECK_EQUAL(rig_receive(nodes[1].sub, frame, sizeof frame, RIG_PATIENCE_MS), FRAME_BYTES);
  CHECK_EQUAL(rig_receive(stranger, frame, sizeof frame, 20), -1);
  rig_close_socket(stranger);
  rig_close(nodes, 3);
}

/* A flood on one socket does not keep the others from being read, nor the
 * deadline from passing. */
static void test_floods(void) {
  begin();
  float sum[4];
  zmoe_fault fault;
  void *stranger = rig_socket(ZMQ_DEALER, nodes[0].control);
  uint8_t frame[FRAME_BYTES] = {0};
  for (int i = 0; i < 900; i++)
    rig_send(stranger, frame, 1, 0);
  CHECK_EQUAL(zmoe_exchange_collect(nodes[0].ex, sum, ZMOE_F32, 20000, &fault), ZMOE_ETIMEOUT);
  CHECK_EQUAL(fault.missing, 6);
  finish();
  rig_close_socket(stranger);
}

/* ---- random damage ------------------------------------------------------------ */

static uint32_t state = 2463534242u;

static uint32_t next_random(void) {
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

static size_t random_frame(uint8_t *frame) {
  zmoe_header header = rig_header(1 + next_random() % 2, next_random() % 2, 0);
  header.kind = (uint8_t)(next_random() % 6);
  if (header.kind != ZMOE_KIND_PARTIAL)
    header.payload_bytes = 0;
  size_t bytes = rig_frame(&header, 9, frame);
  /* Not a faultless partial of (0, 0): that would be accepted, rightly. */
  frame[ZMOE_TOPIC_BYTES + next_random() % 48] ^= (uint8_t)(1 + next_random() % 255);
  return next_random() % 4 == 0 ? next_random() % FRAME_BYTES : bytes;
}

static void test_random_damage(void) {
  begin();
  uint8_t frame[FRAME_BYTES], identity[ZMOE_PRESENCE_BYTES];
  zmoe_wire_presence(RIG_SESSION, 0, identity);
  zmoe_fault fault;
  for (int i = 0; i < 3000; i++) {
    size_t bytes = random_frame(frame);
    switch (next_random() % 3) {
    case 0:
      rig_send(nodes[1].xpub, frame, bytes, next_random() % 8 == 0);
      break;
    case 1:
      rig_send(nodes[1].dealers[0], frame, bytes, next_random() % 8 == 0);
      break;
    default:
      rig_send(nodes[1].router, identity, sizeof identity, 1);
      rig_send(nodes[1].router, frame, bytes, 0);
    }
    CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
  }
  rig_send(nodes[1].xpub, frame, 1, 0); /* ends what may be an unfinished message */
  finish();
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"damaged frames", test_damaged_frames},
      {"frames of a wrong source, and of several parts", test_misplaced_frames},
      {"duplicates and replays", test_replays},
      {"a reply on the wrong link", test_a_reply_on_the_wrong_link},
      {"strangers at the ROUTER", test_strangers_at_the_router},
      {"strangers at the XPUB", test_strangers_at_the_xpub},
      {"floods", test_floods},
      {"random damage", test_random_damage},
  };
  rig_start(argc, argv);
  RUN(tests);
  rig_stop();
  return 0;
}
