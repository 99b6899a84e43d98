/* The part of MPI's C interface that MLX loads by name, over the door.
 *
 * Handles are addresses of objects, as in Open MPI, whose names MLX looks up.  Only sums and
 * all_gather of float32, float16, bfloat16 and 32-bit integers are done; for programs also
 * what folds.c has, and all_gather of anything. */
#include "common/platform.h"

#include "collectives.h"
#include "door/folds.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { MPI_SUCCESS = 0, MPI_FAILURE = 1 };
enum { UNKNOWN_DTYPE = -1 };

typedef struct zmoe_mpi_type {
  const char *name;
  size_t bytes;
  int dtype; /* a zmoe_dtype, or UNKNOWN_DTYPE */
} zmoe_mpi_type;

typedef struct zmoe_mpi_op {
  const char *name;
  int fold; /* a zmoe_fold */
} zmoe_mpi_op;

#define TYPE(symbol, name, bytes, dtype)                                                           \
  EXPORT zmoe_mpi_type ompi_mpi_##symbol = {name, bytes, dtype}
TYPE(c_bool, "bool", 1, UNKNOWN_DTYPE);
TYPE(int8_t, "int8", 1, UNKNOWN_DTYPE);
TYPE(uint8_t, "uint8", 1, UNKNOWN_DTYPE);
TYPE(int16_t, "int16", 2, UNKNOWN_DTYPE);
TYPE(uint16_t, "uint16", 2, UNKNOWN_DTYPE);
TYPE(int32_t, "int32", 4, ZMOE_I32);
TYPE(uint32_t, "uint32", 4, ZMOE_I32);
TYPE(int64_t, "int64", 8, UNKNOWN_DTYPE);
TYPE(uint64_t, "uint64", 8, UNKNOWN_DTYPE);
TYPE(float, "float32", 4, ZMOE_F32);
TYPE(double, "float64", 8, UNKNOWN_DTYPE);
TYPE(c_complex, "complex64", 8, UNKNOWN_DTYPE);

EXPORT zmoe_mpi_op ompi_mpi_op_sum = {"sum", ZMOE_FOLD_SUM};
EXPORT zmoe_mpi_op ompi_mpi_op_max = {"max", ZMOE_FOLD_MAX};
EXPORT zmoe_mpi_op ompi_mpi_op_min = {"min", ZMOE_FOLD_MIN};
EXPORT zmoe_channel ompi_mpi_comm_world = {.nodes = 0}; /* rank and size are the open door's */

/* MLX makes the types float16, bfloat16, and the sums of each, in this order, first. */
static zmoe_mpi_type made_types[] = {{"float16", 2, ZMOE_F16}, {"bfloat16", 2, ZMOE_BF16}};
static zmoe_mpi_op other_op = {"max or min", ZMOE_FOLDS};
static unsigned types_made, ops_made;

/* ---- starting ------------------------------------------------------------------------ */

EXPORT int MPI_Get_library_version(char *version, int *length) {
  *length = sprintf(version, "zmoe, after Open MPI");
  return MPI_SUCCESS;
}

EXPORT int MPI_Init(int *argc, char ***argv) {
  (void)argc, (void)argv;
  types_made = ops_made = 0;
  return MPI_SUCCESS;
}

/* Python is gone by then. */
EXPORT int MPI_Finalize(void) {
  return MPI_SUCCESS;
}

EXPORT int MPI_Type_contiguous(int count, zmoe_mpi_type *of, zmoe_mpi_type **out) {
  if (count != 2 || of != &ompi_mpi_uint8_t || types_made >= sizeof made_types / sizeof *made_types)
    return MPI_FAILURE;
  *out = &made_types[types_made++];
  return MPI_SUCCESS;
}

EXPORT int MPI_Type_commit(zmoe_mpi_type **type) {
  (void)type;
  return MPI_SUCCESS;
}

EXPORT int MPI_Op_create(void (*function)(void *, void *, int *, zmoe_mpi_type **), int commutes,
                         zmoe_mpi_op **out) {
  (void)function, (void)commutes;
  *out = ops_made++ < 2 ? &ompi_mpi_op_sum : &other_op;
  return MPI_SUCCESS;
}

/* ---- communicators ------------------------------------------------------------------- */

/* The world's are those of the open door; a communicator keeps its own. */
static int channel_of(const zmoe_channel *comm, zmoe_channel *out) {
  *out = *comm;
  return comm != &ompi_mpi_comm_world || zmoe_door_channel(0, 0, out) == ZMOE_OK ? MPI_SUCCESS
                                                                                 : MPI_FAILURE;
}

EXPORT int MPI_Comm_rank(zmoe_channel *comm, int *rank) {
  zmoe_channel channel;
  int rc = channel_of(comm, &channel);
  *rank = (int)channel.rank;
  return rc;
}

EXPORT int MPI_Comm_size(zmoe_channel *comm, int *size) {
  zmoe_channel channel;
  int rc = channel_of(comm, &channel);
  *size = (int)channel.nodes;
  return rc;
}

static zmoe_channel *make_channel(int color, uint32_t width) {
  zmoe_channel *made = malloc(sizeof *made);
  if (made == NULL || zmoe_door_channel((uint32_t)color, width, made) == ZMOE_OK)
    return made;
  free(made);
  return NULL;
}

/* MLX frees the communicator of a program's group that nobody holds while collectives of it are
 * yet to come: so each is there for as long as the process. */
