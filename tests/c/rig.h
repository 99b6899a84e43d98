/* Nodes of one process for the tests: real exchanges, and puppets, which have
 * the same sockets but are moved by the test. */
#ifndef ZMOE_RIG_H
#define ZMOE_RIG_H

#include "exchange/exchange.h"
#include "exchange/zmq_api.h"

enum {
  RIG_SESSION = 0x5eed,
  RIG_MAX_BYTES = 65536,
  RIG_SMALL_BYTES = 256,
  RIG_PATIENCE_MS = 60000, /* longer than anything takes that does work */
  RIG_PATIENCE_US = RIG_PATIENCE_MS * 1000,
};

typedef struct rig_node {
  uint32_t rank, nodes;
  void *xpub, *sub, *router;
  void *dealers[ZMOE_MAX_NODES], *monitors[ZMOE_MAX_NODES];
  char data[64], control[64]; /* addresses */
  zmoe_exchange *ex;          /* NULL for a puppet */
} rig_node;

/* Loads libzmq from the path in argv[1] and makes the context. */
void rig_start(int argc, char **argv);
void rig_stop(void);

/* Connected nodes 0..n-1; those in the bit mask `puppets` are puppets. */
typedef struct rig_options {
  uint32_t nodes;
  uint64_t puppets;
  uint32_t spin_us, resend_ms, grace_ms;
  uint32_t dispatch_rows; /* 0: decentralised */
  int no_payload_checksum;
} rig_options;

/* An exchange of whole partials, digest 0. */
zmoe_call rig_call(uint32_t step, uint32_t layer, uint32_t rows, uint32_t width, zmoe_dtype dtype);
/* Publishes f32 without waiting for a slot. */
int rig_node_send(rig_node *node, const zmoe_call *call, const float *src);
void rig_open(rig_node *nodes, rig_options options);
void rig_close(rig_node *nodes, uint32_t n);
/* Close the sockets of one node, as when its process dies; may be opened again
 * as a puppet at the same addresses. */
void rig_kill(rig_node *node);
void rig_return(rig_node *node, const rig_node *nodes);
/* The same, and waits until the others' exchanges, which it serves, subscribed again. */
void rig_revive(rig_node *node, const rig_node *nodes);
/* Until every other node is subscribed to `node` and linked. */
void rig_wait_ready(rig_node *node);

/* A socket of a stranger, with time-outs, connected to `address`. */
void *rig_socket(int type, const char *address);
void rig_close_socket(void *socket);
void rig_subscribe(void *socket, const void *topic, size_t bytes);
void rig_send(void *socket, const void *data, size_t bytes, int more);
/* Receives one part; -1 when nothing comes within `wait_ms`. */
int rig_receive(void *socket, void *data, size_t bytes, int wait_ms);

/* Encodes the header of a frame whose payload is in its place, with the checksum of it;
 * returns the frame's length. */
size_t rig_encode(const zmoe_header *header, uint8_t *frame);
/* A header of `rank` for f32 (1, 4) of step and layer, and the frame of it with
 * the payload {v, v, v, v}; returns its length. */
zmoe_header rig_header(uint32_t rank, uint32_t step, uint32_t layer);
size_t rig_frame(const zmoe_header *header, float value, uint8_t *out);
/* A puppet publishes that frame. */
void rig_publish(rig_node *puppet, uint32_t step, uint32_t layer, float value);
/* A node publishes (1, 4) of `value` to all, digest 0. */
int rig_node_publish(rig_node *node, uint32_t step, uint32_t layer, float value);
/* It collects until done or failed; the sum's first element goes to `out`. */
int rig_collect(rig_node *node, float *out, zmoe_fault *fault);
/* All of them collect in turns until all are done; sums[r] is f32. */
void rig_collect_all(rig_node *nodes, uint32_t n, float *const *sums);
/* The node serves until `*counter` of its statistics, refreshed, reaches `least`. */
#define RIG_UNTIL(node, field, least)                                                              \
  do {                                                                                             \
    zmoe_exchange_stats stats_;                                                                    \
    zmoe_fault fault_;                                                                             \
    uint64_t until_us_ = rig_now_us() + RIG_PATIENCE_US;                                           \
    do {                                                                                           \
      zmoe_exchange_service((node)->ex, &fault_);                                                  \
      zmoe_exchange_stats_get((node)->ex, &stats_);                                                \
      CHECK(rig_now_us() < until_us_ && #field[0]);                                                \
    } while (stats_.field < (uint64_t)(least));                                                    \
    CHECK_EQUAL(stats_.field, least);                                                              \
  } while (0)
uint64_t rig_now_us(void);

enum { ZMQ_PAIR, ZMQ_DEALER = 5, ZMQ_ROUTER, ZMQ_XPUB = 9, ZMQ_SUB = 2 };

#endif
