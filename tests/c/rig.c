#include "common/platform.h"

#include "rig.h"

#include <dlfcn.h>
#include <string.h>

#include "check.h"
#include "exchange/exchange_internal.h"

enum {
  ZMQ_ROUTING_ID = 5,
  ZMQ_LINGER = 17,
  ZMQ_LAST_ENDPOINT = 32,
  ZMQ_RECONNECT_IVL = 18,
  ZMQ_PROBE_ROUTER = 51,
  ZMQ_IMMEDIATE = 39,
  ZMQ_XPUB_MANUAL = 71,
  ZMQ_ROUTER_HANDOVER = 56,
};

static struct {
  void *(*ctx_new)(void);
  int (*ctx_set)(void *, int, int);
  int (*ctx_term)(void *);
  void *(*socket)(void *, int);
  int (*bind)(void *, const char *);
  int (*connect)(void *, const char *);
  int (*close)(void *);
  int (*monitor)(void *, const char *, int);
  int (*recv)(void *, void *, size_t, int);
} zmq;
static void *context;

static void find(void *library, const char *name, void *out) {
  void *symbol = dlsym(library, name);
  CHECK(symbol != NULL);
  memcpy(out, &symbol, sizeof symbol);
}

void rig_start(int argc, char **argv) {
  char error[256] = "";
  CHECK(argc > 1);
  if (zmoe_zmq_load(argv[1], error, sizeof error) != ZMOE_OK) {
    fprintf(stderr, "%s\n", error);
    exit(1);
  }
  void *library = dlopen(argv[1], RTLD_NOW);
  CHECK(library != NULL);
  find(library, "zmq_ctx_new", &zmq.ctx_new);
  find(library, "zmq_ctx_set", &zmq.ctx_set);
  find(library, "zmq_ctx_term", &zmq.ctx_term);
  find(library, "zmq_socket", &zmq.socket);
  find(library, "zmq_bind", &zmq.bind);
  find(library, "zmq_connect", &zmq.connect);
  find(library, "zmq_close", &zmq.close);
  find(library, "zmq_socket_monitor", &zmq.monitor);
  find(library, "zmq_recv", &zmq.recv);
  context = zmq.ctx_new();
  CHECK(context != NULL);
}

void rig_stop(void) {
  CHECK_EQUAL(zmq.ctx_term(context), 0);
}

uint64_t rig_now_us(void) {
  return zmoe_now_us();
}

/* ---- sockets ------------------------------------------------------------- */

static void set(void *socket, int option, int value) {
  CHECK_EQUAL(zmoe_zmq.setsockopt(socket, option, &value, sizeof value), 0);
}

static void *open_socket(int type) {
  void *socket = zmq.socket(context, type);
  CHECK(socket != NULL);
  set(socket, ZMQ_LINGER, 0);
  set(socket, ZMQ_RECONNECT_IVL, 10);
  return socket;
}

void *rig_socket(int type, const char *address) {
  void *socket = open_socket(type);
  CHECK_EQUAL(zmq.connect(socket, address), 0);
  return socket;
}

void rig_close_socket(void *socket) {
  CHECK_EQUAL(zmq.close(socket), 0);
}

void rig_subscribe(void *socket, const void *topic, size_t bytes) {
  CHECK_EQUAL(zmoe_zmq.setsockopt(socket, ZMQ_SUBSCRIBE, topic, bytes), 0);
}

void rig_send(void *socket, const void *data, size_t bytes, int more) {
  CHECK_EQUAL(zmoe_zmq.send(socket, data, bytes, more ? ZMQ_SNDMORE : 0), bytes);
}

int rig_receive(void *socket, void *data, size_t bytes, int wait_ms) {
  set(socket, ZMQ_RCVTIMEO, wait_ms);
  return zmq.recv(socket, data, bytes, 0);
}

/* ---- nodes --------------------------------------------------------------- */

