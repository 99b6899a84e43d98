/* Checks that say where they failed, and tests as a table. */
#ifndef ZMOE_CHECK_H
#define ZMOE_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                           \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                      \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

#define CHECK_EQUAL(left, right)                                                                   \
  do {                                                                                             \
    long long left_ = (long long)(left), right_ = (long long)(right);                              \
    if (left_ != right_) {                                                                         \
      fprintf(stderr, "%s:%d: failed: %s is %lld, %s is %lld\n", __FILE__, __LINE__, #left, left_, \
              #right, right_);                                                                     \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

typedef struct test_case {
  const char *name;
  void (*run)(void);
} test_case;

#define RUN(table)                                                                                 \
  do {                                                                                             \
    for (size_t i_ = 0; i_ < sizeof(table) / sizeof *(table); i_++) {                              \
      printf("   %s\n", (table)[i_].name);                                                         \
      fflush(stdout);                                                                              \
      (table)[i_].run();                                                                           \
    }                                                                                              \
  } while (0)

#endif
