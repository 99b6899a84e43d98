/* The centralised schedule: what workers are sent, what becomes of their answers, and
 * what is lost, dead or does not belong on the leader's side. */
#include "common/platform.h"

#include "central_rig.h"

#include <math.h>

/* ---- sums ------------------------------------------------------------------------ */

/* Every rank's experts are all experts; who computes a pair is drawn. */
typedef struct routing {
  uint32_t rows;
  float x[ROWS * WIDTH], weights[PAIRS];
  int32_t ids[PAIRS];
  uint64_t ranks[PAIRS];
} routing;

/* `idle` ranks get nothing; some pairs are nobody's, some (slices) several ranks'. */
static void draw_routing(routing *out, uint32_t rows, uint32_t n, uint64_t idle) {
  out->rows = rows;
  for (uint32_t i = 0; i < rows * WIDTH; i++)
    out->x[i] = draw(8) == 0 ? -0.0f : sinf((float)draw(1000)) * 3;
  for (uint32_t p = 0; p < rows * TOP_K; p++) {
    out->ids[p] = (int32_t)(p % TOP_K * 2 + draw(2));
    out->weights[p] = 0.25f + (float)draw(100) / 100;
    out->ranks[p] = 0;
    for (uint32_t owners = draw(4) == 0 ? 2 * draw(2) : 1; owners > 0; owners--)
      out->ranks[p] |= UINT64_C(1) << draw(n);
    out->ranks[p] &= ~idle;
  }
}

static void add_pair(float *to, const float *x, int32_t expert, float weight) {
  for (uint32_t i = 0; i < WIDTH; i++)
    to[i] += weight * (x[i] * (1.5f + (float)expert));
}

/* What rank r adds of each row; 0 when that is nothing at all. */
static int partial_of(const routing *given, uint32_t rank, float *out) {
  int any = 0;
  for (uint32_t i = 0; i < given->rows; i++) {
    float *to = out + i * WIDTH;
    int mine = 0;
    for (uint32_t p = i * TOP_K; p < (i + 1) * TOP_K; p++)
      mine |= (int)(given->ranks[p] >> rank & 1);
    for (uint32_t c = 0; c < WIDTH; c++)
      to[c] = mine ? -0.0f : 0.0f;
    for (uint32_t p = i * TOP_K; p < (i + 1) * TOP_K; p++)
      if (given->ranks[p] >> rank & 1)
        add_pair(to, given->x + i * WIDTH, given->ids[p], given->weights[p]);
    any |= mine;
  }
  return any;
}

/* The same of what a worker received: it cannot see the rows that it has no part in. */
static void work(uint32_t rank, const zmoe_dispatch_batch *got, zmoe_dtype x_dtype, float *out) {
  static float x[ROWS * WIDTH];
  CHECK_EQUAL(got->dtype, x_dtype);
  CHECK_EQUAL(got->width, WIDTH);
  zmoe_convert(x, ZMOE_F32, rooms[rank].x, x_dtype, (size_t)got->rows * WIDTH, ZMOE_ISA_GENERIC);
  for (uint32_t i = 0; i < got->rows * WIDTH; i++)
    out[i] = -0.0f;
  for (uint32_t p = 0; p < got->pairs; p++) {
    uint32_t row = (uint32_t)got->pair_rows[p];
    CHECK(row < got->rows && (p == 0 || got->pair_rows[p] >= got->pair_rows[p - 1]));
    add_pair(out + row * WIDTH, x + row * WIDTH, got->pair_experts[p] - 1, got->pair_weights[p]);
  }
}

