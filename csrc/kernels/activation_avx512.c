#if defined(__x86_64__)
#define ACTIVATE zmoe_activate_avx512
#ifdef __clang__ /* does not know the wish for wide vectors, nor the whole list then */
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
#else
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#endif
#include "activation_body.h"
#endif
