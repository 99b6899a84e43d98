/* The sum of partial outputs in rank order, and the routing digest. */
#include "zmoe.h"

#include <string.h>

#include "reduce_scalar.h"
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

int zmoe_reduce(void *out, zmoe_dtype out_dtype, const void *const *parts, uint32_t n_parts,
                zmoe_dtype part_dtype, size_t count, zmoe_isa isa) {
  size_t out_bytes = zmoe_dtype_bytes(out_dtype);
  if (out_bytes == 0 || zmoe_dtype_bytes(part_dtype) == 0 || n_parts > ZMOE_MAX_NODES ||
      !zmoe_isa_supported(isa))
    return ZMOE_EINVAL;
  const unsigned char *present[ZMOE_MAX_NODES];
  uint32_t n = 0;
  for (uint32_t p = 0; p < n_parts; p++)
    if (parts[p] != NULL)
      present[n++] = parts[p];
  if (n == 0 || count == 0) {
    if (count > 0)
      memset(out, 0, count * out_bytes);
    return ZMOE_OK;
  }
  size_t i = reduce_vectors(out, out_dtype, present, n, part_dtype, count, isa);
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
  if (zmoe_dtype_bytes(dst_dtype) == 0 || !zmoe_isa_supported(isa))
    return ZMOE_EINVAL;
  if (count > 0)
    memcpy(dst, src, count * zmoe_dtype_bytes(dst_dtype));
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