/* Just as if every rank had published its partial of all rows. */
static void expect(const routing *given, uint32_t n, zmoe_dtype wire, float *out) {
  static float partials[8][ROWS * WIDTH];
  static uint8_t encoded[8][4 * WIDTH];
  for (uint32_t r = 0; r < n; r++)
    partial_of(given, r, partials[r]);
  for (uint32_t i = 0; i < given->rows; i++) {
    const void *parts[8];
    for (uint32_t r = 0; r < n; r++) {
      zmoe_convert(encoded[r], wire, partials[r] + i * WIDTH, ZMOE_F32, WIDTH, ZMOE_ISA_GENERIC);
      parts[r] = encoded[r];
    }
    float *to = out + i * WIDTH;
    zmoe_reduce(to, ZMOE_F32, parts, n, wire, WIDTH, ZMOE_ISA_GENERIC);
    zmoe_convert(encoded[0], wire, to, ZMOE_F32, WIDTH, ZMOE_ISA_GENERIC);
    zmoe_convert(to, ZMOE_F32, encoded[0], wire, WIDTH, ZMOE_ISA_GENERIC);
  }
}

static int collect_for(float *sum, uint64_t span_us, zmoe_fault *fault) {
  uint64_t until_us = rig_now_us() + span_us;
  int rc;
  do {
    uint64_t now_us = rig_now_us();
    rc = zmoe_exchange_collect(nodes[0].ex, sum, ZMOE_F32,
                               until_us > now_us ? until_us - now_us : 0, fault);
  } while (rc == ZMOE_EINTR);
  return rc;
}

static int collect(float *sum) {
  zmoe_fault fault;
  return collect_for(sum, RIG_PATIENCE_US, &fault);
}

static void exchange(const routing *given, uint32_t n, zmoe_dtype x_dtype, zmoe_dtype wire,
                     uint32_t step) {
  static float partial[ROWS * WIDTH], sum[ROWS * WIDTH], expected[ROWS * WIDTH];
  static uint8_t x[4 * ROWS * WIDTH];
  zmoe_fault fault;
  zmoe_call call = rig_call(step, step % 3, given->rows, WIDTH, wire);
  call.digest = 77 + step;
  zmoe_convert(x, x_dtype, given->x, ZMOE_F32, (size_t)given->rows * WIDTH, ZMOE_ISA_GENERIC);
  zmoe_routed routed = {x, given->ids, given->weights, given->ranks, TOP_K, x_dtype, 3};
  CHECK_EQUAL(zmoe_exchange_dispatch(nodes[0].ex, &call, &routed, RIG_PATIENCE_US, &fault),
              ZMOE_OK);
  for (uint32_t r = 1; r < n; r++) {
    zmoe_dispatch_batch got = received(r, 0);
    CHECK_EQUAL(receive(r, &got, call.step, call.layer), ZMOE_OK);
    CHECK_EQUAL(got.digest, call.digest);
    CHECK_EQUAL(got.busiest, 3);
    work(r, &got, x_dtype, partial);
    CHECK_EQUAL(answer(r, &got, call.step, call.layer, wire, got.rows > 0 ? partial : NULL),
                ZMOE_OK);
  }
  int any = partial_of(given, 0, partial);
  CHECK_EQUAL(zmoe_exchange_publish(nodes[0].ex, &call, any ? partial : NULL, ZMOE_F32,
                                    RIG_PATIENCE_US, &fault),
              ZMOE_OK);
  CHECK_EQUAL(collect(sum), ZMOE_OK);
  expect(given, n, wire, expected);
  CHECK(memcmp(sum, expected, (size_t)given->rows * WIDTH * sizeof *sum) == 0);
}

