/* A few queries against keys and values as they lie in the cache, read once:
 * the part of vector_ops_body.h whose speed is that of the memory.  The number of
 * queries and the dtype are constants in each call of the inlined bodies, so
 * that sums stay in registers. */

KERNEL void fetch_ahead(const zmoe_head_rows *rows, uint32_t j, size_t row_bytes) {
  if (rows->ahead != 0)
    zmoe_prefetch_range(rows->ahead + j * row_bytes, row_bytes);
}

/* ---- scores -------------------------------------------------------------------------- */

KERNEL void score_key(const float *const *queries, uint32_t n, const unsigned char *key,
                      zmoe_dtype dtype, uint32_t dim, float *scores, size_t stride) {
  VEC lanes[ZMOE_QUERIES][PARTS];
  for (uint32_t i = 0; i < n; i++)
    clear(lanes[i]);
  uint32_t d = 0;
  for (; d + ZMOE_SUM_LANES <= dim; d += ZMOE_SUM_LANES)
    for (uint32_t p = 0; p < PARTS; p++) {
      VEC wide = vec_load(key, d + p * LANES, dtype);
      for (uint32_t i = 0; i < n; i++)
        lanes[i][p] += wide * get(queries[i] + d + p * LANES);
    }
  float sums[ZMOE_QUERIES];
  for (uint32_t i = 0; i < n; i++)
    sums[i] = sum_lanes(lanes[i]);
  for (; d < dim; d++)
    for (uint32_t i = 0; i < n; i++)
      sums[i] += load_scalar(key, d, dtype) * queries[i][d];
  for (uint32_t i = 0; i < n; i++)
    scores[i * stride] = sums[i];
}

KERNEL void score_keys(const float *const *queries, uint32_t n, const zmoe_head_rows *keys,
                       zmoe_dtype dtype, float *scores, size_t stride) {
  size_t row_bytes = keys->dim * zmoe_dtype_bytes(dtype);
  for (uint32_t j = 0; j < keys->count; j++) {
    fetch_ahead(keys, j, row_bytes);
    score_key(queries, n, keys->data + j * row_bytes, dtype, keys->dim, scores + j, stride);
  }
}

KERNEL void score_as(const float *const *queries, uint32_t n, const zmoe_head_rows *keys,
                     zmoe_dtype dtype, float *scores, size_t stride) {
  if (n == 1)
    score_keys(queries, 1, keys, dtype, scores, stride);
  else if (n == 2)
    score_keys(queries, 2, keys, dtype, scores, stride);
  else
    score_keys(queries, ZMOE_QUERIES, keys, dtype, scores, stride);
}

TARGET static void score(const float *const *queries, uint32_t n, const zmoe_head_rows *keys,
                         float *scores, size_t stride) {
  switch (keys->dtype) {
  case ZMOE_F32:
    score_as(queries, n, keys, ZMOE_F32, scores, stride);
    return;
  case ZMOE_F16:
    score_as(queries, n, keys, ZMOE_F16, scores, stride);
    return;
  case ZMOE_BF16:
    score_as(queries, n, keys, ZMOE_BF16, scores, stride);
    return;
  }
}

/* ---- values --------------------------------------------------------------------------- */

/* Elements [d, d + vectors * LANES) of the sums. */
KERNEL void add_chunk(const float *weights, size_t stride, uint32_t n, const float *corrections,
                      const zmoe_head_rows *values, zmoe_dtype dtype, uint32_t d, uint32_t vectors,
                      float *sums, size_t sum_stride) {
  size_t row_bytes = values->dim * zmoe_dtype_bytes(dtype);
  VEC lanes[ZMOE_QUERIES][8];
  for (uint32_t i = 0; i < n; i++)
    for (uint32_t v = 0; v < vectors; v++)
      lanes[i][v] = get(sums + i * sum_stride + d + v * LANES) * vec_splat(corrections[i]);
  for (uint32_t j = 0; j < values->count; j++) {
    if (d == 0)
      fetch_ahead(values, j, row_bytes);
    for (uint32_t v = 0; v < vectors; v++) {
      VEC wide = vec_load(values->data + j * row_bytes, d + v * LANES, dtype);
      for (uint32_t i = 0; i < n; i++)
        lanes[i][v] += wide * vec_splat(weights[i * stride + j]);
    }
  }
  for (uint32_t i = 0; i < n; i++)
    for (uint32_t v = 0; v < vectors; v++)
      vec_store((unsigned char *)(sums + i * sum_stride + d), v * LANES, ZMOE_F32, lanes[i][v]);
}

