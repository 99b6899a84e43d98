/* Finds libzmq's functions in a library that the process has loaded. */
#include "common/platform.h"

#include "zmq_api.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "exchange/exchange.h"

zmoe_zmq_api zmoe_zmq;
static int loaded;

int zmoe_zmq_is_loaded(void) {
  return loaded;
}

static const struct {
  const char *name;
  size_t offset;
} SYMBOLS[] = {
    {"zmq_msg_init", offsetof(zmoe_zmq_api, msg_init)},
    {"zmq_msg_init_size", offsetof(zmoe_zmq_api, msg_init_size)},
    {"zmq_msg_init_data", offsetof(zmoe_zmq_api, msg_init_data)},
    {"zmq_msg_close", offsetof(zmoe_zmq_api, msg_close)},
    {"zmq_msg_move", offsetof(zmoe_zmq_api, msg_move)},
    {"zmq_msg_data", offsetof(zmoe_zmq_api, msg_data)},
    {"zmq_msg_size", offsetof(zmoe_zmq_api, msg_size)},
    {"zmq_msg_more", offsetof(zmoe_zmq_api, msg_more)},
    {"zmq_msg_send", offsetof(zmoe_zmq_api, msg_send)},
    {"zmq_msg_recv", offsetof(zmoe_zmq_api, msg_recv)},
    {"zmq_send", offsetof(zmoe_zmq_api, send)},
    {"zmq_setsockopt", offsetof(zmoe_zmq_api, setsockopt)},
    {"zmq_getsockopt", offsetof(zmoe_zmq_api, getsockopt)},
    {"zmq_errno", offsetof(zmoe_zmq_api, get_errno)},
    {"zmq_version", offsetof(zmoe_zmq_api, version)},
};

int zmoe_zmq_load(const char *library, char *error, size_t error_bytes) {
  if (loaded)
    return ZMOE_OK;
  /* Symbols of the libraries that `library` itself needs are found as well. */
  void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (handle == NULL) {
    const char *reason = dlerror();
    snprintf(error, error_bytes, "cannot open %s: %s", library, reason ? reason : "?");
    return ZMOE_EINVAL;
  }
  zmoe_zmq_api api;
  for (size_t i = 0; i < sizeof SYMBOLS / sizeof SYMBOLS[0]; i++) {
    void *symbol = dlsym(handle, SYMBOLS[i].name);
    if (symbol == NULL) {
      snprintf(error, error_bytes, "%s has no function %s", library, SYMBOLS[i].name);
      dlclose(handle);
      return ZMOE_EINVAL;
    }
    memcpy((char *)&api + SYMBOLS[i].offset, &symbol, sizeof symbol);
  }
  int major, minor, patch;
  api.version(&major, &minor, &patch);
  if (major != 4 || minor < 3) {
    snprintf(error, error_bytes, "libzmq 4.3 or later is needed, %s has %d.%d.%d", library, major,
             minor, patch);
    dlclose(handle);
    return ZMOE_EINVAL;
  }
  zmoe_zmq = api; /* the handle stays open for as long as the process lives */
  loaded = 1;
  return ZMOE_OK;
}
