/* The slot pool: classes, alignment, waiting, threads. */
#include "common/platform.h"

#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "exchange/pool.h"

static void test_classes(void) {
  zmoe_pool_class classes[] = {{100, 2}, {5000, 1}};
  zmoe_pool *pool;
  zmoe_slot *slots[4];
  CHECK_EQUAL(zmoe_pool_create(classes, 2, 64, &pool), ZMOE_OK);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 0, 0, &slots[0]), ZMOE_OK);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 100, 0, &slots[1]), ZMOE_OK);
  CHECK_EQUAL(zmoe_slot_capacity(slots[0]), 100);
  CHECK_EQUAL(zmoe_slot_capacity(slots[1]), 100);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 10, 0, &slots[2]), ZMOE_OK); /* a larger one helps out */
  CHECK_EQUAL(zmoe_slot_capacity(slots[2]), 5000);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 10, 0, &slots[3]), ZMOE_EPOOL);
  CHECK(slots[3] == NULL);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 5001, 0, &slots[3]), ZMOE_EINVAL);
  zmoe_pool_stats stats;
  zmoe_pool_stats_get(pool, &stats);
  CHECK_EQUAL(stats.acquired, 3);
  CHECK_EQUAL(stats.exhausted, 1);
  CHECK_EQUAL(stats.waits, 1);
  CHECK(stats.total_bytes >= 2 * 100 + 5000 && stats.locked_bytes <= stats.total_bytes);
  for (int i = 0; i < 3; i++)
    zmoe_slot_release(slots[i]);
  zmoe_pool_destroy(pool);
}

static void test_slots_do_not_overlap(void) {
  for (size_t alignment = 64; alignment <= 65536; alignment *= 4) {
    zmoe_pool_class classes[] = {{100, 3}, {300, 5}};
    zmoe_pool *pool;
    zmoe_slot *slots[8];
    CHECK_EQUAL(zmoe_pool_create(classes, 2, alignment, &pool), ZMOE_OK);
    for (int i = 0; i < 8; i++) {
      CHECK_EQUAL(zmoe_pool_acquire(pool, i < 3 ? 100 : 300, 0, &slots[i]), ZMOE_OK);
      unsigned char *payload = zmoe_slot_payload(slots[i]);
      CHECK_EQUAL((uintptr_t)payload % alignment, 0);
      memset(payload - ZMOE_HEADER_BYTES, i, ZMOE_HEADER_BYTES + zmoe_slot_capacity(slots[i]));
    }
    for (int i = 0; i < 8; i++) {
      unsigned char *payload = zmoe_slot_payload(slots[i]);
      CHECK_EQUAL(payload[-ZMOE_HEADER_BYTES], i);
      CHECK_EQUAL(payload[zmoe_slot_capacity(slots[i]) - 1], i);
      zmoe_slot_release(slots[i]);
    }
    zmoe_pool_destroy(pool);
  }
}

/* Far from where a copy to the beginning of a page would be slow; see pool.c. */
static void test_frames_begin_in_the_middle_of_a_page(void) {
  zmoe_pool_class classes[] = {{100, 3}, {65536, 3}};
  zmoe_pool *pool;
  zmoe_slot *slots[6];
  CHECK_EQUAL(zmoe_pool_create(classes, 2, 64, &pool), ZMOE_OK);
  for (int i = 0; i < 6; i++) {
    CHECK_EQUAL(zmoe_pool_acquire(pool, i < 3 ? 100 : 65536, 0, &slots[i]), ZMOE_OK);
    unsigned char *frame = (unsigned char *)zmoe_slot_payload(slots[i]) - ZMOE_HEADER_BYTES;
    CHECK_EQUAL((uintptr_t)frame % 4096, 2048);
  }
  for (int i = 0; i < 6; i++)
    zmoe_slot_release(slots[i]);
  zmoe_pool_destroy(pool);
}

static void test_refusals(void) {
  zmoe_pool *pool;
  zmoe_pool_class none[] = {{100, 0}}, falling[] = {{100, 1}, {100, 1}};
  CHECK_EQUAL(zmoe_pool_create(none, 1, 64, &pool), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_pool_create(none, 0, 64, &pool), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_pool_create(falling, 2, 64, &pool), ZMOE_EINVAL);
  falling[1].slot_bytes = 200;
  CHECK_EQUAL(zmoe_pool_create(falling, 2, 96, &pool), ZMOE_EINVAL);
  CHECK_EQUAL(zmoe_pool_create(falling, 2, 32, &pool), ZMOE_EINVAL);
  CHECK(pool == NULL);
}

static void *release_later(void *slot) {
  zmoe_slot_release(slot);
  return NULL;
}

static void test_waits_for_another_thread(void) {
  zmoe_pool_class class = {64, 1};
  zmoe_pool *pool;
  CHECK_EQUAL(zmoe_pool_create(&class, 1, 64, &pool), ZMOE_OK);
  for (int i = 0; i < 200; i++) {
    zmoe_slot *first, *second;
    pthread_t thread;
    CHECK_EQUAL(zmoe_pool_acquire(pool, 1, 0, &first), ZMOE_OK);
    CHECK_EQUAL(pthread_create(&thread, NULL, release_later, first), 0);
    CHECK_EQUAL(zmoe_pool_acquire(pool, 1, 20000000, &second), ZMOE_OK);
    CHECK_EQUAL(pthread_join(thread, NULL), 0);
    zmoe_slot_release(second);
  }
  zmoe_pool_destroy(pool);
}

