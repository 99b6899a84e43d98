#if defined(__x86_64__)
#define ACTIVATE zmoe_activate_avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#include "activation_body.h"
#endif
