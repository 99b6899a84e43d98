/* GEMV, AVX-512 with VNNI: codes and x in 8 bits are multiplied as integers; all else as AVX-512
 * has it. */
#if defined(__x86_64__)
#include "avx512.h"

#define VNNI __attribute__((target(AVX512_FEATURES ",avx512vnni")))
#define VNNI_INLINE                                                                                \
  static inline __attribute__((always_inline, target(AVX512_FEATURES ",avx512vnni")))

/* As unsigned bytes twice the fp4 value plus 12; an affine code is itself. */
static const uint8_t byte_of_fp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* Which of 16 scales each lane of a run's first block is multiplied with. */
VNNI_INLINE __m512i scale_lanes(uint32_t codes_per_lane, uint32_t group) {
  uint32_t lanes[16];
  for (uint32_t l = 0; l < 16; l++)
    lanes[l] = l * codes_per_lane / group;
  return _mm512_loadu_si512(lanes);
}

/* A register of codes as bytes, in one or two. */
VNNI_INLINE uint32_t bytes_of(const uint32_t bits, int affine, __m512i words, __m512i values[2]) {
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
VNNI_INLINE __m512 multiply_int8(const __m512i *values, const uint32_t n, const zmoe_packed *x,
                                 size_t k, size_t lane) {
  __m512i sum = _mm512_loadu_si512(x->offsets + lane);
  const int8_t *elements = (const int8_t *)x->elements + k;
  EACH(i, n)
    sum = _mm512_dpbusd_epi32(sum, values[i], _mm512_loadu_si512(elements + 64 * i));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(x->scales + lane));
}

/* `n_out` outputs from o on with `rows` rows of x, all of whose sums stay in
 * registers; several outputs share the loads of x.  Scales come 16 at a time. */
VNNI_INLINE void dot_block(const zmoe_weight *w, const uint32_t bits, const zmoe_packed *x,
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
      scale[i] = load_scales(w, affine ? CODES8 : FP4, scales + i * scale_bytes, g, groups - g);
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
  store_sums(rows, n_out, n_out, sum, ys, y);
}

VNNI_INLINE void dot_int8(const zmoe_weight *w, const uint32_t bits, const void *const *xs,
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

VNNI static void dot_codes4_int8(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, float *const *ys) {
  ZMOE_BY_ROWS(dot_int8, w, 4);
}

VNNI static void dot_codes8_int8(const zmoe_weight *w, const void *const *xs, uint32_t rows,
                                 uint32_t first, uint32_t last, float *const *ys) {
  ZMOE_BY_ROWS(dot_int8, w, 8);
}

/* ---- which one -------------------------------------------------------------------- */

static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  if (layout == ZMOE_LAYOUT_CODES4_INT8)
    dot_codes4_int8(w, xs, rows, first, last, ys);
  else if (layout == ZMOE_LAYOUT_CODES8_INT8)
    dot_codes8_int8(w, xs, rows, first, last, ys);
  else if (zmoe_layout_is_int22(layout))
    zmoe_kernels_vnni256.dot(w, layout, xs, rows, first, last, scratch, ys);
  else
    zmoe_kernels_avx512.dot(w, layout, xs, rows, first, last, scratch, ys);
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  const zmoe_layout layout = zmoe_kernels_avx512.layout(w, x_dtype, precision);
  if (layout != ZMOE_LAYOUT_CODES4 || codes_of(w) == CODES4 || codes_of(w) == FP4)
    return layout; /* read from memory, these two are faster as floats in registers of 512 bits */
  return ZMOE_LAYOUT_CODES4_INT22;
}

const zmoe_kernels zmoe_kernels_avx512_vnni = {layout_for, zmoe_avx512_pack_input, dot};
#endif
