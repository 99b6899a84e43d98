/* MLX's side of the door, called as MLX calls it, on rank 0; the other ranks are plain
 * exchanges, each in a thread of its own. */
#include "common/platform.h"

#include "door/door.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "rig.h"

typedef struct handle handle; /* of MPI: opaque to MLX, too */
extern handle ompi_mpi_comm_world, ompi_mpi_op_sum, ompi_mpi_op_max;
extern handle ompi_mpi_uint8_t, ompi_mpi_int32_t, ompi_mpi_int64_t, ompi_mpi_float;
int MPI_Get_library_version(char *version, int *length);
int MPI_Init(int *argc, char ***argv);
int MPI_Finalize(void);
int MPI_Type_contiguous(int count, handle *of, handle **out);
int MPI_Op_create(void (*function)(void *, void *, int *, handle **), int commutes, handle **out);
int MPI_Comm_rank(handle *comm, int *rank);
int MPI_Comm_size(handle *comm, int *size);
int MPI_Comm_split(handle *comm, int color, int key, handle **out);
int MPI_Comm_free(handle **comm);
int MPI_Allreduce(const void *in, void *out, int count, handle *type, handle *op, handle *comm);
int MPI_Allgather(const void *in, int count, handle *type, void *out, int out_count,
                  handle *out_type, handle *comm);
int MPI_Send(const void *in, int count, handle *type, int to, int tag, handle *comm);

enum { NODES = 3, PLAN = 77, PIPE_NONE = -1 };

static void *const IN_PLACE = (void *)1;
static rig_node nodes[NODES];
static handle *f16, *bf16, *sum_f16, *sum_bf16, *max_f16;

/* As MLX does it, in this order. */
static void init(void) {
  char version[256];
  int length = 0;
  MPI_Get_library_version(version, &length);
  CHECK(length == (int)strlen(version) && strstr(version, "Open MPI") != NULL);
  CHECK_EQUAL(MPI_Init(NULL, NULL), 0);
  CHECK_EQUAL(MPI_Type_contiguous(2, &ompi_mpi_uint8_t, &f16), 0);
  CHECK_EQUAL(MPI_Type_contiguous(2, &ompi_mpi_uint8_t, &bf16), 0);
  CHECK_EQUAL(MPI_Op_create(NULL, 1, &sum_f16), 0);
  CHECK_EQUAL(MPI_Op_create(NULL, 1, &sum_bf16), 0);
  CHECK_EQUAL(MPI_Op_create(NULL, 1, &max_f16), 0);
  CHECK_EQUAL(MPI_Finalize(), 0);
}

static zmoe_door_config config_of(int wakeup_fd, uint64_t deadline_us) {
  return (zmoe_door_config){
      .exchange = nodes[0].ex,
      .rank = 0,
      .nodes = NODES,
      .max_payload_bytes = RIG_MAX_BYTES,
      .wire_dtype = -1,
      .scatter_bytes = UINT64_MAX,
      .deadline_us = deadline_us,
      .patience_us = deadline_us,
      .wakeup_fd = wakeup_fd,
  };
}

static void open_door(uint64_t puppets, zmoe_door_config (*change)(zmoe_door_config)) {
  rig_open(nodes,
           (rig_options){.nodes = NODES, .puppets = puppets, .resend_ms = 1000, .grace_ms = 50});
  zmoe_door_config config = config_of(PIPE_NONE, RIG_PATIENCE_US);
  config = change != NULL ? change(config) : config;
  CHECK_EQUAL(zmoe_door_open(&config), ZMOE_OK);
}

static void close_door(void) {
  zmoe_door_close();
  rig_close(nodes, NODES);
}

static handle *split(int layer, int key) {
  handle *comm = NULL;
  CHECK_EQUAL(MPI_Comm_split(&ompi_mpi_comm_world, layer, key, &comm), 0);
  return comm;
}

static void expect_refusal(const char *what) {
  zmoe_door_failure failure;
  CHECK_EQUAL(zmoe_door_failed(&failure), ZMOE_EINVAL);
  if (strcmp(failure.refused, what) != 0)
    fprintf(stderr, "refused: %s\n", failure.refused);
  CHECK(strcmp(failure.refused, what) == 0);
}

static void expect_zeros(const void *data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    CHECK_EQUAL(((const uint8_t *)data)[i], 0);
}

