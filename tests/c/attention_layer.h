/* An attention layer with random weights, and what it gives in double precision. */
#ifndef ZMOE_ATTENTION_LAYER_H
#define ZMOE_ATTENTION_LAYER_H

#include "numbers.h"

typedef struct shape {
  uint32_t heads, kv_heads, head_dim, width;
  uint32_t rope_dims, traditional, window;
  uint32_t input, head_norms;    /* zmoe_norm_kind */
  int whole, bias, fused, sinks; /* whole: the norms of heads are over all of them */
  float clip;
  uint32_t dtype, rows, filled;
  uint32_t keep;  /* first keys that a window keeps */
  uint32_t gated; /* is_gated */
} shape;

/* A layer of that shape, its cache and its input. */
typedef struct layer {
  shape s;
  uint32_t bits;                            /* of the cache */
  size_t q_width, queries, kv_width, total; /* queries: with their gates */
  float *weights, *biases, *output, *output_bias, *norms, *sinks, *cosines, *sines;
  float *keys, *values, *h; /* of dtype's values: (kv_heads, filled, head_dim); (rows, width) */
  zmoe_weight projections[3], output_weight;
  zmoe_attention attention;
} layer;

layer make_layer(const shape *s, uint32_t bits);
/* Lets `attention` point at the layer, where it lies now. */
void describe_layer(layer *l);
void free_layer(layer *l);
/* A head in 8 bits, the largest magnitude being 127; returns what one is worth. */
float encode_head(const float *head, uint32_t dim, signed char *codes);
/* What attention adds to h: (rows, width); free it. */
double *reference_attention(const layer *l);

#endif