static void bind_to(void *socket, char address[64]) {
  size_t bytes = 64;
  CHECK_EQUAL(zmq.bind(socket, address[0] ? address : "tcp://127.0.0.1:*"), 0);
  CHECK_EQUAL(zmoe_zmq.getsockopt(socket, ZMQ_LAST_ENDPOINT, address, &bytes), 0);
}

static void listen_on(rig_node *node, int puppet) {
  node->xpub = open_socket(ZMQ_XPUB);
  node->sub = open_socket(ZMQ_SUB);
  node->router = open_socket(ZMQ_ROUTER);
  set(node->router, ZMQ_ROUTER_HANDOVER, 1);
  if (!puppet)
    set(node->xpub, ZMQ_XPUB_MANUAL, 1);
  bind_to(node->xpub, node->data);
  bind_to(node->router, node->control);
}

static void connect_to(rig_node *node, const rig_node *nodes) {
  for (uint32_t r = 0; r < node->nodes; r++) {
    if (r == node->rank)
      continue;
    uint8_t presence[ZMOE_PRESENCE_BYTES];
    char monitor[64];
    zmoe_wire_presence(RIG_SESSION, node->rank, presence);
    node->dealers[r] = open_socket(ZMQ_DEALER);
    set(node->dealers[r], ZMQ_PROBE_ROUTER, 1);
    CHECK_EQUAL(zmoe_zmq.setsockopt(node->dealers[r], ZMQ_ROUTING_ID, presence, sizeof presence),
                0);
    set(node->dealers[r], ZMQ_IMMEDIATE, 1);
    snprintf(monitor, sizeof monitor, "inproc://monitor-%p", node->dealers[r]);
    CHECK_EQUAL(zmq.monitor(node->dealers[r], monitor,
                            ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED),
                0);
    node->monitors[r] = rig_socket(ZMQ_PAIR, monitor);
    CHECK_EQUAL(zmq.connect(node->dealers[r], nodes[r].control), 0);
    CHECK_EQUAL(zmq.connect(node->sub, nodes[r].data), 0);
  }
}

static void create(rig_node *node, const rig_options *options) {
  zmoe_exchange_config config = {
      .rank = node->rank,
      .nodes = node->nodes,
      .session = RIG_SESSION,
      .max_payload_bytes = RIG_MAX_BYTES,
      .small_payload_bytes = RIG_SMALL_BYTES,
      .scatter = 1,
      .xpub = node->xpub,
      .sub = node->sub,
      .router = node->router,
      .dealers = node->dealers,
      .monitors = node->monitors,
      .dispatch_rows = options->dispatch_rows,
      .spin_us = options->spin_us,
      .resend_ms = options->resend_ms,
      .grace_ms = options->grace_ms,
      .no_payload_checksum = options->no_payload_checksum,
  };
  CHECK_EQUAL(zmoe_exchange_create(&config, &node->ex), ZMOE_OK);
}

static void subscribe_puppet(rig_node *node) {
  uint8_t presence[ZMOE_PRESENCE_BYTES], frame[ZMOE_HEADER_BYTES];
  zmoe_header header = rig_header(0, 0, 0);
  zmoe_wire_encode(&header, frame);
  zmoe_wire_presence(RIG_SESSION, node->rank, presence);
  rig_subscribe(node->sub, frame, ZMOE_TOPIC_BYTES);
  rig_subscribe(node->sub, presence, sizeof presence);
}

/* Until a puppet's frames reach every exchange: the presences come last. After
 * a broken link a node must be serving to subscribe again. */
static void wait_subscribed(rig_node *puppet, const rig_node *nodes) {
  uint64_t waiting = 0, until_us = rig_now_us() + RIG_PATIENCE_US;
  for (uint32_t r = 0; r < puppet->nodes; r++)
    waiting |= (uint64_t)(nodes[r].ex != NULL) << r;
  while (waiting != 0) {
    uint8_t message[64], presence[ZMOE_PRESENCE_BYTES];
    int bytes = rig_receive(puppet->xpub, message, sizeof message, 1);
    CHECK(rig_now_us() < until_us);
    for (uint32_t r = 0; r < puppet->nodes; r++) {
      zmoe_fault fault;
      if (nodes[r].ex != NULL)
        zmoe_exchange_service(nodes[r].ex, &fault);
      zmoe_wire_presence(RIG_SESSION, r, presence);
      if (bytes == 1 + sizeof presence && memcmp(message + 1, presence, sizeof presence) == 0)
        waiting &= ~(UINT64_C(1) << r);
    }
  }
}

