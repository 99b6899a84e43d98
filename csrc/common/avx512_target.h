/* The instructions that every AVX-512 variant may use; isa.c looks for the same. */
#ifndef ZMOE_AVX512_TARGET_H
#define ZMOE_AVX512_TARGET_H

#define AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl"

/* For loops that are left to the compiler. */
#ifdef __clang__ /* does not know the wish for wide vectors, nor the whole list then */
#define AVX512_WIDE __attribute__((target(AVX512_FEATURES)))
#else
#define AVX512_WIDE __attribute__((target(AVX512_FEATURES ",prefer-vector-width=512")))
#endif

#endif
