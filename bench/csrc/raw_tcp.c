/* The limit of what TCP allows: a full mesh of sockets over which every rank
 * sends its payload to all peers and receives all of theirs.  No framing and
 * no sum.  usage: raw_tcp CONTROL RANK NODES block|spin
 */
#include "worker.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>

#define MAX_NODES 64

typedef struct mesh {
  int rank, nodes, spin;
  int yield; /* more spinning ranks than cores: let the others run */
  int fds[MAX_NODES];
  uint8_t *inbox[MAX_NODES];
  size_t inbox_bytes;
} mesh;

static struct sockaddr_in loopback(uint16_t port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

static int listen_anywhere(int *port) {
  struct sockaddr_in address = loopback(0);
  socklen_t size = sizeof address;
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) != 0 || listen(fd, MAX_NODES) != 0 ||
      getsockname(fd, (struct sockaddr *)&address, &size) != 0) {
    die("listen");
  }
  *port = ntohs(address.sin_port);
  return fd;
}

static void keep(mesh *m, int peer, int fd) {
  int on = 1;
  if (peer < 0 || peer >= m->nodes || peer == m->rank)
    die("an unknown rank connected");
  if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0)
    die("TCP_NODELAY");
  if (fcntl(fd, F_SETFL, O_NONBLOCK) != 0)
    die("O_NONBLOCK");
  m->fds[peer] = fd;
}

/* Connect to the lower ranks, accept the higher ones. */
static void mesh_connect(mesh *m, int listener, char *ports) {
  char *word = strtok(ports, " \n"); /* "peers" */
  for (int peer = 0; peer < m->rank; peer++) {
    word = strtok(NULL, " \n");
    if (word == NULL)
      die("too few ports");
    struct sockaddr_in address = loopback((uint16_t)atoi(word));
    uint8_t me = (uint8_t)m->rank;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
      die("connect");
    if (send(fd, &me, 1, 0) != 1)
      die("send");
    keep(m, peer, fd);
  }
  for (int peer = m->rank + 1; peer < m->nodes; peer++) {
    uint8_t who;
    int fd = accept(listener, NULL, NULL);
    if (fd < 0 || recv(fd, &who, 1, 0) != 1)
      die("accept");
    keep(m, who, fd);
  }
}

/* How many bytes a non-blocking call moved; 0 when it would have blocked. */
static size_t moved(ssize_t result, int receiving) {
  if (result > 0)
    return (size_t)result;
  if (result == 0 && receiving)
    die("a peer closed its socket");
  if (result < 0 && errno != EAGAIN && errno != EINTR)
    die("socket");
  return 0;
}

static void wait_for_sockets(const mesh *m, const size_t *to_send, const size_t *to_recv) {
  struct pollfd polled[MAX_NODES];
  nfds_t count = 0;
  for (int peer = 0; peer < m->nodes; peer++) {
    short events = 0;
    if (to_recv[peer] > 0)
      events |= POLLIN;
    if (to_send[peer] > 0)
      events |= POLLOUT;
    if (events)
      polled[count++] = (struct pollfd){.fd = m->fds[peer], .events = events};
  }
  if (poll(polled, count, -1) < 0 && errno != EINTR)
    die("poll");
}

static void step(void *context, const void *mine, size_t bytes) {
  mesh *m = context;
  size_t to_send[MAX_NODES] = {0}, to_recv[MAX_NODES] = {0};
  size_t left = 0;
  if (m->inbox_bytes < bytes) {
    for (int peer = 0; peer < m->nodes; peer++) {
      if ((m->inbox[peer] = realloc(m->inbox[peer], bytes)) == NULL)
        die("realloc");
    }
    m->inbox_bytes = bytes;
  }
  for (int peer = 0; peer < m->nodes; peer++) {
    if (peer == m->rank)
      continue;
    to_send[peer] = to_recv[peer] = bytes;
    left += 2 * bytes;
  }
  for (int first = 1; left > 0; first = 0) {
    if (!first && !m->spin)
      wait_for_sockets(m, to_send, to_recv);
    if (!first && m->yield)
      sched_yield();
    for (int peer = 0; peer < m->nodes; peer++) {
      if (to_send[peer] > 0) {
        const uint8_t *from = (const uint8_t *)mine + (bytes - to_send[peer]);
        size_t sent = moved(send(m->fds[peer], from, to_send[peer], 0), 0);
        to_send[peer] -= sent;
        left -= sent;
      }
      if (to_recv[peer] > 0 && (m->spin || !first)) {
        uint8_t *to = m->inbox[peer] + (bytes - to_recv[peer]);
        size_t got = moved(recv(m->fds[peer], to, to_recv[peer], 0), 1);
        to_recv[peer] -= got;
        left -= got;
      }
    }
  }
}

int main(int argc, char **argv) {
  if (argc != 5) {
    fputs("usage: raw_tcp CONTROL RANK NODES block|spin\n", stderr);
    return 2;
  }
  mesh m = {.rank = atoi(argv[2]), .nodes = atoi(argv[3]), .spin = strcmp(argv[4], "spin") == 0};
  if (m.nodes < 2 || m.nodes > MAX_NODES || m.rank < 0 || m.rank >= m.nodes)
    return 2;
  m.yield = m.spin && m.nodes > sysconf(_SC_NPROCESSORS_ONLN);
  alarm(RUN_DEADLINE_S);
  int port;
  int listener = listen_anywhere(&port);
  control c;
  control_greet(&c, argv[1], m.rank, port);
  mesh_connect(&m, listener, c.line);
  control_serve(&c, m.rank, step, &m);
  return 0;
}
