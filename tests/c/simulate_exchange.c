/* Runs of an exchange in a simulated network: ranks are coroutines, and libzmq, the clock,
 * poll() and the waits for a slot are played by this file, so that a run depends on its seed
 * alone.  Messages are delayed, lost and damaged, links are cut and come back, ranks are cut
 * off for good at any call of libzmq.
 *
 * What must hold: all ranks get the same bits, and the right ones, or an error that names a
 * rank that is gone; without a lasting loss there is no error; no call ends long after its
 * deadline; every slot is released.
 *
 * usage: simulate_exchange RUNS FIRST_SEED */
#include "common/platform.h"

#include "check.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <ucontext.h>

#include "exchange/exchange_internal.h"

enum {
  SESSION = 0x5eed,
  MAX_NODES = 4,
  LAYERS = 12,
  MAX_ROWS = 3,
  WIDTH = 80, /* whole blocks of q8, and a part of one */
  EXPERTS = 4,
  MAX_BYTES = MAX_ROWS * (WIDTH * 4 + ZMOE_PAIR_BYTES),
  QUEUE = 64,
  FLIGHTS = 1024,
  EVENTS = 64,
  STACK_BYTES = 256 << 10,
  RESEND_MS = 20,
  GRACE_MS = 300,
  DEADLINE_US = 3000000,
  FIRST_FD = 1000,
  SOCKETS = 3 + 2 * MAX_NODES,
};

/* ---- chance ------------------------------------------------------------------------- */

static uint64_t state;

static uint32_t draw(uint32_t below) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t mixed = (state ^ state >> 30) * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
  return (uint32_t)((mixed >> 32) % below);
}

static int chance(uint32_t in) {
  return in > 0 && draw(in) == 0;
}

/* ---- the world ------------------------------------------------------------------------ */

enum { SUB, XPUB, ROUTER, DEALER, MONITOR };

typedef struct part {
  uint8_t *data;
  size_t bytes;
  int more, from;
} part;

typedef struct sim_socket {
  int kind, owner, peer;
  int sign; /* its descriptor is readable */
  int wait_us;
  uint32_t first, count;
  part queue[QUEUE];
} sim_socket;

typedef struct sim_rank {
  sim_socket sockets[SOCKETS];
  zmoe_exchange *ex;
  ucontext_t context;
  char *stack;
  uint64_t wake_us;
  uint64_t waits; /* bit s: for socket s */
  long calls, dies_at;
  int is_gone, is_done, rc;
  zmoe_fault fault;
  int addressed, subscriber; /* the ROUTER is within a message to; whose subscription came last */
} sim_rank;

/* What libzmq has taken over, until all have got it. */
typedef struct body {
  uint8_t *data;
  size_t bytes;
  zmq_free_fn *free;
  void *hint;
  int references;
} body;

/* The ways from rank to rank: by two connections, made by `from` or by `to`. */
enum way { PUBLISHED, UP, DOWN, SUBSCRIPTION, WAYS };

typedef struct flight {
  uint64_t at_us, number;
  enum way way;
  int from, to;
  body *body;
} flight;

enum what { CUT_CONTROL, CUT_DATA, MEND_CONTROL, MEND_DATA, TELL_CUT };

typedef struct event {
  uint64_t at_us;
  enum what what;
  int rank, peer; /* the connection that `rank` makes to `peer` */
} event;

static struct {
  uint64_t seed, now_us, number;
  uint32_t nodes;
  int central; /* the schedule */
  zmoe_algorithm algorithm[LAYERS];
  uint32_t rows[LAYERS], batches[LAYERS], dtype[LAYERS];
  uint32_t lossy, damaging, slow, interrupts; /* one in so many; 0: never */
  uint64_t ready, lasting, failed;            /* bit r: has all links; may be lost; has given up */
  int control[MAX_NODES][MAX_NODES], data[MAX_NODES][MAX_NODES];
  int accepted[MAX_NODES][MAX_NODES], known[MAX_NODES][MAX_NODES];
  uint64_t last_us[WAYS][MAX_NODES][MAX_NODES];
  flight flights[FLIGHTS];
  uint32_t n_flights, n_events;
  event events[EVENTS];
  sim_rank ranks[MAX_NODES];
  uint8_t sums[LAYERS][2][MAX_BYTES];
  int summed[LAYERS][2];
} world;

static ucontext_t scheduler;
static sim_rank *current;
static long long exchanged, losses, repeated;

static int number_of(const sim_rank *rank) {
  return (int)(rank - world.ranks);
}

