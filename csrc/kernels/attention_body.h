/* A few queries against a block of keys and values, each read once: the part of
 * vector_ops_body.h where attention's time goes.  The number of queries, the
 * dtype and the number of vectors are constants in each call of the inlined
 * bodies, so that sums stay in registers.
 *
 * A sum takes its terms in order in one lane, by one fused multiply-add each:
 * however many queries and keys are looked at, it is the same to the bit. */

/* So many vectors of sums fit the registers, beside what is multiplied. */
#if defined(VEC_AVX512) || defined(ZMOE_ARM64)
enum { MOST_SUMS = 16, MOST_QUERIES = 8 };
#else
enum { MOST_SUMS = 8, MOST_QUERIES = 4 };
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

/* `halves` vectors, 1 or 2; two of bf16 are every other element of both. */
KERNEL void load_some(const unsigned char *row, size_t i, const uint32_t dtype,
                      const uint32_t halves, VEC wide[2]) {
  if (dtype == ZMOE_BF16 && halves == 2)
    vec_load_pair(row + 2 * i, &wide[0], &wide[1]);
  else
    EACH(k, halves)
      wide[k] = elements(row, i + k * LANES, dtype);
}

/* Where the part begins of what comes next that is fetched beside elements from `at` on of all
 * `rows`, so that all of it is fetched evenly, in order; 0 for nothing. */
KERNEL uintptr_t ahead_of(const zmoe_head_block *block, size_t at, size_t rows) {
  return block->ahead == 0 ? 0 : block->ahead + at * rows * bytes_of(block->dtype);
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
  size_t row_bytes = ZMOE_KEY_BLOCK * bytes_of(dtype), slice = vectors * LANES * bytes_of(dtype);
  uintptr_t ahead = ahead_of(keys, j, keys->dim);
  const uint32_t halves = vectors == 1 ? 1 : 2, pairs = (vectors + 1) / 2;
  const uint32_t mixed = dtype == ZMOE_BF16 ? vectors / 2 : 0; /* pairs in another order */
  VEC lanes[ZMOE_QUERIES][8], wide[2];
  EACH(i, n)
    EACH(v, vectors)
      lanes[i][v] = vec_splat(0.0f);
  for (uint32_t d = 0; d < keys->dim; d++) {
    if (ahead != 0)
      zmoe_prefetch_range(ahead + d * slice, slice);
    EACH(p, pairs) {
      load_some(keys->data + d * row_bytes, j + p * 2 * LANES, dtype, halves, wide);
      EACH(k, halves)
        EACH(i, n)
          lanes[i][2 * p + k] = vec_fma(wide[k], vec_splat(queries[i][d]), lanes[i][2 * p + k]);
    }
  }
  EACH(i, n) {
    EACH(p, mixed)
      vec_zip(&lanes[i][2 * p], &lanes[i][2 * p + 1]);
    EACH(v, vectors)
      vec_store((unsigned char *)(scores + i * ZMOE_KEY_BLOCK + j), v * LANES, ZMOE_F32,
                lanes[i][v]);
  }
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
  size_t row_bytes = values->stride * bytes_of(dtype), slice = vectors * LANES * bytes_of(dtype);
  uintptr_t ahead = ahead_of(values, d, ZMOE_KEY_BLOCK);
  const uint32_t halves = vectors == 1 ? 1 : 2, pairs = (vectors + 1) / 2;
  const uint32_t mixed = dtype == ZMOE_BF16 ? vectors / 2 : 0; /* pairs in another order */
  VEC lanes[ZMOE_QUERIES][8], wide[2];
  EACH(i, n) {
    EACH(v, vectors)
      lanes[i][v] = get(sums + i * sum_stride + d + v * LANES) * vec_splat(corrections[i]);
    EACH(p, mixed)
      vec_unzip(&lanes[i][2 * p], &lanes[i][2 * p + 1]);
  }
  for (uint32_t j = 0; j < values->count; j++) {
    if (ahead != 0)
      zmoe_prefetch_range(ahead + j * slice, slice);
    const float *weight = weights + j;
    EACH(p, pairs) {
      load_some(values->data + j * row_bytes, d + p * 2 * LANES, dtype, halves, wide);
      EACH(k, halves)
        EACH(i, n)
          lanes[i][2 * p + k] =
              vec_fma(wide[k], vec_splat(weight[i * ZMOE_KEY_BLOCK]), lanes[i][2 * p + k]);
    }
  }
  EACH(i, n) {
    EACH(p, mixed)
      vec_zip(&lanes[i][2 * p], &lanes[i][2 * p + 1]);
    EACH(v, vectors)
      vec_store((unsigned char *)(sums + i * sum_stride + d), v * LANES, ZMOE_F32, lanes[i][v]);
  }
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
  size_t row_bytes = values->stride * bytes_of(dtype);
  for (; d < dim; d++)
    for (uint32_t i = 0; i < n; i++) {
      float sum = sums[i * sum_stride + d] * corrections[i];
      for (uint32_t j = 0; j < values->count; j++)
        sum = fma_of(element(values->data + j * row_bytes, d, dtype),
                     weights[i * ZMOE_KEY_BLOCK + j], sum);
      sums[i * sum_stride + d] = sum;
    }
}

