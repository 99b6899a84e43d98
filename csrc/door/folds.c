#include "door/folds.h"

#include <stdint.h>
#include <string.h>

/* Integers wrap around, as in MLX: U is the unsigned type of the width of T. */
#define FOLDS(name, T, U)                                                                          \
  static void sum_##name(void *into, const void *from, size_t count) {                             \
    T *a = into;                                                                                   \
    for (size_t i = 0; i < count; i++)                                                             \
      a[i] = (T)((U)a[i] + (U)((const T *)from)[i]);                                               \
  }                                                                                                \
  static void max_##name(void *into, const void *from, size_t count) {                             \
    T *a = into;                                                                                   \
    for (size_t i = 0; i < count; i++)                                                             \
      a[i] = ((const T *)from)[i] > a[i] ? ((const T *)from)[i] : a[i];                            \
  }                                                                                                \
  static void min_##name(void *into, const void *from, size_t count) {                             \
    T *a = into;                                                                                   \
    for (size_t i = 0; i < count; i++)                                                             \
      a[i] = ((const T *)from)[i] < a[i] ? ((const T *)from)[i] : a[i];                            \
  }

FOLDS(int8, int8_t, uint8_t)
FOLDS(uint8, uint8_t, uint8_t)
FOLDS(int16, int16_t, uint16_t)
FOLDS(uint16, uint16_t, uint16_t)
FOLDS(int32, int32_t, uint32_t)
FOLDS(uint32, uint32_t, uint32_t)
FOLDS(int64, int64_t, uint64_t)
FOLDS(uint64, uint64_t, uint64_t)
FOLDS(float32, float, float)

#define ROW(name)                                                                                  \
  {                                                                                                \
    #name, {                                                                                       \
      sum_##name, max_##name, min_##name                                                           \
    }                                                                                              \
  }
static const struct {
  const char *type;
  zmoe_fold *folds[ZMOE_FOLDS];
} table[] = {ROW(int8),   ROW(uint8), ROW(int16),  ROW(uint16), ROW(int32),
             ROW(uint32), ROW(int64), ROW(uint64), ROW(float32)};

zmoe_fold *zmoe_fold_of(const char *type, int op) {
  for (size_t i = 0; i < sizeof table / sizeof *table && op < ZMOE_FOLDS; i++)
    if (strcmp(table[i].type, type) == 0)
      return table[i].folds[op];
  return NULL;
}