static zmoe_channel *lasting_channel(int color) {
  static struct kept {
    zmoe_channel channel;
    struct kept *next;
  } *first;
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&lock);
  struct kept *each = first;
  while (each != NULL && each->channel.layer != (uint32_t)color)
    each = each->next;
  if (each == NULL && (each = malloc(sizeof *each)) != NULL) {
    zmoe_door_channel((uint32_t)color, 0, &each->channel);
    each->next = first;
    first = each;
  }
  pthread_mutex_unlock(&lock);
  return each == NULL ? NULL : &each->channel;
}

/* All ranks split alike: who does not is found out by the first collective.  A program may
 * split what it has split, but not change the order of the ranks. */
EXPORT int MPI_Comm_split(zmoe_channel *comm, int color, int key, zmoe_channel **out) {
  zmoe_channel whole;
  uint32_t width = key & ZMOE_DOOR_WIDTH ? (uint32_t)(key & ~ZMOE_DOOR_WIDTH) : 0;
  *out = NULL;
  if (channel_of(comm, &whole) == MPI_SUCCESS && color >= 0) {
    if (whole.is_program && (key == 0 || key == (int)whole.rank))
      *out = lasting_channel(color);
    else if (!whole.is_program && comm == &ompi_mpi_comm_world)
      *out = make_channel(color, width);
  }
  return *out != NULL ? MPI_SUCCESS : MPI_FAILURE;
}

EXPORT int MPI_Comm_free(zmoe_channel **comm) {
  if (*comm != &ompi_mpi_comm_world && !(*comm)->is_program)
    free(*comm);
  *comm = NULL;
  return MPI_SUCCESS;
}

/* ---- collectives --------------------------------------------------------------------- */

static int lacks_steps(const zmoe_channel *comm, const zmoe_channel *channel) {
  return comm == &ompi_mpi_comm_world && !channel->is_program;
}

static void refuse(const char *what, const zmoe_mpi_type *type, const zmoe_channel *comm, void *out,
                   size_t count) {
  char words[ZMOE_DOOR_WORDS];
  zmoe_channel channel;
  channel_of(comm, &channel);
  const char *where = lacks_steps(comm, &channel) ? ", over the whole world" : "";
  snprintf(words, sizeof words, "%s of %s%s", what, type->name, where);
  zmoe_door_refuse(words, out, count * type->bytes);
}

static int is_done(const zmoe_mpi_type *type, const zmoe_channel *comm, zmoe_channel *channel) {
  return channel_of(comm, channel) == MPI_SUCCESS && type->dtype != UNKNOWN_DTYPE &&
         !lacks_steps(comm, channel);
}

/* In the order of the ranks. */
static void fold_all(const zmoe_channel *channel, const void *in, void *out, size_t count,
                     size_t item, zmoe_fold *fold) {
  size_t bytes = count * item;
  uint8_t *all = malloc(bytes * channel->nodes + 1);
  if (all == NULL) {
    zmoe_door_refuse("a collective that this machine's memory does not hold", out, bytes);
    return;
  }
  zmoe_door_gather(channel, in, all, bytes);
  memcpy(out, all, bytes);
  for (uint32_t r = 1; r < channel->nodes; r++)
    fold(out, all + r * bytes, count);
  free(all);
}

EXPORT int MPI_Allreduce(const void *in, void *out, int count, zmoe_mpi_type *type, zmoe_mpi_op *op,
                         zmoe_channel *comm) {
  const void *const in_place = (const void *)1;
  zmoe_channel channel;
  int can_be = is_done(type, comm, &channel);
  if (op == &ompi_mpi_op_sum && can_be) {
    zmoe_door_sum(&channel, in == in_place ? out : in, out, (size_t)count, (zmoe_dtype)type->dtype);
    return MPI_SUCCESS;
  }
  zmoe_fold *fold = channel.is_program ? zmoe_fold_of(type->name, op->fold) : NULL;
  if (fold != NULL) {
    fold_all(&channel, in == in_place ? out : in, out, (size_t)count, type->bytes, fold);
    return MPI_SUCCESS;
  }
  char what[32];
  snprintf(what, sizeof what, "an all_%s", op->name);
  refuse(what, type, comm, out, (size_t)count);
  return MPI_FAILURE;
}

EXPORT int MPI_Allgather(const void *in, int count, zmoe_mpi_type *type, void *out, int out_count,
                         zmoe_mpi_type *out_type, zmoe_channel *comm) {
  zmoe_channel channel;
  int is_done_here = is_done(type, comm, &channel) || channel.is_program;
  if (is_done_here && out_count == count && out_type == type) {
    zmoe_door_gather(&channel, in, out, (size_t)count * type->bytes);
    return MPI_SUCCESS;
  }
  refuse("an all_gather", type, comm, out, (size_t)count * channel.nodes);
  return MPI_FAILURE;
}

EXPORT int MPI_Send(const void *in, int count, zmoe_mpi_type *type, int to, int tag,
                    zmoe_channel *comm) {
  (void)in, (void)count, (void)to, (void)tag;
  refuse("a send", type, comm, NULL, 0);
  return MPI_FAILURE;
}

EXPORT int MPI_Recv(void *out, int count, zmoe_mpi_type *type, int from, int tag,
                    zmoe_channel *comm, void *status) {
  (void)from, (void)tag, (void)status;
  refuse("a recv", type, comm, out, (size_t)count);
  return MPI_FAILURE;
}
