/* GEMV, AVX2 with FMA.  Before including this, after vec.h, define TABLE, the name of the table of
 * kernels, and, where there is VNNI, DOT4 and
 *   dot4(sum, a, b)  lane l of sum + a[4 l] b[4 l] + ... + a[4 l + 3] b[4 l + 3],
 * a without sign.  Integers being exact, both give the same bits. */
#include "avx2.h"
#include "unpacking.h"
#include "weight.h"

#define CODES __m256i
#define FP4_CHAINS
#define UNIT 2

/* The codes in the low and in the high half of each byte. */
KERNEL void split(CODES bytes, int affine, CODES codes[2]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i fp4 = _mm256_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0,
                                       12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  codes[0] = _mm256_and_si256(bytes, nibble);
  codes[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
  for (int i = 0; i < 2 && !affine; i++)
    codes[i] = _mm256_shuffle_epi8(fp4, codes[i]);
}

/* Words are exchanged so that, lane by lane, all of a unit belongs to one group: even lanes are
 * of the first 64 codes, odd ones of the others; the lanes of each half of a register are of 32. */
KERNEL void load_unit(const unsigned char *src, uint32_t words, int affine, CODES codes[4]) {
  __m256i a = load_codes(src, words), b = load_codes(src + 32, words > 8 ? words - 8 : 0);
  split(_mm256_unpacklo_epi32(a, b), affine, codes);
  split(_mm256_unpackhi_epi32(a, b), affine, codes + 2);
}

KERNEL VEC spread(const float *scales, uint32_t group) {
  if (group == 128)
    return _mm256_broadcast_ss(scales);
  if (group == 64)
    return _mm256_castpd_ps(_mm256_broadcast_sd((const double *)(const void *)scales));
  __m256 four = _mm256_castps128_ps256(_mm_loadu_ps(scales));
  return _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3));
}

KERNEL __m256i add_pairs(__m256i pairs, int times) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16((short)times));
}

#ifdef DOT4
KERNEL __m256i times_plane(__m256i sum, const CODES codes[4], const int8_t *elements) {
  EACH(i, 4)
    sum = dot4(sum, codes[i], load_bytes32(elements + 32 * i));
  return sum;
}
#else
/* 128 codes with one plane of x: eight products make at most 8 * 24 * 128, which
 * 16 bits hold. */
KERNEL __m256i pairs_with_plane(const CODES codes[4], const int8_t *elements) {
  __m256i sum[4];
  EACH(i, 4)
    sum[i] = _mm256_maddubs_epi16(codes[i], load_bytes32(elements + 32 * i));
  return _mm256_add_epi16(_mm256_add_epi16(sum[0], sum[1]), _mm256_add_epi16(sum[2], sum[3]));
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
  return to_floats(times_plane(zero, codes, (const int8_t *)x->elements + k), x, k / 16);
}

KERNEL VEC times_int22(const CODES codes[4], const zmoe_packed *x, size_t k, uint32_t i) {
  (void)i;
  const int8_t *elements = (const int8_t *)x->elements + 3 * k;
  const __m256i zero = _mm256_setzero_si256();
  __m256i sum = _mm256_slli_epi32(times_plane(zero, codes, elements), 7);
  sum = times_plane(_mm256_sub_epi32(zero, sum), codes, elements + ZMOE_BLOCK);
  sum = times_plane(_mm256_slli_epi32(sum, 8), codes, elements + 2 * ZMOE_BLOCK);
  return _mm256_cvtepi32_ps(sum);
}

KERNEL VEC bytes_times_int8(CODES bytes, const zmoe_packed *x, size_t k) {
  __m256i elements = load_bytes32((const int8_t *)x->elements + k);
  return to_floats(dot4(_mm256_setzero_si256(), bytes, elements), x, k / 4);
}
#else
KERNEL VEC times_int8(const CODES codes[4], const zmoe_packed *x, size_t k, uint32_t i) {
  (void)i;
  return to_floats(add_pairs(pairs_with_plane(codes, (const int8_t *)x->elements + k), 1), x,
                   k / 16);
}

KERNEL VEC times_int22(const CODES codes[4], const zmoe_packed *x, size_t k, uint32_t i) {
  (void)i;
  const int8_t *elements = (const int8_t *)x->elements + 3 * k;
  __m256i high = add_pairs(pairs_with_plane(codes, elements), -32768);
  __m256i middle = add_pairs(pairs_with_plane(codes, elements + ZMOE_BLOCK), 256);
  __m256i low = add_pairs(pairs_with_plane(codes, elements + 2 * ZMOE_BLOCK), 1);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(high, _mm256_add_epi32(middle, low)));
}

/* Two products of whole 8-bit codes do not fit 16 bits; of their halves they do. */
KERNEL VEC bytes_times_int8(CODES bytes, const zmoe_packed *x, size_t k) {
  CODES halves[2];
  split(bytes, 1, halves);
  __m256i elements = load_bytes32((const int8_t *)x->elements + k);
  __m256i low = add_pairs(_mm256_maddubs_epi16(halves[0], elements), 1);
  __m256i high = add_pairs(_mm256_maddubs_epi16(halves[1], elements), 16);
  return to_floats(_mm256_add_epi32(low, high), x, k / 4);
}
#endif

KERNEL void widen_bytes(const unsigned char *src, VEC values[4]) {
  EACH(i, 4) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(src + 8 * i));
    values[i] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  }
}

/* Eight codes lie in the eight bytes from their first on, the last in those that end with them. */
KERNEL uint32_t window_at(uint32_t bits, uint32_t c) {
  const uint32_t last = packed_bytes(bits) - 8;
  return c * bits < last ? c * bits : last;
}

KERNEL uint8_t place_in_window(uint32_t bits, uint32_t c, uint32_t byte) {
  return (uint8_t)(byte - window_at(bits, c));
}

KERNEL VEC widen_packed(const struct unpacking *u, const unsigned char *src, uint32_t c) {
  int64_t window;
  memcpy(&window, src + window_at(u->bits, c), sizeof window);
  __m256i words =
      _mm256_shuffle_epi8(_mm256_set1_epi64x(window), load_bytes32(u->bytes[LANES * c]));
  words = _mm256_srlv_epi32(words, load_bytes32(u->shifts + LANES * c));
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(u->mask)));
}

/* The lookup ignores all but the lowest three bits. */
KERNEL VEC fp4_at(const unsigned char *src) {
  int32_t word;
  memcpy(&word, src, sizeof word);
  __m256i codes =
      _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  VEC value = _mm256_permutevar8x32_ps(_mm256_loadu_ps(zmoe_fp4_values), codes);
  VEC sign = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
  return _mm256_xor_ps(value, _mm256_and_ps(sign, vec_splat(-0.0f)));
}

/* As f16, 2^-8 of the value. */
KERNEL VEC fp8_at(const unsigned char *src) {
  const __m128i largest = _mm_set1_epi16(0x3f80);
  __m128i half = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)src));
  half = _mm_and_si128(_mm_slli_epi16(half, 7), _mm_set1_epi16((short)0xbf80));
  __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, largest), largest);
  return _mm256_cvtph_ps(_mm_or_si128(half, nan)) * vec_splat(256.0f);
}

static void pack_integers(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  zmoe_avx2_pack_input(layout, w, x, row);
}

#include "gemv_body.h"

const zmoe_kernels TABLE = {gemv_layout, gemv_pack_input, gemv_dot};