static sim_socket *dealer_of(int rank, int peer) {
  return &world.ranks[rank].sockets[3 + 2 * peer];
}

static void later(uint64_t span_us, enum what what, int rank, int peer) {
  CHECK(world.n_events < EVENTS);
  world.events[world.n_events++] = (event){world.now_us + span_us, what, rank, peer};
}

static void put(sim_socket *socket, const void *data, size_t bytes, int more, int from) {
  CHECK(socket->count < QUEUE);
  uint8_t *copy = malloc(bytes ? bytes : 1);
  memcpy(copy, data, bytes);
  socket->queue[(socket->first + socket->count++) % QUEUE] = (part){copy, bytes, more, from};
  socket->sign = 1;
}

/* ---- coroutines ------------------------------------------------------------------------ */

static void yield(uint64_t until_us, uint64_t sockets) {
  sim_rank *me = current;
  me->wake_us = until_us;
  me->waits = sockets;
  CHECK_EQUAL(swapcontext(&me->context, &scheduler), 0);
}

static void leave(sim_rank *rank);

/* Each call of libzmq is a moment at which a rank may vanish: it goes on in a void. */
static void step_on(void) {
  if (current != NULL && ++current->calls == current->dies_at)
    leave(current);
}

/* ---- the network ------------------------------------------------------------------------- */

static void let_go(body *body) {
  if (--body->references > 0)
    return;
  body->free(body->data, body->hint);
  free(body);
}

static void send_by(enum way way, int from, int to, body *body) {
  uint64_t span_us = 20 + draw(200), *last_us = &world.last_us[way][from][to];
  if (chance(world.slow))
    span_us += draw(200000);
  uint64_t at_us = world.now_us + span_us;
  *last_us = at_us > *last_us ? at_us : *last_us; /* nothing overtakes */
  CHECK(world.n_flights < FLIGHTS);
  body->references++;
  world.flights[world.n_flights++] = (flight){*last_us, world.number++, way, from, to, body};
}

static void free_bytes(void *data, void *hint) {
  (void)hint;
  free(data);
}

static body *body_of(const void *data, size_t bytes) {
  body *made = malloc(sizeof *made);
  *made = (body){malloc(bytes ? bytes : 1), bytes, free_bytes, NULL, 1};
  memcpy(made->data, data, bytes);
  return made;
}

static void send_bytes_by(enum way way, int from, int to, const void *data, size_t bytes) {
  body *made = body_of(data, bytes);
  send_by(way, from, to, made);
  let_go(made);
}

static void drop_flights(enum way way, int from, int to) {
  uint32_t kept = 0;
  for (uint32_t i = 0; i < world.n_flights; i++) {
    flight *each = &world.flights[i];
    if (each->way == way && each->from == from && each->to == to)
      let_go(each->body);
    else
      world.flights[kept++] = *each;
  }
  world.n_flights = kept;
}

static void tell_monitor(int rank, int peer, uint16_t event) {
  uint8_t frame[6] = {0};
  memcpy(frame, &event, sizeof event);
  sim_socket *monitor = dealer_of(rank, peer) + 1;
  put(monitor, frame, sizeof frame, 1, peer);
  put(monitor, "tcp", 3, 0, peer);
}

static void subscription(int rank, int is_on, uint8_t out[1 + ZMOE_PRESENCE_BYTES]) {
  out[0] = (uint8_t)is_on;
  zmoe_wire_presence(SESSION, (uint32_t)rank, out + 1);
}

static void happen(const event *event) {
  int a = event->rank, b = event->peer;
  uint8_t bytes[1 + ZMOE_PRESENCE_BYTES], topic[1 + ZMOE_HEADER_BYTES] = {1};
  int is_gone = world.ranks[a].is_gone || world.ranks[b].is_gone;
  switch (event->what) {
  case CUT_CONTROL:
    if (world.control[a][b])
      later(draw(2000), TELL_CUT, a, b);
    world.control[a][b] = world.known[b][a] = 0;
    drop_flights(UP, a, b);
    drop_flights(DOWN, b, a);
    break;
  case TELL_CUT:
    tell_monitor(a, b, ZMQ_EVENT_DISCONNECTED);
    break;
  case CUT_DATA:
    if (world.data[a][b] && world.accepted[b][a]) {
      subscription(a, 0, bytes);
      put(&world.ranks[b].sockets[XPUB], bytes, sizeof bytes, 0, a);
    }
    world.data[a][b] = world.accepted[b][a] = 0;
    drop_flights(PUBLISHED, b, a);
    drop_flights(SUBSCRIPTION, a, b);
    break;
  case MEND_CONTROL:
    if (is_gone || world.control[a][b])
      break;
    world.control[a][b] = 1;
    tell_monitor(a, b, ZMQ_EVENT_HANDSHAKE_SUCCEEDED);
    send_bytes_by(UP, a, b, "", 0); /* the probe */
    break;
  case MEND_DATA:
    if (is_gone || world.data[a][b])
      break;
    world.data[a][b] = 1;
    zmoe_header header = {.kind = ZMOE_KIND_PARTIAL, .session = SESSION};
    zmoe_wire_encode(&header, topic + 1);
    send_bytes_by(SUBSCRIPTION, a, b, topic, 1 + ZMOE_TOPIC_BYTES);
    subscription(a, 1, bytes);
    send_bytes_by(SUBSCRIPTION, a, b, bytes, sizeof bytes);
  }
}

