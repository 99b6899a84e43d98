/* Fuzz target of the exchange behind its sockets: whatever frames come, by whatever way,
 * with right checksums, and whatever its caller does meanwhile, it writes nowhere but
 * where it may, and never hangs.
 *
 * libzmq and the clock are played by this file, so that a run depends on its input alone
 * and takes microseconds.  The input is a script: a role, then frames and calls.  A
 * frame's fields are those that are due next, some of them changed.  Memory given to the
 * exchange has the exact size that its caller would make, for AddressSanitizer to guard.
 *
 * With libFuzzer: clang -fsanitize=fuzzer -DLIBFUZZER.  Without, main() below makes the
 * inputs by chance: fuzz_exchange SECONDS [SEED] */
#include "common/platform.h"

#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "exchange/exchange.h"
#include "exchange/zmq_api.h"

enum {
  SESSION = 0x5eed,
  MAX_NODES = 4,
  MAX_ROWS = 6,
  WIDTH = 40, /* a whole block of q8, and a part of one */
  TOP_K = 2,
  PAIRS = MAX_ROWS * TOP_K,
  EXPERTS = 4,
  MAX_PAYLOAD = MAX_ROWS * WIDTH * 4 + PAIRS * ZMOE_PAIR_BYTES,
  QUEUE = 24, /* messages of a socket */
  PART_BYTES = ZMOE_HEADER_BYTES + MAX_PAYLOAD + 256,
};

/* ---- the input ---------------------------------------------------------------- */

typedef struct script {
  const uint8_t *at, *end;
} script;

static script input;

static uint32_t draw(uint32_t below) {
  uint32_t value = input.at < input.end ? *input.at++ : 0;
  if (below > 256)
    value = value << 8 | (input.at < input.end ? *input.at++ : 0);
  return below > 0 ? value % below : 0;
}

static int chance(uint32_t in) {
  return draw(in) == in - 1; /* never, once the input is used up */
}

/* ---- libzmq, as far as an exchange sees it ------------------------------------------ */

typedef struct part {
  uint8_t *data;
  size_t bytes;
  int more;
} part;

typedef struct fake_socket {
  part queue[QUEUE];
  uint32_t first, count;
} fake_socket;

/* What a zmq_msg_t holds here. */
typedef struct message {
  uint8_t *data;
  size_t bytes;
  int more;
  zmq_free_fn *free;
  void *hint;
} message;

_Static_assert(sizeof(message) <= sizeof(zmq_msg_t), "a message fits");

static struct {
  fake_socket xpub, sub, router, dealers[MAX_NODES], monitors[MAX_NODES];
} sockets;
static int readable; /* a descriptor that always is */
static int out_of_memory;
static uint64_t fake_us;

static message *of(const zmq_msg_t *msg) {
  return (message *)(uintptr_t)msg;
}

static int msg_init(zmq_msg_t *msg) {
  *of(msg) = (message){.data = NULL};
  return 0;
}

static void release(void *data, void *hint) {
  (void)hint;
  free(data);
}

static int msg_init_size(zmq_msg_t *msg, size_t size) {
  if (out_of_memory) {
    errno = ENOMEM;
    return -1;
  }
  *of(msg) = (message){.data = malloc(size ? size : 1), .bytes = size, .free = release};
  return 0;
}

static int msg_init_data(zmq_msg_t *msg, void *data, size_t size, zmq_free_fn *ffn, void *hint) {
  if (out_of_memory) {
    errno = ENOMEM;
    return -1;
  }
  *of(msg) = (message){.data = data, .bytes = size, .free = ffn, .hint = hint};
  return 0;
}

static int msg_close(zmq_msg_t *msg) {
  if (of(msg)->free != NULL)
    of(msg)->free(of(msg)->data, of(msg)->hint);
  return msg_init(msg);
}

static int msg_move(zmq_msg_t *dest, zmq_msg_t *src) {
  msg_close(dest);
  *of(dest) = *of(src);
  return msg_init(src);
}

static void *msg_data(zmq_msg_t *msg) {
  return of(msg)->data;
}

static size_t msg_size(const zmq_msg_t *msg) {
  return of(msg)->bytes;
}

