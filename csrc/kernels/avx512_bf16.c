/* GEMV, AVX-512 with BF16 and VNNI.
 *
 * Where x is bf16, codes of 4 bits are looked up as bf16, which holds all their
 * values exactly, and multiplied in pairs with f32 sums: twice the rate of f32,
 * and nothing lost.  With x in 8 bits, codes are multiplied as integers. */
#if defined(__x86_64__)
#include "avx512.h"

#define FEATURES AVX512_FEATURES ",avx512bf16,avx512vnni"
#define BF16 __attribute__((target(FEATURES)))
#define BF16_INLINE static inline __attribute__((always_inline, target(FEATURES)))

/* ---- bf16 ------------------------------------------------------------------------ */

BF16_INLINE __m512bh as_bf16(__m512i bits) {
  return (__m512bh)bits;
}

BF16_INLINE __m512bh load_bf16(const void *elements, size_t i) {
  return as_bf16(_mm512_loadu_si512((const uint16_t *)elements + i));
}

BF16_INLINE void dot_bf16(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                          uint32_t first, uint32_t last, float *const *ys) {
  zmoe_packed x[ZMOE_DOT_ROWS];
  for (uint32_t r = 0; r < rows; r++)
    x[r] = zmoe_packed_at((void *)xs[r], ZMOE_LAYOUT_BF16, w->in_features);
  for (uint32_t o = first; o < last; o++) {
    const unsigned char *data = zmoe_row(w, o);
    __m512 even[ZMOE_DOT_ROWS], odd[ZMOE_DOT_ROWS];
    for (uint32_t r = 0; r < rows; r++)
      even[r] = odd[r] = _mm512_setzero_ps();
    uint32_t k = 0;
    for (; k + 64 <= w->in_features; k += 64) {
      prefetch_lines(data + 2 * k, 2);
      __m512bh a = as_bf16(_mm512_loadu_si512(data + 2 * k));
      __m512bh b = as_bf16(_mm512_loadu_si512(data + 2 * k + 64));
      for (uint32_t r = 0; r < rows; r++) {
        even[r] = _mm512_dpbf16_ps(even[r], a, load_bf16(x[r].elements, k));
        odd[r] = _mm512_dpbf16_ps(odd[r], b, load_bf16(x[r].elements, k + 32));
      }
    }
    for (; k < w->in_features; k += 32) {
      uint32_t left = w->in_features - k;
      __mmask32 lanes = left >= 32 ? 0xffffffffu : (1u << left) - 1;
      __m512bh a = as_bf16(_mm512_maskz_loadu_epi16(lanes, data + 2 * k));
      for (uint32_t r = 0; r < rows; r++)
        even[r] = _mm512_dpbf16_ps(even[r], a, load_bf16(x[r].elements, k));
    }
    for (uint32_t r = 0; r < rows; r++)
      ys[r][o - first] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
  }
}

/* ---- the frame of a row of codes ---------------------------------------------------- */

/* Which product of a block of codes, all of it in registers. */
enum product { CODES4_BF16, CODES8_BF16, CODES4_INT8, CODES8_INT8 };

/* The 16 values as bf16, twice, since an index has five bits; as unsigned bytes
 * for integers: the codes themselves, or twice the fp4 value plus 12.  A code of
 * 8 bits is the sum of its low half, looked up alike, and of its high half,
 * whose table has 16 times as much. */
static const uint16_t bf16_of_affine[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                                            0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
                                            0x4140, 0x4150, 0x4160, 0x4170};
static const uint16_t bf16_of_fp4[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                         0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                         0xc000, 0xc040, 0xc080, 0xc0c0};
static const uint8_t byte_of_fp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

BF16_INLINE __m512i table_of(const zmoe_weight *w, enum product product) {
  int affine = w->format == ZMOE_FORMAT_AFFINE;
  if (product == CODES4_BF16 || product == CODES8_BF16)
    return _mm512_broadcast_i64x4(
        _mm256_loadu_si256((const __m256i *)(const void *)(affine ? bf16_of_affine : bf16_of_fp4)));
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)byte_of_fp4));
}

/* A register of codes as what its products take: bf16 (4 registers), or bytes. */
BF16_INLINE int decode(enum product product, int affine, __m512i words, __m512i table,
                       __m512i values[4]) {
  if (product == CODES4_BF16) {
    for (unsigned i = 0; i < 4; i++)
      values[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), table);
    return 4;
  }
  if (product == CODES8_BF16) {
    /* Four more in the exponent, but zero stays zero. */
    __m512i sixteen = _mm512_mask_add_epi16(table, _mm512_test_epi16_mask(table, table), table,
                                            _mm512_set1_epi16(4 << 7));
    for (unsigned i = 0; i < 4; i++)
      values[i] =
          _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), i % 2 ? sixteen : table);
    return 4;
  }
  if (product == CODES8_INT8) {
    values[0] = words;
    return 1;
  }
  values[0] = _mm512_and_si512(words, _mm512_set1_epi8(15));
  values[1] = _mm512_and_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi8(15));
  for (int i = 0; i < 2 && !affine; i++)
    values[i] = _mm512_shuffle_epi8(table, values[i]);
  return 2;
}

