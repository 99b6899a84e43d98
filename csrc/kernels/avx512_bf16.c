/* GEMV, AVX-512 with BF16 and VBMI.
 *
 * Where x is bf16, codes are looked up as bf16, which holds all their values exactly, and
 * multiplied in pairs with f32 sums: twice the rate of f32, and nothing lost.  Those of 2 and 3
 * bits are brought to 4 before, those of 5 and 6 to 8. */
#if defined(__x86_64__)
#include "avx512.h"

#define FEATURES AVX512_FEATURES ",avx512bf16,avx512vbmi"
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
  store_sums(rows, n_out, n_out, sum, ys, y);
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

/* Of e2m1. */
static const uint16_t bf16_of_fp4[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                         0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                         0xc000, 0xc040, 0xc080, 0xc0c0};

CODES_INLINE zmoe_layout layout_of(const enum codes codes) {
  return unpacked_bits(codes) == 8 ? ZMOE_LAYOUT_CODES8_BF16 : ZMOE_LAYOUT_CODES4_BF16;
}

/* Of codes in 4 bits v[0], 32 values, since an index has five bits.  Of those in 8 bits the low
 * bytes of codes below 128 as bf16, and the high ones. */
typedef struct table {
  __m512i v[4], order, starts[2];
} table;

/* 32 codes from `code` on as bf16; bits above theirs have no meaning. */
BF16_INLINE __m512i code_values(const enum codes codes, uint32_t code) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 v[2];
  EACH(i, 2) {
    __m512i number = _mm512_add_epi32(first, _mm512_set1_epi32((int)(code + 16 * i)));
    if (codes == FP8)
      v[i] = f32_of_e4m3(number);
    else
      v[i] = _mm512_cvtepi32_ps(
          _mm512_and_si512(number, _mm512_set1_epi32((1 << bits_of(codes)) - 1)));
  }
  return (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
}

/* How `unpack` brings 64 bits of unpacked codes together, and from which bit on each of their bytes
 * is taken; of codes in 4 bits the low half, and the high one. */
BF16_INLINE void plan_unpacking(const enum codes codes, table *t) {
  const uint32_t bits = bits_of(codes), per_byte = 8 / unpacked_bits(codes);
  uint8_t order[64], starts[2][64];
  for (uint32_t i = 0; i < 64; i++) {
    uint32_t from = i / 8 * bits * per_byte + i % 8;
    order[i] = (uint8_t)(from < 63 ? from : 63);
    starts[0][i] = (uint8_t)(i % 8 * bits * per_byte);
    starts[1][i] = (uint8_t)(starts[0][i] + bits - 4);
  }
  t->order = _mm512_loadu_si512(order);
  EACH(i, 2)
    t->starts[i] = _mm512_loadu_si512(starts[i]);
}

BF16_INLINE table table_of(const enum codes codes) {
  table t = {0};
  if (bits_of(codes) != unpacked_bits(codes))
    plan_unpacking(codes, &t);
  if (codes == FP4 || codes == NVFP4) {
    t.v[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(const void *)bf16_of_fp4));
    return t;
  }
  if (unpacked_bits(codes) == 4) {
    t.v[0] = code_values(codes, 0);
    return t;
  }
  EACH(i, 2) {
    const __m512i v[2] = {code_values(codes, 64 * i), code_values(codes, 64 * i + 32)};
    EACH(high, 2)
      t.v[2 * high + i] = _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(v[0], 8 * high))),
          _mm512_cvtepi16_epi8(_mm512_srli_epi16(v[1], 8 * high)), 1);
  }
  return t;
}

/* Bits above a code's own have no meaning. */
BF16_INLINE __m512i unpack(const enum codes codes, __m512i bytes, const table t) {
  if (bits_of(codes) == unpacked_bits(codes))
    return bytes;
  bytes = _mm512_permutexvar_epi8(t.order, bytes);
  __m512i low = _mm512_multishift_epi64_epi8(t.starts[0], bytes);
  if (unpacked_bits(codes) == 8)
    return low;
  const __m512i nibble = _mm512_set1_epi8(15);
  return _mm512_ternarylogic_epi32(nibble, low, _mm512_multishift_epi64_epi8(t.starts[1], bytes),
                                   0xca); /* of the first where the nibble has ones */
}

