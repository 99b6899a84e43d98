/* MPI_Allreduce of float32, as a worker of bench/exchange.py.
 * usage: mpirun -n NODES mpi_allreduce CONTROL
 */
#include "worker.h"

#include <mpi.h>

typedef struct sum {
  float *result;
  size_t result_bytes;
  int nodes;
} sum;

static void step(void *context, const void *mine, size_t bytes) {
  sum *s = context;
  if (s->result_bytes < bytes) {
    if ((s->result = realloc(s->result, bytes)) == NULL)
      die("realloc");
    s->result_bytes = bytes;
  }
  int count = (int)(bytes / sizeof(float));
  if (MPI_Allreduce(mine, s->result, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD) != MPI_SUCCESS ||
      s->result[0] != (float)(s->nodes * (s->nodes + 1) / 2)) {
    fputs("MPI_Allreduce gave a wrong sum\n", stderr);
    exit(1);
  }
}

int main(int argc, char **argv) {
  int rank;
  sum s = {0};
  alarm(RUN_DEADLINE_S);
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &s.nodes);
  if (argc != 2) {
    fputs("usage: mpirun -n NODES mpi_allreduce CONTROL\n", stderr);
    return 2;
  }
  control c;
  control_greet(&c, argv[1], rank, 0);
  control_serve(&c, rank, step, &s);
  /* No MPI_Finalize when the parent is gone: it would wait for the others. */
  _exit(0);
}