static void test_sums(void) {
  static const zmoe_dtype wires[] = {ZMOE_F32, ZMOE_F16, ZMOE_BF16, (zmoe_dtype)ZMOE_Q8};
  static routing given;
  for (uint32_t n = 2; n <= 8; n += n < 4 ? 1 : 4) {
    open_nodes(n, 0, 1000, 1000);
    uint32_t step = 0;
    for (int w = 0; w < 4; w++)
      for (uint32_t rows = 0; rows <= ROWS; rows += rows < 3 ? 1 : 13, step++) {
        /* In f32 alone are the worker's numbers those of the reference. */
        draw_routing(&given, rows, n, step % 4 == 0 ? 1 : step % 4 == 1 ? 2 : 0);
        exchange(&given, n, ZMOE_F32, wires[w], step);
      }
    zmoe_exchange_stats stats;
    zmoe_exchange_stats_get(nodes[0].ex, &stats);
    CHECK_EQUAL(stats.exchanges, step);
    CHECK_EQUAL(stats.frames_sent, step * (n - 1)); /* two messages a worker */
    CHECK_EQUAL(stats.frames_received, step * (n - 1));
    zmoe_exchange_stats_get(nodes[n - 1].ex, &stats);
    CHECK_EQUAL(stats.exchanges, step);
    CHECK_EQUAL(stats.frames_sent, step);
    rig_close(nodes, n);
  }
}

/* Only its own rows and pairs, in order, as they are: empty where there are none. */
static void test_what_a_worker_is_sent(void) {
  open_nodes(NODES, 0, 1000, 1000);
  static const uint16_t x[4 * 2] = {1, 2, 3, 4, 5, 6, 7, 8}; /* bits of bf16 */
  static const int32_t ids[4 * 2] = {5, 2, 0, 1, 7, 3, -1, 9};
  static const float weights[4 * 2] = {0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f, 0.8f};
  static const uint64_t ranks[4 * 2] = {2, 1, 1, 1, 3, 2, 0, 0};
  zmoe_call call = rig_call(4, 2, 4, 2, ZMOE_BF16);
  call.digest = UINT64_C(1) << 63;
  zmoe_routed routed = {x, ids, weights, ranks, 2, ZMOE_BF16, 0};
  zmoe_fault fault;
  CHECK_EQUAL(zmoe_exchange_dispatch(nodes[0].ex, &call, &routed, 0, &fault), ZMOE_OK);
  zmoe_dispatch_batch got = received(1, 0);
  got.width = 2;
  CHECK_EQUAL(receive(1, &got, 4, 2), ZMOE_OK);
  CHECK(got.rows == 2 && got.width == 2 && got.dtype == ZMOE_BF16 && got.pairs == 3);
  CHECK(got.digest == call.digest);
  CHECK(memcmp(got.x, (uint16_t[4]){1, 2, 5, 6}, 8) == 0);
  CHECK(memcmp(got.pair_rows, (int32_t[3]){0, 1, 1}, 12) == 0);
  CHECK(memcmp(got.pair_experts, (int32_t[3]){6, 8, 4}, 12) == 0); /* as it numbers them */
  CHECK(memcmp(got.pair_weights, (float[3]){0.1f, 0.5f, 0.6f}, 12) == 0);
  CHECK(rooms[1].x[8] == 0xee && rooms[1].pair_rows[3] != 0);
  got = received(2, 0);
  got.width = 2;
  CHECK_EQUAL(receive(2, &got, 4, 2), ZMOE_OK);
  CHECK(got.rows == 0 && got.pairs == 0 && got.width == 2);
  CHECK(rooms[2].x[0] == 0xee);
  CHECK_EQUAL(answer(2, &got, 4, 2, ZMOE_BF16, NULL), ZMOE_OK);
  rig_close(nodes, NODES);
}

/* ---- the leader and puppets ------------------------------------------------------- */

/* Row 0 for rank 1, row 1 for rank 2; the leader's own part is 1 in both. */
static int dispatch(uint32_t step, uint32_t layer) {
  static const float x[2 * 4] = {1, 1, 1, 1, 2, 2, 2, 2}, ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  static const int32_t ids[2] = {3, 4};
  static const float weights[2] = {1, 1};
  static const uint64_t ranks[2] = {1 << 1, 1 << 2};
  zmoe_fault fault;
  zmoe_call call = rig_call(step, layer, 2, 4, ZMOE_F32);
  zmoe_routed routed = {x, ids, weights, ranks, 1, ZMOE_F32, 0};
  int rc = zmoe_exchange_dispatch(nodes[0].ex, &call, &routed, 0, &fault);
  if (rc == ZMOE_OK)
    CHECK_EQUAL(zmoe_exchange_publish(nodes[0].ex, &call, ones, ZMOE_F32, 0, &fault), ZMOE_OK);
  return rc;
}

