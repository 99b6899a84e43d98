/* A few queries against a block of keys and values, each read once: the part of
 * vector_ops_body.h where attention's time goes.  The number of queries, the
 * dtype and the number of vectors are constants in each call of the inlined
 * bodies, so that sums stay in registers.
 *
 * A sum takes its terms in order in one lane, by one fused multiply-add each:
 * however many queries and keys are looked at, it is the same to the bit. */

/* So many vectors of sums fit the registers, beside what is multiplied. */
#if defined(VEC_AVX512) || defined(ZMOE_ARM64)
enum { MOST_SUMS = 16 };
#else
enum { MOST_SUMS = 8 };
#endif

KERNEL size_t bytes_of(const uint32_t dtype) {
  return dtype == ZMOE_CODES ? 1 : zmoe_dtype_bytes((zmoe_dtype)dtype);
}

KERNEL VEC elements(const unsigned char *row, size_t i, const uint32_t dtype) {
  return dtype == ZMOE_CODES ? vec_load8(row + i) : vec_load(row, i, (zmoe_dtype)dtype);
}

KERNEL float element(const unsigned char *row, size_t i, const uint32_t dtype) {
  return dtype == ZMOE_CODES ? (float)(signed char)row[i] : load_scalar(row, i, (zmoe_dtype)dtype);
}

KERNEL void fetch_ahead(const zmoe_head_block *block, uint32_t row, size_t row_bytes) {
  if (block->ahead != 0)
    zmoe_prefetch_range(block->ahead + row * row_bytes, row_bytes);
}

/* Runs `chunk(vectors)` over elements [0, count) from `at` on, as wide as the registers allow. */
#define BY_CHUNKS(at, count, n, chunk)                                                             \
  do {                                                                                             \
    for (; MOST_SUMS / (n) >= 8 && at + 8 * LANES <= (count); at += 8 * LANES)                     \
      chunk(8);                                                                                    \
    for (; MOST_SUMS / (n) >= 4 && at + 4 * LANES <= (count); at += 4 * LANES)                     \
      chunk(4);                                                                                    \
    for (; MOST_SUMS / (n) >= 2 && at + 2 * LANES <= (count); at += 2 * LANES)                     \
      chunk(2);                                                                                    \
    for (; at + LANES <= (count); at += LANES)                                                     \
      chunk(1);                                                                                    \
  } while (0)

/* ---- scores -------------------------------------------------------------------------- */

/* Of keys [j, j + vectors * LANES). */
KERNEL void score_chunk(const float *const *queries, const uint32_t n, const zmoe_head_block *keys,
                        const uint32_t dtype, uint32_t j, const uint32_t vectors, float *scores) {
  size_t row_bytes = ZMOE_KEY_BLOCK * bytes_of(dtype);
  VEC lanes[ZMOE_QUERIES][8];
  EACH(i, n)
    EACH(v, vectors)
      lanes[i][v] = vec_splat(0.0f);
  for (uint32_t d = 0; d < keys->dim; d++) {
    if (j == 0)
      fetch_ahead(keys, d, row_bytes);
    EACH(v, vectors) {
      VEC wide = elements(keys->data + d * row_bytes, j + v * LANES, dtype);
      EACH(i, n)
        lanes[i][v] = vec_fma(wide, vec_splat(queries[i][d]), lanes[i][v]);
    }
  }
  EACH(i, n)
    EACH(v, vectors)
      vec_store((unsigned char *)(scores + i * ZMOE_KEY_BLOCK + j), v * LANES, ZMOE_F32,
                lanes[i][v]);
}

KERNEL void score_keys(const float *const *queries, const uint32_t n, const zmoe_head_block *keys,
                       const uint32_t dtype, float *scores) {
  uint32_t j = 0, count = (keys->count + ZMOE_SUM_LANES - 1) / ZMOE_SUM_LANES * ZMOE_SUM_LANES;
#define CHUNK(vectors) score_chunk(queries, n, keys, dtype, j, vectors, scores)
  BY_CHUNKS(j, count, n, CHUNK);
#undef CHUNK
}

/* ---- values --------------------------------------------------------------------------- */

