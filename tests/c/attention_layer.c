/* See attention_layer.h. */
#include "attention_layer.h"

static zmoe_weight f32_weight(const float *data, const float *bias, size_t out_features,
                              size_t in_features) {
  return (zmoe_weight){.data = data,
                       .bias = bias,
                       .out_features = (uint32_t)out_features,
                       .in_features = (uint32_t)in_features};
}

static void point_at_weights(layer *l) {
  const shape *s = &l->s;
  size_t out_features[] = {s->fused ? l->total : l->queries, l->kv_width, l->kv_width}, at = 0;
  for (int i = 0; i < (s->fused ? 1 : 3); i++) {
    l->projections[i] = f32_weight(l->weights + at * s->width, s->bias ? l->biases + at : NULL,
                                   out_features[i], s->width);
    at += out_features[i];
  }
  l->output_weight = f32_weight(l->output, s->bias ? l->output_bias : NULL, s->width, l->q_width);
}

static zmoe_norm norm_of(const layer *l, uint32_t kind, size_t width, size_t at) {
  return (zmoe_norm){kind, (uint32_t)width, 1e-5f, l->norms + at,
                     kind == ZMOE_NORM_LAYER ? l->norms + at + 1 : NULL};
}

float encode_head(const float *head, uint32_t dim, signed char *codes) {
  double most = 0;
  for (uint32_t d = 0; d < dim; d++)
    most = fmax(most, fabs((double)head[d]));
  float scale = (float)(most / 127);
  for (uint32_t d = 0; d < dim; d++)
    codes[d] = (signed char)lrint(scale > 0 ? (double)head[d] / (double)scale : 0);
  return scale;
}

/* As the cache keeps it: rounded to its dtype, or to 8 bits. */
static void round_head(const layer *l, float *head) {
  signed char codes[ZMOE_MAX_HEAD_DIM];
  float scale = encode_head(head, l->s.head_dim, codes);
  for (uint32_t d = 0; d < l->s.head_dim; d++)
    head[d] = l->bits == 8 ? scale * (float)codes[d] : rounded(head[d], (zmoe_dtype)l->s.dtype);
}

layer make_layer(const shape *s, uint32_t bits) {
  layer l = {.s = *s, .bits = bits};
  l.q_width = (size_t)s->heads * s->head_dim, l.kv_width = (size_t)s->kv_heads * s->head_dim;
  l.queries = (1 + s->gated) * l.q_width, l.total = l.queries + 2 * l.kv_width;
  size_t angles = (size_t)s->rows * (s->rope_dims / 2), past = l.kv_width * s->filled;
  l.weights = random_floats(l.total * s->width, 3.0f / sqrtf((float)s->width));
  l.biases = random_floats(l.total, 0.3f);
  l.output = random_floats(s->width * l.q_width, 1.0f);
  l.output_bias = random_floats(s->width, 0.3f);
  l.norms = random_floats(s->width + l.q_width + 8, 1.5f);
  l.sinks = random_floats(s->heads, 2.0f);
  l.cosines = random_floats(angles, 1.0f), l.sines = random_floats(angles, 1.0f);
  l.keys = random_floats(past, 1.5f), l.values = random_floats(past, 1.0f);
  for (size_t i = 0; i < past; i += s->head_dim)
    round_head(&l, l.keys + i), round_head(&l, l.values + i);
  l.h = random_floats((size_t)s->rows * s->width, 2.0f);
  return l;
}

void describe_layer(layer *l) {
  const shape *s = &l->s;
  point_at_weights(l);
  l->attention = (zmoe_attention){
      .input = norm_of(l, s->input, s->width, 0),
      .projections = l->projections,
      .n_projections = s->fused ? 1 : 3,
      .output = &l->output_weight,
      .query_norm = norm_of(l, s->head_norms, s->whole ? l->q_width : s->head_dim, 3),
      .key_norm = norm_of(l, s->head_norms, s->whole ? l->kv_width : s->head_dim, 5),
      .heads = s->heads,
      .kv_heads = s->kv_heads,
      .head_dim = s->head_dim,
      .scale = 1.0f / sqrtf((float)s->head_dim),
      .clip = s->clip,
      .rope_dims = s->rope_dims,
      .rope_traditional = s->traditional,
      .sinks = s->sinks ? l->sinks : NULL,
      .window = s->window,
      .keep = s->keep,
      .is_gated = s->gated,
      .dtype = s->dtype,
  };
}

void free_layer(layer *l) {
  free(l->weights), free(l->biases), free(l->output), free(l->output_bias), free(l->norms);
  free(l->sinks), free(l->cosines), free(l->sines), free(l->keys), free(l->values), free(l->h);
}

/* ---- the reference ------------------------------------------------------------------- */

static void reference_norm(const zmoe_norm *norm, double *x) {
  if (norm->kind == ZMOE_NORM_NONE)
    return;
  double mean = 0, squares = 0;
  for (uint32_t i = 0; i < norm->width && norm->kind == ZMOE_NORM_LAYER; i++)
    mean += x[i] / norm->width;
  for (uint32_t i = 0; i < norm->width; i++)
    squares += (x[i] - mean) * (x[i] - mean) / norm->width;
  for (uint32_t i = 0; i < norm->width; i++)
    x[i] = (x[i] - mean) / sqrt(squares + norm->eps) * norm->weight[i] +
           (norm->bias != NULL ? norm->bias[i] : 0);
}