static void answer_as(uint32_t rank, const zmoe_header *header, float value) {
  uint8_t frame[ANSWER_BYTES];
  rig_send(nodes[rank].dealers[0], frame, rig_frame(header, value, frame), 0);
}

static void puppet_answers(uint32_t rank, uint32_t step, uint32_t layer, float value) {
  zmoe_header header = rig_header(rank, step, layer);
  answer_as(rank, &header, value);
}

static void expect_sum(float first, float second) {
  float sum[8];
  CHECK_EQUAL(collect(sum), ZMOE_OK);
  CHECK(sum[0] == first && sum[3] == first && sum[4] == second && sum[7] == second);
}

static void leader_with(uint32_t resend_ms, uint32_t grace_ms) {
  open_nodes(NODES, 6, resend_ms, grace_ms);
}

/* Of a layer's rows for puppet `rank`; what else comes by its DEALER is passed over. */
static void take_rows(uint32_t rank, uint32_t layer, uint8_t *frame, size_t bytes) {
  zmoe_header header;
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  do {
    CHECK(rig_now_us() < until_us);
    int got = rig_receive(nodes[rank].dealers[0], frame, bytes, 5000);
    CHECK(got >= ZMOE_HEADER_BYTES);
    CHECK_EQUAL(zmoe_wire_decode(frame, (size_t)got, RIG_MAX_BYTES, &header), ZMOE_WIRE_OK);
  } while (header.kind != ZMOE_KIND_ROWS || header.layer != layer);
  CHECK_EQUAL(header.rows, 1);
  CHECK_EQUAL(header.payload_bytes, 16 + ZMOE_PAIR_BYTES);
}

static void test_the_leader_asks_for_lost_answers(void) {
  leader_with(5, 1000);
  CHECK_EQUAL(dispatch(0, 0), ZMOE_OK);
  puppet_answers(1, 0, 0, 2);
  RIG_UNTIL(&nodes[0], frames_received, 1);
  uint8_t identity[64], frame[ANSWER_BYTES];
  float sum[8];
  zmoe_fault fault;
  zmoe_header request;
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  do {
    CHECK(rig_now_us() < until_us);
    CHECK_EQUAL(collect_for(sum, 1000, &fault), ZMOE_ETIMEOUT);
  } while (rig_receive(nodes[2].router, identity, sizeof identity, 1) < 0);
  CHECK_EQUAL(rig_receive(nodes[2].router, frame, sizeof frame, 5000), ZMOE_HEADER_BYTES);
  CHECK_EQUAL(zmoe_wire_decode(frame, ZMOE_HEADER_BYTES, 0, &request), ZMOE_WIRE_OK);
  CHECK(request.kind == ZMOE_KIND_RESEND && request.source == 0 && request.layer == 0);
  CHECK_EQUAL(rig_receive(nodes[1].router, identity, sizeof identity, 20), -1);
  zmoe_header header = rig_header(2, 0, 0); /* by the way that answers take */
  rig_send(nodes[2].router, identity, ZMOE_PRESENCE_BYTES, 1);
  rig_send(nodes[2].router, frame, rig_frame(&header, 4, frame), 0);
  expect_sum(3, 5);
  rig_close(nodes, NODES);
}

/* A puppet asks again for what it has been sent, until it gets it, bit for bit. */
static void ask_until_served(uint32_t layer, const uint8_t *expected, size_t bytes) {
  uint8_t frame[256];
  zmoe_fault fault;
  zmoe_header request = rig_header(1, 0, layer);
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
  do {
    CHECK(rig_now_us() < until_us);
    answer_as(1, &request, 0);
    CHECK_EQUAL(zmoe_exchange_service(nodes[0].ex, &fault), ZMOE_OK);
  } while (rig_receive(nodes[1].dealers[0], frame, sizeof frame, 1) != (int)bytes ||
           memcmp(frame, expected, bytes) != 0);
}

