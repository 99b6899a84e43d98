/* The sum in chunks: what is lost, who is dead, what does not belong, in either phase. */
#include "common/platform.h"

#include "check.h"

#include <string.h>

#include "rig.h"

/* Rank 0 is real, the others are puppets; a chunk is one block of f32. */
enum { NODES = 3, CHUNK = 32, WIDTH = NODES * CHUNK, FRAME_BYTES = ZMOE_HEADER_BYTES + 4 * CHUNK };

static rig_node nodes[NODES];

static zmoe_call call_of(uint32_t step, uint32_t layer) {
  zmoe_call call = rig_call(step, layer, 1, WIDTH, ZMOE_F32);
  call.algorithm = ZMOE_SCATTER;
  return call;
}

static zmoe_header header_of(zmoe_kind kind, uint32_t source, uint32_t chunk, uint32_t layer) {
  zmoe_header header = rig_header(source, 0, layer);
  header.kind = (uint8_t)kind;
  header.width = WIDTH;
  header.chunks = NODES, header.chunk = (uint8_t)chunk;
  header.payload_bytes = kind == ZMOE_KIND_RESEND ? 0 : 4 * CHUNK;
  return header;
}

static size_t frame_of(const zmoe_header *header, float value, uint8_t *out) {
  float payload[CHUNK];
  for (int i = 0; i < CHUNK; i++)
    payload[i] = value;
  memcpy(out + ZMOE_HEADER_BYTES, payload, sizeof payload);
  return rig_encode(header, out);
}

/* A puppet's chunk for rank 0, and its chunk of the sum for all. */
static void send_chunk(uint32_t rank, uint32_t layer, float value) {
  uint8_t frame[FRAME_BYTES];
  zmoe_header header = header_of(ZMOE_KIND_PARTIAL, rank, 0, layer);
  rig_send(nodes[rank].dealers[0], frame, frame_of(&header, value, frame), 0);
}

static void send_sum(uint32_t rank, uint32_t layer, float value) {
  uint8_t frame[FRAME_BYTES];
  zmoe_header header = header_of(ZMOE_KIND_SUM, rank, rank, layer);
  rig_send(nodes[rank].xpub, frame, frame_of(&header, value, frame), 0);
}

/* The same with a flipped bit. */
static void send_damaged(uint32_t rank, zmoe_kind kind) {
  uint8_t frame[FRAME_BYTES];
  int sum = kind == ZMOE_KIND_SUM;
  zmoe_header header = header_of(kind, rank, sum ? rank : 0, 0);
  size_t bytes = frame_of(&header, 5, frame);
  frame[bytes - 1] ^= 0x80;
  rig_send(sum ? nodes[rank].xpub : nodes[rank].dealers[0], frame, bytes, 0);
}

/* Rank 0 publishes 1 everywhere. */
static void begin(uint32_t layer) {
  float ones[WIDTH];
  for (int i = 0; i < WIDTH; i++)
    ones[i] = 1;
  zmoe_call call = call_of(0, layer);
  CHECK_EQUAL(rig_node_send(&nodes[0], &call, ones), ZMOE_OK);
}

static void open_with(uint32_t resend_ms, uint32_t grace_ms) {
  rig_open(nodes, (rig_options){
                      .nodes = NODES, .puppets = 6, .resend_ms = resend_ms, .grace_ms = grace_ms});
}

static int collect_for(float *sum, uint64_t span_us, zmoe_fault *fault) {
  return zmoe_exchange_collect(nodes[0].ex, sum, ZMOE_F32, span_us, fault);
}

static int collect(float *sum, zmoe_fault *fault) {
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  int rc;
  do
    rc = collect_for(sum, RIG_PATIENCE_US, fault);
  while (rc == ZMOE_EINTR && rig_now_us() < until_us);
  return rc;
}

/* Chunk 0 is what rank 0 added up; the others are what the puppets said. */
static void finish(float own, float first, float second) {
  float sum[WIDTH];
  zmoe_fault fault;
  CHECK_EQUAL(collect(sum, &fault), ZMOE_OK);
  CHECK(sum[0] == own && sum[CHUNK - 1] == own);
  CHECK(sum[CHUNK] == first && sum[2 * CHUNK - 1] == first);
  CHECK(sum[2 * CHUNK] == second && sum[WIDTH - 1] == second);
}