/* ---- peers ------------------------------------------------------------------------ */

/* One exchange of a peer, whose own sum lands in `out`. */
typedef struct peer_call {
  zmoe_call call;
  const void *src;
  void *out;
  zmoe_dtype dtype;
} peer_call;

typedef struct peer {
  uint32_t rank;
  const peer_call *calls;
  size_t count;
} peer;

static void *run_peer(void *argument) {
  const peer *peer = argument;
  zmoe_fault fault;
  zmoe_exchange *ex = nodes[peer->rank].ex;
  for (size_t i = 0; i < peer->count; i++) {
    const peer_call *c = &peer->calls[i];
    int rc = ZMOE_EINTR;
    while (rc == ZMOE_EINTR)
      rc = zmoe_exchange_publish(ex, &c->call, c->src, c->dtype, RIG_PATIENCE_US, &fault);
    CHECK_EQUAL(rc, ZMOE_OK);
    for (rc = ZMOE_EINTR; rc == ZMOE_EINTR;)
      rc = zmoe_exchange_collect(ex, c->out, c->dtype, RIG_PATIENCE_US, &fault);
    CHECK_EQUAL(rc, ZMOE_OK);
  }
  return NULL;
}

typedef struct team {
  peer peers[NODES];
  pthread_t threads[NODES];
} team;

static void start(team *team, const peer_call *calls[NODES], size_t count) {
  for (uint32_t r = 1; r < NODES; r++) {
    team->peers[r] = (peer){r, calls[r], count};
    CHECK_EQUAL(pthread_create(&team->threads[r], NULL, run_peer, &team->peers[r]), 0);
  }
}

static void join(team *team) {
  for (uint32_t r = 1; r < NODES; r++)
    CHECK_EQUAL(pthread_join(team->threads[r], NULL), 0);
}

/* ---- what is done ------------------------------------------------------------------- */

enum { MOST = 3 * RIG_MAX_BYTES / 4 }; /* elements: three frames of f32 */

static uint32_t data[NODES][MOST], sums[NODES][MOST];

/* Numbers whose sum depends on the order, of any dtype. */
static void fill(zmoe_dtype dtype, size_t count) {
  static float source[MOST];
  for (uint32_t r = 0; r < NODES; r++) {
    for (size_t i = 0; i < count; i++)
      source[i] = (float)(int)((i * 7919 + r * 104729) % 2003 - 1001) * (r == 1 ? 1e-3f : 0.37f);
    if (dtype == (zmoe_dtype)ZMOE_I32)
      memcpy(data[r], source, count * 4);
    else
      CHECK_EQUAL(zmoe_convert(data[r], dtype, source, ZMOE_F32, count, zmoe_isa_best()), ZMOE_OK);
  }
}

static void check_sum(zmoe_dtype dtype, handle *type, handle *op, uint32_t layer, size_t count,
                      uint32_t width, int in_place) {
  size_t item = dtype == (zmoe_dtype)ZMOE_I32 ? 4 : zmoe_dtype_bytes(dtype);
  size_t rows_each = RIG_MAX_BYTES / (width * item), each = rows_each * width, n = 0;
  static peer_call calls[NODES][8];
  const peer_call *of_rank[NODES] = {NULL, calls[1], calls[2]};
  fill(dtype, count);
  for (size_t at = 0; at < count; at += each, n++)
    for (uint32_t r = 1; r < NODES; r++) {
      size_t some = count - at < each ? count - at : each;
      zmoe_call call = rig_call(1, layer, (uint32_t)(some / width), width, dtype);
      call.micro_batch = (uint32_t)n, call.plan = PLAN;
      calls[r][n] =
          (peer_call){call, (uint8_t *)data[r] + at * item, (uint8_t *)sums[r] + at * item, dtype};
    }
  team team;
  start(&team, of_rank, n);
  handle *comm = split((int)layer, (int)width | ZMOE_DOOR_WIDTH);
  void *out = in_place ? (void *)data[0] : (void *)sums[0];
  CHECK_EQUAL(MPI_Allreduce(in_place ? IN_PLACE : data[0], out, (int)count, type, op, comm), 0);
  join(&team);
  zmoe_door_failure failure;
  CHECK_EQUAL(zmoe_door_failed(&failure), ZMOE_OK);
  CHECK(memcmp(out, sums[1], count * item) == 0); /* those of the exchange, bit for bit */
  CHECK(memcmp(out, sums[2], count * item) == 0);
  CHECK_EQUAL(MPI_Comm_free(&comm), 0);
}

