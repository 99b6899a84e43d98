/* Few rows, AVX2 with FMA.
 *
 * `rows`, formats and groups are constants in each call of the inlined bodies,
 * so that choices vanish and sums stay in registers. */
#if defined(__x86_64__)
#include "avx2.h"

/* ---- floats ------------------------------------------------------------------ */

/* `outs` outputs from o on.  The sums are eight, or four of one row: enough to
 * hide the latency of each. */
AVX2_INLINE void dot_outputs(const zmoe_weight *w, uint32_t format, const void *const *xs,
                             const uint32_t rows, const uint32_t outs, uint32_t o, uint32_t first,
                             float *const *ys) {
  const uint32_t n = rows * outs, chains = n == 1 ? 4 : 8 / n;
  const size_t ins = w->ins, item = format == ZMOE_FORMAT_F32 ? 4 : 2, row_bytes = ins * item;
  const unsigned char *data = zmoe_row(w, o);
  __m256 sum[8][4], value[2];
  EACH(i, n)
    EACH(c, chains)
      sum[i][c] = _mm256_setzero_ps();
  size_t k = 0;
  for (; k + 32 <= ins; k += 32)
    EACH(c, 4) {
      EACH(j, outs) {
        const unsigned char *at = data + j * row_bytes + (k + 8 * c) * item;
        if (8 * c * item % 64 == 0)
          zmoe_prefetch(at);
        value[j] = load_floats(at, 0, format);
      }
      EACH(i, n) {
        __m256 x = _mm256_loadu_ps((const float *)xs[i / outs] + k + 8 * c);
        sum[i][c % chains] = _mm256_fmadd_ps(value[i % outs], x, sum[i][c % chains]);
      }
    }
  for (; k < ins; k += 8) {
    uint32_t left = (uint32_t)(ins - k);
    EACH(j, outs)
      value[j] = load_some_floats(data + j * row_bytes, k, format, left);
    EACH(i, n) {
      __m256 x = load_some_floats(xs[i / outs], k, ZMOE_F32, left);
      sum[i][0] = _mm256_fmadd_ps(value[i % outs], x, sum[i][0]);
    }
  }
  EACH(i, n) {
    EACH(c, chains - 1)
      sum[i][0] = _mm256_add_ps(sum[i][0], sum[i][c + 1]);
    ys[i / outs][o + i % outs - first] = sum_lanes(sum[i][0]);
  }
}

/* Four rows of x and a stream of weights crowd the smallest cache: two outputs
 * at a time read the rows half as often. */
AVX2_INLINE void dot_floats(const zmoe_weight *w, uint32_t format, const void *const *xs,
                            const uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  uint32_t o = first;
  for (; rows == 4 && o + 2 <= last; o += 2)
    dot_outputs(w, format, xs, rows, 2, o, first, ys);
  for (; o < last; o++)
    dot_outputs(w, format, xs, rows, 1, o, first, ys);
}

/* ---- codes ------------------------------------------------------------------------
 * x is integers, and so are products and sums; of 8 bits only where asked for,
 * since whole bytes convert to floats quickly enough. */

enum product { CODES4_INT8, CODES4_INT22, CODES8, CODES8_INT8 };

/* Scales that are converted at a time. */
enum { SCALES = 64 };

/* The scales of groups [g, g + count), for each row of x where they contain
 * its own; and what the sums of x add: all biases times their groups' sum. */
AVX2_INLINE void load_groups(const zmoe_weight *w, enum product product, int affine,
                             const unsigned char *scales, const unsigned char *biases, uint32_t g,
                             uint32_t count, const zmoe_arranged *x, const uint32_t rows,
                             float each[ZMOE_DOT_ROWS][SCALES], __m256 sum[ZMOE_DOT_ROWS]) {
  const float centre = product == CODES4_INT8 ? ZMOE_CENTRE4 : ZMOE_CENTRE8;
  for (uint32_t i = 0; i < count; i += 8) {
    __m256 scale = affine ? load_some_floats(scales, g + i, w->scale_dtype, count - i)
                          : load_e8m0(scales + g + i, count - i);
    __m256 bias = scale;
    if (affine) {
      bias = load_some_floats(biases, g + i, w->scale_dtype, count - i);
      if (product == CODES4_INT8 || product == CODES8_INT8)
        bias = _mm256_fmadd_ps(scale, _mm256_set1_ps(centre), bias);
      EACH(r, rows)
        sum[r] = _mm256_fmadd_ps(bias, _mm256_loadu_ps(x[r].sums + g + i), sum[r]);
    }
    EACH(r, rows) {
      __m256 own = scale;
      if (product == CODES4_INT22) {
        sum[r] = _mm256_fmadd_ps(scale, _mm256_loadu_ps(x[r].rests + g + i), sum[r]);
        own = _mm256_mul_ps(scale, _mm256_loadu_ps(x[r].scales + g + i));
      }
      _mm256_storeu_ps(each[r] + i, own);
    }
  }
}