/* Until rank 0 asks puppet `rank` for that chunk.  Before a sum it may have asked for the partial,
 * several times on a slow machine; it asks for nothing else. */
static void expect_request(uint32_t rank, uint32_t chunk) {
  uint8_t identity[64], frame[FRAME_BYTES];
  float sum[WIDTH];
  zmoe_fault fault;
  zmoe_header request = {0};
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  while (request.kind != ZMOE_KIND_RESEND || request.chunk != chunk) {
    CHECK(rig_now_us() < until_us);
    CHECK_EQUAL(collect_for(sum, 1000, &fault), ZMOE_ETIMEOUT);
    if (rig_receive(nodes[rank].router, identity, sizeof identity, 1) < 0)
      continue;
    CHECK(rig_receive(nodes[rank].router, frame, sizeof frame, 5000) >= ZMOE_HEADER_BYTES);
    zmoe_wire_decode(frame, ZMOE_HEADER_BYTES, 0, &request);
    if (request.kind != ZMOE_KIND_RESEND)
      continue; /* rank 0's own chunk */
    CHECK_EQUAL(request.chunks, NODES);
    CHECK(request.chunk == chunk || request.chunk == 0);
  }
}

static void reply(uint32_t rank, const zmoe_header *header, float value) {
  uint8_t identity[ZMOE_PRESENCE_BYTES], frame[FRAME_BYTES];
  zmoe_wire_presence(RIG_SESSION, 0, identity);
  rig_send(nodes[rank].router, identity, sizeof identity, 1);
  rig_send(nodes[rank].router, frame, frame_of(header, value, frame), 0);
}

/* ---- lost frames ----------------------------------------------------------------- */

static void test_asks_in_both_phases(void) {
  open_with(5, 1000);
  begin(0);
  send_chunk(1, 0, 2);
  expect_request(2, 0);
  zmoe_header header = header_of(ZMOE_KIND_PARTIAL, 2, 0, 0);
  reply(2, &header, 4);
  send_sum(1, 0, 10);
  expect_request(2, 2);
  header = header_of(ZMOE_KIND_SUM, 2, 2, 0);
  reply(2, &header, 20);
  finish(7, 10, 20);
  rig_close(nodes, NODES);
}

/* Puppet 1 asks for chunk `chunk` until it gets it, bit for bit. */
static void ask_until_served(uint32_t layer, uint32_t chunk, const uint8_t *expected) {
  uint8_t frame[FRAME_BYTES];
  zmoe_fault fault;
  zmoe_header request = header_of(ZMOE_KIND_RESEND, 1, chunk, layer);
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  do {
    CHECK(rig_now_us() < until_us);
    rig_send(nodes[1].dealers[0], frame, frame_of(&request, 0, frame), 0);
    CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
  } while (rig_receive(nodes[1].dealers[0], frame, sizeof frame, 1) != FRAME_BYTES ||
           memcmp(frame, expected, FRAME_BYTES) != 0);
}

/* What rank 0 published last; puppet 1 hears puppet 2 as well. */
static void hear_rank_0(uint8_t *frame) {
  do
    CHECK_EQUAL(rig_receive(nodes[1].sub, frame, FRAME_BYTES, 5000), FRAME_BYTES);
  while (frame[36] != 0);
}

static void ask_in_vain(uint32_t layer, uint32_t chunk) {
  uint8_t frame[FRAME_BYTES];
  zmoe_exchange_stats stats;
  zmoe_header request = header_of(ZMOE_KIND_RESEND, 1, chunk, layer);
  zmoe_exchange_stats_get(nodes[0].ex, &stats);
  rig_send(nodes[1].dealers[0], frame, frame_of(&request, 0, frame), 0);
  RIG_UNTIL(&nodes[0], resend_unknown, stats.resend_unknown + 1);
}

