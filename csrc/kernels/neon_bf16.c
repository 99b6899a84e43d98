/* GEMV, NEON with BF16 and I8MM.
 *
 * Codes become bf16 in registers, which holds all their values exactly, and x is
 * bf16 already: nothing is lost but what f32 sums round.  Pairs of rows take turns of
 * 8 bytes in memory, as pairs of outputs do in registers, and one instruction adds to
 * four sums: bfmmla, or smmla where x is in 8 bits.
 *
 * bfmmla is no fused multiply-add: two products are added, and that to the sum, either rounded to
 * odd (an inexact number to its odd neighbour), with subnormals taken and given as zero.  Each
 * error may be twice that of f32's rounding, but there are half as many, and they have no direction
 * either. */
#if defined(__aarch64__)
#include "common/vec.h"

#include "kernels.h"

#ifdef ZMOE_NEON_BF16
#undef TARGET
#ifdef __clang__
#define TARGET __attribute__((target("bf16,i8mm")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+bf16+i8mm")))
#endif

#include "neon_bf16.h"
#include "weight.h"

/* Four outputs share the loads of x. */
enum { N_OUT = 4 };

/* ---- a part: what has one scale ---------------------------------------------------- */

/* Where a line of four outputs is, and what of x it is multiplied with. */
struct line {
  const unsigned char *data[N_OUT], *x[2];
  uint32_t left; /* of bf16, elements that are there, of a unit or more */
};

/* A sum is of one output, or of a pair of outputs and pair p of rows. */
KERNEL uint32_t sum_of(uint32_t outputs, uint32_t p) {
  return 2 * outputs + p;
}

/* Adds the unit at element k of the line. */
KERNEL void add_unit(const kind t, const struct line *line, size_t k, VEC part[N_OUT]) {
  uint8x16_t bytes[N_OUT], values[4];
  EACH(i, N_OUT) {
    const unsigned char *at = line->data[i] + k * 16 / unit_of(t);
    bytes[i] = t.product == HALVES ? load_bytes(at, 2 * line->left) : vld1q_u8(at);
  }
  for (uint32_t i = 0; i < N_OUT; i += 2) {
    uint8x16_t even = bytes[i], odd = bytes[i + 1];
    bytes[i] = halves_of(even, odd, 0);
    bytes[i + 1] = halves_of(even, odd, 1);
  }
  EACH(i, N_OUT) {
    const uint32_t n = decode(t, bytes[i], values);
    EACH(j, n) {
      const size_t place = place_in_line(t, k, j);
      EACH(p, t.pairs) {
        const unsigned char *x = line->x[p] + 2 * place + i % 2 * 16;
        part[sum_of(i / 2, p)] = multiply(t, part[sum_of(i / 2, p)], values[j], vld1q_u8(x));
      }
    }
  }
}

/* Of four outputs: where they lie, and the scales of a run, one for each sum of a pair. */
struct outputs {
  const unsigned char *data[N_OUT], *scales[N_OUT];
  float of_pair[N_OUT / 2][RUN_GROUPS][4];
};

/* Adds `units` units from element k of the line on, whose scales are those of
 * element `at` of the run. */
KERNEL void add_part(const kind t, const struct line *line, size_t k, const uint32_t units,
                     size_t at, const struct inputs *x, const struct outputs *out, VEC sum[N_OUT]) {
  VEC part[N_OUT];
  EACH(i, N_OUT)
    part[i] = vec_splat(0.0f);
  if (t.product == HALVES) {
    EACH(i, units)
      add_unit(t, line, k + i * unit_of(t), part);
    EACH(i, N_OUT)
      sum[i] += part[i];
    return;
  }
  uint32_t count = units;
  if (units > 1 && !is_integer(t))
    __asm__("" : "+r"(count)); /* unrolled, they would not fit the registers */
  for (uint32_t i = 0; i < count; i++)
    add_unit(t, line, k + i * unit_of(t), part);
  EACH(i, N_OUT) {
    if (is_integer(t))
      part[i] = vcvtq_f32_s32(vreinterpretq_s32_f32(part[i])) *
                vld1q_f32(x->scales[i % 2][at / ZMOE_INT_GROUP]);
    if (i % 2 < t.pairs)
      sum[i] = vec_fma(part[i], vld1q_f32(out->of_pair[i / 2][at / t.group]), sum[i]);
  }
}