/* The codes in the low and in the high half of each byte. */
AVX2_INLINE void split(__m256i words, int affine, __m256i codes[2]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i fp4 = _mm256_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0,
                                       12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  codes[0] = _mm256_and_si256(words, nibble);
  codes[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble);
  if (!affine) {
    codes[0] = _mm256_shuffle_epi8(fp4, codes[0]);
    codes[1] = _mm256_shuffle_epi8(fp4, codes[1]);
  }
}

AVX2_INLINE __m256i add_pairs(__m256i pairs, int times) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16((short)times));
}

AVX2_INLINE __m256 to_floats(__m256i sum, const zmoe_arranged *x, size_t lane) {
  sum = _mm256_add_epi32(sum, load_bytes32(x->offsets + lane));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(x->scales + lane));
}

/* 64 codes of 4 bits, or 0 to 24, with one plane of x: four products make at
 * most 4 * 24 * 128, which 16 bits hold. */
AVX2_INLINE __m256i times_plane(const __m256i codes[2], const int8_t *elements) {
  return _mm256_add_epi16(_mm256_maddubs_epi16(codes[0], load_bytes32(elements)),
                          _mm256_maddubs_epi16(codes[1], load_bytes32(elements + 64)));
}

AVX2_INLINE __m256 block4_int8(const __m256i codes[2], const zmoe_arranged *x, size_t k,
                               size_t in_block) {
  const int8_t *elements = (const int8_t *)x->elements + k + in_block / 2;
  return to_floats(add_pairs(times_plane(codes, elements), 1), x, (k + in_block) / 8);
}

AVX2_INLINE __m256 block4_int22(const __m256i codes[2], const zmoe_arranged *x, size_t k,
                                size_t in_block) {
  const int8_t *elements = (const int8_t *)x->elements + 3 * k + in_block / 2;
  __m256i high = add_pairs(times_plane(codes, elements), -32768);
  __m256i middle = add_pairs(times_plane(codes, elements + ZMOE_BLOCK), 256);
  __m256i low = add_pairs(times_plane(codes, elements + 2 * ZMOE_BLOCK), 1);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(high, _mm256_add_epi32(middle, low)));
}

/* 32 codes of 8 bits: two products of whole ones do not fit 16 bits; of their
 * halves they do. */
AVX2_INLINE __m256 block8_int8(const __m256i codes[2], const zmoe_arranged *x, size_t k) {
  __m256i elements = load_bytes32((const int8_t *)x->elements + k);
  __m256i low = add_pairs(_mm256_maddubs_epi16(codes[0], elements), 1);
  __m256i high = add_pairs(_mm256_maddubs_epi16(codes[1], elements), 16);
  return to_floats(_mm256_add_epi32(low, high), x, k / 4);
}

AVX2_INLINE void block8(const unsigned char *data, const zmoe_arranged *x, size_t k,
                        const uint32_t rows, __m256 part[ZMOE_DOT_ROWS]) {
  for (uint32_t i = 0; i < 4; i++) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(data + k + 8 * i));
    __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    EACH(r, rows) {
      __m256 other = _mm256_loadu_ps((const float *)x[r].elements + k + 8 * i);
      part[r] = i == 0 ? _mm256_mul_ps(value, other) : _mm256_fmadd_ps(value, other, part[r]);
    }
  }
}

/* The codes from element k + in_block on, k a multiple of ZMOE_BLOCK: 64, or 32
 * of 8 bits; of 4 bits no more than `left`, but others are whole. */
