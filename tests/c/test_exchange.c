/* The all-reduce as it goes well, and how a caller's mistakes are answered. */
#include "common/platform.h"

#include "check.h"

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

#include "exchange/exchange_internal.h"
#include "rig.h"

static const rig_options USUAL = {.nodes = 2, .resend_ms = 1000, .grace_ms = 1000};

/* ---- sums ------------------------------------------------------------------ */

enum { MOST_NODES = 8, MOST_FLOATS = 8192 };

/* What every rank must end with, in plain steps: encode, add in rank order, encode
 * again.  Rows one by one, as blocks end there; a silent rank adds zeros. */
static void expect(float *out, float (*sources)[MOST_FLOATS], uint32_t n, uint32_t silent,
                   const zmoe_call *call) {
  static uint8_t encoded[MOST_NODES][4 * MOST_FLOATS];
  for (uint32_t row = 0; row < call->rows; row++) {
    static const float zeros[MOST_FLOATS];
    const void *parts[MOST_NODES];
    for (uint32_t r = 0; r < n; r++) {
      const float *given = silent >> r & 1 ? zeros : sources[r] + (size_t)row * call->width;
      parts[r] = encoded[r];
      zmoe_convert(encoded[r], call->wire_dtype, given, ZMOE_F32, call->width, ZMOE_ISA_GENERIC);
    }
    float *to = out + (size_t)row * call->width;
    zmoe_reduce(to, ZMOE_F32, parts, n, call->wire_dtype, call->width, ZMOE_ISA_GENERIC);
    zmoe_convert(encoded[0], call->wire_dtype, to, ZMOE_F32, call->width, ZMOE_ISA_GENERIC);
    zmoe_convert(to, ZMOE_F32, encoded[0], call->wire_dtype, call->width, ZMOE_ISA_GENERIC);
  }
}

static void exchange_once(rig_node *nodes, uint32_t n, const zmoe_call *call) {
  static float sources[MOST_NODES][MOST_FLOATS], sums[MOST_NODES][MOST_FLOATS];
  static float expected[MOST_FLOATS];
  float *outs[MOST_NODES];
  size_t count = (size_t)call->rows * call->width;
  uint32_t silent = 0;
  for (uint32_t r = 0; r < n; r++) {
    outs[r] = sums[r];
    silent |= (uint32_t)((call->step + r) % 3 == 0) << r;
    for (size_t i = 0; i < count; i++)
      sources[r][i] = sinf((float)(i + 1) * (float)(r + 3)) * 3.7f;
    CHECK_EQUAL(rig_node_send(&nodes[r], call, silent >> r & 1 ? NULL : sources[r]), ZMOE_OK);
  }
  expect(expected, sources, n, silent, call);
  rig_collect_all(nodes, n, outs);
  for (uint32_t r = 0; r < n; r++)
    CHECK(memcmp(sums[r], expected, count * sizeof(float)) == 0);
}

static void test_sums(void) {
  static const uint32_t shapes[][2] = {{1, 1}, {3, 61}, {8, 1024}, {0, 1024}, {5, 96}, {2, 33}};
  for (uint32_t n = 2; n <= MOST_NODES; n += n < 4 ? 1 : 4) {
    rig_node nodes[MOST_NODES];
    rig_options options = USUAL;
    options.nodes = n;
    options.spin_us = n == 3 ? 200 : 0;
    rig_open(nodes, options);
    zmoe_exchange_stats stats;
    for (uint32_t i = 0; i < 48; i++) {
      zmoe_call call = rig_call(i, 0, shapes[i % 6][0], shapes[i % 6][1], (zmoe_dtype)(i / 6 % 4));
      call.algorithm = (zmoe_algorithm)(i / 24);
      call.digest = 99;
      exchange_once(nodes, n, &call);
    }
    zmoe_exchange_stats_get(nodes[0].ex, &stats);
    CHECK_EQUAL(stats.exchanges, 48);
    CHECK_EQUAL(stats.frames_sent, 24 + 24 * n);
    CHECK_EQUAL(stats.frames_received, 24 * 3 * (n - 1));
    rig_close(nodes, n);
  }
}

/* ---- rows and their neighbours --------------------------------------------------- */