/* ---- keys that lie as values do ------------------------------------------------------------ */

/* LANES vectors of LANES elements: rows become columns. */
KERNEL void transpose(VEC v[LANES]) {
  for (uint32_t stage = 1; stage < LANES; stage *= 2) {
    VEC zipped[LANES];
    EACH(k, LANES / 2) {
      zipped[2 * k] = v[k], zipped[2 * k + 1] = v[k + LANES / 2];
      vec_zip(&zipped[2 * k], &zipped[2 * k + 1]);
    }
    EACH(k, LANES)
      v[k] = zipped[k];
  }
}

KERNEL void turn_rows(const unsigned char *rows, const uint32_t dtype, uint32_t count, uint32_t dim,
                      float *keys) {
  size_t row_bytes = dim * bytes_of(dtype);
  uint32_t whole_rows = count / LANES * LANES, whole_dim = dim / LANES * LANES;
  for (uint32_t d = 0; d < whole_dim; d += LANES)
    for (uint32_t j = 0; j < whole_rows; j += LANES) {
      VEC v[LANES];
      EACH(k, LANES)
        v[k] = elements(rows + (j + k) * row_bytes, d, dtype);
      transpose(v);
      EACH(k, LANES)
        vec_store((unsigned char *)(keys + (size_t)(d + k) * ZMOE_KEY_BLOCK), j, ZMOE_F32, v[k]);
    }
  for (uint32_t j = 0; j < count; j++)
    for (uint32_t d = j < whole_rows ? whole_dim : 0; d < dim; d++)
      keys[(size_t)d * ZMOE_KEY_BLOCK + j] = element(rows + j * row_bytes, d, dtype);
}

TARGET static void turn(const unsigned char *rows, zmoe_dtype dtype, uint32_t count, uint32_t dim,
                        float *keys) {
  if (dtype == ZMOE_BF16)
    turn_rows(rows, ZMOE_BF16, count, dim, keys);
  else if (dtype == ZMOE_F16)
    turn_rows(rows, ZMOE_F16, count, dim, keys);
  else
    turn_rows(rows, ZMOE_F32, count, dim, keys);
}

/* ---- by number of queries, by dtype ------------------------------------------------------ */

/* `body` of as many of the queries as the registers allow at once, and then of the others. */
#define BY_QUERIES(body, n, ...)                                                                   \
  do {                                                                                             \
    if ((n) == 1)                                                                                  \
      body(0, 1, __VA_ARGS__);                                                                     \
    else if ((n) == 2)                                                                             \
      body(0, 2, __VA_ARGS__);                                                                     \
    else if ((n) == 4)                                                                             \
      body(0, 4, __VA_ARGS__);                                                                     \
    else                                                                                           \
      for (uint32_t first = 0; first < ZMOE_QUERIES; first += MOST_QUERIES)                        \
        body(first, MOST_QUERIES, __VA_ARGS__);                                                    \
  } while (0)

#define SCORE(first, n, dtype)                                                                     \
  score_keys(queries + (first), n, keys, dtype, scores + (first) * ZMOE_KEY_BLOCK)

TARGET static void score(const float *const *queries, uint32_t n, const zmoe_head_block *keys,
                         float *scores) {
  switch (keys->dtype) {
  case ZMOE_F32:
    BY_QUERIES(SCORE, n, ZMOE_F32);
    return;
  case ZMOE_F16:
    BY_QUERIES(SCORE, n, ZMOE_F16);
    return;
  case ZMOE_BF16:
    BY_QUERIES(SCORE, n, ZMOE_BF16);
    return;
  case ZMOE_CODES:
    BY_QUERIES(SCORE, n, ZMOE_CODES);
    return;
  }
}

#define ADD(first, n, dtype)                                                                       \
  add_rows(weights + (first) * ZMOE_KEY_BLOCK, n, corrections + (first), values, dtype,            \
           sums + (first) * sum_stride, sum_stride)

TARGET static void add_values(const float *weights, uint32_t n, const float *corrections,
                              const zmoe_head_block *values, float *sums, size_t sum_stride) {
  switch (values->dtype) {
  case ZMOE_F32:
    BY_QUERIES(ADD, n, ZMOE_F32);
    return;
  case ZMOE_F16:
    BY_QUERIES(ADD, n, ZMOE_F16);
    return;
  case ZMOE_BF16:
    BY_QUERIES(ADD, n, ZMOE_BF16);
    return;
  case ZMOE_CODES:
    BY_QUERIES(ADD, n, ZMOE_CODES);
    return;
  }
}
