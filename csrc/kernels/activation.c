/* The activations between an expert's matmuls. */
#define ACTIVATE zmoe_activate_generic
#define TARGET
#include "activation_body.h"

int zmoe_activation_has_gate(uint32_t activation) {
  return activation <= ZMOE_CLAMPED_SWIGLU;
}

static float gelu_of(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678f));
}

void zmoe_activate(zmoe_isa isa, const zmoe_expert_layer *layer, const float *gate, const float *up,
                   uint32_t count, float *out) {
  if (layer->activation == ZMOE_GELU || layer->activation == ZMOE_GELU_ONLY) {
    for (uint32_t i = 0; i < count; i++)
      out[i] = layer->activation == ZMOE_GELU ? gelu_of(gate[i]) * up[i] : gelu_of(up[i]);
    return;
  }
  zmoe_activate_fn *activate = zmoe_activate_generic;
#if defined(__x86_64__)
  if (isa == ZMOE_ISA_AVX2)
    activate = zmoe_activate_avx2;
  else if (isa == ZMOE_ISA_AVX512 || isa == ZMOE_ISA_AVX512_BF16)
    activate = zmoe_activate_avx512;
#endif
  (void)isa;
  activate(layer, gate, up, count, out);
}
