/* What two nodes compare: the checksum of a payload, and the digest of a routing. */
#ifndef ZMOE_CHECKSUM_H
#define ZMOE_CHECKSUM_H

#include "common/isa.h"

#include <stdint.h>

/* CRC-32C (Castagnoli; RFC 3720, appendix B.4): 0 for no bytes.  The same value with
 * every instruction set. */
uint32_t zmoe_crc32c(const void *data, size_t bytes, zmoe_isa isa);
/* The same of what came before, whose CRC is `crc`, and `data` after it. */
uint32_t zmoe_crc32c_go_on(uint32_t crc, const void *data, size_t bytes, zmoe_isa isa);
/* The same, and copies `data` to `to`, which does not overlap it. */
uint32_t zmoe_crc32c_copy(uint32_t crc, void *to, const void *data, size_t bytes, zmoe_isa isa);

/* 64-bit digest of `bytes` bytes, not cryptographic. */
uint64_t zmoe_digest(const void *data, size_t bytes);

#endif
