/* Where the parts of a weight's rows lie. */
#ifndef ZMOE_WEIGHT_H
#define ZMOE_WEIGHT_H

#include "compute.h"

static inline int zmoe_is_float(const zmoe_weight *w) {
  return w->format <= ZMOE_FORMAT_BF16;
}

static inline const unsigned char *zmoe_row(const zmoe_weight *w, uint32_t row) {
  return (const unsigned char *)w->data + row * zmoe_weight_row_bytes(w);
}

static inline const unsigned char *zmoe_row_scales(const zmoe_weight *w, uint32_t row) {
  return (const unsigned char *)w->scales + row * zmoe_weight_scale_bytes(w);
}

static inline const unsigned char *zmoe_row_biases(const zmoe_weight *w, uint32_t row) {
  return (const unsigned char *)w->biases + row * zmoe_weight_scale_bytes(w);
}

/* Weights are read once, in order, by loops that compute much between two reads
 * of memory: what the hardware fetches ahead by itself is too little, and ends at
 * each page.  Distances from 4 to 32 KiB do about as well.  Into the second cache: a
 * core waits for few lines of the first at once. */
enum { ZMOE_AHEAD_BYTES = 8192 };

static inline __attribute__((always_inline)) void zmoe_prefetch(const void *at) {
  const uintptr_t ahead = (uintptr_t)at + ZMOE_AHEAD_BYTES; /* may be past the end */
  __builtin_prefetch((const void *)ahead, 0, 2);
}

/* The same for `out_features` outputs at a time: so many outputs ahead.  Half as far: what is
 * fetched is often another expert's, and panels of experts are short. */
static inline uint32_t zmoe_rows_ahead(size_t row_bytes, uint32_t out_features) {
  return out_features * (uint32_t)(ZMOE_AHEAD_BYTES / 2 / (out_features * row_bytes) + 1);
}

/* The weight's rows from one on. */
struct zmoe_outputs {
  const unsigned char *data, *scales, *biases; /* NULL where it has none */
  size_t row_bytes, scale_bytes;
};

static inline __attribute__((always_inline)) struct zmoe_outputs
zmoe_pass_outputs(struct zmoe_outputs out, uint32_t count) {
  out.data += count * out.row_bytes;
  if (out.scales != NULL)
    out.scales += count * out.scale_bytes;
  if (out.biases != NULL)
    out.biases += count * out.scale_bytes;
  return out;
}

static inline __attribute__((always_inline)) struct zmoe_outputs
zmoe_outputs_at(const zmoe_weight *w, uint32_t o) {
  const struct zmoe_outputs all = {
      .data = w->data,
      .scales = w->scales,
      .biases = w->biases,
      .row_bytes = zmoe_weight_row_bytes(w),
      .scale_bytes = zmoe_weight_scale_bytes(w),
  };
  return zmoe_pass_outputs(all, o);
}

/* The 16 values of e2m1, and 0 to 15: what a 4-bit code stands for, before its scale. */
extern const float zmoe_fp4_values[16];
extern const float zmoe_affine_values[16];

static inline const float *zmoe_code_values(const zmoe_weight *w) {
  return w->format == ZMOE_FORMAT_AFFINE ? zmoe_affine_values : zmoe_fp4_values;
}

/* The scales (or, `biases`, the biases) of one row in f32: in_features / group values. */
void zmoe_decode_scales(const zmoe_weight *w, uint32_t row, int biases, float *out);
/* Elements [first, last) of one row in f32; both are multiples of the group. */
void zmoe_decode_range(const zmoe_weight *w, uint32_t row, uint32_t first, uint32_t last,
                       float *out);

#endif
