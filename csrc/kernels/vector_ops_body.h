/* Vector operations in the vectors of vec.h.  Before including this, define
 * TABLE, the name of the table.  Loops without VEC are the compiler's to vectorise. */
#include "vector_ops.h"

#include "common/vec.h"
#include "exp_of.h"

enum { PARTS = ZMOE_SUM_LANES / LANES };
typedef uint32_t WORDS __attribute__((vector_size(4 * LANES)));

/* A loop that must be unrolled: sums in an array stay in registers only so. */
#define EACH(i, count) _Pragma("GCC unroll 16") for (uint32_t i = 0; i < (count); i++)

KERNEL VEC get(const float *x) {
  return vec_load((const unsigned char *)x, 0, ZMOE_F32);
}

/* ---- sums of 16 lanes ----------------------------------------------------------- */

KERNEL void clear(VEC lanes[PARTS]) {
  for (uint32_t p = 0; p < PARTS; p++)
    lanes[p] = vec_splat(0.0f);
}

KERNEL float sum_lanes(VEC lanes[PARTS]) {
  for (uint32_t half = PARTS / 2; half > 0; half /= 2)
    for (uint32_t p = 0; p < half; p++)
      lanes[p] += lanes[p + half];
  return vec_fold(lanes[0]);
}

KERNEL float sum_of(const float *x, uint32_t count) {
  VEC lanes[PARTS];
  clear(lanes);
  uint32_t i = 0;
  for (; i + ZMOE_SUM_LANES <= count; i += ZMOE_SUM_LANES)
    for (uint32_t p = 0; p < PARTS; p++)
      lanes[p] += get(x + i + p * LANES);
  float sum = sum_lanes(lanes);
  for (; i < count; i++)
    sum += x[i];
  return sum;
}

/* ---- norms ----------------------------------------------------------------------- */

KERNEL float sum_of_squares(const float *x, uint32_t count, float mean) {
  VEC lanes[PARTS];
  clear(lanes);
  uint32_t i = 0;
  for (; i + ZMOE_SUM_LANES <= count; i += ZMOE_SUM_LANES)
    for (uint32_t p = 0; p < PARTS; p++) {
      VEC v = get(x + i + p * LANES) - vec_splat(mean);
      lanes[p] += v * v;
    }
  float sum = sum_lanes(lanes);
  for (; i < count; i++)
    sum += (x[i] - mean) * (x[i] - mean);
  return sum;
}

KERNEL void norm_to(const zmoe_norm *norm, const float *x, void *out, zmoe_dtype out_dtype) {
  uint32_t width = norm->width;
  const float *weight = norm->weight, *bias = norm->bias;
  float mean = norm->kind == ZMOE_NORM_LAYER ? sum_of(x, width) / (float)width : 0.0f;
  float squares = sum_of_squares(x, width, mean) / (float)width;
  float factor = 1.0f / sqrtf(squares + norm->eps);
  uint32_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    VEC v = (get(x + i) - vec_splat(mean)) * vec_splat(factor);
    if (weight != NULL)
      v *= get(weight + i);
    if (bias != NULL)
      v += get(bias + i);
    vec_store(out, i, out_dtype, v);
  }
  for (; i < width; i++) {
    float value = (x[i] - mean) * factor;
    if (weight != NULL)
      value *= weight[i];
    if (bias != NULL)
      value += bias[i];
    store_scalar(out, i, out_dtype, value);
  }
}

TARGET static void norm_row(const zmoe_norm *norm, const float *x, void *out,
                            zmoe_dtype out_dtype) {
  switch (out_dtype) {
  case ZMOE_F32:
    norm_to(norm, x, out, ZMOE_F32);
    return;
  case ZMOE_F16:
    norm_to(norm, x, out, ZMOE_F16);
    return;
  case ZMOE_BF16:
    norm_to(norm, x, out, ZMOE_BF16);
    return;
  }
}

/* ---- one head --------------------------------------------------------------------- */

TARGET static void clip(float *x, uint32_t count, float limit) {
  for (uint32_t i = 0; i < count; i++) {
    float value = x[i] > limit ? limit : x[i];
    x[i] = value < -limit ? -limit : value;
  }
}

