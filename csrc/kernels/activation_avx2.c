#if defined(__x86_64__)
#define ACTIVATE zmoe_activate_avx2
#define TARGET __attribute__((target("avx2")))
#include "activation_body.h"
#endif
