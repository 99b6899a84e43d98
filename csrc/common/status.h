/* Return codes: what a caller, a peer or the network can cause. */
#ifndef ZMOE_STATUS_H
#define ZMOE_STATUS_H

typedef enum zmoe_status {
  ZMOE_OK = 0,
  ZMOE_EINVAL = -1,    /* an argument is out of range */
  ZMOE_ETIMEOUT = -2,  /* the deadline passed; fault.missing tells for whom */
  ZMOE_EPEER = -3,     /* a peer's link is gone; fault.lost tells whose */
  ZMOE_EINTR = -4,     /* time to look at signals; call again to go on waiting */
  ZMOE_EDIVERGED = -5, /* a peer is at another step, layer, shape or routing */
  ZMOE_EPOOL = -6,     /* no slot became free before the deadline */
  ZMOE_EZMQ = -7,      /* libzmq failed; fault.zmq_errno says how */
  ZMOE_ENOMEM = -8,    /* no memory, in a *_create call */
  ZMOE_EFORK = -9,     /* the exchange belongs to the process that forked this one */
} zmoe_status;

#endif
