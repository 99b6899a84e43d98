/* GEMV, AVX-512 with BF16 and VNNI.
 *
 * Where x is bf16, codes of 4 bits are looked up as bf16, which holds all their
 * values exactly, and multiplied in pairs with f32 sums: twice the rate of f32,
 * and nothing lost.  With x in 8 bits, codes are multiplied as integers. */
#if defined(__x86_64__)
#include "avx512.h"

#define FEATURES AVX512_FEATURES ",avx512bf16,avx512vnni,avx512vbmi"
#define BF16 __attribute__((target(FEATURES)))
#define BF16_INLINE static inline __attribute__((always_inline, target(FEATURES)))

/* ---- bf16 ------------------------------------------------------------------------ */

BF16_INLINE __m512 multiply_add(__m512 sum, __m512i value, const void *x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)value, (__m512bh)_mm512_loadu_si512(x));
}

/* Adds 32 elements from k on; of the weight those outside `lanes` are zero and not touched. */
BF16_INLINE void add_halves(const unsigned char *data, size_t row_bytes, size_t k, __mmask32 lanes,
                            const char *const *x, const uint32_t rows, const uint32_t n_out,
                            __m512 sum[ZMOE_DOT_ROWS][ZMOE_DOT_ROWS]) {
  __m512i value[ZMOE_DOT_ROWS];
  EACH(j, n_out)
    value[j] = _mm512_maskz_loadu_epi16(lanes, data + j * row_bytes + 2 * k);
  EACH(r, rows)
    EACH(j, n_out)
      sum[r][j] = multiply_add(sum[r][j], value[j], x[r] + 2 * k);
}

BF16_INLINE void dot_outputs_bf16(const zmoe_weight *w, const void *const *xs, const uint32_t rows,
                                  const uint32_t n_out, uint32_t o, float *const *ys, uint32_t y) {
  const size_t row_bytes = zmoe_weight_row_bytes(w),
               ahead = zmoe_rows_ahead(row_bytes, n_out) * row_bytes;
  const unsigned char *data = zmoe_row(w, o);
  const char *x[ZMOE_DOT_ROWS];
  __m512 sum[ZMOE_DOT_ROWS][ZMOE_DOT_ROWS];
  EACH(r, rows) {
    x[r] = zmoe_packed_at((void *)xs[r], ZMOE_LAYOUT_BF16, w->in_features).elements;
    EACH(j, n_out)
      sum[r][j] = _mm512_setzero_ps();
  }
  uint32_t k = 0;
  for (; k + 64 <= w->in_features; k += 64) {
    EACH(j, n_out)
      EACH(line, 2)
        prefetch_line(data + j * row_bytes + 2 * k + 64 * line + ahead);
    EACH(i, 2)
      add_halves(data, row_bytes, k + 32 * i, 0xffffffffu, x, rows, n_out, sum);
  }
  for (; k < w->in_features; k += 32) {
    uint32_t left = w->in_features - k;
    add_halves(data, row_bytes, k, left >= 32 ? 0xffffffffu : (1u << left) - 1, x, rows, n_out,
               sum);
  }
  store_sums(rows, n_out, sum, ys, y);
}

BF16_INLINE void dot_bf16(const zmoe_weight *w, const void *const *xs, const uint32_t rows,
                          uint32_t first, uint32_t last, float *const *ys) {
  uint32_t o = first;
  for (; o + 4 <= last; o += 4)
    dot_outputs_bf16(w, xs, rows, 4, o, ys, o - first);
  for (; o < last; o++)
    dot_outputs_bf16(w, xs, rows, 1, o, ys, o - first);
}

BF16 static void dot_halves(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                            uint32_t first, uint32_t last, float *const *ys) {
  ZMOE_BY_ROWS(dot_bf16, w);
}

/* ---- codes and bf16 --------------------------------------------------------------------- */

/* The 16 values as bf16, twice, since an index has five bits. */
static const uint16_t bf16_of_affine[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                                            0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
                                            0x4140, 0x4150, 0x4160, 0x4170};
static const uint16_t bf16_of_fp4[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                         0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                         0xc000, 0xc040, 0xc080, 0xc0c0};

BF16_INLINE zmoe_layout layout_of(const enum codes codes) {
  return codes == CODES8 ? ZMOE_LAYOUT_CODES8_BF16 : ZMOE_LAYOUT_CODES4_BF16;
}

/* Of FP4 v[0]; of CODES8 the low bytes of codes below 128 as bf16, and the high ones. */
typedef struct table {
  __m512i v[4];
} table;

BF16_INLINE table table_of(const zmoe_weight *w, const enum codes codes) {
  (void)w;
  table t = {0};
  if (codes != CODES8)
    t.v[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256(
        (const __m256i *)(const void *)(codes == FP4 ? bf16_of_fp4 : bf16_of_affine)));
  if (codes != CODES8)
    return t;
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  EACH(i, 2) {
    __m512i v[2];
    EACH(j, 2) {
      __m512i code = _mm512_add_epi32(first, _mm512_set1_epi32((int)(64 * i + 32 * j)));
      __m512i next = _mm512_add_epi32(code, _mm512_set1_epi32(16));
      v[j] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(next), _mm512_cvtepi32_ps(code));
    }
    EACH(high, 2)
      t.v[2 * high + i] = _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(v[0], 8 * high))),
          _mm512_cvtepi16_epi8(_mm512_srli_epi16(v[1], 8 * high)), 1);
  }
  return t;
}