/* Eight vectors of sums fit the registers of every instruction set. */
KERNEL void add_rows(const float *weights, size_t stride, uint32_t n, const float *corrections,
                     const zmoe_head_rows *values, zmoe_dtype dtype, float *sums,
                     size_t sum_stride) {
  uint32_t d = 0, dim = values->dim;
  const uint32_t most = 8 / n;
#define ADD_CHUNKS(vectors)                                                                        \
  for (; most >= (vectors) && d + (vectors) * LANES <= dim; d += (vectors) * LANES)                \
  add_chunk(weights, stride, n, corrections, values, dtype, d, vectors, sums, sum_stride)
  ADD_CHUNKS(8);
  ADD_CHUNKS(4);
  ADD_CHUNKS(2);
  ADD_CHUNKS(1);
#undef ADD_CHUNKS
  size_t row_bytes = dim * zmoe_dtype_bytes(dtype);
  for (; d < dim; d++)
    for (uint32_t i = 0; i < n; i++) {
      float sum = sums[i * sum_stride + d] * corrections[i];
      for (uint32_t j = 0; j < values->count; j++)
        sum += load_scalar(values->data + j * row_bytes, d, dtype) * weights[i * stride + j];
      sums[i * sum_stride + d] = sum;
    }
}

KERNEL void add_as(const float *weights, size_t stride, uint32_t n, const float *corrections,
                   const zmoe_head_rows *values, zmoe_dtype dtype, float *sums, size_t sum_stride) {
  if (n == 1)
    add_rows(weights, stride, 1, corrections, values, dtype, sums, sum_stride);
  else if (n == 2)
    add_rows(weights, stride, 2, corrections, values, dtype, sums, sum_stride);
  else
    add_rows(weights, stride, ZMOE_QUERIES, corrections, values, dtype, sums, sum_stride);
}

TARGET static void add_values(const float *weights, size_t stride, uint32_t n,
                              const float *corrections, const zmoe_head_rows *values, float *sums,
                              size_t sum_stride) {
  switch (values->dtype) {
  case ZMOE_F32:
    add_as(weights, stride, n, corrections, values, ZMOE_F32, sums, sum_stride);
    return;
  case ZMOE_F16:
    add_as(weights, stride, n, corrections, values, ZMOE_F16, sums, sum_stride);
    return;
  case ZMOE_BF16:
    add_as(weights, stride, n, corrections, values, ZMOE_BF16, sums, sum_stride);
    return;
  }
}

/* ---- values for many queries ------------------------------------------------------------ */

KERNEL void pack_as(const zmoe_head_rows *values, zmoe_dtype dtype, uint32_t panel, float *panels) {
  uint32_t dim = values->dim, count = values->count;
  size_t row_bytes = dim * zmoe_dtype_bytes(dtype);
  for (uint32_t j = 0; j < count; j++) {
    const unsigned char *row = values->data + j * row_bytes;
    fetch_ahead(values, j, row_bytes);
    for (uint32_t first = 0; first < dim; first += panel) {
      float *to = panels + (size_t)first * count + (size_t)j * panel;
      uint32_t width = dim - first < panel ? dim - first : panel, d = 0;
      for (; d + LANES <= width; d += LANES)
        vec_store((unsigned char *)to, d, ZMOE_F32, vec_load(row, first + d, dtype));
      for (; d < width; d++)
        to[d] = load_scalar(row, first + d, dtype);
      for (; d < panel; d++)
        to[d] = 0.0f;
    }
  }
}

TARGET static void pack_values(const zmoe_head_rows *values, uint32_t panel, float *panels) {
  switch (values->dtype) {
  case ZMOE_F32:
    pack_as(values, ZMOE_F32, panel, panels);
    return;
  case ZMOE_F16:
    pack_as(values, ZMOE_F16, panel, panels);
    return;
  case ZMOE_BF16:
    pack_as(values, ZMOE_BF16, panel, panels);
    return;
  }
}
