/* GEMV, AVX2 with FMA.  Before including this, after vec.h, define TABLE, the name of the table of
 * kernels, and, where there is VNNI, DOT4 and
 *   dot4(sum, a, b)  lane l of sum + a[4 l] b[4 l] + ... + a[4 l + 3] b[4 l + 3],
 * a without sign.  Integers being exact, both give the same bits. */
#include "avx2.h"
#include "unpacking.h"
#include "weight.h"

#define CODES __m256i
#define LOW_BITS
#define UNIT 2

/* Where each of 32 fields of bits lies: the bytes of a pair of them, of which the lower half of a
 * register has those of the first 16 bytes, the upper half those of the last, and what brings a
 * pair to the top of its 16 bits. */
struct fields {
  uint8_t bytes[32];
  uint16_t factors[16];
};
static const struct fields fields_of_5 = {{0, 1, 1, 2, 2, 3, 3, 4,  5,  6,  6,  7,  7,  8,  8,  9,
                                           6, 7, 7, 8, 8, 9, 9, 10, 11, 12, 12, 13, 13, 14, 14, 15},
                                          {64, 16, 4, 1, 64, 16, 4, 1, 64, 16, 4, 1, 64, 16, 4, 1}};
static const struct fields fields_of_6 = {{0, 1, 1, 2, 3, 4, 4, 5, 6,  7,  7,  8,  9,  10, 10, 11,
                                           4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15},
                                          {16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1}};

/* 32 fields of 5 or 6 bits as bytes. */
KERNEL __m256i widen_fields(const uint32_t bits, const unsigned char *src) {
  const struct fields *f = bits == 5 ? &fields_of_5 : &fields_of_6;
  __m128i first = _mm_loadu_si128((const __m128i *)(const void *)src);
  __m128i last = _mm_loadu_si128((const __m128i *)(const void *)(src + 4 * bits - 16));
  __m256i pairs = _mm256_shuffle_epi8(_mm256_set_m128i(last, first), load_bytes32(f->bytes));
  pairs = _mm256_mullo_epi16(pairs, load_bytes32(f->factors));
  const short mask = (short)((1 << bits) - 1);
  __m256i even =
      _mm256_and_si256(_mm256_srli_epi16(pairs, 16 - 2 * (int)bits), _mm256_set1_epi16(mask));
  __m256i odd = _mm256_and_si256(_mm256_srli_epi16(pairs, 8 - (int)bits),
                                 _mm256_set1_epi16((short)(mask << 8)));
  return _mm256_or_si256(even, odd);
}

/* 64 codes of 2, 3 or 4 bits, two of them at the bottom of each byte. */
KERNEL __m256i load_pairs(const uint32_t bits, const unsigned char *src) {
  if (bits == 4)
    return load_bytes32(src);
  if (bits == 3)
    return widen_fields(6, src);
  __m256i four = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)src));
  return _mm256_or_si256(four, _mm256_slli_epi16(four, 4));
}

/* The first and the second code of each byte. */
KERNEL void split(form t, CODES pairs, CODES codes[2]) {
  const __m256i mask = _mm256_set1_epi8((char)((1 << t.bits) - 1));
  const __m256i fp4 = _mm256_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0,
                                       12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  codes[0] = _mm256_and_si256(pairs, mask);
  codes[1] = _mm256_and_si256(_mm256_srli_epi16(pairs, (int)t.bits), mask);
  for (int i = 0; i < 2 && t.format != ZMOE_FORMAT_AFFINE; i++)
    codes[i] = _mm256_shuffle_epi8(fp4, codes[i]);
}

/* Of codes that take half a byte, words are exchanged so that, lane by lane, all of a unit belongs
 * to one group: even lanes are of the first 64 codes, odd ones of the others; the lanes of each
 * half of a register are of 32, and of a group of 16 those of the first two registers or the last.
 */
KERNEL void load_unit(form t, const unsigned char *src, CODES codes[4]) {
  if (t.layout == ZMOE_LAYOUT_CODES8_INT22) {
    codes[0] = widen_fields(t.bits, src);
    codes[1] = widen_fields(t.bits, src + 4 * t.bits);
    return;
  }
  __m256i a = load_pairs(t.bits, src), b = load_pairs(t.bits, src + 8 * t.bits);
  split(t, _mm256_unpacklo_epi32(a, b), codes);
  split(t, _mm256_unpackhi_epi32(a, b), codes + 2);
}

typedef __m256i lanes;

KERNEL lanes lanes_of(uint32_t group) {
  if (group == 128)
    return _mm256_setzero_si256();
  if (group == 64)
    return _mm256_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1);
  return _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3);
}

KERNEL VEC spread(const float *scales, lanes l) {
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scales)), l);
}

KERNEL __m256i add_pairs(__m256i pairs, int times) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16((short)times));
}

#ifdef DOT4
KERNEL __m256i times_plane(__m256i sum, const CODES *codes, const uint32_t n,
                           const int8_t *elements) {
  EACH(i, n)
    sum = dot4(sum, codes[i], load_bytes32(elements + 32 * i));
  return sum;
}
#else
/* n registers of codes with one plane of x.  Four have eight products that make at most
 * 8 * 24 * 128, and two have four of at most 4 * 63 * 128, which 16 bits hold. */
KERNEL __m256i pairs_with_plane(const CODES *codes, const uint32_t n, const int8_t *elements) {
  __m256i sum = _mm256_maddubs_epi16(codes[0], load_bytes32(elements));
  if (n == 4) {
    __m256i others = _mm256_add_epi16(_mm256_maddubs_epi16(codes[2], load_bytes32(elements + 64)),
                                      _mm256_maddubs_epi16(codes[3], load_bytes32(elements + 96)));
    sum = _mm256_add_epi16(sum, others);
  }
  if (n > 1)
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes[1], load_bytes32(elements + 32)));
  return sum;
}
#endif

