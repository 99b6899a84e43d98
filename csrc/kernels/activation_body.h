/* The activations between an expert's matmuls, written for the compiler to vectorise, but
 * for erf; a part of vector_ops_body.h. */

INLINE float gelu_tanh_of(float x) {
  float inner = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x * sigmoid_of(2.0f * inner); /* (1 + tanh(z)) / 2 = sigmoid(2 z) */
}

INLINE float gelu_of(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678f));
}

INLINE float clamped_swiglu_of(float gate, float up, float alpha, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate * sigmoid_of(alpha * gate) * (up + 1.0f);
}

TARGET static void activate(const zmoe_expert_layer *layer, const float *gate, const float *up,
                            uint32_t count, float *restrict out) {
  float alpha = layer->alpha, limit = layer->limit;
  switch (layer->activation) {
  case ZMOE_SILU:
    for (uint32_t i = 0; i < count; i++)
      out[i] = gate[i] * sigmoid_of(gate[i]) * up[i];
    return;
  case ZMOE_GELU:
    for (uint32_t i = 0; i < count; i++)
      out[i] = gelu_of(gate[i]) * up[i];
    return;
  case ZMOE_GELU_ONLY:
    for (uint32_t i = 0; i < count; i++)
      out[i] = gelu_of(up[i]);
    return;
  case ZMOE_GELU_TANH:
    for (uint32_t i = 0; i < count; i++)
      out[i] = gelu_tanh_of(gate[i]) * up[i];
    return;
  case ZMOE_GELU_TANH_ONLY:
    for (uint32_t i = 0; i < count; i++)
      out[i] = gelu_tanh_of(up[i]);
    return;
  case ZMOE_CLAMPED_SWIGLU:
    for (uint32_t i = 0; i < count; i++)
      out[i] = clamped_swiglu_of(gate[i], up[i], alpha, limit);
    return;
  case ZMOE_RELU2:
    for (uint32_t i = 0; i < count; i++) {
      float positive = up[i] < 0.0f ? 0.0f : up[i];
      out[i] = positive * positive;
    }
    return;
  }
}
