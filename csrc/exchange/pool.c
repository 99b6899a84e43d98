/* Pinned slots in fixed size classes.
 *
 * A slot is handed to libzmq as the body of a message, and its last reference
 * may be dropped by an I/O thread; hence atomic counts, and a lock around the
 * free lists.  The lock is held for a few instructions, twice an exchange. */
#include "common/platform.h"

#include "pool.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* The kernel copies a frame to the beginning of a page of its own, where no earlier frame is
 * under way; all of it but what libzmq copies to its buffer of 8 KiB, together with 9 bytes
 * before it.  A copy by the CPU's string instructions to where a page goes on 1 to 15 bytes after
 * where the source's does is ten times as slow as another, on AMD's Zen 4: it would be that of a
 * frame at the beginning of a page, 9 bytes.  So frames begin in the middle of one. */
enum { COPY_PAGE = 4096, FRAME_AT = COPY_PAGE / 2 };

struct zmoe_slot {
  atomic_uint references;
  zmoe_pool *pool;
  zmoe_slot *next_free;
  unsigned char *payload;
  uint32_t class_index;
};

typedef struct size_class {
  size_t slot_bytes;
  uint32_t slots;
  unsigned char *memory;
  size_t memory_bytes;
  zmoe_slot *first; /* `slots` of them */
  zmoe_slot *free;
} size_class;

struct zmoe_pool {
  pthread_mutex_t lock;
  pthread_cond_t released;
  uint32_t n_classes;
  uint32_t in_use;
  int abandoned;
  zmoe_pool_stats stats;
  size_class classes[ZMOE_POOL_MAX_CLASSES]; /* ascending slot_bytes */
};

static size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/* ---- creation ------------------------------------------------------------ */

