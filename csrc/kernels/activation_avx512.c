#if defined(__x86_64__)
#include "common/avx512_target.h"

#define ACTIVATE zmoe_activate_avx512
#define TARGET AVX512_WIDE
#include "activation_body.h"
#endif