enum { KINDS = 40, MOST_ROWS = 33, ROW = 61 };

/* Rank r's part of a row of that kind: zeros where it has none. */
static int row_part(uint32_t kind, uint32_t r, float *out) {
  int mine = (kind + r) % 3 != 0; /* with two ranks, in a third of the rows one alone */
  for (uint32_t c = 0; c < ROW; c++) {
    uint32_t hash = (kind * 64 + r) * 2654435761u ^ c * 40503u;
    float value = sinf((float)(hash >> 8)) * ldexpf(1, (int)(kind % 5) * 9 - 30);
    out[c] = !mine ? 0.0f : hash >> 5 & 3 ? value : -0.0f;
  }
  return mine;
}

/* The sum of rows of those kinds, as rank 1 has it; a rank without any part says so. */
static void sum_rows(rig_node *nodes, uint32_t n, const zmoe_call *call, const uint32_t *kinds,
                     float *sum) {
  static float source[MOST_FLOATS], others[MOST_NODES][MOST_FLOATS];
  float *outs[MOST_NODES];
  for (uint32_t r = 0; r < n; r++) {
    int any = 0;
    for (uint32_t i = 0; i < call->rows; i++)
      any |= row_part(kinds[i], r, source + i * ROW);
    CHECK_EQUAL(rig_node_send(&nodes[r], call, any ? source : NULL), ZMOE_OK);
    outs[r] = r == 1 ? sum : others[r];
  }
  rig_collect_all(nodes, n, outs);
}

static void test_rows_and_their_neighbours(void) {
  static float alone[KINDS][ROW], sums[MOST_FLOATS];
  for (uint32_t n = 2; n <= 4; n++) {
    rig_node nodes[MOST_NODES];
    rig_options options = USUAL;
    options.nodes = n;
    rig_open(nodes, options);
    uint32_t step = 0;
    for (zmoe_dtype wire = ZMOE_F32; wire <= ZMOE_Q8; wire++) {
      for (uint32_t kind = 0; kind < KINDS; kind++) {
        zmoe_call call = rig_call(step++, 0, 1, ROW, wire);
        sum_rows(nodes, n, &call, &kind, alone[kind]);
      }
      for (uint32_t rows = 1; rows <= MOST_ROWS; rows++) {
        uint32_t kinds[MOST_ROWS];
        for (uint32_t i = 0; i < rows; i++)
          kinds[i] = (rows * 7 + i * i * 3 + step) % KINDS;
        zmoe_call call = rig_call(step++, 0, rows, ROW, wire);
        call.algorithm = (zmoe_algorithm)(step % 2);
        sum_rows(nodes, n, &call, kinds, sums);
        for (uint32_t i = 0; i < rows; i++)
          CHECK(memcmp(sums + i * ROW, alone[kinds[i]], sizeof alone[0]) == 0);
      }
    }
    rig_close(nodes, n);
  }
}

/* One puppet stands for the 63 others. */
static void test_64_nodes(void) {
  static rig_node nodes[2];
  rig_options options = USUAL;
  options.puppets = 2;
  rig_open(nodes, options);
  zmoe_exchange_destroy(nodes[0].ex);
  nodes[0].ex = NULL;
  for (uint32_t r = 2; r < ZMOE_MAX_NODES; r++) {
    uint8_t presence[ZMOE_PRESENCE_BYTES];
    zmoe_wire_presence(RIG_SESSION, r, presence);
    rig_subscribe(nodes[1].sub, presence, sizeof presence);
    nodes[0].dealers[r] = nodes[0].dealers[1];
    nodes[0].monitors[r] = nodes[0].monitors[1];
  }
  zmoe_exchange_config config = {
      .rank = 0,
      .nodes = ZMOE_MAX_NODES,
      .session = RIG_SESSION,
      .max_payload_bytes = RIG_MAX_BYTES,
      .small_payload_bytes = RIG_SMALL_BYTES,
      .xpub = nodes[0].xpub,
      .sub = nodes[0].sub,
      .router = nodes[0].router,
      .dealers = nodes[0].dealers,
      .monitors = nodes[0].monitors,
      .resend_ms = 1000,
  };
  CHECK_EQUAL(zmoe_exchange_create(&config, &nodes[0].ex), ZMOE_OK);
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  while (zmoe_exchange_subscribers(nodes[0].ex) != (~UINT64_C(1) & ~UINT64_C(2)))
    CHECK(rig_now_us() < until_us); /* rank 1 had made itself known to the first exchange */
  zmoe_call scatter = {.rows = 1, .width = 4, .algorithm = ZMOE_SCATTER};
  CHECK_EQUAL(rig_node_send(&nodes[0], &scatter, NULL), ZMOE_EINVAL); /* it was not announced */
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 0.5f), ZMOE_OK);
  for (uint32_t r = 1; r < ZMOE_MAX_NODES; r++) {
    nodes[1].rank = r;
    rig_publish(&nodes[1], 0, 0, (float)r);
  }
  nodes[1].rank = 1;
  float sum;
  zmoe_fault fault;
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  CHECK(sum == 63 * 64 / 2 + 0.5f);
  for (uint32_t r = 2; r < ZMOE_MAX_NODES; r++)
    nodes[0].dealers[r] = nodes[0].monitors[r] = NULL;
  rig_close(nodes, 2);
}