/* Of 4 bits codes i % 4 and i % 4 + 4 of each word, next to each other.  Of 8 bits the
 * first or second halves of all 128-bit parts, in order; from 128 on an affine code's bf16 is
 * 0x4300 plus its lowest seven bits. */
BF16_INLINE __m512i value_of(const enum codes codes, const __m512i words[2], const uint32_t i,
                             const table t) {
  if (unpacked_bits(codes) == 4)
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i / 4], i % 4 * 4), t.v[0]);
  __m512i code = words[i / 2], low, high;
  if (codes == CODES8) {
    __mmask64 large = _mm512_movepi8_mask(code);
    code = _mm512_and_si512(code, _mm512_set1_epi8(127));
    low = _mm512_mask2_permutex2var_epi8(t.v[0], code, ~large, t.v[1]);
    high = _mm512_permutex2var_epi8(t.v[2], code, t.v[3]);
    high = _mm512_mask_mov_epi8(high, large, _mm512_set1_epi8(0x43));
  } else if (codes == FP8) {
    low = _mm512_permutex2var_epi8(t.v[0], code, t.v[1]);
    high = _mm512_permutex2var_epi8(t.v[2], code, t.v[3]);
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(INT8_MIN),
                                     0xf8); /* and the code's sign */
  } else {
    low = _mm512_permutexvar_epi8(code, t.v[0]);
    high = _mm512_permutexvar_epi8(code, t.v[2]);
  }
  return i % 2 == 0 ? _mm512_unpacklo_epi8(low, high) : _mm512_unpackhi_epi8(low, high);
}

BF16_INLINE uint32_t lane_code(const enum codes codes, uint32_t lane) {
  return unpacked_bits(codes) == 8 ? lane % 4 / 2 * 64 + lane / 4 * 16 : 8 * lane_word(lane);
}

BF16_INLINE uint32_t panel_rows(const enum codes codes) {
  return unpacked_bits(codes) == 8 ? 12 : ZMOE_ROW_BLOCK + 1;
}

#define INLINE BF16_INLINE
#define ELEMENTS 32
#include "avx512_codes.h"

#define DOT(codes)                                                                                 \
  BF16 static void dot_##codes(const zmoe_weight *w, const void *const *xs, uint32_t rows,         \
                               uint32_t first, uint32_t last, void *scratch, float *const *ys) {   \
    dot_codes(w, codes, xs, rows, first, last, scratch, ys);                                       \
  }
DOT(CODES2)
DOT(CODES3)
DOT(CODES4)
DOT(CODES5)
DOT(CODES6)
DOT(CODES8)
DOT(FP4)
DOT(NVFP4)
DOT(FP8)

typedef void matmul(const zmoe_weight *w, const void *const *xs, uint32_t rows, uint32_t first,
                    uint32_t last, void *scratch, float *const *ys);
static matmul *const of_codes[] = {
    [CODES2] = dot_CODES2, [CODES3] = dot_CODES3, [CODES4] = dot_CODES4,
    [CODES5] = dot_CODES5, [CODES6] = dot_CODES6, [CODES8] = dot_CODES8,
    [FP4] = dot_FP4,       [NVFP4] = dot_NVFP4,   [FP8] = dot_FP8};

/* ---- which one -------------------------------------------------------------------- */

static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  switch (layout) {
  case ZMOE_LAYOUT_BF16:
    dot_halves(w, xs, rows, first, last, ys);
    return;
  case ZMOE_LAYOUT_CODES4_BF16:
  case ZMOE_LAYOUT_CODES8_BF16:
    of_codes[codes_of(w)](w, xs, rows, first, last, scratch, ys);
    return;
  default:
    zmoe_kernels_avx512_vnni.dot(w, layout, xs, rows, first, last, scratch, ys);
  }
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  zmoe_layout layout = zmoe_kernels_avx512_vnni.layout(w, x_dtype, precision);
  if (zmoe_layout_is_integer(layout) && !zmoe_layout_is_int22(layout))
    return layout;
  if (x_dtype != ZMOE_BF16 || w->bits == 1)
    return layout;
  if (zmoe_is_float(w))
    return w->format == ZMOE_FORMAT_BF16 ? ZMOE_LAYOUT_BF16 : layout;
  return layout_of(codes_of(w));
}

const zmoe_kernels zmoe_kernels_avx512_bf16 = {layout_for, zmoe_avx512_pack_input, dot};
#endif