static void deliver(const flight *each) {
  sim_rank *to = &world.ranks[each->to];
  uint8_t presence[ZMOE_PRESENCE_BYTES];
  if (to->is_gone || (each->way == PUBLISHED && chance(world.lossy)))
    return;
  sim_socket *socket = &to->sockets[each->way == PUBLISHED ? SUB : each->way == UP ? ROUTER : XPUB];
  if (each->way == DOWN)
    socket = dealer_of(each->to, each->from);
  if (each->way == UP) {
    zmoe_wire_presence(SESSION, (uint32_t)each->from, presence);
    put(socket, presence, sizeof presence, 1, each->from);
    world.known[each->to][each->from] = 1;
  }
  put(socket, each->body->data, each->body->bytes, 0, each->from);
  part *last = &socket->queue[(socket->first + socket->count - 1) % QUEUE];
  if (each->way != SUBSCRIPTION && last->bytes > ZMOE_TOPIC_BYTES && chance(world.damaging))
    last->data[ZMOE_TOPIC_BYTES + draw((uint32_t)last->bytes - ZMOE_TOPIC_BYTES)] ^=
        (uint8_t)(1 << draw(8));
}

static void leave(sim_rank *rank) {
  int gone = number_of(rank);
  rank->is_gone = 1;
  world.lasting |= zmoe_bit((uint32_t)gone);
  for (int r = 0; r < (int)world.nodes; r++) {
    if (r == gone)
      continue;
    uint64_t span_us = chance(2) ? 0 : draw(100000); /* until a host's silence is noticed */
    later(span_us, CUT_CONTROL, r, gone);
    later(span_us, CUT_CONTROL, gone, r);
    later(span_us, CUT_DATA, r, gone);
    later(span_us, CUT_DATA, gone, r);
  }
}

/* ---- libzmq, as far as an exchange sees it ------------------------------------------------ */

typedef struct message {
  uint8_t *data;
  size_t bytes;
  int more;
  zmq_free_fn *free;
  void *hint;
} message;

_Static_assert(sizeof(message) <= sizeof(zmq_msg_t), "a message fits");

static message *of(const zmq_msg_t *msg) {
  return (message *)(uintptr_t)msg;
}

static int msg_init(zmq_msg_t *msg) {
  *of(msg) = (message){.data = NULL};
  return 0;
}

static int msg_init_size(zmq_msg_t *msg, size_t size) {
  *of(msg) = (message){.data = malloc(size ? size : 1), .bytes = size, .free = free_bytes};
  return 0;
}