KERNEL VEC to_floats(__m256i sum, const zmoe_packed *x, size_t lane) {
  sum = _mm256_add_epi32(sum, load_bytes32(x->offsets + lane));
  return _mm256_cvtepi32_ps(sum) * _mm256_loadu_ps(x->scales + lane);
}

/* A unit of 4-bit codes is a block: i is 0. */
#ifdef DOT4
KERNEL VEC times_int8(const CODES codes[4], const zmoe_packed *x, size_t k, uint32_t i) {
  (void)i;
  const __m256i zero = _mm256_setzero_si256();
  return to_floats(times_plane(zero, codes, 4, (const int8_t *)x->elements + k), x, k / 16);
}

KERNEL VEC times_digits(const CODES *codes, const uint32_t n, const int8_t *elements) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i high = times_plane(zero, codes, n, elements);
  __m256i middle = times_plane(zero, codes, n, elements + ZMOE_BLOCK);
  __m256i low = times_plane(zero, codes, n, elements + 2 * ZMOE_BLOCK);
  low = _mm256_add_epi32(low, _mm256_slli_epi32(middle, 8));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(low, _mm256_slli_epi32(high, 15)));
}

KERNEL VEC bytes_times_int8(CODES bytes, const zmoe_packed *x, size_t k) {
  __m256i elements = load_bytes32((const int8_t *)x->elements + k);
  return to_floats(dot4(_mm256_setzero_si256(), bytes, elements), x, k / 4);
}
#else
KERNEL VEC times_int8(const CODES codes[4], const zmoe_packed *x, size_t k, uint32_t i) {
  (void)i;
  return to_floats(add_pairs(pairs_with_plane(codes, 4, (const int8_t *)x->elements + k), 1), x,
                   k / 16);
}

KERNEL VEC times_digits(const CODES *codes, const uint32_t n, const int8_t *elements) {
  __m256i high = add_pairs(pairs_with_plane(codes, n, elements), -32768);
  __m256i middle = add_pairs(pairs_with_plane(codes, n, elements + ZMOE_BLOCK), 256);
  __m256i low = add_pairs(pairs_with_plane(codes, n, elements + 2 * ZMOE_BLOCK), 1);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(high, _mm256_add_epi32(middle, low)));
}

/* Two products of whole 8-bit codes do not fit 16 bits; of their halves they do. */
KERNEL VEC bytes_times_int8(CODES bytes, const zmoe_packed *x, size_t k) {
  CODES halves[2];
  split((form){.format = ZMOE_FORMAT_AFFINE, .bits = 4}, bytes, halves);
  __m256i elements = load_bytes32((const int8_t *)x->elements + k);
  __m256i low = add_pairs(_mm256_maddubs_epi16(halves[0], elements), 1);
  __m256i high = add_pairs(_mm256_maddubs_epi16(halves[1], elements), 16);
  return to_floats(_mm256_add_epi32(low, high), x, k / 4);
}
#endif

/* A lane has at most 16 codes of 24, or 8 of 63, whose products with 22 bits 31 hold. */
KERNEL VEC add_int22(form t, const CODES codes[4], const zmoe_packed *x, size_t k, uint32_t i,
                     const float *scales, lanes l, VEC sum) {
  const int8_t *elements = (const int8_t *)x->elements + 3 * k + i;
  if (t.layout == ZMOE_LAYOUT_CODES8_INT22 && !t.short_groups)
    return vec_fma(times_digits(codes, 2, elements), vec_splat(scales[0]), sum);
  if (t.layout == ZMOE_LAYOUT_CODES8_INT22) {
    sum = vec_fma(times_digits(codes, 1, elements), vec_splat(scales[0]), sum);
    return vec_fma(times_digits(codes + 1, 1, elements + 32), vec_splat(scales[1]), sum);
  }
  if (t.format != ZMOE_FORMAT_NVFP4)
    return vec_fma(times_digits(codes, 4, elements), spread(scales, l), sum);
  VEC all = _mm256_loadu_ps(scales);
  VEC first = _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 4, 0, 4, 2, 6, 2, 6));
  VEC second = _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(1, 5, 1, 5, 3, 7, 3, 7));
  sum = vec_fma(times_digits(codes, 2, elements), first, sum);
  return vec_fma(times_digits(codes + 2, 2, elements + 64), second, sum);
}

KERNEL void widen_bytes(const unsigned char *src, VEC values[4]) {
  EACH(i, 4) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(src + 8 * i));
    values[i] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  }
}

/* As f16, 2^-8 of the values, unless they are NaN. */
KERNEL __m128i halves_of_fp8(const unsigned char *src) {
  __m128i half = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)src));
  return _mm_and_si128(_mm_slli_epi16(half, 7), _mm_set1_epi16((short)0xbf80));
}

KERNEL VEC small_fp8_at(const unsigned char *src) {
  return _mm256_cvtph_ps(halves_of_fp8(src));
}

KERNEL VEC fp8_at(const unsigned char *src) {
  const __m128i largest = _mm_set1_epi16(0x3f80);
  __m128i half = halves_of_fp8(src);
  __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, largest), largest);
  return _mm256_cvtph_ps(_mm_or_si128(half, nan)) * vec_splat(256.0f);
}

static void pack_integers(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  zmoe_avx2_pack_input(layout, w, x, row);
}

#include "gemv_body.h"

const zmoe_kernels TABLE = {gemv_layout, gemv_pack_input, gemv_dot};