/* The products of a decoded register with element k and on of a row: 16 sums. */
BF16_INLINE __m512 multiply(enum product product, const __m512i *values, int n,
                            const zmoe_packed *x, size_t k, size_t lane) {
  if (product == CODES4_BF16) {
    const uint16_t *elements = (const uint16_t *)x->elements + k;
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++)
      sum = _mm512_dpbf16_ps(sum, as_bf16(values[i]), load_bf16(elements, 32 * (size_t)i));
    return sum;
  }
  if (product == CODES8_BF16) {
    const uint16_t *elements = (const uint16_t *)x->elements + k;
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++)
      sum = _mm512_dpbf16_ps(sum, as_bf16(values[i]), load_bf16(elements, 32 * (size_t)(i / 2)));
    return sum;
  }
  __m512i sum = _mm512_loadu_si512(x->offsets + lane);
  const int8_t *elements = (const int8_t *)x->elements + k;
  for (int i = 0; i < n; i++)
    sum = _mm512_dpbusd_epi32(sum, values[i], _mm512_loadu_si512(elements + 64 * i));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(x->scales + lane));
}

/* The sums of four registers at once. */
BF16_INLINE __m128 reduce_4(const __m512 v[4]) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  __m512d low = _mm512_castps_pd(ab), high = _mm512_castps_pd(cd);
  __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                              _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* `n_out` outputs from o on with `rows` rows of x, all of whose sums stay in
 * registers; several outputs share the loads of x.  Scales come 16 at a time. */
BF16_INLINE void dot_block(const zmoe_weight *w, enum product product, uint32_t group,
                           __m512i table, const zmoe_packed *x, uint32_t rows, uint32_t n_out,
                           uint32_t o, float *const *ys, uint32_t y) {
  const uint32_t per_lane = product == CODES8_INT8 || product == CODES8_BF16 ? 4 : 8,
                 block = 16 * per_lane;
  const uint32_t in_features = w->in_features, groups = in_features / group;
  const int affine = w->format == ZMOE_FORMAT_AFFINE;
  const size_t row_bytes = zmoe_weight_row_bytes(w), scale_bytes = zmoe_weight_scale_bytes(w);
  const unsigned char *data = (const unsigned char *)w->data + o * row_bytes;
  const unsigned char *scales = (const unsigned char *)w->scales + o * scale_bytes;
  const unsigned char *biases = (const unsigned char *)w->biases + (affine ? o * scale_bytes : 0);
  const __m512i first_lanes = scale_lanes(per_lane, group);
  const __m512 centre = _mm512_set1_ps(product == CODES4_INT8   ? ZMOE_CENTRE4
                                       : product == CODES8_INT8 ? ZMOE_CENTRE8
                                                                : 0);
  const uint32_t skipped = zmoe_rows_ahead(row_bytes, n_out);
  for (uint32_t i = 0; i < n_out; i++)
    prefetch_scales(w, o + i + skipped, scale_bytes);
  __m512 sum[ZMOE_DOT_ROWS], scale[ZMOE_DOT_ROWS];
  for (uint32_t i = 0; i < rows * n_out; i++)
    sum[i] = _mm512_setzero_ps();
  for (uint32_t g = 0; g < groups; g += 16) {
    __mmask16 lanes = lanes16(groups - g);
    for (uint32_t i = 0; i < n_out; i++) {
      scale[i] = load_scales(w, scales + i * scale_bytes, g, lanes);
      if (!affine)
        continue;
      __m512 bias = load_floats(biases + i * scale_bytes, g, w->scale_dtype, lanes);
      bias = _mm512_fmadd_ps(scale[i], centre, bias);
      for (uint32_t r = 0; r < rows; r++)
        sum[i * rows + r] =
            _mm512_fmadd_ps(bias, _mm512_loadu_ps(x[r].sums + g), sum[i * rows + r]);
    }
    uint32_t begin = g * group,
             end = begin + 16 * group < in_features ? begin + 16 * group : in_features;
    for (uint32_t k = begin; k < end; k += block) {
      __m512i spread = _mm512_add_epi32(first_lanes, _mm512_set1_epi32((int)((k - begin) / group)));
      __mmask16 words = lanes16((end - k) / per_lane);
      for (uint32_t i = 0; i < n_out; i++) {
        const unsigned char *at = data + i * row_bytes + k * 4 / per_lane;
        _mm_prefetch((const char *)at + skipped * row_bytes, _MM_HINT_T0);
        __m512i values[4];
        int n = decode(product, affine, _mm512_maskz_loadu_epi32(words, at), table, values);
        __m512 factor = _mm512_permutexvar_ps(spread, scale[i]);
        for (uint32_t r = 0; r < rows; r++)
          sum[i * rows + r] = _mm512_fmadd_ps(multiply(product, values, n, &x[r], k, k / per_lane),
                                              factor, sum[i * rows + r]);
      }
    }
  }
  for (uint32_t i = rows * n_out; i < 4; i++)
    sum[i] = sum[0];
  float folded[4];
  _mm_storeu_ps(folded, reduce_4(sum));
  for (uint32_t i = 0; i < n_out; i++)
    for (uint32_t r = 0; r < rows; r++)
      ys[r][y + i] = folded[i * rows + r];
}