typedef struct wish {
  zmoe_pool *pool;
  size_t bytes;
  atomic_int granted;
} wish;

static void *wait_for_slot(void *data) {
  wish *w = data;
  zmoe_slot *slot;
  CHECK_EQUAL(zmoe_pool_acquire(w->pool, w->bytes, UINT64_MAX, &slot), ZMOE_OK);
  atomic_store(&w->granted, 1);
  zmoe_slot_release(slot);
  return NULL;
}

/* Who has waited longest waits for a large slot; a small one comes free. */
static void test_whoever_can_use_a_slot_wakes(void) {
  zmoe_pool_class classes[] = {{64, 1}, {1024, 1}};
  zmoe_pool *pool;
  zmoe_slot *small, *large;
  zmoe_pool_stats stats;
  CHECK_EQUAL(zmoe_pool_create(classes, 2, 64, &pool), ZMOE_OK);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 64, 0, &small), ZMOE_OK);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 1024, 0, &large), ZMOE_OK);
  wish wishes[] = {{.pool = pool, .bytes = 1024}, {.pool = pool, .bytes = 64}};
  pthread_t threads[2];
  for (uint32_t i = 0; i < 2; i++) {
    CHECK_EQUAL(pthread_create(&threads[i], NULL, wait_for_slot, &wishes[i]), 0);
    do
      zmoe_pool_stats_get(pool, &stats);
    while (stats.waits <= i);
  }
  zmoe_slot_release(small);
  for (int tries = 0; !atomic_load(&wishes[1].granted); tries++) {
    struct timespec pause = {.tv_nsec = 1000000};
    CHECK(tries < 60000);
    nanosleep(&pause, NULL);
  }
  zmoe_slot_release(large);
  for (uint32_t i = 0; i < 2; i++)
    CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
  zmoe_pool_destroy(pool);
}

enum { ROUNDS = 20000 };

static void *churn(void *data) {
  zmoe_pool *pool = data;
  for (int i = 0; i < ROUNDS; i++) {
    zmoe_slot *slot;
    CHECK_EQUAL(zmoe_pool_acquire(pool, 64, 20000000, &slot), ZMOE_OK);
    *(volatile int *)zmoe_slot_payload(slot) = i;
    zmoe_slot_retain(slot);
    zmoe_slot_release(slot);
    CHECK_EQUAL(*(volatile int *)zmoe_slot_payload(slot), i);
    zmoe_slot_release(slot);
  }
  return NULL;
}

static void test_threads_share_slots(void) {
  zmoe_pool_class class = {64, 2};
  zmoe_pool *pool;
  pthread_t threads[3];
  CHECK_EQUAL(zmoe_pool_create(&class, 1, 64, &pool), ZMOE_OK);
  for (int i = 0; i < 3; i++)
    CHECK_EQUAL(pthread_create(&threads[i], NULL, churn, pool), 0);
  for (int i = 0; i < 3; i++)
    CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
  zmoe_pool_stats stats;
  zmoe_pool_stats_get(pool, &stats);
  CHECK_EQUAL(stats.acquired, 3 * ROUNDS);
  CHECK_EQUAL(stats.released, 3 * ROUNDS);
  zmoe_pool_destroy(pool);
}

/* LeakSanitizer sees to it that the last release frees an abandoned pool. */
static void test_abandoned(void) {
  zmoe_pool_class class = {64, 2};
  zmoe_pool *pool;
  zmoe_slot *first, *second;
  CHECK_EQUAL(zmoe_pool_create(&class, 1, 64, &pool), ZMOE_OK);
  zmoe_pool_abandon(pool);
  CHECK_EQUAL(zmoe_pool_create(&class, 1, 64, &pool), ZMOE_OK);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 1, 0, &first), ZMOE_OK);
  CHECK_EQUAL(zmoe_pool_acquire(pool, 1, 0, &second), ZMOE_OK);
  zmoe_pool_abandon(pool);
  zmoe_slot_release(second);
  memset(zmoe_slot_payload(first), 1, 64);
  zmoe_slot_release(first);
}

int main(void) {
  static const test_case tests[] = {
      {"size classes and exhaustion", test_classes},
      {"slots are aligned and do not overlap", test_slots_do_not_overlap},
      {"frames begin in the middle of a page", test_frames_begin_in_the_middle_of_a_page},
      {"unusable classes are refused", test_refusals},
      {"an exhausted pool waits for a release", test_waits_for_another_thread},
      {"whoever can use a slot wakes", test_whoever_can_use_a_slot_wakes},
      {"threads share slots", test_threads_share_slots},
      {"the last release frees an abandoned pool", test_abandoned},
  };
  RUN(tests);
  return 0;
}