/* A peer that has collected may publish the next exchange before we collect. */
static void test_a_peer_one_ahead(void) {
  rig_node nodes[3];
  rig_options options = USUAL;
  options.nodes = 3;
  rig_open(nodes, options);
  float sum;
  zmoe_fault fault;
  for (uint32_t step = 0; step < 50; step++) {
    for (uint32_t layer = 0; layer < 2; layer++) {
      CHECK_EQUAL(rig_node_publish(&nodes[0], step, layer, 1), ZMOE_OK);
      if (step + layer == 0)
        CHECK_EQUAL(rig_node_publish(&nodes[1], step, layer, 2), ZMOE_OK);
      CHECK_EQUAL(rig_node_publish(&nodes[2], step, layer, 4), ZMOE_OK);
      CHECK_EQUAL(rig_collect(&nodes[1], &sum, &fault), ZMOE_OK);
      CHECK(sum == 7);
      CHECK_EQUAL(rig_node_publish(&nodes[1], step + layer, 1 - layer, 2), ZMOE_OK);
      CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
      CHECK(sum == 7);
      CHECK_EQUAL(rig_collect(&nodes[2], &sum, &fault), ZMOE_OK);
      CHECK(sum == 7);
    }
  }
  rig_close(nodes, 3);
}

/* ---- deadlines and signals --------------------------------------------------- */

static void test_deadline(void) {
  rig_node nodes[3];
  rig_options options = USUAL;
  options.nodes = 3;
  options.puppets = 6;
  rig_open(nodes, options);
  zmoe_fault fault;
  float sum[4];
  CHECK_EQUAL(rig_node_publish(&nodes[0], 4, 7, 1), ZMOE_OK);
  rig_publish(&nodes[1], 4, 7, 1);
  uint64_t start_us = rig_now_us();
  CHECK_EQUAL(zmoe_exchange_collect(nodes[0].ex, sum, ZMOE_F32, 50000, &fault), ZMOE_ETIMEOUT);
  CHECK(rig_now_us() - start_us >= 50000);
  CHECK_EQUAL(fault.missing, 4);
  CHECK_EQUAL(fault.lost, 0);
  CHECK_EQUAL(fault.step, 4);
  CHECK_EQUAL(fault.layer, 7);
  rig_publish(&nodes[2], 4, 7, 1); /* late, but it can still be collected */
  CHECK_EQUAL(rig_collect(&nodes[0], sum, &fault), ZMOE_OK);
  CHECK(sum[0] == 3);
  rig_close(nodes, 3);
}

static void on_signal(int number) {
  (void)number;
}

static atomic_int stop;

static void *send_signals(void *thread) {
  while (!atomic_load(&stop)) {
    struct timespec pause = {.tv_nsec = 1000000};
    CHECK_EQUAL(pthread_kill(*(pthread_t *)thread, SIGUSR1), 0);
    nanosleep(&pause, NULL);
  }
  return NULL;
}