static int is_ready(rig_node *node) {
  uint64_t everyone = (node->nodes == 64 ? 0 : UINT64_C(1) << node->nodes) - 1;
  everyone &= ~(UINT64_C(1) << node->rank);
  return zmoe_exchange_subscribers(node->ex) == everyone &&
         zmoe_exchange_links(node->ex) == everyone;
}

/* Lets a puppet's DEALERs take up their connections, which needs a call on each. */
static void take_up_connections(const rig_node *puppet) {
  for (uint32_t r = 0; r < puppet->nodes; r++) {
    if (puppet->dealers[r] != NULL)
      zmoe_peers_take_up(puppet->dealers[r]);
  }
}

/* All of them in turns: a node becomes ready only while its peers act, too. */
static void wait_all_ready(rig_node *nodes, uint32_t count) {
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  for (int ready = 0; !ready;) {
    ready = 1;
    for (uint32_t r = 0; r < count; r++)
      if (nodes[r].ex == NULL)
        take_up_connections(&nodes[r]);
      else
        ready &= is_ready(&nodes[r]);
    CHECK(rig_now_us() < until_us);
  }
}

/* Each peer's address and an empty message: see ZMQ_PROBE_ROUTER. */
static void take_probes(const rig_node *puppet, const rig_node *nodes) {
  uint8_t message[ZMOE_PRESENCE_BYTES];
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  for (uint32_t found = 0; found < puppet->nodes - 1;) {
    for (uint32_t r = 0; r < puppet->nodes; r++)
      if (nodes[r].ex == NULL)
        take_up_connections(&nodes[r]);
    if (rig_receive(puppet->router, message, sizeof message, 1) < 0) {
      CHECK(rig_now_us() < until_us);
      continue;
    }
    CHECK_EQUAL(rig_receive(puppet->router, message, sizeof message, RIG_PATIENCE_MS), 0);
    found++;
  }
}

void rig_open(rig_node *nodes, rig_options options) {
  for (uint32_t r = 0; r < options.nodes; r++) {
    nodes[r] = (rig_node){.rank = r, .nodes = options.nodes};
    listen_on(&nodes[r], (int)(options.puppets >> r & 1));
  }
  for (uint32_t r = 0; r < options.nodes; r++) {
    connect_to(&nodes[r], nodes);
    if (options.puppets >> r & 1)
      subscribe_puppet(&nodes[r]);
    else
      create(&nodes[r], &options);
  }
  wait_all_ready(nodes, options.nodes);
  for (uint32_t r = 0; r < options.nodes; r++)
    if (nodes[r].ex == NULL) {
      wait_subscribed(&nodes[r], nodes);
      take_probes(&nodes[r], nodes);
    }
}

void rig_wait_ready(rig_node *node) {
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  while (!is_ready(node))
    CHECK(rig_now_us() < until_us);
}

void rig_kill(rig_node *node) {
  zmoe_exchange_destroy(node->ex);
  node->ex = NULL;
  void **sockets[] = {&node->xpub, &node->sub, &node->router};
  for (int i = 0; i < 3; i++) {
    if (*sockets[i] != NULL)
      rig_close_socket(*sockets[i]);
    *sockets[i] = NULL;
  }
  for (uint32_t r = 0; r < node->nodes; r++) {
    if (node->dealers[r] == NULL)
      continue;
    CHECK_EQUAL(zmq.monitor(node->dealers[r], NULL, 0), 0);
    rig_close_socket(node->dealers[r]);
    rig_close_socket(node->monitors[r]);
    node->dealers[r] = node->monitors[r] = NULL;
  }
}