static int msg_more(const zmq_msg_t *msg) {
  return of(msg)->more;
}

static int msg_recv(zmq_msg_t *msg, void *socket, int flags) {
  fake_socket *from = socket;
  (void)flags;
  if (from->count == 0) {
    errno = EAGAIN;
    return -1;
  }
  part *next = &from->queue[from->first++ % QUEUE];
  from->count--;
  msg_close(msg);
  *of(msg) = (message){next->data, next->bytes, next->more, release, NULL};
  return (int)next->bytes;
}

/* What is sent must be readable to its end. */
static int read_through(const uint8_t *data, size_t bytes) {
  static volatile uint8_t seen;
  for (size_t i = 0; i < bytes; i++)
    seen ^= data[i];
  return (int)bytes;
}

static int msg_send(zmq_msg_t *msg, void *socket, int flags) {
  (void)socket, (void)flags;
  read_through(of(msg)->data, of(msg)->bytes);
  return msg_close(msg);
}

static int send_bytes(void *socket, const void *data, size_t size, int flags) {
  (void)socket, (void)flags;
  return read_through(data, size);
}

static int setsockopt_(void *socket, int option, const void *value, size_t size) {
  (void)socket, (void)option;
  return read_through(value, size) < 0;
}

static int getsockopt_(void *socket, int option, void *value, size_t *size) {
  (void)socket;
  int events = 0, *answer = option == ZMQ_FD ? &readable : &events;
  CHECK((option == ZMQ_FD || option == ZMQ_EVENTS) && *size == sizeof *answer);
  memcpy(value, answer, sizeof *answer);
  return 0;
}

static int get_errno(void) {
  return errno;
}

zmoe_zmq_api zmoe_zmq = {
    .msg_init = msg_init,
    .msg_init_size = msg_init_size,
    .msg_init_data = msg_init_data,
    .msg_close = msg_close,
    .msg_move = msg_move,
    .msg_data = msg_data,
    .msg_size = msg_size,
    .msg_more = msg_more,
    .msg_send = msg_send,
    .msg_recv = msg_recv,
    .send = send_bytes,
    .setsockopt = setsockopt_,
    .getsockopt = getsockopt_,
    .get_errno = get_errno,
};

int zmoe_zmq_is_loaded(void) {
  return 1;
}

/* A clock that each look at it moves on by a microsecond. */
int clock_gettime(clockid_t clock, struct timespec *now) {
  (void)clock;
  fake_us++;
  *now = (struct timespec){(time_t)(fake_us / 1000000), (long)(fake_us % 1000000) * 1000};
  return 0;
}

static void put(fake_socket *socket, const void *data, size_t bytes, int more) {
  if (socket->count == QUEUE)
    return;
  uint8_t *copy = malloc(bytes ? bytes : 1); /* of the exact size */
  memcpy(copy, data, bytes);
  socket->queue[(socket->first + socket->count++) % QUEUE] = (part){copy, bytes, more};
}

static void drop_all(fake_socket *socket) {
  for (; socket->count > 0; socket->count--)
    free(socket->queue[socket->first++ % QUEUE].data);
}

/* ---- the exchange, and where it should be ---------------------------------------------- */

static zmoe_exchange *ex;
static uint32_t rank, nodes, step, layer, micro_batch;
static int central, in_chunks, dispatched;
static zmoe_dispatch_batch got;
static uint64_t ranks[PAIRS];
static long long taken[2]; /* sums, and rows of a worker */

enum role { DIRECT, SCATTER, LEADER, WORKER, ROLES };
static const char *const ROLE_NAMES[ROLES] = {"direct", "scatter", "leader", "worker"};
static long long frames[ROLES]; /* given to each role, behind right checksums */

static enum role role(void) {
  return central ? (rank > 0 ? WORKER : LEADER) : in_chunks ? SCATTER : DIRECT;
}

static zmoe_call due(void) {
  return (zmoe_call){
      .step = step,
      .layer = layer,
      .micro_batch = micro_batch,
      .rows = central && rank > 0 ? got.rows : 3,
      .width = WIDTH,
      .wire_dtype = (zmoe_dtype)(step % 4),
      .algorithm = in_chunks ? ZMOE_SCATTER : ZMOE_DIRECT,
      .digest = central && rank > 0 ? got.digest : 7,
  };
}