static void test_the_leader_sends_rows_again(void) {
  leader_with(1, 1000);
  uint8_t frame[2][256];
  size_t bytes = ANSWER_BYTES + ZMOE_PAIR_BYTES;
  for (uint32_t layer = 0; layer < 2; layer++) {
    CHECK_EQUAL(dispatch(0, layer), ZMOE_OK);
    take_rows(1, layer, frame[layer], sizeof frame[layer]);
    ask_until_served(layer, frame[layer], bytes);
    puppet_answers(1, 0, layer, 2);
    puppet_answers(2, 0, layer, 4);
    expect_sum(3, 5);
  }
  /* Whoever has answered has them; and what is yet to come cannot be sent. */
  zmoe_header request = rig_header(1, 0, 1);
  request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
  zmoe_exchange_stats before;
  zmoe_header mark = rig_header(1, 0, 2);
  mark.kind = ZMOE_KIND_ROWS;
  answer_as(1, &mark, 0); /* behind the requests above */
  RIG_UNTIL(&nodes[0], bad_field, 1);
  zmoe_exchange_stats_get(nodes[0].ex, &before);
  answer_as(1, &request, 0);
  request.layer = 2;
  answer_as(1, &request, 0);
  RIG_UNTIL(&nodes[0], resend_unknown, before.resend_unknown + 2);
  rig_close(nodes, NODES);
}

static void wait_readable(void *socket) {
  enum { ZMQ_EVENTS = 15, ZMQ_POLLIN = 1 };
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  int events = 0;
  do {
    size_t bytes = sizeof events;
    CHECK(rig_now_us() < until_us);
    CHECK_EQUAL(zmoe_zmq.getsockopt(socket, ZMQ_EVENTS, &events, &bytes), 0);
  } while (!(events & ZMQ_POLLIN));
}

/* A worker that asks while the leader is busy gets its rows once. */
static void test_impatient_workers(void) {
  leader_with(1, 1000);
  zmoe_header request = rig_header(1, 0, 0);
  request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
  answer_as(1, &request, 0);
  wait_readable(nodes[0].router);
  CHECK_EQUAL(dispatch(0, 0), ZMOE_OK);
  uint64_t until_us = rig_now_us() + 5000; /* long after the rows were sent */
  while (rig_now_us() < until_us)
    ;
  puppet_answers(1, 0, 0, 2);
  puppet_answers(2, 0, 0, 4);
  expect_sum(3, 5);
  zmoe_exchange_stats stats;
  zmoe_exchange_stats_get(nodes[0].ex, &stats);
  CHECK(stats.resend_served == 0 && stats.resend_unknown == 1);
  rig_close(nodes, NODES);
}

static void test_a_dead_worker_is_named(void) {
  leader_with(20, 30);
  float sum[8];
  zmoe_fault fault;
  CHECK_EQUAL(dispatch(2, 3), ZMOE_OK);
  puppet_answers(1, 2, 3, 1);
  rig_kill(&nodes[2]);
  CHECK_EQUAL(collect_for(sum, RIG_PATIENCE_US, &fault), ZMOE_EPEER);
  CHECK(fault.lost == 4 && fault.step == 2 && fault.layer == 3);
  rig_close(nodes, NODES);
}

static void test_a_silent_worker_is_named(void) {
  leader_with(20, 1000);
  float sum[8];
  zmoe_fault fault;
  CHECK_EQUAL(dispatch(2, 3), ZMOE_OK);
  puppet_answers(1, 2, 3, 1);
  CHECK_EQUAL(collect_for(sum, 30000, &fault), ZMOE_ETIMEOUT);
  CHECK(fault.missing == 4 && fault.lost == 0 && fault.step == 2 && fault.layer == 3);
  puppet_answers(2, 2, 3, 2); /* late, but it can still be collected */
  expect_sum(2, 3);
  rig_close(nodes, NODES);
}