static void test_sums(void) {
  open_door(0, NULL);
  int rank = -1, size = -1;
  handle *comm = split(0, 0);
  CHECK(MPI_Comm_rank(comm, &rank) == 0 && rank == 0);
  CHECK(MPI_Comm_size(comm, &size) == 0 && size == NODES);
  CHECK(MPI_Comm_size(&ompi_mpi_comm_world, &size) == 0 && size == NODES);
  CHECK_EQUAL(MPI_Comm_free(&comm), 0);
  CHECK_EQUAL(zmoe_door_begin(1, PLAN, 0), ZMOE_OK);
  check_sum(ZMOE_F32, &ompi_mpi_float, &ompi_mpi_op_sum, 0, 96, 96, 0);
  check_sum(ZMOE_F32, &ompi_mpi_float, &ompi_mpi_op_sum, 1, 96, 96, 1);
  check_sum(ZMOE_F16, f16, sum_f16, 2, 7 * 33, 33, 0);
  check_sum(ZMOE_BF16, bf16, sum_bf16, 3, 7 * 33, 33, 1);
  check_sum((zmoe_dtype)ZMOE_I32, &ompi_mpi_int32_t, &ompi_mpi_op_sum, 4, 5, 5, 0);
  check_sum(ZMOE_F32, &ompi_mpi_float, &ompi_mpi_op_sum, 5, MOST / 96 * 96, 96, 0);
  check_sum(ZMOE_F32, &ompi_mpi_float, &ompi_mpi_op_sum, 6, MOST / 96 * 96, 96, 1);
  check_sum(ZMOE_BF16, bf16, sum_bf16, 7, MOST / 33 * 33, 33, 1);
  close_door();
}

static zmoe_door_config small_frames(zmoe_door_config config) {
  config.max_payload_bytes = 16;
  return config;
}

/* Of a puppet: 3 halves in a frame of a word and one of the rest. */
static void publish_words(uint32_t rank, uint32_t part, uint32_t word) {
  uint8_t frame[ZMOE_HEADER_BYTES + 4];
  zmoe_header header = rig_header(rank, 1, 0);
  header.dtype = ZMOE_I32, header.width = 1, header.payload_bytes = 4, header.digest = PLAN;
  header.micro_batch = (uint8_t)part;
  memcpy(frame + ZMOE_HEADER_BYTES, &word, 4);
  rig_send(nodes[rank].xpub, frame, rig_encode(&header, frame), 0);
}

/* Words travel as bits: a NaN keeps its payload; an odd half comes alone. */
static void test_gather(void) {
  open_door(6, small_frames);
  CHECK_EQUAL(zmoe_door_begin(1, PLAN, 0), ZMOE_OK);
  handle *comm = split(0, 0);
  const uint16_t mine[] = {0x7e01, 0xfe02, 3};
  uint16_t all[3 * NODES];
  for (uint32_t r = 1; r < NODES; r++) {
    publish_words(r, 0, 0x7c01fd55u + r);
    publish_words(r, 1, 10 + r);
  }
  CHECK_EQUAL(MPI_Allgather(mine, 3, f16, all, 3, f16, comm), 0);
  const uint16_t expected[] = {0x7e01, 0xfe02, 3, 0xfd56, 0x7c01, 11, 0xfd57, 0x7c01, 12};
  CHECK(memcmp(all, expected, sizeof all) == 0);
  CHECK_EQUAL(MPI_Comm_free(&comm), 0);
  close_door();
}