static const uint32_t ODD[] = {0, 1, 2, 3, 7, 8, 36, 48, 64, 1u << 16, UINT32_MAX};

static uint32_t odd(void) {
  return ODD[draw(sizeof ODD / sizeof *ODD)];
}

static uint32_t payload_of(const zmoe_header *header) {
  uint64_t bytes = zmoe_payload_bytes((zmoe_dtype)header->dtype, header->rows, header->width);
  if (bytes > MAX_PAYLOAD || chance(8))
    return odd() % (MAX_PAYLOAD + 1);
  if (header->kind == ZMOE_KIND_ROWS)
    return header->rows > 0 || chance(2) ? (uint32_t)bytes + draw(PAIRS + 2) * ZMOE_PAIR_BYTES : 0;
  if (header->kind == ZMOE_KIND_RESEND || header->kind == ZMOE_KIND_ELSEWHERE || chance(4))
    return 0;
  if (header->chunks == 0)
    return (uint32_t)bytes;
  /* A chunk is of whole blocks: find how many bytes the decoder wants. */
  zmoe_header probe = *header;
  static uint8_t frame[ZMOE_HEADER_BYTES + MAX_PAYLOAD];
  for (uint32_t blocks = 0; blocks <= 2 * header->rows; blocks++)
    for (uint32_t tail = 0; tail <= 2 * header->rows; tail++) {
      uint32_t each = header->dtype == ZMOE_Q8 ? ZMOE_Q8_BLOCK_BYTES
                                               : 32 * (uint32_t)zmoe_dtype_bytes(header->dtype);
      uint32_t rest = header->dtype == ZMOE_Q8 ? each : each / 4;
      probe.payload_bytes = blocks * each + tail * rest;
      probe.payload_checksum = probe.payload_bytes > 0;
      if (probe.payload_bytes > MAX_PAYLOAD)
        continue;
      zmoe_wire_encode(&probe, frame);
      zmoe_header out;
      if (zmoe_wire_decode(frame, ZMOE_HEADER_BYTES + probe.payload_bytes, MAX_PAYLOAD, &out) ==
          ZMOE_WIRE_OK)
        return probe.payload_bytes;
    }
  return 0;
}

static void change(zmoe_header *header) {
  switch (draw(13)) {
  case 0:
    header->kind = (uint8_t)draw(7);
    break;
  case 1:
    header->dtype = (uint8_t)draw(5);
    break;
  case 2:
    header->source = (uint16_t)odd();
    break;
  case 3:
    header->session += draw(2);
    break;
  case 4:
    header->step += draw(5) - 2;
    break;
  case 5:
    header->layer += draw(5) - 2;
    break;
  case 6:
    header->rows = odd();
    break;
  case 7:
    header->width = odd();
    break;
  case 8:
    header->rows = 1 + draw(2 * MAX_ROWS), header->width = 1 + draw(2 * WIDTH);
    break;
  case 9:
    header->micro_batch = (uint8_t)draw(4);
    break;
  case 10:
    header->chunks = (uint8_t)draw(MAX_NODES + 2), header->chunk = (uint8_t)draw(MAX_NODES + 1);
    break;
  case 11:
    header->busiest = (uint8_t)odd();
    break;
  default:
    header->digest = draw(2) ? (uint64_t)step << 32 | layer : odd();
  }
}