BF16_INLINE void dot_codes(const zmoe_weight *w, enum product product, zmoe_layout layout,
                           uint32_t group, const void *const *xs, uint32_t rows, uint32_t first,
                           uint32_t last, float *const *ys) {
  __m512i table = table_of(w, product);
  zmoe_packed x[ZMOE_DOT_ROWS];
  for (uint32_t r = 0; r < rows; r++)
    x[r] = zmoe_packed_at((void *)xs[r], layout, w->in_features);
  const uint32_t n_out = ZMOE_DOT_ROWS / rows;
  uint32_t o = first;
  for (; o + n_out <= last; o += n_out)
    dot_block(w, product, group, table, x, rows, n_out, o, ys, o - first);
  for (; o < last; o++)
    dot_block(w, product, group, table, x, rows, 1, o, ys, o - first);
}

/* ---- which one -------------------------------------------------------------------- */

#define GROUPS(product, layout)                                                                    \
  do {                                                                                             \
    if (w->group == 32)                                                                            \
      ZMOE_BY_ROWS(dot_codes, w, product, layout, 32);                                             \
    else if (w->group == 64)                                                                       \
      ZMOE_BY_ROWS(dot_codes, w, product, layout, 64);                                             \
    else                                                                                           \
      ZMOE_BY_ROWS(dot_codes, w, product, layout, 128);                                            \
  } while (0)

typedef void dot_fn(const zmoe_weight *w, const void *const *xs, uint32_t rows, uint32_t first,
                    uint32_t last, float *const *ys);

BF16 static void dot_halves(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                            uint32_t first, uint32_t last, float *const *ys) {
  ZMOE_BY_ROWS(dot_bf16, w);
}

BF16 static void dot_codes4_bf16(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, float *const *ys) {
  GROUPS(CODES4_BF16, ZMOE_LAYOUT_CODES4_BF16);
}

BF16 static void dot_codes8_bf16(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, float *const *ys) {
  GROUPS(CODES8_BF16, ZMOE_LAYOUT_CODES8_BF16);
}

BF16 static void dot_codes4_int8(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, float *const *ys) {
  GROUPS(CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8);
}

BF16 static void dot_codes8_int8(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, float *const *ys) {
  GROUPS(CODES8_INT8, ZMOE_LAYOUT_CODES8_INT8);
}

static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                uint32_t first, uint32_t last, float *const *ys) {
  switch (layout) {
  case ZMOE_LAYOUT_BF16:
    dot_halves(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES4_BF16:
    dot_codes4_bf16(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES8_BF16:
    dot_codes8_bf16(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES4_INT8:
    dot_codes4_int8(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES8_INT8:
    dot_codes8_int8(w, xs, rows, first, last, ys);
    return;
  default:
    zmoe_avx512_dot(w, layout, xs, rows, first, last, ys);
  }
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  zmoe_layout layout = zmoe_kernels_avx512.layout(w, x_dtype, precision);
  int bf16 = x_dtype == ZMOE_BF16;
  if (layout == ZMOE_LAYOUT_CODES4 && bf16)
    return ZMOE_LAYOUT_CODES4_BF16;
  if (layout == ZMOE_LAYOUT_CODES8 && bf16)
    return ZMOE_LAYOUT_CODES8_BF16;
  if (w->format == ZMOE_FORMAT_BF16 && bf16)
    return ZMOE_LAYOUT_BF16;
  return layout;
}

const zmoe_kernels zmoe_kernels_avx512_bf16 = {layout_for, zmoe_avx512_pack_input, dot,
                                               zmoe_avx512_pack_panel, zmoe_avx512_tile};
#endif