/* ---- a run of four outputs ----------------------------------------------------------- */

KERNEL VEC load_scales(const zmoe_weight *w, const kind t, const unsigned char *from, size_t g,
                       uint32_t count) {
  return t.affine ? load_some(from, g, w->scale_dtype, count) : load_e8m0(from + g, count);
}

KERNEL void convert_scales(const zmoe_weight *w, const kind t, struct outputs *out, size_t first,
                           uint32_t count) {
  for (uint32_t g = 0; g < count; g += LANES) {
    VEC v[N_OUT];
    EACH(i, N_OUT)
      v[i] = load_scales(w, t, out->scales[i], first + g, count - g);
    EACH(i, N_OUT) {
      VEC both = i % 2 == 0 ? vzip1q_f32(v[i], v[i + 1]) : vzip2q_f32(v[i - 1], v[i]);
      vst1q_f32(out->of_pair[i / 2][g + i % 2 * 2], vzip1q_f32(both, both));
      vst1q_f32(out->of_pair[i / 2][g + i % 2 * 2 + 1], vzip2q_f32(both, both));
    }
  }
}

KERNEL void advance(const kind t, struct line *line, uint32_t units) {
  const size_t x_bytes = is_integer(t) ? 2 : 4; /* of a pair */
  EACH(i, N_OUT)
    line->data[i] += 16 * (size_t)units;
  EACH(p, 2)
    line->x[p] += units * unit_of(t) * x_bytes;
}

/* Adds elements [first, first + count). */
KERNEL void add_run(const zmoe_weight *w, const kind t, struct outputs *out, size_t first,
                    uint32_t count, size_t ahead, const struct inputs *x, VEC sum[N_OUT]) {
  const uint32_t unit = unit_of(t), part = part_of(t);
  const uint32_t whole = t.product == HALVES ? count - count % (4 * unit) : count;
  struct line line = {.x = {x->elements[0], x->elements[1]}, .left = unit};
  EACH(i, N_OUT)
    line.data[i] = out->data[i] + first * 16 / unit;
  if (t.product != HALVES)
    convert_scales(w, t, out, first / t.group, count / t.group);
  uint32_t k = 0;
  for (; k < whole; k += 4 * unit, advance(t, &line, 4)) {
    EACH(i, N_OUT)
      __builtin_prefetch(line.data[i] + ahead);
    const uint32_t n = count - k < 4 * unit ? count - k : 4 * unit;
    _Pragma("GCC unroll 1") for (uint32_t i = 0; i < n; i += part)
        add_part(t, &line, i, part / unit, k + i, x, out, sum);
  }
  for (; k < count; k += unit, advance(t, &line, 1)) {
    line.left = count - k;
    add_part(t, &line, 0, 1, k, x, out, sum);
  }
}

/* ---- rows ------------------------------------------------------------------------------ */

/* What the sums of x's groups add, affine biases and centres: where outputs start. */
KERNEL void start_outputs(const zmoe_weight *w, const kind t, const zmoe_packed x[ZMOE_DOT_ROWS],
                          uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  const uint32_t most = 2 * t.pairs, groups = t.affine ? w->in_features / t.group : 0;
  for (uint32_t o = first; o < last; o++) {
    VEC sum[ZMOE_DOT_ROWS];
    EACH(r, most)
      sum[r] = vec_splat(0.0f);
    for (uint32_t g = 0; g < groups; g += LANES) {
      VEC bias = load_some(zmoe_row_biases(w, o), g, w->scale_dtype, groups - g);
      VEC scale = load_scales(w, t, zmoe_row_scales(w, o), g, groups - g);
      bias = vec_fma(scale, vec_splat(centre_of(t)), bias);
      EACH(r, most)
        sum[r] = vec_fma(bias, vld1q_f32(x[r].sums + g), sum[r]);
    }
    for (uint32_t r = 0; r < rows; r++)
      ys[r][o - first] = vec_fold(sum[r]);
  }
}