/* A frame of the session in the place of `out`; returns its length. */
static size_t make_frame(uint32_t from, uint8_t *out) {
  static const uint8_t kinds[] = {ZMOE_KIND_PARTIAL, ZMOE_KIND_PARTIAL, ZMOE_KIND_SUM,
                                  ZMOE_KIND_RESEND, ZMOE_KIND_ELSEWHERE};
  zmoe_call call = due();
  zmoe_header header = {
      .kind = central && rank > 0 && !chance(4) ? ZMOE_KIND_ROWS : kinds[draw(sizeof kinds)],
      .dtype = (uint8_t)call.wire_dtype,
      .source = (uint16_t)from,
      .session = SESSION,
      .step = step,
      .layer = layer,
      .micro_batch = (uint8_t)micro_batch,
      .rows = central && rank > 0 ? 1 + draw(MAX_ROWS) : call.rows,
      .width = WIDTH,
      .digest = 7,
  };
  if (header.kind == ZMOE_KIND_ROWS)
    header.dtype = (uint8_t)draw(3);
  if (central && rank == 0) {
    header.rows = 0; /* those that were dispatched to the worker */
    for (uint32_t i = 0; i < call.rows; i++)
      header.rows += ((ranks[i * TOP_K] | ranks[i * TOP_K + 1]) >> from) & 1;
  }
  if (header.kind == ZMOE_KIND_SUM || in_chunks) {
    header.chunks = (uint8_t)nodes;
    header.chunk = (uint8_t)(header.kind == ZMOE_KIND_SUM ? from : draw(2) ? rank : from);
  }
  for (uint32_t changes = draw(8); changes > 5; changes--)
    change(&header);
  header.payload_bytes = payload_of(&header);
  uint8_t *payload = out + ZMOE_HEADER_BYTES;
  for (uint32_t i = 0; i < header.payload_bytes; i++)
    payload[i] = (uint8_t)(i % 2 ? 0x3c : i);
  if (header.kind == ZMOE_KIND_ROWS) {
    uint64_t x = zmoe_payload_bytes((zmoe_dtype)header.dtype, header.rows, header.width);
    uint32_t pairs =
        x <= header.payload_bytes ? (header.payload_bytes - (uint32_t)x) / ZMOE_PAIR_BYTES : 0;
    int32_t numbers[2 * (PAIRS + 2)];
    for (uint32_t p = 0; pairs <= PAIRS + 2 && p < pairs; p++) {
      numbers[p] = (int32_t)(p * header.rows / pairs);
      numbers[pairs + p] = (int32_t)(p % EXPERTS);
      if (chance(16))
        numbers[p] = (int32_t)odd();
      if (chance(16))
        numbers[pairs + p] = (int32_t)odd();
    }
    if (pairs <= PAIRS + 2)
      memcpy(payload, numbers, 8 * (size_t)pairs);
  }
  header.payload_checksum = zmoe_crc32c(payload, header.payload_bytes, ZMOE_ISA_GENERIC);
  zmoe_wire_encode(&header, out);
  size_t bytes = ZMOE_HEADER_BYTES + header.payload_bytes;
  if (chance(16)) /* damage that a checksum finds */
    out[draw((uint32_t)bytes)] ^= (uint8_t)(1 + draw(255));
  else
    frames[role()]++;
  return chance(32) ? draw((uint32_t)bytes) : bytes + chance(32);
}

static void deliver(void) {
  static uint8_t frame[PART_BYTES];
  uint32_t from = central && rank > 0 && !chance(8) ? 0 : draw(nodes);
  size_t bytes = make_frame(from, frame);
  uint32_t way = draw(4);
  if (!chance(4)) /* that by which such a frame comes */
    way = central ? (rank > 0 ? 1 : 2) : in_chunks && draw(2) ? 2 : 0;
  if (way == 0) {
    put(&sockets.sub, frame, bytes, chance(32));
  } else if (way == 1) {
    put(&sockets.dealers[from], frame, bytes, chance(32));
  } else if (way == 2) {
    uint8_t presence[ZMOE_PRESENCE_BYTES];
    zmoe_wire_presence(SESSION, from, presence);
    put(&sockets.router, presence, sizeof presence - chance(32), !chance(32));
    put(&sockets.router, frame, bytes, chance(32));
  } else {
    uint8_t subscription[1 + ZMOE_PRESENCE_BYTES] = {(uint8_t)draw(3)};
    zmoe_wire_presence(SESSION, from, subscription + 1);
    put(&sockets.xpub, chance(4) ? frame : subscription, sizeof subscription - chance(8), 0);
  }
}