/* Steps follow one another in the order in which they began. */
static void test_steps(void) {
  open_door(6, NULL);
  float value[4] = {1, 2, 3, 4}, out[4];
  handle *comms[] = {split(0, 0), split(1, 0)};
  for (uint32_t step = 1; step <= ZMOE_DOOR_STEPS; step++)
    CHECK_EQUAL(zmoe_door_begin(step, 0, 0), ZMOE_OK);
  CHECK_EQUAL(zmoe_door_begin(9, 0, 0), ZMOE_EINVAL);
  for (uint32_t step = 1; step <= ZMOE_DOOR_STEPS; step++)
    for (uint32_t layer = 0; layer < 2; layer++) {
      for (uint32_t r = 1; r < NODES; r++)
        rig_publish(&nodes[r], step, layer, (float)(10 * step + r));
      MPI_Allreduce(value, out, 4, &ompi_mpi_float, &ompi_mpi_op_sum, comms[layer]);
      CHECK(out[3] == 4 + 20 * (float)step + 3);
    }
  MPI_Allreduce(value, out, 4, &ompi_mpi_float, &ompi_mpi_op_sum, comms[0]);
  expect_zeros(out, sizeof out);
  expect_refusal("a collective outside of a step");
  for (int layer = 0; layer < 2; layer++)
    CHECK_EQUAL(MPI_Comm_free(&comms[layer]), 0);
  close_door();
}

/* ---- what is not -------------------------------------------------------------------- */

static void test_refusals(void) {
  int64_t wide[2 * NODES];
  float narrow[33];
  uint16_t half[4];
  struct {
    const char *words;
    int which;
  } cases[] = {
      {"an all_sum of int64", 0},
      {"an all_max of float32", 1},
      {"an all_max or min of float16", 2},
      {"an all_sum of float32, over the whole world", 3},
      {"an all_gather of int64", 4},
      {"a send of float32", 5},
      {"a sum of rows of another width", 6},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    open_door(6, NULL);
    CHECK_EQUAL(zmoe_door_begin(1, PLAN, 0), ZMOE_OK);
    handle *comm = split(0, 32 | ZMOE_DOOR_WIDTH);
    memset(wide, 1, sizeof wide), memset(narrow, 1, sizeof narrow), memset(half, 1, sizeof half);
    handle *f32 = &ompi_mpi_float, *i64 = &ompi_mpi_int64_t, *sum = &ompi_mpi_op_sum;
    if (cases[i].which == 0)
      MPI_Allreduce(IN_PLACE, wide, 2 * NODES, i64, sum, comm), expect_zeros(wide, sizeof wide);
    if (cases[i].which == 1)
      MPI_Allreduce(narrow, narrow, 33, f32, &ompi_mpi_op_max, comm);
    if (cases[i].which == 2)
      MPI_Allreduce(half, half, 4, f16, max_f16, comm), expect_zeros(half, sizeof half);
    if (cases[i].which == 3)
      MPI_Allreduce(narrow, narrow, 32, f32, sum, &ompi_mpi_comm_world);
    if (cases[i].which == 4)
      MPI_Allgather(wide, 2, i64, wide, 2, i64, comm), expect_zeros(wide, sizeof wide);
    if (cases[i].which == 5)
      CHECK(MPI_Send(narrow, 33, f32, 1, 0, comm) != 0);
    if (cases[i].which == 6)
      MPI_Allreduce(narrow, narrow, 33, f32, sum, comm), expect_zeros(narrow, sizeof narrow);
    expect_refusal(cases[i].words);
    CHECK_EQUAL(MPI_Comm_free(&comm), 0);
    close_door();
  }
}

static void test_splits_that_are_none(void) {
  handle *comm = NULL, *further = NULL;
  CHECK(MPI_Comm_split(&ompi_mpi_comm_world, 0, 0, &comm) != 0); /* no door is open */
  open_door(6, NULL);
  CHECK(MPI_Comm_split(&ompi_mpi_comm_world, -1, 0, &comm) != 0);
  comm = split(0, 0);
  CHECK(MPI_Comm_split(comm, 0, 0, &further) != 0);
  zmoe_door_config config = config_of(PIPE_NONE, 0);
  CHECK_EQUAL(zmoe_door_open(&config), ZMOE_EINVAL); /* one at a time */
  close_door();
  float value[4] = {1, 2, 3, 4};
  zmoe_door_failure failure;
  MPI_Allreduce(IN_PLACE, value, 4, &ompi_mpi_float, &ompi_mpi_op_sum, comm);
  expect_zeros(value, sizeof value);
  open_door(6, NULL);
  CHECK_EQUAL(zmoe_door_begin(1, PLAN, 0), ZMOE_OK);
  value[0] = 1;
  MPI_Allreduce(value, value, 4, &ompi_mpi_float, &ompi_mpi_op_sum, comm);
  expect_zeros(value, sizeof value); /* it was split in a run that has ended */
  CHECK_EQUAL(zmoe_door_failed(&failure), ZMOE_OK);
  CHECK_EQUAL(MPI_Comm_free(&comm), 0);
  close_door();
}