/* Of 4 bits codes i % 4 and i % 4 + 4 of each word, next to each other.  Of 8 bits the
 * first or second halves of all 128-bit parts, in order; from 128 on a code's bf16 is 0x4300 plus
 * its lowest seven bits. */
BF16_INLINE __m512i value_of(const enum codes codes, const __m512i words[2], const uint32_t i,
                             const table t) {
  if (codes != CODES8)
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i / 4], i % 4 * 4), t.v[0]);
  __mmask64 large = _mm512_movepi8_mask(words[i / 2]);
  __m512i code = _mm512_and_si512(words[i / 2], _mm512_set1_epi8(127));
  __m512i low = _mm512_mask2_permutex2var_epi8(t.v[0], code, ~large, t.v[1]);
  __m512i high = _mm512_permutex2var_epi8(t.v[2], code, t.v[3]);
  high = _mm512_mask_mov_epi8(high, large, _mm512_set1_epi8(0x43));
  return i % 2 == 0 ? _mm512_unpacklo_epi8(low, high) : _mm512_unpackhi_epi8(low, high);
}

BF16_INLINE uint32_t lane_code(const enum codes codes, uint32_t lane) {
  return codes == CODES8 ? lane % 4 / 2 * 64 + lane / 4 * 16 : 8 * lane_word(lane);
}

BF16_INLINE uint32_t panel_rows(const enum codes codes) {
  return codes == CODES8 ? 12 : ZMOE_ROW_BLOCK + 1;
}

#define INLINE BF16_INLINE
#define ELEMENTS 32
#include "avx512_codes.h"

BF16 static void dot_codes4_bf16(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  if (w->format == ZMOE_FORMAT_MXFP4)
    dot_codes(w, FP4, xs, rows, first, last, scratch, ys);
  else
    dot_codes(w, CODES4, xs, rows, first, last, scratch, ys);
}

BF16 static void dot_codes8_bf16(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  dot_codes(w, CODES8, xs, rows, first, last, scratch, ys);
}

/* ---- codes and x in 8 bits ------------------------------------------------------------- */

/* As unsigned bytes twice the fp4 value plus 12; an affine code is itself. */
static const uint8_t byte_of_fp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* Which of 16 scales each lane of a run's first block is multiplied with. */
BF16_INLINE __m512i scale_lanes(uint32_t codes_per_lane, uint32_t group) {
  uint32_t lanes[16];
  for (uint32_t l = 0; l < 16; l++)
    lanes[l] = l * codes_per_lane / group;
  return _mm512_loadu_si512(lanes);
}

/* A register of codes as bytes, in one or two. */
BF16_INLINE uint32_t bytes_of(const uint32_t bits, int affine, __m512i words, __m512i values[2]) {
  if (bits == 8) {
    values[0] = words;
    return 1;
  }
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)byte_of_fp4));
  values[0] = _mm512_and_si512(words, _mm512_set1_epi8(15));
  values[1] = _mm512_and_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi8(15));
  EACH(i, 2)
    if (!affine)
      values[i] = _mm512_shuffle_epi8(table, values[i]);
  return 2;
}

/* The products with element k and on of a row: 16 sums. */
BF16_INLINE __m512 multiply_int8(const __m512i *values, const uint32_t n, const zmoe_packed *x,
                                 size_t k, size_t lane) {
  __m512i sum = _mm512_loadu_si512(x->offsets + lane);
  const int8_t *elements = (const int8_t *)x->elements + k;
  EACH(i, n)
    sum = _mm512_dpbusd_epi32(sum, values[i], _mm512_loadu_si512(elements + 64 * i));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(x->scales + lane));
}

/* `n_out` outputs from o on with `rows` rows of x, all of whose sums stay in
 * registers; several outputs share the loads of x.  Scales come 16 at a time. */