static void event(void) {
  uint16_t events[] = {ZMQ_EVENT_HANDSHAKE_SUCCEEDED, ZMQ_EVENT_DISCONNECTED, (uint16_t)draw(256)};
  uint8_t frame[6] = {0};
  memcpy(frame, &events[draw(3)], 2);
  fake_socket *monitor = &sockets.monitors[draw(nodes)];
  put(monitor, frame, draw(4) ? sizeof frame : draw(4), 1);
  put(monitor, "tcp", 3, 0);
}

static void next_exchange(void) {
  micro_batch = 0;
  dispatched = 0;
  if (draw(2))
    layer++;
  else
    step++, layer = 0;
}

static int dispatch(zmoe_fault *fault) {
  static const float x[MAX_ROWS * WIDTH], weights[PAIRS];
  int32_t ids[PAIRS];
  zmoe_call call = due();
  for (uint32_t p = 0; p < call.rows * TOP_K; p++) {
    ids[p] = (int32_t)draw(EXPERTS);
    ranks[p] = draw(1u << nodes);
  }
  zmoe_routed routed = {x, ids, weights, ranks, TOP_K, (zmoe_dtype)draw(3), 1};
  int rc = zmoe_exchange_dispatch(ex, &call, &routed, 0, fault);
  dispatched |= rc == ZMOE_OK;
  return rc;
}

/* What a worker's experts do: they know the width of their model, not that of a frame. */
static void compute(void) {
  CHECK(got.rows <= MAX_ROWS && got.pairs <= PAIRS && zmoe_dtype_bytes(got.dtype) > 0);
  size_t row_bytes = WIDTH * zmoe_dtype_bytes(got.dtype);
  float *sums = malloc((size_t)got.rows * got.width * sizeof *sums + 1);
  read_through(got.x, got.rows * row_bytes);
  for (uint32_t i = 0; i < got.rows * WIDTH; i++)
    sums[i] = 0;
  for (uint32_t p = 0; p < got.pairs; p++) {
    CHECK(got.pair_experts[p] >= 0 && got.pair_experts[p] < EXPERTS);
    sums[(uint32_t)got.pair_rows[p] * WIDTH + WIDTH - 1] += got.pair_weights[p];
  }
  free(sums);
}

static int publish(zmoe_fault *fault) {
  zmoe_call call = due();
  float *src = malloc((size_t)call.rows * WIDTH * sizeof *src + 1);
  for (uint32_t i = 0; i < call.rows * WIDTH; i++)
    src[i] = (float)i;
  int rc = zmoe_exchange_publish(ex, &call, draw(4) ? src : NULL, ZMOE_F32, 0, fault);
  free(src);
  if (rc == ZMOE_OK && central && rank > 0)
    next_exchange();
  else if (rc == ZMOE_OK && !central)
    micro_batch++;
  return rc;
}

static int collect(zmoe_fault *fault) {
  static const zmoe_dtype dtypes[] = {ZMOE_F32, ZMOE_F16, ZMOE_BF16};
  zmoe_dtype dtype = dtypes[draw(3)];
  uint8_t *out = malloc(3 * WIDTH * zmoe_dtype_bytes(dtype));
  int rc = zmoe_exchange_collect(ex, out, dtype, draw(2) * 200, fault);
  if (rc == ZMOE_OK) {
    read_through(out, 3 * WIDTH * zmoe_dtype_bytes(dtype));
    taken[0]++;
    if (micro_batch <= 1 || chance(2))
      next_exchange();
  }
  free(out);
  return rc;
}

static int receive(zmoe_fault *fault) {
  int rc = zmoe_exchange_receive(ex, &got, step, layer, draw(2) * 200, fault);
  if (rc == ZMOE_OK) {
    taken[1]++;
    compute();
  }
  return rc;
}

static int act(zmoe_fault *fault) {
  out_of_memory = chance(16);
  switch (draw(15)) {
  case 0:
    return zmoe_exchange_service(ex, fault);
  case 1:
    fake_us += chance(8) ? 2000000 : 1000 * draw(64); /* a lost link's grace, or a resend's */
    return ZMOE_OK;
  case 2:
    event();
    return ZMOE_OK;
  case 3:
    zmoe_exchange_links(ex);
    zmoe_exchange_subscribers(ex);
    return ZMOE_OK;
  case 4:
  case 5:
    return central && rank == 0 && !dispatched ? dispatch(fault) : publish(fault);
  case 6:
  case 7:
    return central && rank > 0 ? receive(fault) : collect(fault);
  default:
    deliver();
    return ZMOE_OK;
  }
}

