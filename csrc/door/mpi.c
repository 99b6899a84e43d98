/* The part of MPI's C interface that MLX loads by name, over the door.
 *
 * Handles are addresses of objects, as in Open MPI, whose names MLX looks up.  Only sums and
 * all_gather of float32, float16, bfloat16 and 32-bit integers are done. */
#include "common/platform.h"

#include "collectives.h"

#include <limits.h>
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

EXPORT zmoe_mpi_op ompi_mpi_op_sum = {"sum"}, ompi_mpi_op_max = {"max"}, ompi_mpi_op_min = {"min"};
EXPORT zmoe_channel ompi_mpi_comm_world = {.nodes = 0}; /* rank and size are the open door's */

/* MLX makes the types float16, bfloat16, and the sums of each, in this order, first. */
static zmoe_mpi_type made_types[] = {{"float16", 2, ZMOE_F16}, {"bfloat16", 2, ZMOE_BF16}};
static zmoe_mpi_op other_op = {"max or min"};
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

/* All ranks split alike: who does not is found out by the first collective. */
EXPORT int MPI_Comm_split(zmoe_channel *comm, int color, int key, zmoe_channel **out) {
  zmoe_channel *made = comm == &ompi_mpi_comm_world && color >= 0 ? malloc(sizeof *made) : NULL;
  uint32_t width = key & ZMOE_DOOR_WIDTH ? (uint32_t)(key & ~ZMOE_DOOR_WIDTH) : 0;
  if (made == NULL || zmoe_door_channel((uint32_t)color, width, made) != ZMOE_OK) {
    free(made);
    return MPI_FAILURE;
  }
  *out = made;
  return MPI_SUCCESS;
}

EXPORT int MPI_Comm_free(zmoe_channel **comm) {
  if (*comm != &ompi_mpi_comm_world)
    free(*comm);
  *comm = NULL;
  return MPI_SUCCESS;
}

/* ---- collectives --------------------------------------------------------------------- */

static void refuse(const char *what, const zmoe_mpi_type *type, const zmoe_channel *comm, void *out,
                   size_t count) {
  char words[ZMOE_DOOR_WORDS];
  const char *where = comm == &ompi_mpi_comm_world ? ", over the whole world" : "";
  snprintf(words, sizeof words, "%s of %s%s", what, type->name, where);
  zmoe_door_refuse(words, out, count * type->bytes);
}

static int is_done(const zmoe_mpi_type *type, const zmoe_channel *comm) {
  return type->dtype != UNKNOWN_DTYPE && comm != &ompi_mpi_comm_world;
}

EXPORT int MPI_Allreduce(const void *in, void *out, int count, zmoe_mpi_type *type, zmoe_mpi_op *op,
                         zmoe_channel *comm) {
  const void *const in_place = (const void *)1;
  if (op == &ompi_mpi_op_sum && is_done(type, comm)) {
    zmoe_door_sum(comm, in == in_place ? out : in, out, (size_t)count, (zmoe_dtype)type->dtype);
    return MPI_SUCCESS;
  }
  char what[32];
  snprintf(what, sizeof what, "an all_%s", op->name);
  refuse(what, type, comm, out, (size_t)count);
  return MPI_FAILURE;
}

EXPORT int MPI_Allgather(const void *in, int count, zmoe_mpi_type *type, void *out, int out_count,
                         zmoe_mpi_type *out_type, zmoe_channel *comm) {
  if (out_count == count && out_type == type && is_done(type, comm)) {
    zmoe_door_gather(comm, in, out, (size_t)count * type->bytes);
    return MPI_SUCCESS;
  }
  zmoe_channel channel;
  channel_of(comm, &channel);
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