KERNEL void store_sums(const kind t, const VEC sum[N_OUT], uint32_t rows, uint32_t count,
                       float *const *ys, uint32_t y) {
  float sums[ZMOE_DOT_ROWS][N_OUT];
  EACH(p, t.pairs) {
    vst1q_f32(sums[2 * p], vuzp1q_f32(sum[sum_of(0, p)], sum[sum_of(1, p)]));
    vst1q_f32(sums[2 * p + 1], vuzp2q_f32(sum[sum_of(0, p)], sum[sum_of(1, p)]));
  }
  for (uint32_t r = 0; r < rows; r++)
    for (uint32_t i = 0; i < count; i++)
      ys[r][y + i] += sums[r][i];
}

/* Pairs of rows are turned run by run, and all outputs multiplied with each; a row without
 * another is a pair of itself, since its sums must not depend on that. */
KERNEL void dot_rows(const kind t, zmoe_layout layout, const zmoe_weight *w, const void *const *xs,
                     uint32_t rows, uint32_t first, uint32_t last, float *const *ys) {
  const size_t row_bytes = zmoe_weight_row_bytes(w);
  const size_t ahead = zmoe_rows_ahead(row_bytes, N_OUT) * row_bytes;
  const uint32_t in_features = w->in_features;
  unsigned char turns[2][4 * RUN];
  zmoe_packed x[ZMOE_DOT_ROWS];
  for (uint32_t r = 0; r < ZMOE_DOT_ROWS; r++)
    x[r] = zmoe_packed_at((void *)xs[r < rows ? r : rows - 1], layout, in_features);
  start_outputs(w, t, x, rows, first, last, ys);
  for (uint32_t k = 0; k < in_features; k += RUN) {
    struct inputs in;
    const uint32_t count = in_features - k < RUN ? in_features - k : RUN;
    take_turns(t, x, k, count, turns, &in);
    for (uint32_t o = first; o < last; o += N_OUT) {
      struct outputs out;
      VEC sum[N_OUT];
      EACH(i, N_OUT) {
        uint32_t row = o + i < last ? o + i : last - 1;
        out.data[i] = zmoe_row(w, row);
        out.scales[i] = t.product == HALVES ? NULL : zmoe_row_scales(w, row);
        sum[i] = vec_splat(0.0f);
      }
      add_run(w, t, &out, k, count, ahead, &in, sum);
      store_sums(t, sum, rows, last - o < N_OUT ? last - o : N_OUT, ys, o - first);
    }
  }
}

/* ---- which one ---------------------------------------------------------------------------- */

#define ROWS(product, layout, affine, group)                                                       \
  do {                                                                                             \
    if (rows <= 2)                                                                                 \
      dot_rows((kind){product, affine, group, 1}, layout, w, xs, rows, first, last, ys);           \
    else                                                                                           \
      dot_rows((kind){product, affine, group, 2}, layout, w, xs, rows, first, last, ys);           \
  } while (0)
#define GROUPS(product, layout)                                                                    \
  do {                                                                                             \
    if (w->group == 32)                                                                            \
      ROWS(product, layout, 1, 32);                                                                \
    else if (w->group == 64)                                                                       \
      ROWS(product, layout, 1, 64);                                                                \
    else                                                                                           \
      ROWS(product, layout, 1, 128);                                                               \
  } while (0)