static void test_answers_in_both_phases(void) {
  open_with(1, 1000);
  uint8_t identity[64], chunk[FRAME_BYTES], sums[2][FRAME_BYTES];
  begin(0);
  CHECK_EQUAL(rig_receive(nodes[1].router, identity, sizeof identity, 5000), ZMOE_PRESENCE_BYTES);
  CHECK_EQUAL(rig_receive(nodes[1].router, chunk, FRAME_BYTES, 5000), FRAME_BYTES);
  ask_until_served(0, 1, chunk);
  ask_in_vain(0, 0); /* the sum is not made yet */
  ask_in_vain(0, 2); /* and this chunk is for another rank */
  for (uint32_t layer = 0; layer < 2; layer++) {
    if (layer > 0)
      begin(layer);
    send_chunk(1, layer, 2), send_chunk(2, layer, 4);
    send_sum(1, layer, 10), send_sum(2, layer, 20);
    if (layer > 0)
      ask_until_served(0, 0, sums[0]); /* it may not have collected this one */
    finish(7, 10, 20);
    hear_rank_0(sums[layer]);
    ask_until_served(layer, 0, sums[layer]);
    ask_in_vain(layer, 1); /* rank 1's sum was here, so it has our chunk */
  }
  rig_close(nodes, NODES);
}

/* ---- who is dead or late ------------------------------------------------------------ */

static void test_dead_ranks(void) {
  for (int phase = 0; phase < 2; phase++) {
    open_with(20, 30);
    float sum[WIDTH];
    zmoe_fault fault;
    begin(0);
    send_chunk(1, 0, 2);
    if (phase == 1)
      send_chunk(2, 0, 4);
    send_sum(1, 0, 10);
    RIG_UNTIL(&nodes[0], frames_received, 2 + phase);
    rig_kill(&nodes[2]);
    CHECK_EQUAL(collect(sum, &fault), ZMOE_EPEER);
    CHECK_EQUAL(fault.lost, 4);
    rig_close(nodes, NODES);
  }
}

static void test_deadlines(void) {
  open_with(1000, 1000);
  float sum[WIDTH];
  zmoe_fault fault;
  begin(0);
  CHECK_EQUAL(collect_for(sum, 1000, &fault), ZMOE_ETIMEOUT);
  CHECK_EQUAL(fault.missing, 6);
  send_chunk(1, 0, 2), send_sum(1, 0, 10);
  RIG_UNTIL(&nodes[0], frames_received, 2);
  CHECK_EQUAL(collect_for(sum, 1000, &fault), ZMOE_ETIMEOUT);
  CHECK_EQUAL(fault.missing, 4);
  send_chunk(2, 0, 4);
  RIG_UNTIL(&nodes[0], frames_received, 3);
  CHECK_EQUAL(collect_for(sum, 1000, &fault), ZMOE_ETIMEOUT);
  CHECK_EQUAL(fault.missing, 4);
  send_sum(2, 0, 20); /* late, but it can still be collected */
  finish(7, 10, 20);
  rig_close(nodes, NODES);
}

/* ---- divergence ------------------------------------------------------------------------ */

static void expect_divergence(const zmoe_header *theirs) {
  float sum[WIDTH];
  zmoe_fault fault;
  CHECK_EQUAL(collect(sum, &fault), ZMOE_EDIVERGED);
  CHECK_EQUAL(fault.diverged, 2);
  CHECK_EQUAL(fault.theirs.kind, theirs->kind);
  CHECK_EQUAL(fault.theirs.chunks, theirs->chunks);
}

static void diverges(zmoe_header header, int to_all) {
  uint8_t frame[FRAME_BYTES + 4 * WIDTH] = {0};
  for (int early = 0; early < 2; early++) {
    if (early && header.kind == ZMOE_KIND_SUM)
      continue;
    open_with(1000, 1000);
    if (!early)
      begin(0);
    rig_send(to_all ? nodes[1].xpub : nodes[1].dealers[0], frame, rig_encode(&header, frame), 0);
    RIG_UNTIL(&nodes[0], frames_received, 1);
    if (early)
      begin(0);
    expect_divergence(&header);
    rig_close(nodes, NODES);
  }
}

