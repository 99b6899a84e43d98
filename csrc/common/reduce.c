/* The sum of partial outputs in rank order, and the routing digest. */
#include "common/reduce.h"
#include "common/status.h"

#include <string.h>

#include "block_scalar.h"
#include "reduce_variants.h"

size_t zmoe_dtype_bytes(zmoe_dtype dtype) {
  switch (dtype) {
  case ZMOE_F32:
    return 4;
  case ZMOE_F16:
  case ZMOE_BF16:
    return 2;
  }
  return 0;
}

/* Of a row; 0 for an unknown dtype. */
static size_t bytes_of(zmoe_dtype dtype, size_t count) {
  return dtype == ZMOE_Q8 ? (count + ZMOE_Q8_BLOCK - 1) / ZMOE_Q8_BLOCK * ZMOE_Q8_BLOCK_BYTES
                          : count * zmoe_dtype_bytes(dtype);
}

static size_t reduce_vectors(unsigned char *out, zmoe_dtype out_dtype,
                             const unsigned char *const *parts, uint32_t n_parts,
                             zmoe_dtype part_dtype, size_t count, zmoe_isa isa) {
  switch (isa) {
#ifdef ZMOE_X86
  case ZMOE_ISA_AVX2:
    return zmoe_reduce_avx2(out, out_dtype, parts, n_parts, part_dtype, count);
  case ZMOE_ISA_AVX512:
  case ZMOE_ISA_AVX512_BF16:
    return zmoe_reduce_avx512(out, out_dtype, parts, n_parts, part_dtype, count);
#endif
#ifdef ZMOE_ARM64
  case ZMOE_ISA_NEON:
  case ZMOE_ISA_NEON_DOT:
  case ZMOE_ISA_NEON_BF16:
    return zmoe_reduce_neon(out, out_dtype, parts, n_parts, part_dtype, count);
#endif
  default:
    (void)out, (void)out_dtype, (void)parts, (void)n_parts, (void)part_dtype, (void)count;
    return 0;
  }
}

static void reduce_block(unsigned char *out, zmoe_dtype out_dtype,
                         const unsigned char *const *parts, uint32_t n_parts, zmoe_dtype part_dtype,
                         size_t b, size_t count) {
  float sum[ZMOE_Q8_BLOCK], part[ZMOE_Q8_BLOCK];
  block_load_scalar(sum, parts[0], b, part_dtype, count);
  for (uint32_t p = 1; p < n_parts; p++) {
    block_load_scalar(part, parts[p], b, part_dtype, count);
    for (size_t i = 0; i < count; i++)
      sum[i] += part[i];
  }
  block_store_scalar(out, b, out_dtype, sum, count);
}

int zmoe_reduce(void *out, zmoe_dtype out_dtype, const void *const *parts, uint32_t n_parts,
                zmoe_dtype part_dtype, size_t count, zmoe_isa isa) {
  if (bytes_of(out_dtype, 1) == 0 || bytes_of(part_dtype, 1) == 0 || n_parts > ZMOE_MAX_NODES ||
      !zmoe_isa_supported(isa))
    return ZMOE_EINVAL;
  const unsigned char *present[ZMOE_MAX_NODES];
  uint32_t n = 0;
  for (uint32_t p = 0; p < n_parts; p++)
    if (parts[p] != NULL)
      present[n++] = parts[p];
  if (n == 0 || count == 0) {
    if (count > 0)
      memset(out, 0, bytes_of(out_dtype, count));
    return ZMOE_OK;
  }
  size_t i = reduce_vectors(out, out_dtype, present, n, part_dtype, count, isa);
  int in_blocks = part_dtype == ZMOE_Q8 || out_dtype == ZMOE_Q8;
  for (; in_blocks && i < count; i += ZMOE_Q8_BLOCK)
    reduce_block(out, out_dtype, present, n, part_dtype, i / ZMOE_Q8_BLOCK,
                 count - i < ZMOE_Q8_BLOCK ? count - i : ZMOE_Q8_BLOCK);
  for (; i < count; i++) {
    float sum = load_scalar(present[0], i, part_dtype);
    for (uint32_t p = 1; p < n; p++)
      sum += load_scalar(present[p], i, part_dtype);
    store_scalar(out, i, out_dtype, sum);
  }
  return ZMOE_OK;
}

int zmoe_convert(void *dst, zmoe_dtype dst_dtype, const void *src, zmoe_dtype src_dtype,
                 size_t count, zmoe_isa isa) {
  if (dst_dtype != src_dtype)
    return zmoe_reduce(dst, dst_dtype, &src, 1, src_dtype, count, isa);
  if (bytes_of(dst_dtype, 1) == 0 || !zmoe_isa_supported(isa))
    return ZMOE_EINVAL;
  if (count > 0)
    memcpy(dst, src, bytes_of(dst_dtype, count));
  return ZMOE_OK;
}

/* ---- digest -------------------------------------------------------------
 * Every step is a bijection of the running value, so that two inputs that
 * differ in one word always differ in the digest. */

static uint64_t mix(uint64_t value) {
  value ^= value >> 32;
  value *= 0x9e3779b97f4a7c15u;
  return value ^ value >> 29;
}

uint64_t zmoe_digest(const void *data, size_t bytes) {
  const unsigned char *at = data;
  uint64_t digest = mix(bytes + 1);
  for (; bytes >= 8; bytes -= 8, at += 8) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
    digest = mix(digest ^ word);
  }
  if (bytes > 0) {
    uint64_t word = 0;
    memcpy(&word, at, bytes);
    digest = mix(digest ^ word);
  }
  return mix(digest);
}
