/* Vectors of f32, by one of vec_avx2.h, vec_avx512.h, vec_neon.h and
 * vec_generic.h, which define
 *   TARGET         the attribute of functions that use it,
 *   KERNEL         "static inline" with that attribute, always inlined,
 *   VEC            the vector,      LANES   how many f32 it holds,
 *   vec_load(src, i, dtype), vec_store(dst, i, dtype, v), vec_splat(value),
 *   vec_fma(a, b, c)   a * b + c, rounded once where the CPU can,
 *   vec_max(a, b)  a where a > b, else b;   vec_most(v)   the largest of its lanes;
 *   vec_fold(v)    the sum of its lanes: lane l and l + LANES / 2 first, and so on;
 *   vec_load_pair(src, even, odd)  from 2 * LANES bf16: every other one, faster than in order;
 *   vec_zip(even, odd), vec_unzip(low, high)   two vectors from that order, and into it;
 *   vec_load8(src)         from LANES integers of 8 bits,
 *   vec_store8(dst, v)     to such, rounding to nearest even; all within [-127, 127],
 *   vec_largest(v, count)  the largest magnitude in an array of vectors, as bits;
 *                          these two not in vec_generic.h;
 * + - * / of two vectors are the language's own.
 *
 * vec_store rounds to nearest even and writes the NaN of reduce_scalar.h. */
#include "reduce_scalar.h"

#if defined(VEC_AVX2)
#include "vec_avx2.h"
#elif defined(VEC_AVX512)
#include "vec_avx512.h"
#elif defined(__aarch64__)
#include "vec_neon.h"
#else
#include "vec_generic.h"
#endif