/* A signal ends the wait; and so does time, since a signal may have come just
 * before it. Either way the collect goes on when called again. */
static void test_signals(void) {
  rig_node nodes[2];
  rig_options options = USUAL;
  options.puppets = 2;
  rig_open(nodes, options);
  zmoe_fault fault;
  float sum[4];
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  CHECK_EQUAL(zmoe_exchange_collect(nodes[0].ex, sum, ZMOE_F32, RIG_PATIENCE_US, &fault),
              ZMOE_EINTR);
  /* A deadline shorter than the time above: only a signal can be the cause. */
  struct sigaction action = {.sa_handler = on_signal}, before;
  CHECK_EQUAL(sigaction(SIGUSR1, &action, &before), 0);
  pthread_t self = pthread_self(), thread;
  CHECK_EQUAL(pthread_create(&thread, NULL, send_signals, &self), 0);
  int rc, tries = 0;
  do
    rc = zmoe_exchange_collect(nodes[0].ex, sum, ZMOE_F32, 50000, &fault);
  while (rc == ZMOE_ETIMEOUT && ++tries < 100);
  CHECK_EQUAL(rc, ZMOE_EINTR);
  atomic_store(&stop, 1);
  CHECK_EQUAL(pthread_join(thread, NULL), 0);
  CHECK_EQUAL(sigaction(SIGUSR1, &before, NULL), 0);
  rig_publish(&nodes[1], 0, 0, 1);
  CHECK_EQUAL(rig_collect(&nodes[0], sum, &fault), ZMOE_OK);
  rig_close(nodes, 2);
}

/* ---- a caller's mistakes -------------------------------------------------------- */

static void test_mistakes(void) {
  rig_node nodes[2];
  rig_options options = USUAL;
  options.puppets = 2;
  rig_open(nodes, options);
  zmoe_exchange *ex = nodes[0].ex, *other;
  zmoe_fault fault;
  float data[4] = {0};
  CHECK_EQUAL(zmoe_exchange_collect(ex, data, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  const zmoe_call calls[] = {rig_call(0, 0, 1, RIG_MAX_BYTES / 4 + 1, ZMOE_F32),
                             rig_call(0, 0, UINT32_MAX, UINT32_MAX, ZMOE_F32),
                             rig_call(0, 0, 1, 4, (zmoe_dtype)7),
                             {.rows = 1, .width = 4, .algorithm = (zmoe_algorithm)2},
                             {.rows = 1, .width = 4, .micro_batch = 256},
                             {.rows = 1, .width = 4, .micro_batch = 1}};
  for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
    CHECK_EQUAL(zmoe_exchange_publish(ex, &calls[i], data, ZMOE_F32, 0, &fault), ZMOE_EINVAL);
  zmoe_call fits = rig_call(0, 0, 1, 4, ZMOE_F32);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &fits, data, (zmoe_dtype)7, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_exchange_publish(ex, &fits, data, ZMOE_Q8, 0, &fault), ZMOE_EINVAL);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 3, 0, 1), ZMOE_OK);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 4, 0, 1), ZMOE_EINVAL); /* not yet collected */
  rig_publish(&nodes[1], 3, 0, 1);
  CHECK_EQUAL(rig_collect(&nodes[0], data, &fault), ZMOE_OK);
  CHECK_EQUAL(rig_node_publish(&nodes[0], 3, 0, 1), ZMOE_EINVAL); /* never backwards */
  CHECK_EQUAL(rig_node_publish(&nodes[0], 2, 9, 1), ZMOE_EINVAL);
  zmoe_pool_stats stats;
  zmoe_exchange_pool_stats(ex, &stats);
  CHECK(stats.acquired - stats.released <= 2); /* every refused slot came back */
  zmoe_exchange_config config = {.rank = 2, .nodes = 2, .resend_ms = 1};
  CHECK_EQUAL(zmoe_exchange_create(&config, &other), ZMOE_EINVAL);
  CHECK(other == NULL);
  rig_close(nodes, 2);
}

static int take_all_slots(rig_node *node, zmoe_slot **slots) {
  int n = 0;
  while (zmoe_pool_acquire(node->ex->pool, RIG_MAX_BYTES, 0, &slots[n]) == ZMOE_OK)
    n++;
  return n;
}

