/* What mpi.c asks of door.c. */
#ifndef ZMOE_COLLECTIVES_H
#define ZMOE_COLLECTIVES_H

#include "door/door.h"

typedef struct zmoe_channel {
  uint64_t opening; /* which opening of the door it was split in */
  uint32_t rank, nodes, layer;
  uint32_t width; /* 0: not known */
  int is_program;
} zmoe_channel;

/* ZMOE_EINVAL while the door is closed. */
int zmoe_door_channel(uint32_t layer, uint32_t width, zmoe_channel *out);
/* `count` elements of `dtype`: ZMOE_I32 or floats; src may be out. */
void zmoe_door_sum(const zmoe_channel *channel, const void *src, void *out, size_t count,
                   zmoe_dtype dtype);
/* `bytes` of every rank, by rank, bit for bit. */
void zmoe_door_gather(const zmoe_channel *channel, const void *src, void *out, size_t bytes);
/* Fails with these words, and writes zeros. */
void zmoe_door_refuse(const char *what, void *out, size_t bytes);

#endif
