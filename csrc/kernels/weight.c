/* Weights in the formats of their checkpoints: sizes, and decoding in plain C. */
#include "weight.h"

#include <math.h>

#include "common/reduce_scalar.h"

const float zmoe_fp4_values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
const float zmoe_affine_values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* ---- sizes ------------------------------------------------------------------- */

size_t zmoe_weight_row_bytes(const zmoe_weight *w) {
  if (zmoe_is_float(w))
    return w->in_features * zmoe_dtype_bytes((zmoe_dtype)w->format);
  return (size_t)w->in_features * w->bits / 8;
}

size_t zmoe_weight_scale_bytes(const zmoe_weight *w) {
  if (zmoe_is_float(w))
    return 0;
  size_t item = w->format == ZMOE_FORMAT_AFFINE ? zmoe_dtype_bytes((zmoe_dtype)w->scale_dtype) : 1;
  return w->in_features / w->group * item;
}

static int layout_is_known(const zmoe_weight *w) {
  switch (w->format) {
  case ZMOE_FORMAT_F32:
  case ZMOE_FORMAT_F16:
  case ZMOE_FORMAT_BF16:
    return w->bits == 0 && w->group == 0;
  case ZMOE_FORMAT_AFFINE:
    return ((w->bits >= 1 && w->bits <= 6) || w->bits == 8) &&
           (w->group == 32 || w->group == 64 || w->group == 128) && w->scale_dtype <= ZMOE_BF16;
  case ZMOE_FORMAT_MXFP4:
    return w->bits == 4 && w->group == 32;
  case ZMOE_FORMAT_NVFP4:
    return w->bits == 4 && w->group == 16;
  case ZMOE_FORMAT_MXFP8:
    return w->bits == 8 && w->group == 32;
  }
  return 0;
}

int zmoe_weight_check(const zmoe_weight *w) {
  if (!layout_is_known(w) || w->data == NULL || w->out_features == 0 || w->in_features == 0 ||
      w->in_features > ZMOE_MAX_COLUMNS || w->bias_dtype > ZMOE_BF16)
    return ZMOE_EINVAL;
  if (!zmoe_is_float(w) && (w->scales == NULL || w->in_features % w->group != 0 ||
                            (w->biases != NULL) != (w->format == ZMOE_FORMAT_AFFINE)))
    return ZMOE_EINVAL;
  return ZMOE_OK;
}

/* ---- decoding ------------------------------------------------------------------ */

static float f32_of_e8m0(uint8_t code) {
  if (code == 0)
    return 0x1p-127f;
  return code == 255 ? NAN : f32_of_bits((uint32_t)code << 23);
}

/* Exponent bias 7; 0x7f and 0xff are the only NaN, and there is no infinity. */
static float f32_of_e4m3(uint8_t code) {
  uint32_t exponent = code >> 3 & 15u, fraction = code & 7u;
  float value = (float)fraction * 0x1p-9f;
  if ((code & 0x7f) == 0x7f)
    value = NAN;
  else if (exponent != 0)
    value = f32_of_bits((exponent + 120) << 23 | fraction << 20);
  return code & 0x80 ? -value : value;
}

static float group_scale(const zmoe_weight *w, const unsigned char *scales, uint32_t group) {
  if (w->format == ZMOE_FORMAT_AFFINE)
    return load_scalar(scales, group, (zmoe_dtype)w->scale_dtype);
  return w->format == ZMOE_FORMAT_NVFP4 ? f32_of_e4m3(scales[group]) : f32_of_e8m0(scales[group]);
}

void zmoe_decode_scales(const zmoe_weight *w, uint32_t row, int biases, float *out) {
  const unsigned char *source = biases ? zmoe_row_biases(w, row) : zmoe_row_scales(w, row);
  uint32_t groups = w->in_features / w->group;
  for (uint32_t g = 0; g < groups; g++)
    out[g] = group_scale(w, source, g);
}

/* MLX packs codes from the lowest bit on, in one stream of little-endian bytes. */
static uint32_t code_at(const unsigned char *row, uint32_t element, uint32_t bits) {
  size_t bit = (size_t)element * bits;
  uint32_t low = row[bit / 8], shift = bit % 8;
  if (shift + bits > 8)
    low |= (uint32_t)row[bit / 8 + 1] << 8;
  return low >> shift & ((1u << bits) - 1);
}

static void decode_group(const zmoe_weight *w, const unsigned char *row, uint32_t first,
                         float scale, float bias, float *out) {
  for (uint32_t k = 0; k < w->group; k++) {
    uint32_t code = code_at(row, first + k, w->bits);
    if (w->format == ZMOE_FORMAT_AFFINE)
      out[k] = (float)code * scale + bias;
    else if (w->format == ZMOE_FORMAT_MXFP8)
      out[k] = f32_of_e4m3((uint8_t)code) * scale;
    else
      out[k] = zmoe_fp4_values[code] * scale;
  }
}

void zmoe_decode_range(const zmoe_weight *w, uint32_t row, uint32_t first, uint32_t last,
                       float *out) {
  const unsigned char *data = zmoe_row(w, row);
  if (zmoe_is_float(w)) {
    for (uint32_t k = first; k < last; k++)
      out[k - first] = load_scalar(data, k, (zmoe_dtype)w->format);
    return;
  }
  const unsigned char *scales = zmoe_row_scales(w, row);
  const unsigned char *biases = w->biases == NULL ? NULL : zmoe_row_biases(w, row);
  for (uint32_t k = first; k < last; k += w->group) {
    float scale = group_scale(w, scales, k / w->group);
    float bias = biases == NULL ? 0.0f : group_scale(w, biases, k / w->group);
    decode_group(w, data, k, scale, bias, out + (k - first));
  }
}

int zmoe_weight_decode(const zmoe_weight *w, uint32_t row, float *out) {
  if (zmoe_weight_check(w) != ZMOE_OK || row >= w->out_features)
    return ZMOE_EINVAL;
  zmoe_decode_range(w, row, 0, w->in_features, out);
  return ZMOE_OK;
}