/* ---- failures ------------------------------------------------------------------------ */

/* A collective that fails, and one after it, which returns zeros at once. */
static zmoe_door_failure fail_at_layer(uint32_t layer) {
  float value[4] = {1, 2, 3, 4};
  handle *comm = split((int)layer, 0), *next = split((int)layer + 1, 0);
  CHECK_EQUAL(zmoe_door_begin(5, 0, 0), ZMOE_OK);
  MPI_Allreduce(IN_PLACE, value, 4, &ompi_mpi_float, &ompi_mpi_op_sum, comm);
  expect_zeros(value, sizeof value);
  value[0] = 1;
  MPI_Allreduce(IN_PLACE, value, 4, &ompi_mpi_float, &ompi_mpi_op_sum, next);
  expect_zeros(value, sizeof value);
  CHECK_EQUAL(MPI_Comm_free(&comm), 0);
  CHECK_EQUAL(MPI_Comm_free(&next), 0);
  zmoe_door_failure failure;
  zmoe_door_failed(&failure);
  CHECK_EQUAL(failure.step, 5);
  CHECK_EQUAL(failure.layer, layer);
  return failure;
}

static void test_a_lost_peer(void) {
  open_door(6, NULL);
  CHECK_EQUAL(zmoe_door_links(), 6);
  rig_publish(&nodes[1], 5, 3, 1);
  rig_kill(&nodes[2]);
  zmoe_door_failure failure = fail_at_layer(3);
  CHECK_EQUAL(failure.status, ZMOE_EPEER);
  CHECK_EQUAL(failure.fault.lost, 4);
  zmoe_fault fault;
  CHECK_EQUAL(zmoe_door_service(&fault), ZMOE_EPEER);
  CHECK_EQUAL(zmoe_door_links(), 2);
  close_door();
  CHECK_EQUAL(zmoe_door_links(), 0);
}

static void *ask_for_links(void *stop) {
  while (!atomic_load((atomic_int *)stop))
    CHECK_EQUAL(zmoe_door_links(), 6);
  return NULL;
}

/* Whatever thread asks, and whether or not a collective is under way. */
static void test_links_beside_a_collective(void) {
  open_door(6, NULL);
  atomic_int stop = 0;
  pthread_t asking;
  handle *comm = split(3, 0);
  float value[4] = {1, 2, 3, 4};
  pthread_create(&asking, NULL, ask_for_links, &stop);
  for (uint32_t step = 1; step <= 50; step++) {
    CHECK_EQUAL(zmoe_door_begin(step, 0, 0), ZMOE_OK);
    for (uint32_t rank = 1; rank < NODES; rank++)
      rig_publish(&nodes[rank], step, 3, 1);
    MPI_Allreduce(IN_PLACE, value, 4, &ompi_mpi_float, &ompi_mpi_op_sum, comm);
  }
  atomic_store(&stop, 1);
  pthread_join(asking, NULL);
  zmoe_door_failure failure;
  CHECK_EQUAL(zmoe_door_failed(&failure), ZMOE_OK);
  CHECK_EQUAL(MPI_Comm_free(&comm), 0);
  close_door();
}

static void test_divergence(void) {
  open_door(6, NULL);
  uint8_t frame[ZMOE_HEADER_BYTES + 16];
  zmoe_header header = rig_header(2, 5, 3);
  header.digest = 1;
  rig_send(nodes[2].xpub, frame, rig_frame(&header, 1, frame), 0);
  zmoe_door_failure failure = fail_at_layer(3);
  CHECK_EQUAL(failure.status, ZMOE_EDIVERGED);
  CHECK_EQUAL(failure.fault.diverged, 4);
  close_door();
}

static zmoe_door_config impatient(zmoe_door_config config) {
  config.patience_us = 300 * 1000; /* what is there comes in that time, on a busy machine too */
  return config;
}

static float sum_of(handle *comm) {
  float value[4] = {1, 1, 1, 1};
  MPI_Allreduce(IN_PLACE, value, 4, &ompi_mpi_float, &ompi_mpi_op_sum, comm);
  CHECK(memcmp(&value[0], &value[3], sizeof *value) == 0);
  return value[0];
}