static void test_disagreement(void) {
  zmoe_header header = header_of(ZMOE_KIND_PARTIAL, 1, 0, 0);
  header.chunks = 0, header.payload_bytes = 4 * WIDTH; /* it sends whole partials */
  diverges(header, 1);
  header = header_of(ZMOE_KIND_PARTIAL, 1, 0, 0), header.digest = 1;
  diverges(header, 0);
  header = header_of(ZMOE_KIND_PARTIAL, 1, 0, 0), header.rows = 3, header.payload_bytes *= 3;
  diverges(header, 0);
  header = header_of(ZMOE_KIND_PARTIAL, 1, 0, 0), header.chunks = 1, header.payload_bytes *= 3;
  diverges(header, 0);
  header = header_of(ZMOE_KIND_SUM, 1, 1, 0), header.digest = 1;
  diverges(header, 1);
}

/* Each learns of it, the one that waits for chunks too. */
static void test_two_algorithms(void) {
  rig_open(nodes, (rig_options){.nodes = 2, .resend_ms = 1, .grace_ms = 1000});
  static float data[WIDTH], sum[WIDTH];
  zmoe_fault fault[2];
  for (uint32_t r = 0; r < 2; r++) {
    zmoe_call call = call_of(0, 0);
    call.algorithm = (zmoe_algorithm)r;
    CHECK_EQUAL(rig_node_send(&nodes[r], &call, data), ZMOE_OK);
  }
  int rc[2] = {ZMOE_ETIMEOUT, ZMOE_ETIMEOUT};
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  while (rc[0] != ZMOE_EDIVERGED || rc[1] != ZMOE_EDIVERGED) {
    for (int r = 0; r < 2; r++)
      rc[r] = zmoe_exchange_collect(nodes[r].ex, sum, ZMOE_F32, 2000, &fault[r]);
    CHECK(rig_now_us() < until_us);
  }
  CHECK_EQUAL(fault[0].theirs.chunks, 2);
  CHECK_EQUAL(fault[1].theirs.chunks, 0);
  rig_close(nodes, 2);
}

/* ---- what does not belong ---------------------------------------------------------------- */

static void send_frame(void *socket, const zmoe_header *header) {
  uint8_t frame[FRAME_BYTES];
  rig_send(socket, frame, frame_of(header, 99, frame), 0);
}

static void test_misplaced_frames(void) {
  open_with(5000, 1000);
  begin(0);
  void *to_router = nodes[1].dealers[0], *to_all = nodes[1].xpub;
  zmoe_header header = header_of(ZMOE_KIND_PARTIAL, 1, 0, 0);
  send_frame(to_all, &header); /* a chunk is for one rank */
  header.chunk = 2;
  send_frame(to_router, &header); /* for another one */
  header = header_of(ZMOE_KIND_SUM, 1, 1, 0);
  send_frame(to_router, &header); /* a sum is for all */
  header.chunk = 2;
  send_frame(to_all, &header); /* somebody else's to make */
  header = header_of(ZMOE_KIND_PARTIAL, 1, 0, 0), header.payload_bytes -= 4;
  send_frame(to_router, &header);
  header = header_of(ZMOE_KIND_ELSEWHERE, 1, 0, 0), header.payload_bytes = 0;
  send_frame(to_router, &header); /* asked for by nobody */
  RIG_UNTIL(&nodes[0], bad_field, 6);
  header = header_of(ZMOE_KIND_SUM, 1, 1, 1);
  send_frame(to_all, &header); /* it can't have been made */
  RIG_UNTIL(&nodes[0], bad_stale, 1);
  header = header_of(ZMOE_KIND_PARTIAL, 2, 0, 0);
  send_frame(to_router, &header); /* rank 1 in the name of rank 2 */
  RIG_UNTIL(&nodes[0], bad_stranger, 1);
  send_chunk(1, 0, 2), send_chunk(1, 0, 64); /* the first one counts */
  send_sum(1, 0, 10), send_sum(1, 0, 64);
  RIG_UNTIL(&nodes[0], bad_stale, 3);
  send_chunk(2, 0, 4), send_sum(2, 0, 20);
  finish(7, 10, 20);
  send_chunk(1, 0, 64), send_sum(1, 0, 64); /* replays */
  RIG_UNTIL(&nodes[0], bad_stale, 5);
  begin(1);
  send_chunk(1, 1, 2), send_chunk(2, 1, 4), send_sum(1, 1, 10), send_sum(2, 1, 20);
  finish(7, 10, 20);
  rig_close(nodes, NODES);
}