static int msg_init_data(zmq_msg_t *msg, void *data, size_t size, zmq_free_fn *ffn, void *hint) {
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

static int fail(int error) {
  errno = error;
  return -1;
}

static int msg_recv(zmq_msg_t *msg, void *at, int flags) {
  sim_socket *socket = at;
  step_on();
  if (socket->count == 0 && !(flags & ZMQ_DONTWAIT)) {
    if (chance(world.interrupts))
      return fail(EINTR);
    yield(world.now_us + (uint64_t)socket->wait_us,
          zmoe_bit((uint32_t)(socket - current->sockets)));
  }
  if (socket->count == 0) {
    socket->sign = 0;
    return fail(EAGAIN);
  }
  part *next = &socket->queue[socket->first++ % QUEUE];
  socket->count--;
  msg_close(msg);
  *of(msg) = (message){next->data, next->bytes, next->more, free_bytes, NULL};
  if (socket->kind == XPUB)
    current->subscriber = next->from;
  return (int)next->bytes;
}

static int rank_of(const void *presence) {
  uint8_t each[ZMOE_PRESENCE_BYTES];
  for (uint32_t r = 0; r < world.nodes; r++) {
    zmoe_wire_presence(SESSION, r, each);
    if (memcmp(each, presence, sizeof each) == 0)
      return (int)r;
  }
  return -1;
}

/* 0, or EAGAIN for a DEALER without a link. */
static int route(sim_socket *socket, body *body) {
  int me = socket->owner, to = world.ranks[me].addressed;
  if (world.ranks[me].is_gone)
    return 0;
  if (chance(4))
    socket->sign = 0; /* sending uses up the sign */
  if (socket->kind == XPUB) {
    for (int r = 0; r < (int)world.nodes; r++)
      if (world.accepted[me][r])
        send_by(PUBLISHED, me, r, body);
  } else if (socket->kind == DEALER) {
    if (!world.control[me][socket->peer])
      return EAGAIN;
    send_by(UP, me, socket->peer, body);
  } else if (to >= 0 && world.known[me][to]) {
    send_by(DOWN, me, to, body);
  }
  world.ranks[me].addressed = -1;
  return 0;
}

static int msg_send(zmq_msg_t *msg, void *socket, int flags) {
  (void)flags;
  step_on();
  body *made = malloc(sizeof *made);
  *made = (body){of(msg)->data, of(msg)->bytes, of(msg)->free, of(msg)->hint, 1};
  int error = route(socket, made);
  if (error != 0) {
    free(made);
    return fail(error);
  }
  let_go(made);
  return msg_init(msg);
}

static int send_bytes(void *at, const void *data, size_t size, int flags) {
  sim_socket *socket = at;
  step_on();
  if (socket->kind == ROUTER && (flags & ZMQ_SNDMORE)) {
    world.ranks[socket->owner].addressed = rank_of(data);
    return (int)size;
  }
  body *made = body_of(data, size);
  int error = route(socket, made);
  let_go(made);
  return error != 0 ? fail(error) : (int)size;
}

static int set_option(void *at, int option, const void *value, size_t size) {
  sim_socket *socket = at;
  if (option == ZMQ_RCVTIMEO) {
    int wait_ms;
    CHECK(size == sizeof wait_ms);
    memcpy(&wait_ms, value, size);
    socket->wait_us = 1000 * wait_ms;
  } else if (socket->kind == XPUB) {
    int subscriber = world.ranks[socket->owner].subscriber;
    world.accepted[socket->owner][subscriber] = world.data[subscriber][socket->owner];
  }
  return 0;
}

static int get_option(void *at, int option, void *value, size_t *size) {
  sim_socket *socket = at;
  int place = (int)(socket - world.ranks[socket->owner].sockets), events = 0;
  int fd = FIRST_FD + socket->owner * SOCKETS + place;
  CHECK(*size == sizeof fd);
  memcpy(value, option == ZMQ_FD ? &fd : &events, sizeof fd);
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
    .setsockopt = set_option,
    .getsockopt = get_option,
    .get_errno = get_errno,
};

int zmoe_zmq_is_loaded(void) {
  return 1;
}

/* ---- the system, as far as an exchange sees it ---------------------------------------------- */

/* Each look at the clock moves it on. */
int clock_gettime(clockid_t clock, struct timespec *now) {
  (void)clock;
  world.now_us++;
  *now = (struct timespec){(time_t)(world.now_us / 1000000), (long)(world.now_us % 1000000) * 1000};
  return 0;
}

int poll(struct pollfd *fds, nfds_t count, int wait_ms) {
  uint64_t until_us = world.now_us + (uint64_t)wait_ms * 1000, sockets = 0;
  if (chance(world.interrupts))
    return fail(EINTR);
  for (int again = 0; again < 2; again++) {
    int ready = 0;
    for (nfds_t i = 0; i < count; i++) {
      int place = (fds[i].fd - FIRST_FD) % SOCKETS;
      fds[i].revents = current->sockets[place].sign ? POLLIN : 0;
      ready += fds[i].revents != 0;
      sockets |= zmoe_bit((uint32_t)place);
    }
    if (ready > 0 || again)
      return ready;
    yield(until_us, sockets);
  }
  return 0;
}

int sched_yield(void) {
  if (current != NULL) /* LeakSanitizer calls it, too */
    yield(world.now_us, 0);
  return 0;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *lock,
                           const struct timespec *until) {
  (void)condition;
  uint64_t until_us = (uint64_t)until->tv_sec * 1000000 + (uint64_t)until->tv_nsec / 1000;
  if (world.now_us >= until_us)
    return ETIMEDOUT;
  pthread_mutex_unlock(lock);
  yield(world.now_us + 500 < until_us ? world.now_us + 500 : until_us, 0); /* in case of a slot */
  pthread_mutex_lock(lock);
  return 0;
}

/* ---- what a rank does -------------------------------------------------------------------------
 */

static float value_at(uint32_t rank, uint32_t layer, uint32_t batch, uint32_t i) {
  return (float)((rank * 7 + layer * 3 + batch * 5 + i) % 13) - 6;
}

static int is_nothing(uint32_t rank, uint32_t layer) {
  return (rank + layer) % 5 == 0;
}

static zmoe_call call_of(uint32_t layer, uint32_t batch) {
  return (zmoe_call){
      .step = layer / 4,
      .layer = layer % 4,
      .micro_batch = batch,
      .rows = world.rows[layer],
      .width = WIDTH,
      .wire_dtype = (zmoe_dtype)world.dtype[layer],
      .algorithm = world.algorithm[layer],
      .digest = 7,
  };
}

static uint64_t left_us(uint64_t until_us) {
  return until_us > world.now_us ? until_us - world.now_us : 0;
}

static int send_partial(sim_rank *me, const zmoe_call *call, const float *src) {
  uint64_t until_us = world.now_us + DEADLINE_US;
  int rc;
  do
    rc = zmoe_exchange_publish(me->ex, call, src, ZMOE_F32, left_us(until_us), &me->fault);
  while (rc == ZMOE_EINTR);
  CHECK(world.now_us < until_us + DEADLINE_US);
  return rc;
}

static int publish(sim_rank *me, uint32_t layer, uint32_t batch) {
  zmoe_call call = call_of(layer, batch);
  uint32_t rank = (uint32_t)number_of(me);
  float src[MAX_ROWS * WIDTH];
  for (uint32_t i = 0; i < call.rows * WIDTH; i++)
    src[i] = value_at(rank, layer, batch, i);
  return send_partial(me, &call, is_nothing(rank, layer) ? NULL : src);
}

/* Of the centralised schedule: rank r adds r + 1 times the leader's rows that it has a part in. */
static uint64_t ranks_of(uint32_t layer, uint32_t row) {
  return (layer * 5 + row * 3 + 1) % zmoe_bit(world.nodes);
}

static float part_of(uint32_t rank, uint32_t layer, uint32_t batch, uint32_t i) {
  if (world.central)
    return ranks_of(layer, i / WIDTH) >> rank & 1 ? value_at(0, layer, 0, i) * (float)(rank + 1)
                                                  : 0;
  return is_nothing(rank, layer) ? 0 : value_at(rank, layer, batch, i);
}

/* The first rank's bits are every rank's, and right where no rounding hides it. */
static void check_sum(const float *sum, uint32_t layer, uint32_t batch) {
  size_t bytes = world.rows[layer] * WIDTH * sizeof *sum;
  if (world.summed[layer][batch]++ == 0)
    memcpy(world.sums[layer][batch], sum, bytes);
  CHECK(memcmp(world.sums[layer][batch], sum, bytes) == 0);
  for (uint32_t i = 0; world.dtype[layer] != ZMOE_Q8 && i < world.rows[layer] * WIDTH; i++) {
    float expected = 0;
    for (uint32_t r = 0; r < world.nodes; r++)
      expected += part_of(r, layer, batch, i);
    CHECK(sum[i] == expected);
  }
  exchanged++;
}

static int collect(sim_rank *me, uint32_t layer, uint32_t batch) {
  uint64_t until_us = world.now_us + DEADLINE_US;
  float sum[MAX_ROWS * WIDTH];
  int rc;
  do
    rc = zmoe_exchange_collect(me->ex, sum, ZMOE_F32, left_us(until_us), &me->fault);
  while (rc == ZMOE_EINTR);
  CHECK(world.now_us < until_us + DEADLINE_US);
  if (rc == ZMOE_OK)
    check_sum(sum, layer, batch);
  return rc;
}

static void compute(void) {
  yield(world.now_us + draw(300) + (chance(world.slow) ? draw(400000) : 0), 0);
}

static int dispatch(sim_rank *me, uint32_t layer) {
  uint64_t until_us = world.now_us + DEADLINE_US, ranks[MAX_ROWS];
  zmoe_call call = call_of(layer, 0);
  float x[MAX_ROWS * WIDTH], weights[MAX_ROWS];
  int32_t ids[MAX_ROWS];
  for (uint32_t row = 0; row < call.rows; row++) {
    ranks[row] = ranks_of(layer, row), ids[row] = (int32_t)row, weights[row] = 1;
    for (uint32_t i = row * WIDTH; i < (row + 1) * WIDTH; i++)
      x[i] = value_at(0, layer, 0, i);
  }
  zmoe_routed routed = {x, ids, weights, ranks, 1, ZMOE_F32, 1};
  int rc;
  do
    rc = zmoe_exchange_dispatch(me->ex, &call, &routed, left_us(until_us), &me->fault);
  while (rc == ZMOE_EINTR);
  CHECK(world.now_us < until_us + DEADLINE_US);
  return rc;
}

static int lead(sim_rank *me, uint32_t layer) {
  float own[MAX_ROWS * WIDTH];
  int rc = dispatch(me, layer);
  if (rc != ZMOE_OK)
    return rc;
  for (uint32_t i = 0; i < world.rows[layer] * WIDTH; i++)
    own[i] = ranks_of(layer, i / WIDTH) & 1 ? value_at(0, layer, 0, i) : 0;
  compute();
  zmoe_call call = call_of(layer, 0);
  rc = send_partial(me, &call, own);
  return rc == ZMOE_OK ? collect(me, layer, 0) : rc;
}

static int receive(sim_rank *me, uint32_t layer, zmoe_dispatch_batch *got) {
  uint64_t until_us = world.now_us + DEADLINE_US;
  zmoe_call call = call_of(layer, 0);
  int rc;
  do
    rc = zmoe_exchange_receive(me->ex, got, call.step, call.layer, left_us(until_us), &me->fault);
  while (rc == ZMOE_EINTR);
  CHECK(world.now_us < until_us + DEADLINE_US);
  return rc;
}

static int answer(sim_rank *me, uint32_t layer) {
  static const int32_t local[EXPERTS] = {0, 1, 2, 3};
  uint32_t rank = (uint32_t)number_of(me), taken = 0;
  float x[MAX_ROWS * WIDTH], weights[MAX_ROWS];
  int32_t rows[MAX_ROWS], experts[MAX_ROWS];
  zmoe_dispatch_batch got = {.x = x,
                             .pair_rows = rows,
                             .pair_experts = experts,
                             .pair_weights = weights,
                             .x_bytes = sizeof x,
                             .max_pairs = MAX_ROWS,
                             .experts = EXPERTS,
                             .local = local,
                             .width = WIDTH};
  int rc = receive(me, layer, &got);
  if (rc != ZMOE_OK)
    return rc;
  for (uint32_t row = 0; row < world.rows[layer]; row++) {
    if (!(ranks_of(layer, row) & zmoe_bit(rank)))
      continue;
    CHECK(taken < got.rows && rows[taken] == (int32_t)taken && experts[taken] == (int32_t)row);
    for (uint32_t i = 0; i < WIDTH; i++) {
      CHECK(x[taken * WIDTH + i] == value_at(0, layer, 0, row * WIDTH + i));
      x[taken * WIDTH + i] *= (float)(rank + 1);
    }
    taken++;
  }
  CHECK_EQUAL(taken, got.rows);
  compute();
  zmoe_call call = call_of(layer, 0);
  call.rows = got.rows, call.digest = got.digest;
  return send_partial(me, &call, x);
}

static int run_layer(sim_rank *me, uint32_t layer) {
  int rc = ZMOE_OK;
  for (uint32_t batch = 0; batch < world.batches[layer] && rc == ZMOE_OK; batch++) {
    compute();
    rc = publish(me, layer, batch);
    if (rc == ZMOE_OK && batch > 0)
      rc = collect(me, layer, batch - 1);
  }
  return rc == ZMOE_OK ? collect(me, layer, world.batches[layer] - 1) : rc;
}

static int run_central_layer(sim_rank *me, uint32_t layer) {
  compute();
  return number_of(me) == 0 ? lead(me, layer) : answer(me, layer);
}

static uint64_t everyone(void) {
  return zmoe_bit(world.nodes) - 1;
}

static void serve(sim_rank *me) {
  zmoe_fault fault;
  zmoe_exchange_service(me->ex, &fault);
  yield(world.now_us + 1000, 0);
}

static void plan_cuts(void);

static void meet(sim_rank *me) {
  uint64_t bit = zmoe_bit((uint32_t)number_of(me)), peers = everyone() & ~bit;
  while ((zmoe_exchange_subscribers(me->ex) & zmoe_exchange_links(me->ex)) != peers)
    yield(world.now_us + 500, 0);
  world.ready |= bit;
  if (world.ready == everyone())
    plan_cuts();
  while (world.ready != everyone())
    serve(me);
  me->calls = 0;
}

static int all_done(void) {
  for (uint32_t r = 0; r < world.nodes; r++)
    if (!world.ranks[r].is_done)
      return 0;
  return 1;
}

static void check_loss(const sim_rank *me) {
  const zmoe_fault *fault = &me->fault;
  CHECK(me->rc == ZMOE_EPEER || me->rc == ZMOE_ETIMEOUT || me->rc == ZMOE_EPOOL);
  uint64_t named = world.lasting | world.failed;
  if (world.central && named != 0)
    named |= 1; /* a worker hears of nobody but the leader, who may be waiting for another */
  CHECK(((fault->lost | fault->missing) & named) != 0);
  CHECK((fault->lost & ~world.lasting) == 0);
  world.failed |= zmoe_bit((uint32_t)number_of(me));
  losses++;
}

static void program(void) {
  sim_rank *me = current;
  meet(me);
  for (uint32_t layer = 0; layer < LAYERS && me->rc == ZMOE_OK; layer++)
    me->rc = world.central ? run_central_layer(me, layer) : run_layer(me, layer);
  if (me->rc != ZMOE_OK && !me->is_gone)
    check_loss(me);
  me->is_done = 1;
  while (!all_done()) /* a peer may still need what this rank holds */
    serve(me);
  me->wake_us = UINT64_MAX;
  me->waits = 0;
}

/* ---- runs -------------------------------------------------------------------------------------
 */

/* Short ones, whose link comes back in time, and in some runs one that lasts. */
static void plan_cuts(void) {
  for (uint32_t cuts = draw(5); cuts > 0; cuts--) {
    int a = (int)draw(world.nodes), b = (int)draw(world.nodes);
    if (a == b)
      continue;
    int is_data = (int)draw(2), lasts = chance(12);
    uint64_t at_us = draw(40000), span_us = 5000 + draw(lasts ? 4000000 : 100000);
    if (lasts)
      world.lasting |= zmoe_bit((uint32_t)a) | zmoe_bit((uint32_t)b);
    later(at_us, is_data ? CUT_DATA : CUT_CONTROL, a, b);
    later(at_us + span_us, is_data ? MEND_DATA : MEND_CONTROL, a, b);
  }
}

static void open_rank(int r) {
  sim_rank *rank = &world.ranks[r];
  void *dealers[MAX_NODES] = {NULL}, *monitors[MAX_NODES] = {NULL};
  for (int s = 0; s < SOCKETS; s++) {
    int is_monitor = s >= 3 && (s - 3) % 2;
    rank->sockets[s].kind = s < 3 ? s : is_monitor ? MONITOR : DEALER;
    rank->sockets[s].owner = r;
    rank->sockets[s].peer = (s - 3) / 2;
  }
  for (int p = 0; p < (int)world.nodes; p++) {
    if (p == r)
      continue;
    dealers[p] = dealer_of(r, p);
    monitors[p] = dealer_of(r, p) + 1;
    later(draw(2000), MEND_CONTROL, r, p);
    later(draw(2000), MEND_DATA, r, p);
  }
  const zmoe_exchange_config config = {
      .rank = (uint32_t)r,
      .nodes = world.nodes,
      .session = SESSION,
      .max_payload_bytes = MAX_BYTES,
      .small_payload_bytes = WIDTH * 4,
      .scatter = !world.central,
      .dispatch_rows = world.central ? MAX_ROWS : 0,
      .xpub = &rank->sockets[XPUB],
      .sub = &rank->sockets[SUB],
      .router = &rank->sockets[ROUTER],
      .dealers = dealers,
      .monitors = monitors,
      .spin_us = draw(2) * 50,
      .resend_ms = RESEND_MS,
      .grace_ms = GRACE_MS,
  };
  rank->addressed = -1;
  rank->calls = -1000000000;
  rank->dies_at = chance(6) ? 1 + (long)draw(600) : 0;
  CHECK_EQUAL(zmoe_exchange_create(&config, &rank->ex), ZMOE_OK);
  CHECK_EQUAL(getcontext(&rank->context), 0);
  rank->stack = malloc(STACK_BYTES);
  rank->context.uc_stack.ss_sp = rank->stack;
  rank->context.uc_stack.ss_size = STACK_BYTES;
  rank->context.uc_link = &scheduler;
  makecontext(&rank->context, program, 0);
}

static void open_world(uint64_t seed) {
  memset(&world, 0, sizeof world);
  state = seed * 0x2545f4914f6cdd1du + 1;
  world.seed = seed;
  world.now_us = 1000000;
  world.nodes = 2 + draw(MAX_NODES - 1);
  static const uint32_t rates[] = {0, 0, 64, 8};
  world.lossy = rates[draw(4)], world.damaging = rates[draw(3)];
  world.slow = 8 * rates[draw(4)], world.interrupts = rates[draw(4)];
  world.central = draw(3) == 0;
  for (uint32_t l = 0; l < LAYERS; l++) {
    world.algorithm[l] = draw(2) && !world.central ? ZMOE_SCATTER : ZMOE_DIRECT;
    world.rows[l] = 1 + draw(MAX_ROWS);
    world.batches[l] = 1 + (draw(2) && !world.central);
    world.dtype[l] = draw(4);
  }
  for (uint32_t r = 0; r < world.nodes; r++)
    open_rank((int)r);
}

static uint64_t run_due(void) {
  uint64_t next_us = UINT64_MAX;
  for (uint32_t i = 0; i < world.n_events;) {
    event due = world.events[i];
    if (due.at_us > world.now_us) {
      next_us = due.at_us < next_us ? due.at_us : next_us;
      i++;
      continue;
    }
    world.events[i] = world.events[--world.n_events];
    happen(&due);
    i = 0;
  }
  for (;;) {
    uint32_t first = world.n_flights;
    for (uint32_t i = 0; i < world.n_flights; i++)
      if (first == world.n_flights || world.flights[i].at_us < world.flights[first].at_us ||
          (world.flights[i].at_us == world.flights[first].at_us &&
           world.flights[i].number < world.flights[first].number))
        first = i;
    if (first == world.n_flights)
      return next_us;
    flight due = world.flights[first];
    if (due.at_us > world.now_us)
      return due.at_us < next_us ? due.at_us : next_us;
    world.flights[first] = world.flights[--world.n_flights];
    deliver(&due);
    let_go(due.body);
  }
}

static int is_awake(const sim_rank *rank) {
  if (rank->wake_us <= world.now_us)
    return 1;
  for (int s = 0; s < SOCKETS; s++)
    if ((rank->waits >> s & 1) && rank->sockets[s].sign)
      return 1;
  return 0;
}

/* Until all are done, or nothing more can happen. */
static void run_world(void) {
  for (;;) {
    uint64_t next_us = run_due();
    uint32_t first = draw(world.nodes), asleep = 0;
    for (uint32_t i = 0; i < world.nodes; i++) {
      sim_rank *rank = &world.ranks[(first + i) % world.nodes];
      if (is_awake(rank)) {
        current = rank;
        CHECK_EQUAL(swapcontext(&scheduler, &rank->context), 0);
        current = NULL;
        break;
      }
      next_us = rank->wake_us < next_us ? rank->wake_us : next_us;
      asleep++;
    }
    if (asleep == world.nodes && all_done())
      return;
    CHECK(next_us != UINT64_MAX || asleep < world.nodes);
    if (asleep == world.nodes && next_us > world.now_us)
      world.now_us = next_us;
  }
}

static void close_world(void) {
  while (world.n_flights > 0)
    let_go(world.flights[--world.n_flights].body);
  for (uint32_t r = 0; r < world.nodes; r++) {
    sim_rank *rank = &world.ranks[r];
    zmoe_pool_stats pool;
    zmoe_collectives_clear(rank->ex);
    zmoe_exchange_pool_stats(rank->ex, &pool);
    CHECK_EQUAL(pool.acquired, pool.released);
    repeated += (long long)rank->ex->stats.resend_served;
    zmoe_exchange_destroy(rank->ex);
    for (int s = 0; s < SOCKETS; s++)
      for (sim_socket *socket = &rank->sockets[s]; socket->count > 0; socket->count--)
        free(socket->queue[socket->first++ % QUEUE].data);
    free(rank->stack);
  }
}

void __sanitizer_set_death_callback(void (*told)(void)) __attribute__((weak));

static int passed;

static void tell_seed(void) {
  if (!passed)
    fprintf(stderr, "simulate_exchange: of seed %llu\n", (unsigned long long)world.seed);
}

int main(int argc, char **argv) {
  CHECK_EQUAL(argc, 3);
  atexit(tell_seed);
  if (__sanitizer_set_death_callback != NULL)
    __sanitizer_set_death_callback(tell_seed);
  uint64_t runs = strtoull(argv[1], NULL, 10), first = strtoull(argv[2], NULL, 10);
  for (uint64_t i = 0; i < runs; i++) {
    open_world(first + i);
    run_world();
    close_world();
  }
  passed = 1;
  printf("simulate_exchange: %llu runs from seed %llu, %lld sums, %lld losses, %lld frames again\n",
         (unsigned long long)runs, (unsigned long long)first, exchanged, losses, repeated);
  return 0;
}
