/* The state of the door, and its collectives on the exchange. */
#include "common/platform.h"

#include "collectives.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct begun {
  uint32_t step;
  uint64_t plan;
  int is_patient;
} begun;

/* `turn` is held for a whole collective: MLX may call from several threads.  `lock`, never
 * for longer than a moment, guards what the host looks at meanwhile. */
static struct {
  pthread_mutex_t turn, lock;
  zmoe_door_config config; /* exchange NULL: closed */
  uint64_t openings;
  atomic_int cancelled;
  atomic_uint_fast64_t spent_us, links;
  begun queue[ZMOE_DOOR_STEPS]; /* the i-th that began is at i % ZMOE_DOOR_STEPS */
  uint64_t queued, entered;     /* of a program: `entered` counts its collectives */
  begun now;
  int64_t layer;  /* of the latest collective of the step; -1: none yet */
  int is_patient; /* the step waits for deadline_us */
  int is_open;    /* the next collective has been published before */
  zmoe_door_failure failure;
} door = {.turn = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- the host's side ----------------------------------------------------------- */

/* Reads the numbers of the signals that came; whether one asks us to end. */
static int signalled(void) {
  uint8_t number;
  int ends = 0;
  while (door.config.wakeup_fd >= 0 && read(door.config.wakeup_fd, &number, 1) == 1)
    ends |= number == SIGINT || number == SIGTERM;
  return ends;
}

int zmoe_door_open(const zmoe_door_config *config) {
  int rc = ZMOE_EINVAL;
  pthread_mutex_lock(&door.turn);
  pthread_mutex_lock(&door.lock);
  if (door.config.exchange == NULL && config->exchange != NULL) {
    door.config = *config;
    door.openings++;
    door.queued = door.entered = 0;
    door.layer = -1;
    door.is_patient = door.is_open = 0;
    door.failure = (zmoe_door_failure){.status = ZMOE_OK};
    atomic_store(&door.cancelled, 0);
    atomic_store(&door.links, zmoe_exchange_links(config->exchange));
    rc = ZMOE_OK;
  }
  pthread_mutex_unlock(&door.lock);
  pthread_mutex_unlock(&door.turn);
  return rc;
}

void zmoe_door_close(void) {
  zmoe_door_cancel();
  pthread_mutex_lock(&door.turn);
  pthread_mutex_lock(&door.lock);
  door.config.exchange = NULL;
  pthread_mutex_unlock(&door.lock);
  pthread_mutex_unlock(&door.turn);
}

int zmoe_door_begin(uint32_t step, uint64_t plan, int is_patient) {
  int rc = ZMOE_EINVAL;
  pthread_mutex_lock(&door.lock);
  if (door.config.exchange != NULL && door.queued - door.entered < ZMOE_DOOR_STEPS) {
    if (door.queued == door.entered)
      signalled(); /* those of earlier steps have had their effect */
    door.queue[door.queued++ % ZMOE_DOOR_STEPS] = (begun){step, plan, is_patient};
    rc = ZMOE_OK;
  }
  pthread_mutex_unlock(&door.lock);
  return rc;
}

int zmoe_door_repeat(void) {
  int rc = ZMOE_EINVAL;
  pthread_mutex_lock(&door.turn);
  pthread_mutex_lock(&door.lock);
  if (door.config.exchange != NULL && door.failure.is_repeatable) {
    door.layer = (int64_t)door.failure.layer - 1;
    door.is_patient = door.is_open = 1;
    door.failure = (zmoe_door_failure){.status = ZMOE_OK};
    rc = ZMOE_OK;
  }
  pthread_mutex_unlock(&door.lock);
  pthread_mutex_unlock(&door.turn);
  return rc;
}

void zmoe_door_cancel(void) {
  atomic_store(&door.cancelled, 1);
}

int zmoe_door_failed(zmoe_door_failure *out) {
  pthread_mutex_lock(&door.lock);
  *out = door.failure;
  pthread_mutex_unlock(&door.lock);
  return out->status;
}

uint64_t zmoe_door_spent_us(void) {
  return atomic_exchange(&door.spent_us, 0);
}

uint64_t zmoe_door_called(void) {
  pthread_mutex_lock(&door.lock);
  uint64_t called = door.config.is_program ? door.entered : 0;
  pthread_mutex_unlock(&door.lock);
  return called;
}

int zmoe_door_service(zmoe_fault *fault) {
  if (pthread_mutex_trylock(&door.turn) != 0)
    return ZMOE_OK;
  int rc =
      door.config.exchange == NULL ? ZMOE_OK : zmoe_exchange_service(door.config.exchange, fault);
  pthread_mutex_unlock(&door.turn);
  return rc;
}

uint64_t zmoe_door_links(void) {
  if (pthread_mutex_trylock(&door.turn) == 0) {
    zmoe_exchange *ex = door.config.exchange;
    atomic_store(&door.links, ex == NULL ? 0 : zmoe_exchange_links(ex));
    pthread_mutex_unlock(&door.turn);
  }
  return atomic_load(&door.links);
}

/* ---- failing --------------------------------------------------------------------- */

/* So that no program goes on with zeros.  Where a signal has ended the wait, they do no harm. */
static void await_end(int status) {
  const struct timespec pause = {.tv_nsec = 10000000};
  if (!door.config.is_program || status == ZMOE_EINTR)
    return;
  uint64_t until_us = zmoe_later_us(zmoe_now_us(), ZMOE_DOOR_END_S * UINT64_C(1000000));
  while (zmoe_now_us() < until_us)
    nanosleep(&pause, NULL);
  _exit(EXIT_FAILURE);
}

static void fail(int status, const zmoe_fault *fault, const char *refused) {
  pthread_mutex_lock(&door.lock);
  if (door.failure.status == ZMOE_OK) {
    door.failure = (zmoe_door_failure){
        .status = status,
        .step = door.now.step,
        .layer = door.layer < 0 ? 0 : (uint32_t)door.layer,
        .fault = *fault,
    };
    snprintf(door.failure.refused, sizeof door.failure.refused, "%s", refused);
  }
  pthread_mutex_unlock(&door.lock);
  await_end(status);
}

static int refuse(const char *what) {
  zmoe_fault none = {.missing = 0};
  fail(ZMOE_EINVAL, &none, what);
  return ZMOE_EINVAL;
}

void zmoe_door_refuse(const char *what, void *out, size_t bytes) {
  refuse(what);
  if (bytes > 0)
    memset(out, 0, bytes);
}

/* ---- a collective ------------------------------------------------------------------ */

int zmoe_door_channel(uint32_t layer, uint32_t width, zmoe_channel *out) {
  pthread_mutex_lock(&door.lock);
  *out = (zmoe_channel){
      .opening = door.openings,
      .rank = door.config.rank,
      .nodes = door.config.nodes,
      .layer = layer,
      .width = width,
      .is_program = door.config.is_program,
  };
  int rc = door.config.exchange == NULL ? ZMOE_EINVAL : ZMOE_OK;
  pthread_mutex_unlock(&door.lock);
  return rc;
}

static uint64_t take_turn(void) {
  pthread_mutex_lock(&door.turn);
  return zmoe_now_us();
}

static void end_turn(uint64_t begun_us) {
  atomic_fetch_add(&door.spent_us, zmoe_now_us() - begun_us);
  pthread_mutex_unlock(&door.turn);
}

/* Two of different communicators are different plans: ranks that call on other ones diverge. */
static void enter_alone(const zmoe_channel *channel) {
  enum { BITS = 16 };
  uint64_t count = door.entered++;
  door.now = (begun){.step = (uint32_t)(count >> BITS) + 1, .plan = channel->layer};
  door.layer = (int64_t)(count & ((1 << BITS) - 1));
}

/* A layer that does not come after the last one is the first of the next step. */
static int enter(const zmoe_channel *channel) {
  const char *problem = NULL;
  pthread_mutex_lock(&door.lock);
  int status = door.failure.status;
  /* What is left of a run that has ended must not fail the one that has the door now. */
  int is_left = channel->opening != door.openings;
  if (status == ZMOE_OK && (door.config.exchange == NULL || (is_left && !channel->is_program)))
    status = ZMOE_EINTR;
  if (status == ZMOE_OK && is_left) {
    problem = "a collective of a run that has ended";
  } else if (status == ZMOE_OK && door.config.is_program) {
    enter_alone(channel);
  } else if (status == ZMOE_OK && door.layer < (int64_t)channel->layer && door.entered > 0) {
    door.layer = channel->layer;
  } else if (status == ZMOE_OK && door.entered == door.queued) {
    problem = "a collective outside of a step";
  } else if (status == ZMOE_OK) {
    door.now = door.queue[door.entered++ % ZMOE_DOOR_STEPS];
    door.layer = channel->layer;
    door.is_patient = door.now.is_patient;
  }
  pthread_mutex_unlock(&door.lock);
  return problem == NULL ? status : refuse(problem);
}

/* One exchange of a collective, or the part of one. */
typedef struct part {
  zmoe_call call;
  const void *src;
  void *out;
  size_t stride; /* of gathered parts */
  zmoe_dtype dtype;
} part;

typedef enum what { PUBLISH, COLLECT, GATHER } what;

static int attempt(const part *p, what what, uint64_t deadline_us, zmoe_fault *fault) {
  zmoe_exchange *ex = door.config.exchange;
  if (what == PUBLISH)
    return zmoe_exchange_publish(ex, &p->call, p->src, p->dtype, deadline_us, fault);
  if (what == COLLECT)
    return zmoe_exchange_collect(ex, p->out, p->dtype, deadline_us, fault);
  return zmoe_exchange_gather(ex, p->out, p->stride, deadline_us, fault);
}

/* Until it is done or has failed; until_us is a time. */
static int run(const part *p, what what, uint64_t until_us) {
  zmoe_fault fault;
  int rc = ZMOE_EINTR;
  while (rc == ZMOE_EINTR && !atomic_load(&door.cancelled)) {
    uint64_t now_us = zmoe_now_us();
    rc = attempt(p, what, until_us > now_us ? until_us - now_us : 0, &fault);
    if (rc == ZMOE_EINTR && signalled())
      zmoe_door_cancel();
  }
  if (rc == ZMOE_EINTR)
    fault = (zmoe_fault){.missing = 0};
  if (rc != ZMOE_OK)
    fail(rc, &fault, rc == ZMOE_EINVAL ? "a collective out of its order" : "");
  return rc;
}

static uint64_t patience_ends_us(void) {
  uint64_t us = door.is_patient ? door.config.deadline_us : door.config.patience_us;
  return zmoe_later_us(zmoe_now_us(), us);
}

/* Publishes, but for a collective that is called again. */
static int publish(const part *p, uint64_t until_us) {
  int was_open = door.is_open;
  door.is_open = 0;
  return was_open ? ZMOE_OK : run(p, PUBLISH, until_us);
}

/* The last wait of a collective, which may be repeated if there is no other. */
static int complete(const part *p, what what, uint64_t until_us, int is_only) {
  int rc = run(p, what, until_us);
  pthread_mutex_lock(&door.lock);
  if (rc == ZMOE_ETIMEOUT)
    door.failure.is_repeatable =
        is_only && !door.is_patient && door.config.patience_us < door.config.deadline_us;
  pthread_mutex_unlock(&door.lock);
  return rc;
}

/* ---- sums -------------------------------------------------------------------------- */

/* How a sum is cut: `parts` of `rows` rows, but for the last. */
typedef struct cut {
  zmoe_dtype wire;
  size_t item, width, rows, parts, count;
} cut;

static int make_cut(const zmoe_channel *channel, size_t count, zmoe_dtype dtype, cut *out) {
  int integers = dtype == (zmoe_dtype)ZMOE_I32;
  out->wire = integers || door.config.wire_dtype < 0 ? dtype : (zmoe_dtype)door.config.wire_dtype;
  out->item = integers ? sizeof(int32_t) : zmoe_dtype_bytes(dtype);
  out->count = count;
  /* Of rows whose width nobody told, blocks. */
  out->width = channel->width != 0 ? channel->width : ZMOE_Q8_BLOCK;
  uint64_t row_bytes = zmoe_payload_bytes(out->wire, 1, (uint32_t)out->width);
  out->rows = row_bytes > 0 ? door.config.max_payload_bytes / row_bytes : 0;
  if (out->rows == 0 || (channel->width != 0 && count % channel->width != 0))
    return refuse("a sum of rows of another width");
  size_t elements = out->rows * out->width;
  out->parts = (count + elements - 1) / elements;
  return out->parts <= UINT8_MAX + 1 ? ZMOE_OK : refuse("a sum of more than 256 frames");
}

static part part_of_sum(const zmoe_channel *channel, const cut *cut, const void *src, void *out,
                        zmoe_dtype dtype, size_t index) {
  size_t most = cut->rows * cut->width, at = index * most;
  size_t elements = cut->count - at < most ? cut->count - at : most;
  uint32_t width = (uint32_t)(channel->width != 0 ? channel->width : elements);
  uint64_t bytes = zmoe_payload_bytes(cut->wire, (uint32_t)(elements / width), width);
  int scatters = bytes >= door.config.scatter_bytes && dtype != (zmoe_dtype)ZMOE_I32;
  return (part){
      .call =
          {
              .step = door.now.step,
              .layer = (uint32_t)door.layer,
              .micro_batch = (uint32_t)index,
              .rows = (uint32_t)(elements / width),
              .width = width,
              .wire_dtype = cut->wire,
              .algorithm = scatters ? ZMOE_SCATTER : ZMOE_DIRECT,
              .plan = door.now.plan,
          },
      .src = (const uint8_t *)src + at * cut->item,
      .out = (uint8_t *)out + at * cut->item,
      .dtype = dtype,
  };
}

/* As many parts as may be are under way at once.  One is collected to where its own source
 * was, which has been published. */
static int sum(const zmoe_channel *channel, const void *src, void *out, size_t count,
               zmoe_dtype dtype) {
  cut cut = {.count = 0};
  uint64_t until_us = patience_ends_us();
  int rc = make_cut(channel, count, dtype, &cut);
  for (size_t i = 0; i < cut.parts + ZMOE_WINDOW && rc == ZMOE_OK; i++) {
    if (i >= ZMOE_WINDOW && i - ZMOE_WINDOW < cut.parts) {
      part done = part_of_sum(channel, &cut, src, out, dtype, i - ZMOE_WINDOW);
      rc = complete(&done, COLLECT, until_us, cut.parts == 1);
    }
    if (i < cut.parts && rc == ZMOE_OK) {
      part next = part_of_sum(channel, &cut, src, out, dtype, i);
      rc = publish(&next, until_us);
    }
  }
  return rc;
}

void zmoe_door_sum(const zmoe_channel *channel, const void *src, void *out, size_t count,
                   zmoe_dtype dtype) {
  size_t item = dtype == (zmoe_dtype)ZMOE_I32 ? sizeof(int32_t) : zmoe_dtype_bytes(dtype);
  uint64_t begun_us = take_turn();
  if (count > 0 && (enter(channel) != ZMOE_OK || sum(channel, src, out, count, dtype) != ZMOE_OK))
    memset(out, 0, count * item);
  end_turn(begun_us);
}

/* ---- gathering ------------------------------------------------------------------- */

static int gather_words(uint32_t index, const void *src, size_t words, void *out, size_t stride,
                        uint64_t until_us, int is_only) {
  part p = {
      .call =
          {
              .step = door.now.step,
              .layer = (uint32_t)door.layer,
              .micro_batch = index,
              .rows = 1,
              .width = (uint32_t)words,
              .wire_dtype = (zmoe_dtype)ZMOE_I32,
              .plan = door.now.plan,
          },
      .src = src,
      .out = out,
      .stride = stride,
      .dtype = (zmoe_dtype)ZMOE_I32,
  };
  int rc = publish(&p, until_us);
  return rc == ZMOE_OK ? complete(&p, GATHER, until_us, is_only) : rc;
}

static int gather(const zmoe_channel *channel, const void *src, uint8_t *out, size_t bytes) {
  enum { WORD = sizeof(uint32_t) };
  uint64_t until_us = patience_ends_us();
  size_t words = bytes / WORD, most = door.config.max_payload_bytes / WORD, at = 0;
  uint32_t index = 0;
  int rc =
      most > 0 && words / most < UINT8_MAX ? ZMOE_OK : refuse("an all_gather that is too large");
  for (; at < words && rc == ZMOE_OK; at += most, index++) {
    size_t some = words - at < most ? words - at : most;
    rc = gather_words(index, (const uint8_t *)src + at * WORD, some, out + at * WORD, bytes,
                      until_us, words <= most && bytes % WORD == 0);
  }
  size_t rest = bytes % WORD;
  if (rest == 0 || rc != ZMOE_OK)
    return rc;
  uint8_t last[WORD] = {0}, of_all[ZMOE_MAX_NODES * WORD];
  memcpy(last, (const uint8_t *)src + words * WORD, rest);
  rc = gather_words(index, last, 1, of_all, WORD, until_us, words == 0);
  for (uint32_t r = 0; r < channel->nodes && rc == ZMOE_OK; r++)
    memcpy(out + r * bytes + words * WORD, of_all + r * WORD, rest);
  return rc;
}

void zmoe_door_gather(const zmoe_channel *channel, const void *src, void *out, size_t bytes) {
  uint64_t begun_us = take_turn();
  if (bytes > 0 && (enter(channel) != ZMOE_OK || gather(channel, src, out, bytes) != ZMOE_OK))
    memset(out, 0, bytes * channel->nodes);
  end_turn(begun_us);
}