static void reference_matmul(const zmoe_weight *w, const double *x, double *y) {
  const float *data = w->data, *bias = w->bias;
  for (uint32_t o = 0; o < w->out_features; o++) {
    y[o] = bias != NULL ? bias[o] : 0;
    for (uint32_t k = 0; k < w->in_features; k++)
      y[o] += data[(size_t)o * w->in_features + k] * x[k];
  }
}

static void round_all(double *x, size_t count, uint32_t dtype) {
  for (size_t i = 0; i < count; i++)
    x[i] = rounded((float)x[i], (zmoe_dtype)dtype);
}

static void reference_rope(const layer *l, uint32_t row, double *head) {
  uint32_t half = l->s.rope_dims / 2;
  for (uint32_t i = 0; i < half; i++) {
    uint32_t a = l->s.traditional ? 2 * i : i, b = l->s.traditional ? 2 * i + 1 : i + half;
    double c = l->cosines[row * half + i], s = l->sines[row * half + i], x = head[a], y = head[b];
    head[a] = x * c - y * s, head[b] = x * s + y * c;
  }
}

/* qkv (total) of one row, norms and rope done, keys and values rounded. */
static void reference_project(const layer *l, uint32_t row, double *qkv) {
  const zmoe_attention *a = &l->attention;
  const shape *s = &l->s;
  double *x = malloc(s->width * sizeof *x), *k = qkv + l->queries;
  for (uint32_t i = 0; i < s->width; i++)
    x[i] = l->h[(size_t)row * s->width + i];
  reference_norm(&a->input, x);
  round_all(x, s->width, s->dtype);
  double *y = qkv;
  for (uint32_t i = 0; i < a->n_projections; y += a->projections[i++].out_features)
    reference_matmul(&a->projections[i], x, y);
  for (size_t i = 0; i < l->total && s->clip > 0; i++)
    qkv[i] = fmin(fmax(qkv[i], -s->clip), s->clip);
  if (s->whole)
    reference_norm(&a->query_norm, qkv), reference_norm(&a->key_norm, k);
  for (uint32_t i = 0; i < s->heads + s->kv_heads; i++) {
    double *head = i < s->heads ? qkv + i * (1 + s->gated) * s->head_dim
                                : k + (size_t)(i - s->heads) * s->head_dim;
    if (!s->whole)
      reference_norm(i < s->heads ? &a->query_norm : &a->key_norm, head);
    reference_rope(l, row, head);
  }
  for (size_t i = 0; i < 2 * l->kv_width; i += s->head_dim) {
    float head[ZMOE_MAX_HEAD_DIM];
    for (uint32_t d = 0; d < s->head_dim; d++)
      head[d] = (float)k[i + d];
    round_head(l, head);
    for (uint32_t d = 0; d < s->head_dim; d++)
      k[i + d] = head[d];
  }
  free(x);
}

/* Key (or value) `position` of a head: from the cache, or of one of the rows. */
static double cached(const layer *l, const float *past, const double *qkvs, size_t offset,
                     uint32_t kv_head, uint32_t position, uint32_t d) {
  const shape *s = &l->s;
  if (position < s->filled)
    return past[((size_t)kv_head * s->filled + position) * s->head_dim + d];
  return qkvs[(position - s->filled) * l->total + offset + (size_t)kv_head * s->head_dim + d];
}

static void reference_head(const layer *l, const double *qkvs, uint32_t row, uint32_t head,
                           double *out) {
  const shape *s = &l->s;
  uint32_t kv_head = head / (s->heads / s->kv_heads), end = s->filled + row + 1;
  uint32_t begin = s->window != 0 && end > s->window ? end - s->window + s->keep : 0;
  const double *q = qkvs + row * l->total + head * (1 + s->gated) * s->head_dim;
  double *p = malloc(end * sizeof *p), max = s->sinks ? l->sinks[head] : -INFINITY, sum = 0;
  for (uint32_t j = 0; j < end; j++) {
    p[j] = j < s->keep || j >= begin ? 0 : -INFINITY;
    for (uint32_t d = 0; d < s->head_dim; d++)
      p[j] += q[d] * cached(l, l->keys, qkvs, l->queries, kv_head, j, d) * l->attention.scale;
    max = fmax(max, p[j]);
  }
  for (uint32_t j = 0; j < end; j++)
    sum += p[j] = exp(p[j] - max);
  sum += s->sinks ? exp(l->sinks[head] - max) : 0;
  for (uint32_t d = 0; d < s->head_dim; d++) {
    out[d] = 0;
    for (uint32_t j = 0; j < end; j++)
      out[d] += p[j] / sum * cached(l, l->values, qkvs, l->queries + l->kv_width, kv_head, j, d);
    if (s->gated)
      out[d] /= 1 + exp(-q[s->head_dim + d]);
  }
  free(p);
}

double *reference_attention(const layer *l) {
  const shape *s = &l->s;
  double *qkvs = malloc(s->rows * l->total * sizeof *qkvs);
  double *heads = malloc(l->q_width * sizeof *heads);
  double *added = malloc((size_t)s->rows * s->width * sizeof *added);
  for (uint32_t r = 0; r < s->rows; r++)
    reference_project(l, r, qkvs + r * l->total);
  for (uint32_t r = 0; r < s->rows; r++) {
    for (uint32_t i = 0; i < s->heads; i++)
      reference_head(l, qkvs, r, i, heads + (size_t)i * s->head_dim);
    round_all(heads, l->q_width, s->dtype);
    reference_matmul(&l->output_weight, heads, added + (size_t)r * s->width);
  }
  free(qkvs), free(heads);
  return added;
}