void rig_return(rig_node *node, const rig_node *nodes) {
  listen_on(node, 1);
  connect_to(node, nodes);
  subscribe_puppet(node);
}

void rig_revive(rig_node *node, const rig_node *nodes) {
  rig_return(node, nodes);
  wait_subscribed(node, nodes);
}

void rig_close(rig_node *nodes, uint32_t n) {
  for (uint32_t r = 0; r < n; r++)
    rig_kill(&nodes[r]);
}

/* ---- frames -------------------------------------------------------------- */

zmoe_header rig_header(uint32_t rank, uint32_t step, uint32_t layer) {
  return (zmoe_header){
      .kind = ZMOE_KIND_PARTIAL,
      .dtype = ZMOE_F32,
      .source = (uint16_t)rank,
      .session = RIG_SESSION,
      .step = step,
      .layer = layer,
      .rows = 1,
      .width = 4,
      .payload_bytes = 16,
  };
}

size_t rig_encode(const zmoe_header *header, uint8_t *frame) {
  zmoe_header sealed = *header;
  sealed.payload_checksum =
      zmoe_crc32c(frame + ZMOE_HEADER_BYTES, header->payload_bytes, ZMOE_ISA_GENERIC);
  zmoe_wire_encode(&sealed, frame);
  return ZMOE_HEADER_BYTES + header->payload_bytes;
}

size_t rig_frame(const zmoe_header *header, float value, uint8_t *out) {
  float payload[4] = {value, value, value, value};
  memcpy(out + ZMOE_HEADER_BYTES, payload, sizeof payload);
  return rig_encode(header, out);
}

void rig_publish(rig_node *puppet, uint32_t step, uint32_t layer, float value) {
  uint8_t frame[ZMOE_HEADER_BYTES + 16];
  zmoe_header header = rig_header(puppet->rank, step, layer);
  rig_send(puppet->xpub, frame, rig_frame(&header, value, frame), 0);
}

zmoe_call rig_call(uint32_t step, uint32_t layer, uint32_t rows, uint32_t width, zmoe_dtype dtype) {
  return (zmoe_call){
      .step = step, .layer = layer, .rows = rows, .width = width, .wire_dtype = dtype};
}

int rig_node_send(rig_node *node, const zmoe_call *call, const float *src) {
  zmoe_fault fault;
  return zmoe_exchange_publish(node->ex, call, src, ZMOE_F32, 0, &fault);
}

int rig_node_publish(rig_node *node, uint32_t step, uint32_t layer, float value) {
  float payload[4] = {value, value, value, value};
  zmoe_call call = rig_call(step, layer, 1, 4, ZMOE_F32);
  return rig_node_send(node, &call, payload);
}

int rig_collect(rig_node *node, float *out, zmoe_fault *fault) {
  float sum[4];
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  int rc;
  do {
    uint64_t now_us = rig_now_us();
    rc = zmoe_exchange_collect(node->ex, sum, ZMOE_F32, until_us > now_us ? until_us - now_us : 0,
                               fault);
  } while (rc == ZMOE_EINTR);
  if (rc == ZMOE_OK) {
    CHECK(sum[0] == sum[1] && sum[0] == sum[3]);
    *out = sum[0];
  }
  return rc;
}

void rig_collect_all(rig_node *nodes, uint32_t n, float *const *sums) {
  uint64_t until_us = rig_now_us() + RIG_PATIENCE_US;
  uint64_t waiting = (UINT64_C(1) << n) - 1;
  while (waiting != 0) {
    CHECK(rig_now_us() < until_us);
    for (uint32_t r = 0; r < n; r++) {
      zmoe_fault fault;
      if (!(waiting >> r & 1))
        continue;
      int rc = zmoe_exchange_collect(nodes[r].ex, sums[r], ZMOE_F32, 1000, &fault);
      CHECK(rc == ZMOE_OK || rc == ZMOE_ETIMEOUT || rc == ZMOE_EINTR);
      if (rc == ZMOE_OK)
        waiting &= ~(UINT64_C(1) << r);
    }
  }
}