/* Two steps have begun, and a collective of the first one waits for rank 2 in vain: it is
 * repeated, from there on.  What it publishes anew would be out of order. */
static void test_a_slow_peer(void) {
  open_door(6, impatient);
  handle *comms[3] = {split(0, 0), split(1, 0), split(2, 0)};
  for (uint32_t step = 5; step < 7; step++)
    CHECK_EQUAL(zmoe_door_begin(step, 0, 0), ZMOE_OK);
  rig_publish(&nodes[1], 5, 0, 10), rig_publish(&nodes[2], 5, 0, 100);
  rig_publish(&nodes[1], 5, 1, 20);
  CHECK(sum_of(comms[0]) == 111);
  for (int i = 1; i < 4; i++) /* the second step begins */
    CHECK(sum_of(comms[i % 3]) == 0);
  zmoe_door_failure failure;
  CHECK_EQUAL(zmoe_door_failed(&failure), ZMOE_ETIMEOUT);
  CHECK(failure.is_repeatable && failure.step == 5 && failure.layer == 1);
  CHECK_EQUAL(zmoe_door_repeat(), ZMOE_OK);
  CHECK_EQUAL(zmoe_door_repeat(), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_door_failed(&failure), ZMOE_OK);
  rig_publish(&nodes[2], 5, 1, 200);
  CHECK(sum_of(comms[1]) == 221);
  rig_publish(&nodes[1], 5, 2, 30), rig_publish(&nodes[2], 5, 2, 300);
  CHECK(sum_of(comms[2]) == 331);
  rig_publish(&nodes[1], 6, 0, 40), rig_publish(&nodes[2], 6, 0, 400);
  CHECK(sum_of(comms[0]) == 441);
  for (int i = 0; i < 3; i++)
    CHECK_EQUAL(MPI_Comm_free(&comms[i]), 0);
  close_door();
}

static void test_the_deadline(void) {
  open_door(6, impatient);
  rig_publish(&nodes[1], 5, 3, 1);
  zmoe_door_failure failure = fail_at_layer(3);
  CHECK_EQUAL(failure.status, ZMOE_ETIMEOUT);
  CHECK(failure.fault.missing & 4);
  close_door();
}

static int ends[2];

static zmoe_door_config with_pipe(zmoe_door_config config) {
  config.wakeup_fd = ends[0];
  return config;
}

static void *send_signals(void *nothing) {
  const uint8_t others = SIGCHLD, ours = SIGINT;
  usleep(150000);
  CHECK_EQUAL(write(ends[1], &others, 1), 1);
  usleep(150000);
  CHECK_EQUAL(write(ends[1], &ours, 1), 1);
  return nothing;
}

static void *cancel(void *nothing) {
  usleep(150000);
  zmoe_door_cancel();
  return nothing;
}

static void test_giving_up(void) {
  CHECK_EQUAL(pipe(ends), 0);
  CHECK_EQUAL(fcntl(ends[0], F_SETFL, O_NONBLOCK), 0);
  void *(*ways[])(void *) = {send_signals, cancel};
  for (int i = 0; i < 2; i++) {
    open_door(6, with_pipe);
    const uint8_t old = SIGINT; /* of before the step: its handler has run */
    CHECK_EQUAL(write(ends[1], &old, 1), 1);
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, ways[i], NULL), 0);
    uint64_t begun_us = rig_now_us();
    CHECK_EQUAL(fail_at_layer(3).status, ZMOE_EINTR);
    CHECK(rig_now_us() - begun_us >= (i == 0 ? 300000u : 150000u));
    CHECK_EQUAL(pthread_join(thread, NULL), 0);
    close_door();
  }
  close(ends[0]), close(ends[1]);
}

static const test_case tests[] = {
    {"sums", test_sums},
    {"gather", test_gather},
    {"steps", test_steps},
    {"refusals", test_refusals},
    {"splits that are none", test_splits_that_are_none},
    {"a lost peer", test_a_lost_peer},
    {"links beside a collective", test_links_beside_a_collective},
    {"divergence", test_divergence},
    {"the deadline", test_the_deadline},
    {"a slow peer", test_a_slow_peer},
    {"giving up", test_giving_up},
};

int main(int argc, char **argv) {
  rig_start(argc, argv);
  init();
  RUN(tests);
  rig_stop();
  return 0;
}