/* An answer that is not to what was asked. */
static void test_a_wrong_answer(void) {
  for (int which = 0; which < 5; which++) {
    leader_with(1000, 1000);
    CHECK_EQUAL(dispatch(0, 1), ZMOE_OK);
    puppet_answers(1, 0, 1, 2);
    zmoe_header header = rig_header(2, 0, 1);
    if (which == 0)
      header.rows = 2, header.width = 2; /* as many elements */
    else if (which == 1)
      header.digest = 1;
    else if (which == 2)
      header.dtype = ZMOE_BF16, header.payload_bytes = 8;
    else if (which == 3)
      header.layer = 0; /* an exchange that was none */
    else
      header.width = 3, header.payload_bytes = 12;
    answer_as(2, &header, 4);
    float sum[8];
    zmoe_fault fault;
    CHECK_EQUAL(collect_for(sum, RIG_PATIENCE_US, &fault), ZMOE_EDIVERGED);
    CHECK(fault.diverged == 4 && fault.theirs.source == 2);
    rig_close(nodes, NODES);
  }
}

static void test_a_damaged_answer(void) {
  leader_with(1000, 1000);
  CHECK_EQUAL(dispatch(0, 0), ZMOE_OK);
  uint8_t frame[ANSWER_BYTES];
  zmoe_header header = rig_header(1, 0, 0);
  size_t bytes = rig_frame(&header, 2, frame);
  frame[ZMOE_HEADER_BYTES] ^= 1;
  rig_send(nodes[1].dealers[0], frame, bytes, 0);
  RIG_UNTIL(&nodes[0], bad_payload, 1);
  puppet_answers(1, 0, 0, 2);
  puppet_answers(2, 0, 0, 4);
  expect_sum(3, 5);
  rig_close(nodes, NODES);
}

/* By another way, of another kind, twice, of a stranger. */
static void test_what_does_not_belong_to_the_leader(void) {
  leader_with(1000, 1000);
  CHECK_EQUAL(dispatch(0, 0), ZMOE_OK);
  rig_publish(&nodes[2], 0, 0, 64); /* to all */
  RIG_UNTIL(&nodes[0], bad_field, 1);
  zmoe_header header = rig_header(2, 0, 0);
  header.kind = ZMOE_KIND_ROWS;
  answer_as(2, &header, 64);
  RIG_UNTIL(&nodes[0], bad_field, 2);
  header = rig_header(2, 0, 0);
  header.width = 96, header.chunks = NODES, header.payload_bytes = 16; /* of a wrong size */
  answer_as(2, &header, 64);
  RIG_UNTIL(&nodes[0], bad_field, 3);
  header.width = 12, header.chunk = 0, header.payload_bytes = 0; /* a chunk */
  answer_as(2, &header, 64);
  RIG_UNTIL(&nodes[0], bad_field, 4);
  header = rig_header(1, 0, 0); /* in the name of another */
  answer_as(2, &header, 64);
  RIG_UNTIL(&nodes[0], bad_stranger, 1);
  puppet_answers(1, 0, 0, 2);
  puppet_answers(1, 0, 0, 64);
  RIG_UNTIL(&nodes[0], bad_stale, 1);
  puppet_answers(2, 0, 0, 4);
  expect_sum(3, 5);
  puppet_answers(2, 0, 0, 64);
  RIG_UNTIL(&nodes[0], bad_stale, 2);
  rig_close(nodes, NODES);
}

/* ---- a caller's mistakes --------------------------------------------------------------- */

