/* Inside of the pool that the exchange needs beside exchange.h. */
#ifndef ZMOE_POOL_H
#define ZMOE_POOL_H

#include "exchange/exchange.h"

#define ZMOE_POOL_MAX_CLASSES 8

/* Like zmoe_pool_destroy, but slots may still be with libzmq, whose closed
 * sockets drop their messages later: the last release frees the pool. */
void zmoe_pool_abandon(zmoe_pool *pool);

#endif