static int class_create(zmoe_pool *pool, uint32_t index, const zmoe_pool_class *spec,
                        size_t alignment) {
  size_class *class = &pool->classes[index];
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t room = round_up(FRAME_AT + ZMOE_HEADER_BYTES, alignment);
  size_t stride = round_up(room + spec->slot_bytes, alignment > COPY_PAGE ? alignment : COPY_PAGE);
  size_t slack = alignment > page ? alignment : 0;
  class->slot_bytes = spec->slot_bytes;
  class->slots = spec->slots;
  class->memory_bytes = round_up(stride * spec->slots + slack, page);
  class->first = calloc(spec->slots, sizeof *class->first);
  class->memory =
      mmap(NULL, class->memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (class->memory == MAP_FAILED)
    class->memory = NULL;
  if (class->memory == NULL || class->first == NULL)
    return ZMOE_EINVAL;
  /* Where the system does not let us lock, at least no page is still missing. */
  int locked = mlock(class->memory, class->memory_bytes) == 0;
  memset(class->memory, 0, class->memory_bytes);
  pool->stats.total_bytes += class->memory_bytes;
  pool->stats.locked_bytes += locked ? class->memory_bytes : 0;
  unsigned char *base = (unsigned char *)round_up((uintptr_t)class->memory, alignment);
  for (uint32_t s = spec->slots; s-- > 0;) {
    zmoe_slot *slot = &class->first[s];
    slot->pool = pool;
    slot->class_index = index;
    slot->payload = base + s * stride + room;
    slot->next_free = class->free;
    class->free = slot;
  }
  return ZMOE_OK;
}

static void pool_free(zmoe_pool *pool) {
  for (uint32_t c = 0; c < pool->n_classes; c++) {
    if (pool->classes[c].memory != NULL)
      munmap(pool->classes[c].memory, pool->classes[c].memory_bytes);
    free(pool->classes[c].first);
  }
  pthread_cond_destroy(&pool->released);
  pthread_mutex_destroy(&pool->lock);
  free(pool);
}

static int specs_are_valid(const zmoe_pool_class *classes, uint32_t n_classes, size_t alignment) {
  if (n_classes == 0 || n_classes > ZMOE_POOL_MAX_CLASSES)
    return 0;
  if (alignment < ZMOE_HEADER_BYTES || (alignment & (alignment - 1)) || alignment > (1u << 24))
    return 0;
  for (uint32_t c = 0; c < n_classes; c++)
    if (classes[c].slots == 0 || classes[c].slots > 4096 || classes[c].slot_bytes > UINT32_MAX ||
        (c > 0 && classes[c].slot_bytes <= classes[c - 1].slot_bytes))
      return 0;
  return 1;
}

static void init_condition(pthread_cond_t *condition) {
#ifdef __APPLE__
  pthread_cond_init(condition, NULL); /* waits by a span there */
#else
  pthread_condattr_t attributes;
  pthread_condattr_init(&attributes);
  pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
  pthread_cond_init(condition, &attributes);
  pthread_condattr_destroy(&attributes);
#endif
}

int zmoe_pool_create(const zmoe_pool_class *classes, uint32_t n_classes, size_t alignment,
                     zmoe_pool **out) {
  *out = NULL;
  if (!specs_are_valid(classes, n_classes, alignment))
    return ZMOE_EINVAL;
  zmoe_pool *pool = calloc(1, sizeof *pool);
  if (pool == NULL)
    return ZMOE_ENOMEM;
  pthread_mutex_init(&pool->lock, NULL);
  init_condition(&pool->released);
  pool->n_classes = n_classes;
  for (uint32_t c = 0; c < n_classes; c++) {
    if (class_create(pool, c, &classes[c], alignment) != ZMOE_OK) {
      pool_free(pool);
      return ZMOE_ENOMEM;
    }
  }
  *out = pool;
  return ZMOE_OK;
}

void zmoe_pool_destroy(zmoe_pool *pool) {
  if (pool == NULL)
    return;
  assert(pool->in_use == 0);
  pool_free(pool);
}

void zmoe_pool_abandon(zmoe_pool *pool) {
  pthread_mutex_lock(&pool->lock);
  pool->abandoned = 1;
  int last = pool->in_use == 0;
  pthread_mutex_unlock(&pool->lock);
  if (last)
    pool_free(pool);
}

/* ---- use ----------------------------------------------------------------- */

static zmoe_slot *take_free(zmoe_pool *pool, size_t bytes) {
  for (uint32_t c = 0; c < pool->n_classes; c++) {
    size_class *class = &pool->classes[c];
    if (class->slot_bytes >= bytes && class->free != NULL) {
      zmoe_slot *slot = class->free;
      class->free = slot->next_free;
      return slot;
    }
  }
  return NULL;
}

/* Returns 0, or ETIMEDOUT. */
static int wait_until(zmoe_pool *pool, uint64_t until_us) {
#ifdef __APPLE__
  uint64_t now_us = zmoe_now_us();
  uint64_t span_us = until_us > now_us ? until_us - now_us : 0;
  struct timespec span = {.tv_sec = (time_t)(span_us / 1000000u),
                          .tv_nsec = (long)(span_us % 1000000u) * 1000};
  return pthread_cond_timedwait_relative_np(&pool->released, &pool->lock, &span);
#else
  struct timespec until = {.tv_sec = (time_t)(until_us / 1000000u),
                           .tv_nsec = (long)(until_us % 1000000u) * 1000};
  return pthread_cond_timedwait(&pool->released, &pool->lock, &until);
#endif
}

int zmoe_pool_acquire(zmoe_pool *pool, size_t bytes, uint64_t deadline_us, zmoe_slot **out) {
  *out = NULL;
  if (bytes > pool->classes[pool->n_classes - 1].slot_bytes)
    return ZMOE_EINVAL;
  pthread_mutex_lock(&pool->lock);
  zmoe_slot *slot = take_free(pool, bytes);
  if (slot == NULL) {
    const uint64_t day_us = 86400u * UINT64_C(1000000); /* keeps time_t from overflowing */
    uint64_t until_us = zmoe_now_us() + (deadline_us < day_us ? deadline_us : day_us);
    pool->stats.waits++;
    while (slot == NULL && wait_until(pool, until_us) == 0)
      slot = take_free(pool, bytes);
    if (slot == NULL)
      slot = take_free(pool, bytes);
  }
  if (slot != NULL) {
    pool->in_use++;
    pool->stats.acquired++;
    atomic_store_explicit(&slot->references, 1, memory_order_relaxed);
  } else {
    pool->stats.exhausted++;
  }
  pthread_mutex_unlock(&pool->lock);
  *out = slot;
  return slot != NULL ? ZMOE_OK : ZMOE_EPOOL;
}

void zmoe_slot_retain(zmoe_slot *slot) {
  unsigned before = atomic_fetch_add_explicit(&slot->references, 1, memory_order_relaxed);
  assert(before > 0);
  (void)before;
}

void zmoe_slot_release(zmoe_slot *slot) {
  unsigned before = atomic_fetch_sub_explicit(&slot->references, 1, memory_order_acq_rel);
  assert(before > 0);
  if (before > 1)
    return;
  zmoe_pool *pool = slot->pool;
  size_class *class = &pool->classes[slot->class_index];
  pthread_mutex_lock(&pool->lock);
  slot->next_free = class->free;
  class->free = slot;
  pool->in_use--;
  pool->stats.released++;
  int last = pool->abandoned && pool->in_use == 0;
  pthread_cond_broadcast(&pool->released); /* not all wait for this size */
  pthread_mutex_unlock(&pool->lock);
  if (last)
    pool_free(pool);
}

void *zmoe_slot_payload(zmoe_slot *slot) {
  return slot->payload;
}

size_t zmoe_slot_capacity(const zmoe_slot *slot) {
  return slot->pool->classes[slot->class_index].slot_bytes;
}

void zmoe_pool_stats_get(const zmoe_pool *pool, zmoe_pool_stats *out) {
  zmoe_pool *unlocked = (zmoe_pool *)pool; /* the lock is no part of its value */
  pthread_mutex_lock(&unlocked->lock);
  *out = pool->stats;
  pthread_mutex_unlock(&unlocked->lock);
}