TARGET static void rotate(float *x, const float *restrict cosines, const float *restrict sines,
                          uint32_t dims, uint32_t traditional) {
  uint32_t half = dims / 2;
  if (traditional) {
    for (uint32_t i = 0; i < half; i++) {
      float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
    return;
  }
  float *restrict low = x, *restrict high = x + half;
  for (uint32_t i = 0; i < half; i++) {
    float a = low[i], b = high[i];
    low[i] = a * cosines[i] - b * sines[i];
    high[i] = a * sines[i] + b * cosines[i];
  }
}

/* ---- softmax ------------------------------------------------------------------------ */

KERNEL float larger(float a, float b) {
  return a > b ? a : b; /* b where a is NaN, which will be in the sum */
}

KERNEL float max_of(const float *x, uint32_t count, float max) {
  uint32_t i = 0;
  if (count >= ZMOE_SUM_LANES) {
    VEC lanes[PARTS];
    EACH(p, PARTS)
      lanes[p] = get(x + p * LANES);
    for (i = ZMOE_SUM_LANES; i + ZMOE_SUM_LANES <= count; i += ZMOE_SUM_LANES)
      EACH(p, PARTS)
        lanes[p] = vec_max(get(x + i + p * LANES), lanes[p]);
    for (uint32_t p = 1; p < PARTS; p++)
      lanes[0] = vec_max(lanes[p], lanes[0]);
    max = larger(vec_most(lanes[0]), max);
  }
  for (; i < count; i++)
    max = larger(x[i], max);
  return max;
}

/* exp_of lane by lane, of what is not above 0, or no number. */
KERNEL VEC exp_below(VEC x) {
  VEC clamped = vec_max(vec_splat(-87.0f), x);
  VEC whole = clamped * vec_splat(1.44269504f) + vec_splat(12582912.0f);
  VEC n = whole - vec_splat(12582912.0f);
  VEC r = clamped - n * vec_splat(0.693359375f) + n * vec_splat(2.12194440e-4f);
  VEC p = vec_splat(1.9875691500e-4f);
  p = p * r + vec_splat(1.3981999507e-3f);
  p = p * r + vec_splat(8.3334519073e-3f);
  p = p * r + vec_splat(4.1665795894e-2f);
  p = p * r + vec_splat(1.6666665459e-1f);
  p = p * r + vec_splat(5.0000001201e-1f);
  p = p * r * r + r + vec_splat(1.0f);
  WORDS power = ((WORDS)whole + 127) << 23, is_zero = (WORDS)(x < vec_splat(-87.0f));
  return (VEC)((WORDS)(p * (VEC)power) & ~is_zero);
}

KERNEL float soften_all(float *scores, const uint32_t count, zmoe_softmax *state) {
  float max = max_of(scores, count, state->max);
  VEC lanes[PARTS];
  clear(lanes);
  uint32_t j = 0;
  for (; j + ZMOE_SUM_LANES <= count; j += ZMOE_SUM_LANES)
    EACH(p, PARTS) {
      VEC weight = exp_below(get(scores + j + p * LANES) - vec_splat(max));
      vec_store((unsigned char *)scores, j + p * LANES, ZMOE_F32, weight);
      lanes[p] += weight;
    }
  float sum = sum_lanes(lanes);
  for (; j < count; j++)
    sum += scores[j] = exp_of(scores[j] - max);
  float correction = state->max == max ? 1.0f : exp_of(state->max - max);
  *state = (zmoe_softmax){max, state->sum * correction + sum};
  return correction;
}

TARGET static float soften(float *scores, uint32_t count, zmoe_softmax *state) {
  if (count == ZMOE_KEY_BLOCK) /* nearly always: its vectors hide each other's latency */
    return soften_all(scores, ZMOE_KEY_BLOCK, state);
  return soften_all(scores, count, state);
}

#include "activation_body.h"
#include "attention_body.h"

TARGET static void widen(const unsigned char *codes, size_t count, float *out) {
  for (size_t i = 0; i < count; i += LANES)
    vec_store((unsigned char *)out, i, ZMOE_F32, vec_load8(codes + i));
}

TARGET static void sigmoid(float *x, uint32_t count) {
  for (uint32_t i = 0; i < count; i++)
    x[i] = sigmoid_of(x[i]);
}

/* to[0:dim] = from * scale + key * add; returns to . with. */
KERNEL float update(const float *from, float *to, float scale, const float *key, float add,
                    const float *with, uint32_t dim) {
  VEC lanes[PARTS];
  clear(lanes);
  uint32_t i = 0;
  for (; i + ZMOE_SUM_LANES <= dim; i += ZMOE_SUM_LANES)
    for (uint32_t p = 0; p < PARTS; p++) {
      uint32_t at = i + p * LANES;
      VEC row = get(from + at) * vec_splat(scale) + get(key + at) * vec_splat(add);
      vec_store((unsigned char *)to, at, ZMOE_F32, row);
      lanes[p] += row * get(with + at);
    }
  float sum = sum_lanes(lanes);
  for (; i < dim; i++) {
    to[i] = from[i] * scale + key[i] * add;
    sum += to[i] * with[i];
  }
  return sum;
}

TARGET static float delta(const float *from, float *to, const float *key, const float *query,
                          uint32_t dim, float decay, float value, float beta) {
  float held = update(from, to, decay, key, 0.0f, key, dim);
  return update(to, to, 1.0f, key, (value - held) * beta, query, dim);
}

const zmoe_vector_ops TABLE = {norm_row, clip, rotate,  score, soften,  add_values,
                               widen,    turn, sigmoid, delta, activate};
