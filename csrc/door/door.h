/* The door: MLX's way to the exchange from inside its graph.
 *
 * MLX loads an MPI library by name and calls it on the thread of a CPU stream.  This
 * module is that library (mpi.c): an all_sum or all_gather of a communicator that was
 * split off the world is then an exchange.  A communicator stands for one layer (the
 * color that it was split with), whose place in the order of a pass that is.
 *
 * There is one door in a process, and so one run at a time.  MLX takes no notice of
 * what a collective returns: one that fails writes zeros, as do all after it, at once,
 * so that the graph comes to its end, and whoever evaluated it asks zmoe_door_failed.
 *
 * A program that knows nothing of us has no steps, asks nothing, and calls on the world.
 * For it each collective is a step of its own, of whose number nobody is told; one that
 * fails returns nothing false: it waits for whoever looks at zmoe_door_failed to end the
 * process, and ends it after ZMOE_DOOR_END_S itself. */
#ifndef ZMOE_DOOR_H
#define ZMOE_DOOR_H

#include <stddef.h>
#include <stdint.h>

#include "common/dtype.h"
#include "exchange/exchange.h"

/* In the key of a split: the lower bits are the width of a row, in which sums are cut
 * into frames and blocks; without it there is one row. */
#define ZMOE_DOOR_WIDTH 1073741824
#define ZMOE_DOOR_STEPS 4 /* most steps that have begun and are not yet in their first layer */
#define ZMOE_DOOR_WORDS 96
#define ZMOE_DOOR_END_S 10

typedef struct zmoe_door_config {
  zmoe_exchange *exchange; /* connected, of a decentralised run */
  uint32_t rank, nodes;
  size_t max_payload_bytes; /* the exchange's: what is larger travels in chunks */
  int32_t wire_dtype;       /* of sums of floats; -1: as they are */
  uint64_t scatter_bytes;   /* payloads of sums of this size and more are scattered */
  uint64_t deadline_us;     /* of one collective */
  uint64_t patience_us;     /* of one that may be repeated after it, at most deadline_us */
  int wakeup_fd;            /* non-blocking: a byte SIGINT or SIGTERM ends a wait; -1: none */
  int is_program;           /* any MLX program calls, which knows of no steps: see above */
} zmoe_door_config;

typedef struct zmoe_door_failure {
  int status; /* ZMOE_OK, or why collectives write zeros; ZMOE_EINTR: given up by this rank */
  uint32_t step, layer;
  zmoe_fault fault;
  int is_repeatable;             /* with ZMOE_ETIMEOUT: see zmoe_door_repeat */
  char refused[ZMOE_DOOR_WORDS]; /* with ZMOE_EINVAL: what the exchange does not do */
} zmoe_door_failure;

/* Takes the exchange, which is the door's until it closes.  ZMOE_EINVAL: it is open already. */
int zmoe_door_open(const zmoe_door_config *config);
/* Ends what is under way; later collectives write zeros. */
void zmoe_door_close(void);
/* The next step, whose collectives follow in the order of their layers, and the digest of its
 * plan.  They wait for patience_us each, or for deadline_us if it `is_patient`.  ZMOE_EINVAL: too
 * many have begun, or the door is closed. */
int zmoe_door_begin(uint32_t step, uint64_t plan, int is_patient);
/* After a failure that is repeatable, once no collective is under way: the failed collective
 * of the step can be called again, and waits on, for deadline_us, as do those after it.  Later
 * steps that have begun follow.  To the others this rank has only been slow. */
int zmoe_door_repeat(void);
/* From any thread: waits, also those to come, end within 100 ms. */
void zmoe_door_cancel(void);
/* The first failure since it was opened, if any; returns its status. */
int zmoe_door_failed(zmoe_door_failure *out);
/* Microseconds that collectives took since the last call. */
uint64_t zmoe_door_spent_us(void);
/* How many collectives a program has called. */
uint64_t zmoe_door_called(void);
/* Between steps: zmoe_exchange_service, but where a collective is under way, which does it. */
int zmoe_door_service(zmoe_fault *fault);
/* zmoe_exchange_links; while a collective is under way, as they last were. */
uint64_t zmoe_door_links(void);

#endif