AVX2_INLINE void block(enum product product, int affine, const unsigned char *data, size_t k,
                       size_t in_block, size_t left, const zmoe_arranged *x, const uint32_t rows,
                       __m256 part[ZMOE_DOT_ROWS]) {
  if (product == CODES8) {
    block8(data, x, k + in_block, rows, part);
    return;
  }
  __m256i codes[2];
  if (product == CODES8_INT8)
    split(load_bytes32(data + k + in_block), 1, codes);
  else
    split(load_words8(data + (k + in_block) / 2, (uint32_t)left / 8), affine, codes);
  EACH(r, rows)
    part[r] = product == CODES8_INT8   ? block8_int8(codes, &x[r], k + in_block)
              : product == CODES4_INT8 ? block4_int8(codes, &x[r], k, in_block)
                                       : block4_int22(codes, &x[r], k, in_block);
}

/* The scale of each lane of a block whose first group is scales[0]; blocks of
 * 64 may hold two groups. */
AVX2_INLINE __m256 spread(const float *scales, int two) {
  if (!two)
    return _mm256_broadcast_ss(scales);
  return _mm256_set_m128(_mm_broadcast_ss(scales + 1), _mm_broadcast_ss(scales));
}

AVX2_INLINE void add_block(enum product product, int affine, uint32_t group,
                           const unsigned char *data, size_t k, uint32_t in_block, size_t left,
                           const zmoe_arranged *x, const uint32_t rows,
                           float each[ZMOE_DOT_ROWS][SCALES], uint32_t at,
                           __m256 sum[ZMOE_DOT_ROWS]) {
  __m256 part[ZMOE_DOT_ROWS];
  block(product, affine, data, k, in_block, left, x, rows, part);
  int two = group == 32 && (product == CODES4_INT8 || product == CODES4_INT22);
  EACH(r, rows)
    sum[r] = _mm256_fmadd_ps(part[r], spread(each[r] + at + in_block / group, two), sum[r]);
}

AVX2_INLINE void dot_codes(const zmoe_weight *w, enum product product, zmoe_layout layout,
                           int affine, uint32_t group, const void *const *xs, const uint32_t rows,
                           uint32_t first, uint32_t last, float *const *ys) {
  const uint32_t bits = product == CODES8 || product == CODES8_INT8 ? 8 : 4;
  const uint32_t step = bits == 4 ? 64 : 32, groups = w->ins / group;
  const size_t row_bytes = zmoe_weight_row_bytes(w), scale_bytes = zmoe_weight_scale_bytes(w);
  const unsigned char *data = zmoe_row(w, first), *scales = zmoe_row_scales(w, first);
  const unsigned char *biases = affine ? zmoe_row_biases(w, first) : scales;
  zmoe_arranged x[ZMOE_DOT_ROWS];
  EACH(r, rows)
    x[r] = zmoe_arranged_at((void *)xs[r], layout, w->ins);
  for (uint32_t o = first; o < last; o++) {
    __m256 sum[ZMOE_DOT_ROWS];
    EACH(r, rows)
      sum[r] = _mm256_setzero_ps();
    for (uint32_t g = 0; g < groups; g += SCALES) {
      uint32_t count = groups - g < SCALES ? groups - g : SCALES;
      float each[ZMOE_DOT_ROWS][SCALES];
      load_groups(w, product, affine, scales, biases, g, count, x, rows, each, sum);
      size_t k = (size_t)g * group, end = k + (size_t)count * group;
      uint32_t at = 0;
      for (; k + ZMOE_BLOCK <= end; k += ZMOE_BLOCK, at += ZMOE_BLOCK / group) {
        for (uint32_t i = 0; i < ZMOE_BLOCK * bits / 8; i += 64)
          zmoe_prefetch(data + k * bits / 8 + i);
        for (uint32_t i = 0; i < ZMOE_BLOCK; i += step)
          add_block(product, affine, group, data, k, i, step, x, rows, each, at, sum);
      }
      for (uint32_t i = 0; k + i < end; i += step)
        add_block(product, affine, group, data, k, i, end - k - i, x, rows, each, at, sum);
    }
    EACH(r, rows)
      ys[r][o - first] = sum_lanes(sum[r]);
    data += row_bytes, scales += scale_bytes, biases += scale_bytes;
  }
}

/* ---- which one -------------------------------------------------------------------- */

