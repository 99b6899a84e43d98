/* Between the matmuls of an expert. */
#ifndef ZMOE_ACTIVATION_H
#define ZMOE_ACTIVATION_H

#include "compute.h"

/* out[i] = activation(gate[i], up[i]); `gate` is unused where the activation has none. */
void zmoe_activate(zmoe_isa isa, const zmoe_expert_layer *layer, const float *gate, const float *up,
                   uint32_t count, float *out);
int zmoe_activation_has_gate(uint32_t activation);

typedef void zmoe_activate_fn(const zmoe_expert_layer *layer, const float *gate, const float *up,
                              uint32_t count, float *out);
zmoe_activate_fn zmoe_activate_generic;
#if defined(__x86_64__)
zmoe_activate_fn zmoe_activate_avx2;
zmoe_activate_fn zmoe_activate_avx512;
#endif

#endif
