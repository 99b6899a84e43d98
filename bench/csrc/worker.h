/* What the C workers of bench/exchange.py share: the control link to the
 * parent, the clock and the loop that obeys it.  Protocol: peers/worker.py.
 */
#ifndef BENCH_WORKER_H
#define BENCH_WORKER_H

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* A run that takes longer than this has lost a peer: SIGALRM ends it. */
#define RUN_DEADLINE_S 120

/* One all-reduce of `bytes` bytes from `mine`; exits on failure. */
typedef void step_fn(void *context, const void *mine, size_t bytes);

static inline void die(const char *what) {
  perror(what);
  exit(1);
}

static inline uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The control link: two streams over one Unix socket, and the last line read. */
typedef struct control {
  FILE *in, *out;
  char line[1024];
} control;

/* Greet the parent that listens at `path` as `rank` with `address`; what comes
 * back, in `line`, is "peers" and the addresses of all ranks. */
static inline void control_greet(control *c, const char *path, int rank, int address) {
  struct sockaddr_un parent = {.sun_family = AF_UNIX};
  if (strlen(path) >= sizeof parent.sun_path) {
    fprintf(stderr, "socket path too long: %s\n", path);
    exit(1);
  }
  strcpy(parent.sun_path, path);
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  if (fd < 0 || connect(fd, (struct sockaddr *)&parent, sizeof parent) != 0)
    die(path);
  c->in = fdopen(fd, "r");
  c->out = fdopen(dup(fd), "w");
  if (c->in == NULL || c->out == NULL)
    die("fdopen");
  fprintf(c->out, "hello %d %d\n", rank, address);
  fflush(c->out);
  if (fgets(c->line, sizeof c->line, c->in) == NULL)
    exit(1);
}

/* Say "ready", then obey "run BYTES ITERATIONS WARMUP" until "quit" or end of file. */
static inline void control_serve(control *c, int rank, step_fn *step, void *context) {
  fputs("ready\n", c->out);
  fflush(c->out);
  signal(SIGPIPE, SIG_IGN);
  alarm(0);
  while (fgets(c->line, sizeof c->line, c->in) != NULL) {
    size_t bytes;
    unsigned iterations, warmup;
    if (sscanf(c->line, "run %zu %u %u", &bytes, &iterations, &warmup) != 3)
      break;
    alarm(RUN_DEADLINE_S);
    uint64_t *samples = calloc(iterations, sizeof *samples);
    float *mine = malloc(bytes);
    if (samples == NULL || mine == NULL)
      die("malloc");
    for (size_t i = 0; i < bytes / sizeof *mine; i++)
      mine[i] = (float)(rank + 1);
    for (unsigned i = 0; i < warmup; i++)
      step(context, mine, bytes);
    for (unsigned i = 0; i < iterations; i++) {
      uint64_t begun = now_ns();
      step(context, mine, bytes);
      samples[i] = now_ns() - begun;
    }
    fputs("done", c->out);
    for (unsigned i = 0; i < iterations; i++) {
      fprintf(c->out, " %llu", (unsigned long long)samples[i]);
    }
    fputc('\n', c->out);
    fflush(c->out);
    free(samples);
    free(mine);
    alarm(0);
  }
}

#endif