#define ROWS(body, ...)                                                                            \
  do {                                                                                             \
    if (rows == ZMOE_DOT_ROWS)                                                                     \
      body(__VA_ARGS__, xs, ZMOE_DOT_ROWS, first, last, ys);                                       \
    else if (rows == 2)                                                                            \
      body(__VA_ARGS__, xs, 2, first, last, ys);                                                   \
    else                                                                                           \
      for (uint32_t r = 0; r < rows; r++)                                                          \
        body(__VA_ARGS__, xs + r, 1, first, last, ys + r);                                         \
  } while (0)
#define GROUPS(product, layout, affine)                                                            \
  do {                                                                                             \
    if (w->group == 32)                                                                            \
      ROWS(dot_codes, w, product, layout, affine, 32);                                             \
    else if (w->group == 64)                                                                       \
      ROWS(dot_codes, w, product, layout, affine, 64);                                             \
    else                                                                                           \
      ROWS(dot_codes, w, product, layout, affine, 128);                                            \
  } while (0)
#define DOT(name, body)                                                                            \
  AVX2 static void name(const zmoe_weight *w, const void *const *xs, uint32_t rows,                \
                        uint32_t first, uint32_t last, float *const *ys) {                         \
    body;                                                                                          \
  }

DOT(dot_f32, ROWS(dot_floats, w, ZMOE_F32))
DOT(dot_f16, ROWS(dot_floats, w, ZMOE_F16))
DOT(dot_bf16, ROWS(dot_floats, w, ZMOE_BF16))
DOT(dot_codes4, GROUPS(CODES4_INT22, ZMOE_LAYOUT_CODES4_INT22, 1))
DOT(dot_fp4, ROWS(dot_codes, w, CODES4_INT22, ZMOE_LAYOUT_CODES4_INT22, 0, 32))
DOT(dot_codes8, GROUPS(CODES8, ZMOE_LAYOUT_CODES8, 1))
DOT(dot_codes4_int8, GROUPS(CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8, 1))
DOT(dot_fp4_int8, ROWS(dot_codes, w, CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8, 0, 32))
DOT(dot_codes8_int8, GROUPS(CODES8_INT8, ZMOE_LAYOUT_CODES8_INT8, 1))

static void dot_plain(const zmoe_weight *w, const void *const *xs, uint32_t rows, uint32_t first,
                      uint32_t last, float *const *ys) {
  switch (w->format) {
  case ZMOE_FORMAT_F32:
    dot_f32(w, xs, rows, first, last, ys);
    return;
  case ZMOE_FORMAT_F16:
    dot_f16(w, xs, rows, first, last, ys);
    return;
  case ZMOE_FORMAT_BF16:
    dot_bf16(w, xs, rows, first, last, ys);
    return;
  default:
    zmoe_generic_dot(w, ZMOE_LAYOUT_PLAIN, xs, rows, first, last, ys);
  }
}

static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                uint32_t first, uint32_t last, float *const *ys) {
  int affine = w->format == ZMOE_FORMAT_AFFINE;
  switch (layout) {
  case ZMOE_LAYOUT_CODES4_INT22:
    (affine ? dot_codes4 : dot_fp4)(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES8:
    dot_codes8(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES4_INT8:
    (affine ? dot_codes4_int8 : dot_fp4_int8)(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES8_INT8:
    dot_codes8_int8(w, xs, rows, first, last, ys);
    return;
  default:
    dot_plain(w, xs, rows, first, last, ys);
  }
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  (void)x_dtype;
  if (w->format == ZMOE_FORMAT_MXFP4 || (w->format == ZMOE_FORMAT_AFFINE && w->bits == 4))
    return precision == ZMOE_INT8 ? ZMOE_LAYOUT_CODES4_INT8 : ZMOE_LAYOUT_CODES4_INT22;
  if (w->format == ZMOE_FORMAT_AFFINE && w->bits == 8)
    return precision == ZMOE_INT8 ? ZMOE_LAYOUT_CODES8_INT8 : ZMOE_LAYOUT_CODES8;
  return ZMOE_LAYOUT_PLAIN;
}

const zmoe_kernels zmoe_kernels_avx2 = {layout_for, zmoe_generic_arrange, dot, zmoe_avx2_pack,
                                        zmoe_avx2_tile};
#endif