/* Elements [d, d + vectors * LANES) of the sums. */
KERNEL void add_chunk(const float *weights, const uint32_t n, const float *corrections,
                      const zmoe_head_block *values, const uint32_t dtype, uint32_t d,
                      const uint32_t vectors, float *sums, size_t sum_stride) {
  size_t row_bytes = values->dim * bytes_of(dtype);
  VEC lanes[ZMOE_QUERIES][8];
  EACH(i, n)
    EACH(v, vectors)
      lanes[i][v] = get(sums + i * sum_stride + d + v * LANES) * vec_splat(corrections[i]);
  for (uint32_t j = 0; j < values->count; j++) {
    if (d == 0)
      fetch_ahead(values, j, row_bytes);
    EACH(v, vectors) {
      VEC wide = elements(values->data + j * row_bytes, d + v * LANES, dtype);
      EACH(i, n)
        lanes[i][v] = vec_fma(wide, vec_splat(weights[i * ZMOE_KEY_BLOCK + j]), lanes[i][v]);
    }
  }
  EACH(i, n)
    EACH(v, vectors)
      vec_store((unsigned char *)(sums + i * sum_stride + d), v * LANES, ZMOE_F32, lanes[i][v]);
}

KERNEL float fma_of(float a, float b, float c) {
  return vec_fma(vec_splat(a), vec_splat(b), vec_splat(c))[0];
}

KERNEL void add_rows(const float *weights, const uint32_t n, const float *corrections,
                     const zmoe_head_block *values, const uint32_t dtype, float *sums,
                     size_t sum_stride) {
  uint32_t d = 0, dim = values->dim;
#define CHUNK(vectors)                                                                             \
  add_chunk(weights, n, corrections, values, dtype, d, vectors, sums, sum_stride)
  BY_CHUNKS(d, dim, n, CHUNK);
#undef CHUNK
  size_t row_bytes = dim * bytes_of(dtype);
  for (; d < dim; d++)
    for (uint32_t i = 0; i < n; i++) {
      float sum = sums[i * sum_stride + d] * corrections[i];
      for (uint32_t j = 0; j < values->count; j++)
        sum = fma_of(element(values->data + j * row_bytes, d, dtype),
                     weights[i * ZMOE_KEY_BLOCK + j], sum);
      sums[i * sum_stride + d] = sum;
    }
}

/* ---- by number of queries, by dtype ------------------------------------------------------ */

#define BY_QUERIES(body, before, n, ...)                                                           \
  do {                                                                                             \
    if ((n) == 1)                                                                                  \
      body(before, 1, __VA_ARGS__);                                                                \
    else if ((n) == 2)                                                                             \
      body(before, 2, __VA_ARGS__);                                                                \
    else                                                                                           \
      body(before, ZMOE_QUERIES, __VA_ARGS__);                                                     \
  } while (0)

TARGET static void score(const float *const *queries, uint32_t n, const zmoe_head_block *keys,
                         float *scores) {
  switch (keys->dtype) {
  case ZMOE_F32:
    BY_QUERIES(score_keys, queries, n, keys, ZMOE_F32, scores);
    return;
  case ZMOE_F16:
    BY_QUERIES(score_keys, queries, n, keys, ZMOE_F16, scores);
    return;
  case ZMOE_BF16:
    BY_QUERIES(score_keys, queries, n, keys, ZMOE_BF16, scores);
    return;
  case ZMOE_CODES:
    BY_QUERIES(score_keys, queries, n, keys, ZMOE_CODES, scores);
    return;
  }
}

TARGET static void add_values(const float *weights, uint32_t n, const float *corrections,
                              const zmoe_head_block *values, float *sums, size_t sum_stride) {
  switch (values->dtype) {
  case ZMOE_F32:
    BY_QUERIES(add_rows, weights, n, corrections, values, ZMOE_F32, sums, sum_stride);
    return;
  case ZMOE_F16:
    BY_QUERIES(add_rows, weights, n, corrections, values, ZMOE_F16, sums, sum_stride);
    return;
  case ZMOE_BF16:
    BY_QUERIES(add_rows, weights, n, corrections, values, ZMOE_BF16, sums, sum_stride);
    return;
  case ZMOE_CODES:
    BY_QUERIES(add_rows, weights, n, corrections, values, ZMOE_CODES, sums, sum_stride);
    return;
  }
}