static void test_mistakes_of_a_leader(void) {
  leader_with(1000, 1000);
  static float x[ROWS * WIDTH + 2 * WIDTH], sum[8];
  static const int32_t ids[ROWS + 2] = {0};
  static const float weights[ROWS + 2] = {0};
  static const uint64_t ranks[ROWS + 2] = {0};
  zmoe_fault fault;
  zmoe_routed routed = {x, ids, weights, ranks, 1, ZMOE_F32, 0};
  zmoe_dispatch_batch got = received(0, 0);
  zmoe_exchange *ex = nodes[0].ex;
  zmoe_call call = rig_call(0, 0, 1, 4, ZMOE_F32), other = call;
  CHECK_EQUAL(zmoe_exchange_publish(ex, &call, x, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_exchange_collect(ex, sum, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_exchange_receive(ex, &got, 0, 0, 0, &fault), ZMOE_EINVAL);
  other = rig_call(0, 0, ROWS + 1, WIDTH, ZMOE_F32);
  CHECK_EQUAL(zmoe_exchange_dispatch(ex, &other, &routed, 0, &fault), ZMOE_EINVAL);
  other = call, other.algorithm = ZMOE_SCATTER;
  CHECK_EQUAL(zmoe_exchange_dispatch(ex, &other, &routed, 0, &fault), ZMOE_EINVAL);
  other = call, other.micro_batch = 1;
  CHECK_EQUAL(zmoe_exchange_dispatch(ex, &other, &routed, 0, &fault), ZMOE_EINVAL);
  routed.x_dtype = (zmoe_dtype)ZMOE_Q8;
  CHECK_EQUAL(zmoe_exchange_dispatch(ex, &call, &routed, 0, &fault), ZMOE_EINVAL);
  routed.x_dtype = ZMOE_F32;
  CHECK_EQUAL(dispatch(1, 0), ZMOE_OK);
  CHECK_EQUAL(dispatch(1, 1), ZMOE_EINVAL); /* not yet collected */
  other = rig_call(1, 0, 2, 4, ZMOE_F32);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &other, x, ZMOE_F32, 0, &fault), ZMOE_EINVAL); /* twice */
  puppet_answers(1, 1, 0, 1);
  puppet_answers(2, 1, 0, 1);
  expect_sum(2, 2);
  CHECK_EQUAL(dispatch(1, 0), ZMOE_EINVAL); /* never backwards */
  call = rig_call(1, 1, 2, 4, ZMOE_F32);
  CHECK_EQUAL(zmoe_exchange_dispatch(ex, &call, &routed, 0, &fault), ZMOE_OK);
  CHECK_EQUAL(zmoe_exchange_collect(ex, sum, ZMOE_F32, 0, &fault), ZMOE_EINVAL); /* without us */
  other = call, other.digest = 5;
  CHECK_EQUAL(zmoe_exchange_publish(ex, &other, x, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  other = call, other.wire_dtype = ZMOE_BF16;
  CHECK_EQUAL(zmoe_exchange_publish(ex, &other, x, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  other = call, other.rows = 1;
  CHECK_EQUAL(zmoe_exchange_publish(ex, &other, x, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &call, x, (zmoe_dtype)9, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &call, x, ZMOE_F32, 0, &fault), ZMOE_OK);
  rig_close(nodes, NODES);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"sums of 2, 3, 4 and 8 nodes, every dtype, some without a part", test_sums},
      {"a worker is sent what is its own", test_what_a_worker_is_sent},
      {"the leader asks for lost answers", test_the_leader_asks_for_lost_answers},
      {"and sends rows again", test_the_leader_sends_rows_again},
      {"but not to those who asked too early", test_impatient_workers},
      {"a dead worker is named", test_a_dead_worker_is_named},
      {"a silent worker is named", test_a_silent_worker_is_named},
      {"an answer to something else", test_a_wrong_answer},
      {"a damaged answer", test_a_damaged_answer},
      {"what does not belong to the leader", test_what_does_not_belong_to_the_leader},
      {"mistakes are refused", test_mistakes_of_a_leader},
  };
  rig_start(argc, argv);
  RUN(tests);
  rig_stop();
  return 0;
}