#define DOT(name, body)                                                                            \
  TARGET static void name(const zmoe_weight *w, const void *const *xs, uint32_t rows,              \
                          uint32_t first, uint32_t last, float *const *ys) {                       \
    body;                                                                                          \
  }

DOT(dot_halves, ROWS(HALVES, ZMOE_LAYOUT_BF16, 0, 1))
DOT(dot_codes4, GROUPS(CODES4, ZMOE_LAYOUT_CODES4_BF16))
DOT(dot_fp4, ROWS(CODES4, ZMOE_LAYOUT_CODES4_BF16, 0, 32))
DOT(dot_codes8, GROUPS(CODES8, ZMOE_LAYOUT_CODES8_BF16))
DOT(dot_codes4_int8, GROUPS(CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8))
DOT(dot_fp4_int8, ROWS(CODES4_INT8, ZMOE_LAYOUT_CODES4_INT8, 0, 32))
DOT(dot_codes8_int8, GROUPS(CODES8_INT8, ZMOE_LAYOUT_CODES8_INT8))

/* At most ZMOE_DOT_ROWS rows. */
static void dot_few(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                    uint32_t first, uint32_t last, float *const *ys) {
  int affine = w->format == ZMOE_FORMAT_AFFINE;
  if (layout == ZMOE_LAYOUT_BF16)
    dot_halves(w, xs, rows, first, last, ys);
  else if (layout == ZMOE_LAYOUT_CODES4_BF16)
    (affine ? dot_codes4 : dot_fp4)(w, xs, rows, first, last, ys);
  else if (layout == ZMOE_LAYOUT_CODES8_BF16)
    dot_codes8(w, xs, rows, first, last, ys);
  else if (layout == ZMOE_LAYOUT_CODES4_INT8)
    (affine ? dot_codes4_int8 : dot_fp4_int8)(w, xs, rows, first, last, ys);
  else
    dot_codes8_int8(w, xs, rows, first, last, ys);
}

static void dot(const zmoe_weight *w, zmoe_layout layout, const void *const *xs, uint32_t rows,
                uint32_t first, uint32_t last, void *scratch, float *const *ys) {
  if (layout == ZMOE_LAYOUT_PLAIN || layout == ZMOE_LAYOUT_CHAINS ||
      layout == ZMOE_LAYOUT_CODES4_INT22) {
    zmoe_kernels_neon_dot.dot(w, layout, xs, rows, first, last, scratch, ys);
    return;
  }
  for (; rows > ZMOE_DOT_ROWS; rows -= ZMOE_DOT_ROWS, xs += ZMOE_DOT_ROWS, ys += ZMOE_DOT_ROWS)
    dot_few(w, layout, xs, ZMOE_DOT_ROWS, first, last, ys);
  dot_few(w, layout, xs, rows, first, last, ys);
}

static void pack_input(zmoe_layout layout, const zmoe_weight *w, const float *x, void *row) {
  if (layout == ZMOE_LAYOUT_CHAINS)
    zmoe_kernels_neon_dot.pack_input(layout, w, x, row);
  else
    zmoe_generic_pack_input(layout, w, x, row);
}

static zmoe_layout layout_for(const zmoe_weight *w, zmoe_dtype x_dtype, zmoe_precision precision) {
  zmoe_layout layout = zmoe_kernels_neon_dot.layout(w, x_dtype, precision);
  if (x_dtype != ZMOE_BF16)
    return layout;
  if (layout == ZMOE_LAYOUT_CODES4_INT22)
    return ZMOE_LAYOUT_CODES4_BF16;
  if (w->format == ZMOE_FORMAT_AFFINE && w->bits == 8 && layout == ZMOE_LAYOUT_CHAINS)
    return ZMOE_LAYOUT_CODES8_BF16;
  return w->format == ZMOE_FORMAT_BF16 ? ZMOE_LAYOUT_BF16 : layout;
}

const zmoe_kernels zmoe_kernels_neon_bf16 = {layout_for, pack_input, dot};
#endif
#endif
