/* One vector of f32 in what any CPU has, by GCC's and clang's own vectors; see vec.h. */
#define TARGET
#define KERNEL static inline __attribute__((always_inline))
#define VEC zmoe_vec4
#define LANES 4

typedef float zmoe_vec4 __attribute__((vector_size(16)));
typedef uint32_t zmoe_words4 __attribute__((vector_size(16)));

KERNEL VEC vec_load(const unsigned char *src, size_t i, zmoe_dtype dtype) {
  VEC v;
  if (dtype == ZMOE_F32) {
    memcpy(&v, src + 4 * i, sizeof v);
    return v;
  }
  uint16_t half[LANES];
  memcpy(half, src + 2 * i, sizeof half);
  if (dtype == ZMOE_F16)
    return (VEC){f32_of_f16(half[0]), f32_of_f16(half[1]), f32_of_f16(half[2]),
                 f32_of_f16(half[3])};
  zmoe_words4 bits = {half[0], half[1], half[2], half[3]};
  bits <<= 16;
  memcpy(&v, &bits, sizeof v);
  return v;
}

KERNEL void vec_store(unsigned char *dst, size_t i, zmoe_dtype dtype, VEC v) {
  for (size_t l = 0; l < LANES; l++)
    store_scalar(dst, i + l, dtype, v[l]);
}

KERNEL VEC vec_splat(float value) {
  return (VEC){value, value, value, value};
}

KERNEL VEC vec_fma(VEC a, VEC b, VEC c) {
  return a * b + c;
}

KERNEL VEC vec_max(VEC a, VEC b) {
  for (size_t l = 0; l < LANES; l++)
    a[l] = a[l] > b[l] ? a[l] : b[l];
  return a;
}

KERNEL float vec_most(VEC v) {
  VEC two = vec_max(v, (VEC){v[2], v[3], v[2], v[3]});
  return two[0] > two[1] ? two[0] : two[1];
}

KERNEL void vec_load_pair(const unsigned char *src, VEC *even, VEC *odd) {
  zmoe_words4 both, low, high;
  memcpy(&both, src, sizeof both);
  low = both << 16, high = both & 0xffff0000u;
  memcpy(even, &low, sizeof low);
  memcpy(odd, &high, sizeof high);
}

KERNEL void vec_zip(VEC *even, VEC *odd) {
  VEC a = *even, b = *odd;
  *even = (VEC){a[0], b[0], a[1], b[1]};
  *odd = (VEC){a[2], b[2], a[3], b[3]};
}

KERNEL void vec_unzip(VEC *low, VEC *high) {
  VEC a = *low, b = *high;
  *low = (VEC){a[0], a[2], b[0], b[2]};
  *high = (VEC){a[1], a[3], b[1], b[3]};
}

KERNEL float vec_fold(VEC v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

KERNEL VEC vec_load8(const unsigned char *src) {
  return (VEC){(signed char)src[0], (signed char)src[1], (signed char)src[2], (signed char)src[3]};
}