/* A link that is down takes no chunk: the rank asks when it is back. */
static void test_a_link_that_is_down(void) {
  open_with(5, 10000);
  uint8_t frame[FRAME_BYTES];
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  rig_kill(&nodes[1]);
  while (zmoe_exchange_links(nodes[0].ex) != 4)
    CHECK(rig_now_us() < until_us);
  struct timespec moment = {.tv_nsec = 20000000}; /* its DEALER has let go of the link by then */
  nanosleep(&moment, NULL);
  begin(0);
  rig_revive(&nodes[1], nodes);
  rig_wait_ready(&nodes[0]);
  zmoe_header request = header_of(ZMOE_KIND_RESEND, 1, 1, 0), chunk;
  do {
    CHECK(rig_now_us() < until_us);
    send_frame(nodes[1].dealers[0], &request);
    zmoe_fault fault;
    CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
  } while (rig_receive(nodes[1].dealers[0], frame, sizeof frame, 1) != FRAME_BYTES);
  CHECK_EQUAL(zmoe_wire_decode(frame, FRAME_BYTES, 4 * CHUNK, &chunk), ZMOE_WIRE_OK);
  CHECK(chunk.kind == ZMOE_KIND_PARTIAL && chunk.chunk == 1);
  send_chunk(1, 0, 2), send_chunk(2, 0, 4), send_sum(1, 0, 10), send_sum(2, 0, 20);
  finish(7, 10, 20);
  rig_close(nodes, NODES);
}

/* The sum of a micro-batch does not wait for a collect: the next one is computed first. */
static void test_a_sum_goes_before_the_next(void) {
  open_with(1000, 1000);
  uint8_t frame[FRAME_BYTES];
  zmoe_header header;
  static float data[WIDTH];
  begin(0);
  send_chunk(1, 0, 2), send_chunk(2, 0, 4);
  struct timespec moment = {.tv_nsec = 200000000}; /* they are at the ROUTER by then */
  nanosleep(&moment, NULL);
  zmoe_call call = call_of(0, 0);
  call.micro_batch = 1;
  CHECK_EQUAL(rig_node_send(&nodes[0], &call, data), ZMOE_OK);
  CHECK_EQUAL(rig_receive(nodes[1].sub, frame, FRAME_BYTES, 5000), FRAME_BYTES);
  CHECK_EQUAL(zmoe_wire_decode(frame, FRAME_BYTES, 4 * CHUNK, &header), ZMOE_WIRE_OK);
  CHECK(header.kind == ZMOE_KIND_SUM && header.micro_batch == 0);
  rig_close(nodes, NODES);
}

static void test_damaged_chunks(void) {
  open_with(5, 1000);
  begin(0);
  send_chunk(2, 0, 4);
  send_damaged(1, ZMOE_KIND_PARTIAL);
  RIG_UNTIL(&nodes[0], bad_payload, 1);
  expect_request(1, 0);
  send_chunk(1, 0, 2);
  send_sum(2, 0, 30);
  send_damaged(1, ZMOE_KIND_SUM);
  RIG_UNTIL(&nodes[0], bad_payload, 2);
  expect_request(1, 1);
  send_sum(1, 0, 20);
  finish(7, 20, 30);
  rig_close(nodes, NODES);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"lost chunks and lost sums are asked for", test_asks_in_both_phases},
      {"and answered out of held slots", test_answers_in_both_phases},
      {"a dead rank is named in either phase", test_dead_ranks},
      {"deadlines name who is missing in either phase", test_deadlines},
      {"another algorithm, routing or shape", test_disagreement},
      {"two nodes with different algorithms", test_two_algorithms},
      {"misplaced frames, duplicates and replays", test_misplaced_frames},
      {"a link that is down takes no chunk", test_a_link_that_is_down},
      {"a sum goes before the next micro-batch", test_a_sum_goes_before_the_next},
      {"damaged chunks are asked for again", test_damaged_chunks},
  };
  rig_start(argc, argv);
  RUN(tests);
  rig_stop();
  return 0;
}