BF16_INLINE void dot_block(const zmoe_weight *w, const uint32_t bits, const zmoe_packed *x,
                           const uint32_t rows, const uint32_t n_out, uint32_t o, float *const *ys,
                           uint32_t y) {
  const uint32_t per_lane = 32 / bits, block = 16 * per_lane, group = w->group;
  const uint32_t in_features = w->in_features, groups = in_features / group;
  const int affine = w->format == ZMOE_FORMAT_AFFINE;
  const size_t row_bytes = zmoe_weight_row_bytes(w), scale_bytes = zmoe_weight_scale_bytes(w);
  const unsigned char *data = (const unsigned char *)w->data + o * row_bytes;
  const unsigned char *scales = (const unsigned char *)w->scales + o * scale_bytes;
  const unsigned char *biases = (const unsigned char *)w->biases + (affine ? o * scale_bytes : 0);
  const __m512i first_lanes = scale_lanes(per_lane, group);
  const __m512 centre = _mm512_set1_ps(bits == 4 ? ZMOE_CENTRE4 : ZMOE_CENTRE8);
  const uint32_t skipped = zmoe_rows_ahead(row_bytes, n_out);
  EACH(i, n_out)
    prefetch_scales(w, o + i + skipped, scale_bytes);
  __m512 sum[ZMOE_DOT_ROWS][ZMOE_DOT_ROWS], scale[ZMOE_DOT_ROWS];
  EACH(r, rows)
    EACH(i, n_out)
      sum[r][i] = _mm512_setzero_ps();
  for (uint32_t g = 0; g < groups; g += 16) {
    __mmask16 lanes = lanes16(groups - g);
    EACH(i, n_out) {
      scale[i] = load_scales(w, scales + i * scale_bytes, g, lanes);
      if (!affine)
        continue;
      __m512 bias = load_floats(biases + i * scale_bytes, g, w->scale_dtype, lanes);
      bias = _mm512_fmadd_ps(scale[i], centre, bias);
      EACH(r, rows)
        sum[r][i] = _mm512_fmadd_ps(bias, _mm512_loadu_ps(x[r].sums + g), sum[r][i]);
    }
    uint32_t begin = g * group,
             end = begin + 16 * group < in_features ? begin + 16 * group : in_features;
    for (uint32_t k = begin; k < end; k += block) {
      __m512i spread = _mm512_add_epi32(first_lanes, _mm512_set1_epi32((int)((k - begin) / group)));
      __mmask16 words = lanes16((end - k) / per_lane);
      EACH(i, n_out) {
        const unsigned char *at = data + i * row_bytes + k * 4 / per_lane;
        prefetch_line(at + skipped * row_bytes);
        __m512i values[2];
        const uint32_t n = bytes_of(bits, affine, _mm512_maskz_loadu_epi32(words, at), values);
        __m512 factor = _mm512_permutexvar_ps(spread, scale[i]);
        EACH(r, rows) {
          __m512 part = multiply_int8(values, n, &x[r], k, k / per_lane);
          sum[r][i] = _mm512_fmadd_ps(part, factor, sum[r][i]);
        }
      }
    }
  }
  store_sums(rows, n_out, sum, ys, y);
}

BF16_INLINE void dot_int8(const zmoe_weight *w, const uint32_t bits, const void *const *xs,
                          const uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  const zmoe_layout layout = bits == 4 ? ZMOE_LAYOUT_CODES4_INT8 : ZMOE_LAYOUT_CODES8_INT8;
  const uint32_t n_out = ZMOE_DOT_ROWS / rows;
  zmoe_packed x[ZMOE_DOT_ROWS];
  EACH(r, rows)
    x[r] = zmoe_packed_at((void *)xs[r], layout, w->in_features);
  uint32_t o = first;
  for (; o + n_out <= last; o += n_out)
    dot_block(w, bits, x, rows, n_out, o, ys, o - first);
  for (; o < last; o++)
    dot_block(w, bits, x, rows, 1, o, ys, o - first);
}

BF16 static void dot_codes4_int8(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, float *const *ys) {
  ZMOE_BY_ROWS(dot_int8, w, 4);
}

BF16 static void dot_codes8_int8(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, float *const *ys) {
  ZMOE_BY_ROWS(dot_int8, w, 8);
}

/* ---- which one -------------------------------------------------------------------- */

static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  switch (layout) {
  case ZMOE_LAYOUT_BF16:
    dot_halves(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES4_BF16:
    dot_codes4_bf16(w, xs, rows, first, last, scratch, ys);
    return;
  case ZMOE_LAYOUT_CODES8_BF16:
    dot_codes8_bf16(w, xs, rows, first, last, scratch, ys);
    return;
  case ZMOE_LAYOUT_CODES4_INT8:
    dot_codes4_int8(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES8_INT8:
    dot_codes8_int8(w, xs, rows, first, last, ys);
    return;
  default:
    zmoe_avx512_dot(w, layout, xs, rows, first, last, scratch, ys);
  }
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  zmoe_layout layout = zmoe_kernels_avx512.layout(w, x_dtype, precision);
  int bf16 = x_dtype == ZMOE_BF16;
  if (layout == ZMOE_LAYOUT_CODES4 && bf16)
    return ZMOE_LAYOUT_CODES4_BF16;
  if (w->format == ZMOE_FORMAT_AFFINE && layout == ZMOE_LAYOUT_CHAINS && bf16)
    return ZMOE_LAYOUT_CODES8_BF16;
  if (w->format == ZMOE_FORMAT_BF16 && bf16)
    return ZMOE_LAYOUT_BF16;
  return layout;
}

const zmoe_kernels zmoe_kernels_avx512_bf16 = {layout_for, zmoe_avx512_pack_input, dot};
#endif