static void open_exchange(void) {
  nodes = 2 + draw(MAX_NODES - 1);
  central = draw(2) == 0;
  rank = draw(nodes);
  in_chunks = !central && draw(2);
  step = layer = micro_batch = 0;
  dispatched = out_of_memory = 0;
  memset(ranks, 0, sizeof ranks);
  fake_us = 1000;
  void *dealers[MAX_NODES], *monitors[MAX_NODES];
  for (uint32_t r = 0; r < nodes; r++) {
    dealers[r] = r == rank ? NULL : &sockets.dealers[r];
    monitors[r] = r == rank ? NULL : &sockets.monitors[r];
  }
  const zmoe_exchange_config config = {
      .rank = rank,
      .nodes = nodes,
      .session = SESSION,
      .max_payload_bytes = MAX_PAYLOAD,
      .small_payload_bytes = 64,
      .scatter = !central,
      .xpub = &sockets.xpub,
      .sub = &sockets.sub,
      .router = &sockets.router,
      .dealers = dealers,
      .monitors = monitors,
      .dispatch_rows = central ? MAX_ROWS : 0,
      .resend_ms = 1,
      .grace_ms = 1000,
  };
  CHECK_EQUAL(zmoe_exchange_create(&config, &ex), ZMOE_OK);
  static const int32_t local[EXPERTS] = {0, 1, 2, -1};
  got = (zmoe_dispatch_batch){
      .x = malloc(MAX_ROWS * WIDTH * 4),
      .pair_rows = malloc(PAIRS * 4),
      .pair_experts = malloc(PAIRS * 4),
      .pair_weights = malloc(PAIRS * 4),
      .x_bytes = MAX_ROWS * WIDTH * 4,
      .max_pairs = PAIRS,
      .experts = EXPERTS,
      .local = local,
      .width = WIDTH,
  };
}

static void close_exchange(void) {
  zmoe_exchange_destroy(ex);
  free(got.x);
  free(got.pair_rows);
  free(got.pair_experts);
  free(got.pair_weights);
  drop_all(&sockets.xpub);
  drop_all(&sockets.sub);
  drop_all(&sockets.router);
  for (uint32_t r = 0; r < MAX_NODES; r++) {
    drop_all(&sockets.dealers[r]);
    drop_all(&sockets.monitors[r]);
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  if (readable == 0) {
    readable = open("/dev/null", O_RDONLY);
    CHECK(readable > 0);
  }
  input = (script){data, data + bytes};
  open_exchange();
  while (input.at < input.end) {
    zmoe_fault fault;
    int rc = act(&fault);
    if (rc == ZMOE_EDIVERGED || rc == ZMOE_EZMQ || rc == ZMOE_EPEER)
      break; /* a caller gives up then */
  }
  close_exchange();
  return 0;
}

#ifndef LIBFUZZER
static uint64_t state = 88172645463325252u;

int main(int argc, char **argv) {
  enum { INPUT_BYTES = 1024 };
  static uint8_t data[INPUT_BYTES];
  CHECK(argc >= 2);
  if (argc > 2)
    state += strtoull(argv[2], NULL, 10);
  long long runs = 0;
  for (time_t end = time(NULL) + atoi(argv[1]); time(NULL) < end;)
    for (int i = 0; i < 100; i++, runs++) {
      for (size_t b = 0; b < sizeof data; b++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        data[b] = (uint8_t)(state >> 32);
      }
      LLVMFuzzerTestOneInput(data, sizeof data);
    }
  printf("fuzz_exchange: %lld runs, %lld sums, %lld times rows; frames:", runs, taken[0], taken[1]);
  for (int r = 0; r < ROLES; r++) {
    printf(" %s %lld", ROLE_NAMES[r], frames[r]);
    CHECK(frames[r] > 0);
  }
  printf("\n");
  CHECK(taken[0] > 0 && taken[1] > 0);
  return 0;
}
#endif
