/* The inner loops, once per instruction set.
 *
 * A row's sums are the same bits whatever the number of rows: `dot` sums each
 * product of a row and an output by lanes of K, in one order, and folds the lanes
 * in one way.  More rows share what decoding a weight costs, nothing else.
 *
 * `dot` wants x in a layout of its own, where neighbours in a register are what
 * one instruction decodes.  Packed once per row, it serves all outputs. */
#ifndef ZMOE_KERNELS_H
#define ZMOE_KERNELS_H

#include "compute.h"

enum {
  ZMOE_PANEL = 32, /* outputs in a panel, and in one task */
  ZMOE_PANEL_BYTES = 96 << 10,
  ZMOE_DOT_ROWS = 4, /* rows of x that a loop takes at a time */
};

/* A loop over rows, or the like, that must be unrolled: sums in an array stay in
 * registers only so. */
#define EACH(i, count) _Pragma("GCC unroll 8") for (uint32_t i = 0; i < (count); i++)

typedef enum zmoe_layout {
  ZMOE_LAYOUT_PLAIN = 0, /* f32, in order; not copied, not padded */
  ZMOE_LAYOUT_BF16,      /* bf16, in order */
  ZMOE_LAYOUT_CODES4,    /* f32, in the order in which 4-bit codes are decoded */
  ZMOE_LAYOUT_CODES4_BF16,
  ZMOE_LAYOUT_CHAINS, /* f32, in the order in which f32_body.h sums floats */
  ZMOE_LAYOUT_CODES8_BF16,
  ZMOE_LAYOUT_CODES4_INT8,  /* 8 bits */
  ZMOE_LAYOUT_CODES4_INT22, /* 22 bits, as three digits of 8; f32 in all but name */
  ZMOE_LAYOUT_CODES8_INT8,
  ZMOE_LAYOUT_CODES8_INT22, /* the same as three digits, for codes that take a byte each */
} zmoe_layout;

/* A packed row: the sums of x per group, which an affine weight's biases
 * multiply, what the integer layouts add, and the elements, padded with zeros
 * to a whole pair of blocks of ZMOE_BLOCK.
 *
 * Integers have no sign where the codes of weights are: the code of an fp4
 * value is twice it plus ZMOE_CENTRE_FP4, and the scale is halved.  What affine
 * codes stand for is centred, since rounding x then costs least: w = (code -
 * centre) scale + (bias + centre scale).  The centres are taken back by
 * - 8 bits: a scale per 32 elements, the start of each lane's sum is `offsets`; AVX-512 has an
 *   order of its own, and in each of four lanes the offset of all 32;
 * - 22 bits: a scale per group, x's sum in it is `rests` apart from the true one:
 *   x w = codes * elements * scale + bias * sums + scale * rests. */
enum { ZMOE_BLOCK = 128, ZMOE_INT_GROUP = 32 };
enum { ZMOE_CENTRE4 = 8, ZMOE_CENTRE8 = 128, ZMOE_CENTRE_FP4 = 12 };

typedef struct zmoe_packed {
  float *sums;      /* ceil16(in_features / group) */
  float *scales;    /* 8 bits: one per register lane, 16 a block of codes; 22 bits: like sums */
  int32_t *offsets; /* 8 bits: like scales */
  float *rests;     /* 22 bits: like sums */
  void *elements;
} zmoe_packed;

int zmoe_layout_is_integer(zmoe_layout layout);
static inline __attribute__((always_inline)) int zmoe_layout_is_int22(zmoe_layout layout) {
  return layout == ZMOE_LAYOUT_CODES4_INT22 || layout == ZMOE_LAYOUT_CODES8_INT22;
}
size_t zmoe_packed_bytes(zmoe_layout layout, uint32_t in_features);
size_t zmoe_packed_most(uint32_t in_features); /* in any layout */
zmoe_packed zmoe_packed_at(void *row, zmoe_layout layout, uint32_t in_features);

/* What a thread has of its own for `dot`.  Towards its end, `dot` fetches from output `next_output`
 * of `next` on what the thread probably reads after this; `next` is NULL where nobody knows. */
typedef struct zmoe_scratch {
  _Alignas(64) unsigned char panel[ZMOE_PANEL_BYTES];
  const zmoe_weight *next;
  uint32_t next_output;
} zmoe_scratch;

typedef struct zmoe_kernels {
  zmoe_layout (*layout)(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision);
  /* x (w->in_features) f32 into `row`.  Whatever is not finite is found before. */
  void (*pack_input)(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row);
  /* ys[r][o - first] = w[o] * xs[r] for o in [first, last), at most ZMOE_PANEL of them;
   * `scratch`: a zmoe_scratch. */
  void (*dot)(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
              uint32_t first, uint32_t last, void *scratch, float *const *ys);
} zmoe_kernels;

/* The `body` of a dot for all rows, ZMOE_DOT_ROWS at a time; how many is a constant, so
 * that sums stay in registers. */
#define ZMOE_BY_ROWS(body, ...)                                                                    \
  do {                                                                                             \
    for (; rows >= ZMOE_DOT_ROWS; rows -= ZMOE_DOT_ROWS, xs += ZMOE_DOT_ROWS, ys += ZMOE_DOT_ROWS) \
      body(__VA_ARGS__, xs, ZMOE_DOT_ROWS, first, last, ys);                                       \
    if (rows == 3)                                                                                 \
      body(__VA_ARGS__, xs, 3, first, last, ys);                                                   \
    else if (rows == 2)                                                                            \
      body(__VA_ARGS__, xs, 2, first, last, ys);                                                   \
    else if (rows == 1)                                                                            \
      body(__VA_ARGS__, xs, 1, first, last, ys);                                                   \
  } while (0)

const zmoe_kernels *zmoe_kernels_for(zmoe_isa isa);

extern const zmoe_kernels zmoe_kernels_generic;
#if defined(__x86_64__)
extern const zmoe_kernels zmoe_kernels_avx2;
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define ZMOE_AVX_VNNI
extern const zmoe_kernels zmoe_kernels_avx_vnni;
#endif
extern const zmoe_kernels zmoe_kernels_avx512;
extern const zmoe_kernels zmoe_kernels_avx512_vnni;
extern const zmoe_kernels zmoe_kernels_vnni256; /* of AVX-512 with VNNI: integers in 256 bits */
extern const zmoe_kernels zmoe_kernels_avx512_bf16;
#elif defined(__aarch64__)
extern const zmoe_kernels zmoe_kernels_neon;
extern const zmoe_kernels zmoe_kernels_neon_dot;
/* Before 16, clang has the intrinsics only where a whole file may use them. */
#if !defined(__clang__) || __clang_major__ >= 16 ||                                                \
    (defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8))
#define ZMOE_NEON_BF16
extern const zmoe_kernels zmoe_kernels_neon_bf16;
#endif
#endif

/* Every layout but those that only x86 has. */
void zmoe_generic_pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row);
/* Of a group in 22 bits whose largest element is `largest`: what one is, and its inverse, or 0. */
float zmoe_scale_int22(float largest, float *inverse);
/* Scale and rest of group g, `sum` being that of its integers. */
void zmoe_finish_int22(const zmoe_weight *w, int32_t sum, float scale, size_t g, zmoe_packed to);

#endif
