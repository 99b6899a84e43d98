/* The sum of partial outputs in rank order. */
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

static int add_integers(void *out, const void *const *parts, uint32_t n_parts, size_t count) {
  uint8_t *to = out;
  for (size_t i = 0; i < count; i++) {
    uint32_t sum = 0, word;
    for (uint32_t p = 0; p < n_parts; p++) {
      if (parts[p] != NULL) {
        memcpy(&word, (const uint8_t *)parts[p] + 4 * i, sizeof word);
        sum += word;
      }
    }
    memcpy(to + 4 * i, &sum, sizeof sum);
  }
  return ZMOE_OK;
}

static zmoe_reduce_fn *const VARIANTS[ZMOE_ISAS] = {
#if defined(__x86_64__)
    [ZMOE_ISA_AVX2] = zmoe_reduce_avx2,
    [ZMOE_ISA_AVX512] = zmoe_reduce_avx512,
#elif defined(__aarch64__)
    [ZMOE_ISA_NEON] = zmoe_reduce_neon,
#else
    NULL,
#endif
};

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
  if (part_dtype == ZMOE_I32 && out_dtype == ZMOE_I32 && n_parts <= ZMOE_MAX_NODES)
    return add_integers(out, parts, n_parts, count);
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
  zmoe_reduce_fn *vectors = ZMOE_VARIANT(VARIANTS, isa);
  size_t i = vectors == NULL ? 0 : vectors(out, out_dtype, present, n, part_dtype, count);
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