static void test_pool_exhaustion(void) {
  rig_node nodes[2];
  rig_options options = USUAL;
  options.puppets = 2;
  rig_open(nodes, options);
  zmoe_slot *slots[64];
  int n = take_all_slots(&nodes[0], slots);
  CHECK_EQUAL(n, 6);
  static float data[RIG_MAX_BYTES / 4];
  zmoe_fault fault;
  zmoe_call call = rig_call(0, 0, 1, RIG_MAX_BYTES / 4, ZMOE_F32);
  CHECK_EQUAL(zmoe_exchange_publish(nodes[0].ex, &call, data, ZMOE_F32, 1000, &fault), ZMOE_EPOOL);
  CHECK_EQUAL(fault.missing, 0);
  CHECK_EQUAL(zmoe_exchange_publish(nodes[0].ex, &call, data, ZMOE_F32, RIG_PATIENCE_US, &fault),
              ZMOE_EINTR);
  while (n-- > 0)
    zmoe_slot_release(slots[n]);
  CHECK_EQUAL(rig_node_send(&nodes[0], &call, data), ZMOE_OK);
  rig_close(nodes, 2);
}

/* While there is no slot, a peer gets again what it asks for, and is named. */
static void test_exhaustion_behind_a_link(void) {
  rig_node nodes[2];
  rig_options options = USUAL;
  options.puppets = 2, options.resend_ms = 1, options.grace_ms = 1;
  rig_open(nodes, options);
  zmoe_fault fault;
  float sum;
  CHECK_EQUAL(rig_node_publish(&nodes[0], 0, 0, 1), ZMOE_OK);
  rig_publish(&nodes[1], 0, 0, 1);
  CHECK_EQUAL(rig_collect(&nodes[0], &sum, &fault), ZMOE_OK);
  zmoe_slot *slots[64];
  int n = take_all_slots(&nodes[0], slots), rc;
  static float data[RIG_MAX_BYTES / 4];
  zmoe_call call = rig_call(1, 0, 1, RIG_MAX_BYTES / 4, ZMOE_F32);
  zmoe_header request = rig_header(1, 0, 0);
  uint8_t frame[ZMOE_HEADER_BYTES + 16];
  request.kind = ZMOE_KIND_RESEND, request.payload_bytes = 0;
  do {
    rig_send(nodes[1].dealers[0], frame, rig_frame(&request, 0, frame), 0);
    rc = zmoe_exchange_publish(nodes[0].ex, &call, data, ZMOE_F32, 1000, &fault);
    CHECK_EQUAL(rc, ZMOE_EPOOL);
  } while (fault.missing == 0);
  CHECK_EQUAL(fault.missing, 2);
  CHECK_EQUAL(rig_receive(nodes[1].dealers[0], frame, sizeof frame, RIG_PATIENCE_US / 1000),
              sizeof frame);
  rig_kill(&nodes[1]);
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  do
    rc = zmoe_exchange_publish(nodes[0].ex, &call, data, ZMOE_F32, RIG_PATIENCE_US, &fault);
  while (rc == ZMOE_EINTR && rig_now_us() < until_us);
  CHECK_EQUAL(rc, ZMOE_EPEER);
  CHECK_EQUAL(fault.lost, 2);
  while (n-- > 0)
    zmoe_slot_release(slots[n]);
  rig_close(nodes, 2);
}

int main(int argc, char **argv) {
  static const test_case tests[] = {
      {"sums of 2, 3, 4 and 8 nodes, every dtype, both algorithms, some without a part", test_sums},
      {"a row's sum does not depend on its neighbours", test_rows_and_their_neighbours},
      {"64 nodes", test_64_nodes},
      {"a peer one exchange ahead", test_a_peer_one_ahead},
      {"deadlines name who is missing", test_deadline},
      {"signals end a wait", test_signals},
      {"a caller's mistakes are refused", test_mistakes},
      {"an exhausted pool", test_pool_exhaustion},
      {"an exhausted pool behind a link", test_exhaustion_behind_a_link},
  };
  rig_start(argc, argv);
  RUN(tests);
  rig_stop();
  return 0;
}
