/* The part of libzmq's stable C interface that zmoe uses.
 *
 * Resolved at run time from the libzmq that pyzmq brings, so that installing
 * needs no system libzmq and a process never holds two; hence these
 * declarations instead of zmq.h.  Names, numbers and sizes are those that
 * libzmq promises for all of its 4.x releases. */
#ifndef ZMOE_ZMQ_API_H
#define ZMOE_ZMQ_API_H

#include <stddef.h>
#include <stdint.h>

typedef union zmq_msg_t {
  unsigned char bytes[64];
  void *alignment;
} zmq_msg_t;

typedef void zmq_free_fn(void *data, void *hint);

enum {
  ZMQ_SUBSCRIBE = 6,
  ZMQ_FD = 14,
  ZMQ_EVENTS = 15,
  ZMQ_RCVTIMEO = 27,
  ZMQ_DONTWAIT = 1,
  ZMQ_SNDMORE = 2,
  ZMQ_EVENT_DISCONNECTED = 0x0200,
  ZMQ_EVENT_HANDSHAKE_SUCCEEDED = 0x1000,
};

typedef struct zmoe_zmq_api {
  int (*msg_init)(zmq_msg_t *msg);
  int (*msg_init_size)(zmq_msg_t *msg, size_t size);
  int (*msg_init_data)(zmq_msg_t *msg, void *data, size_t size, zmq_free_fn *ffn, void *hint);
  int (*msg_close)(zmq_msg_t *msg);
  int (*msg_move)(zmq_msg_t *dest, zmq_msg_t *src);
  void *(*msg_data)(zmq_msg_t *msg);
  size_t (*msg_size)(const zmq_msg_t *msg);
  int (*msg_more)(const zmq_msg_t *msg);
  int (*msg_send)(zmq_msg_t *msg, void *socket, int flags);
  int (*msg_recv)(zmq_msg_t *msg, void *socket, int flags);
  int (*send)(void *socket, const void *data, size_t size, int flags);
  int (*setsockopt)(void *socket, int option, const void *value, size_t size);
  int (*getsockopt)(void *socket, int option, void *value, size_t *size);
  int (*get_errno)(void);
  void (*version)(int *major, int *minor, int *patch);
} zmoe_zmq_api;

/* Filled by zmoe_zmq_load(). */
extern zmoe_zmq_api zmoe_zmq;
int zmoe_zmq_is_loaded(void);

#endif
