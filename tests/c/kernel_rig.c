/* Weights for the tests of the kernels; see kernel_rig.h. */
#include "common/platform.h"

#include "kernel_rig.h"

#include <sys/mman.h>
#include <unistd.h>

#include "kernels/weight.h"

static uint32_t every = 1;

void rig_start(int argc, char **argv) {
  int number = argc > 1 ? atoi(argv[1]) : 0;
  every = number > 0 ? (uint32_t)number : 1;
}

int rig_skips(uint32_t n) {
  return (n * 2654435761u >> 16) % every != 0; /* at random, but always the same */
}

int rig_runs(zmoe_isa isa) {
  return zmoe_isa_supported(isa) && (every == 1 || isa != ZMOE_ISA_GENERIC);
}

/* ---- memory -------------------------------------------------------------------- */

enum { MOST_BLOCKS = 256 };

static struct {
  void *base;
  size_t mapped; /* 0: from malloc */
} blocks[MOST_BLOCKS];
static uint32_t n_blocks;

static void *guarded_block(size_t bytes) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
  unsigned char *base =
      mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(base != MAP_FAILED);
  CHECK(mprotect(base + room, page, PROT_NONE) == 0);
  blocks[n_blocks].base = base;
  blocks[n_blocks++].mapped = room + page;
  return base + room - bytes;
}

void *rig_block(size_t bytes, uint32_t offset, int guarded) {
  CHECK(n_blocks < MOST_BLOCKS);
  if (guarded)
    return guarded_block(bytes);
  unsigned char *base = malloc(bytes + offset);
  CHECK(base != NULL);
  blocks[n_blocks].base = base;
  blocks[n_blocks++].mapped = 0;
  return base + offset;
}

static const zmoe_weight *decoded; /* and its row, that `decode` holds */
static uint32_t decoded_row;

void rig_free_blocks(void) {
  decoded = NULL;
  while (n_blocks > 0) {
    n_blocks--;
    if (blocks[n_blocks].mapped > 0)
      munmap(blocks[n_blocks].base, blocks[n_blocks].mapped);
    else
      free(blocks[n_blocks].base);
  }
}

/* ---- weights --------------------------------------------------------------------- */

#define AFFINE(bits)                                                                               \
  {ZMOE_FORMAT_AFFINE, bits, 32}, {ZMOE_FORMAT_AFFINE, bits, 64}, {ZMOE_FORMAT_AFFINE, bits, 128}
const weight_kind RIG_KINDS[N_KINDS] = {{ZMOE_FORMAT_F32, 0, 0},
                                        {ZMOE_FORMAT_F16, 0, 0},
                                        {ZMOE_FORMAT_BF16, 0, 0},
                                        {ZMOE_FORMAT_MXFP4, 4, 32},
                                        {ZMOE_FORMAT_NVFP4, 4, 16},
                                        {ZMOE_FORMAT_MXFP8, 8, 32},
                                        AFFINE(1),
                                        AFFINE(2),
                                        AFFINE(3),
                                        AFFINE(4),
                                        AFFINE(5),
                                        AFFINE(6),
                                        AFFINE(8)};

const char *rig_kind_name(weight_kind kind) {
  static const char *const names[] = {"f32", "f16", "bf16", "affine", "mxfp4", "nvfp4", "mxfp8"};
  static char name[32];
  snprintf(name, sizeof name, "%s/%u/%u", names[kind.format], kind.bits, kind.group);
  return name;
}

static void store(void *data, size_t i, zmoe_dtype dtype, float value) {
  size_t item = zmoe_dtype_bytes(dtype);
  CHECK_EQUAL(
      zmoe_convert((unsigned char *)data + i * item, dtype, &value, ZMOE_F32, 1, ZMOE_ISA_GENERIC),
      ZMOE_OK);
}

double rig_load(const void *data, size_t i, zmoe_dtype dtype) {
  float value;
  size_t item = zmoe_dtype_bytes(dtype);
  CHECK_EQUAL(zmoe_convert(&value, ZMOE_F32, (const unsigned char *)data + i * item, dtype, 1,
                           ZMOE_ISA_GENERIC),
              ZMOE_OK);
  return value;
}

static void *random_floats_as(size_t count, float size, uint32_t dtype, weight_options options) {
  void *data =
      rig_block(count * zmoe_dtype_bytes((zmoe_dtype)dtype), options.offset, options.guarded);
  for (size_t i = 0; i < count; i++)
    store(data, i, (zmoe_dtype)dtype, random_float(size));
  return data;
}

/* Bytes in [low, high], none of them NaN in e4m3. */
static void *random_bytes(size_t count, uint32_t low, uint32_t high, weight_options options) {
  unsigned char *data = rig_block(count, options.offset, options.guarded);
  for (size_t i = 0; i < count; i++) {
    data[i] = (unsigned char)(low + (next_random() >> 8) % (high - low + 1));
    if (high == 255 && (data[i] & 0x7f) == 0x7f)
      data[i] = 0x31;
  }
  return data;
}

zmoe_weight rig_weight(weight_kind kind, uint32_t out_features, uint32_t in_features,
                       weight_options options) {
  zmoe_weight w = {.out_features = out_features,
                   .in_features = in_features,
                   .format = kind.format,
                   .bits = kind.bits,
                   .group = kind.group,
                   .scale_dtype = options.scale_dtype,
                   .bias_dtype = options.bias_dtype};
  if (options.bias)
    w.bias = random_floats_as(out_features, 1.0f, options.bias_dtype, options);
  if (kind.format <= ZMOE_FORMAT_BF16) {
    w.data = random_floats_as((size_t)out_features * in_features, 1.0f, kind.format, options);
    CHECK_EQUAL(zmoe_weight_check(&w), ZMOE_OK);
    return w;
  }
  size_t groups = (size_t)out_features * (in_features / kind.group);
  w.data = random_bytes(out_features * zmoe_weight_row_bytes(&w), 0, 255, options);
  if (kind.format == ZMOE_FORMAT_AFFINE) {
    w.scales =
        random_floats_as(groups, 2.0f / (float)(1u << kind.bits), options.scale_dtype, options);
    w.biases = random_floats_as(groups, 0.5f, options.scale_dtype, options);
  } else if (kind.format == ZMOE_FORMAT_NVFP4) {
    w.scales = random_bytes(groups, 0x08, 0x38, options);
  } else {
    w.scales = random_bytes(groups, 127 - 6, 127, options);
  }
  CHECK_EQUAL(zmoe_weight_check(&w), ZMOE_OK);
  return w;
}

void *rig_inputs(size_t count, float size, zmoe_dtype dtype, uint32_t offset, int guarded) {
  void *x = rig_block(count * zmoe_dtype_bytes(dtype), offset, guarded);
  for (size_t i = 0; i < count; i++) {
    uint32_t kind = (next_random() >> 8) % 64;
    store(x, i, dtype, kind == 0 ? 0.0f : random_float(kind == 1 ? 16 * size : size));
  }
  return x;
}

/* ---- products in double ---------------------------------------------------------- */

/* Of each element of a weight's row: its value; the sum of the sizes of the parts
 * that kernels may multiply apart; and, of a code, what it stands for without bias. */
typedef struct row_parts {
  float *values, *sizes, *codes;
} row_parts;

static row_parts decode(const zmoe_weight *w, uint32_t row) {
  static float values[ZMOE_MAX_COLUMNS], sizes[ZMOE_MAX_COLUMNS], codes[ZMOE_MAX_COLUMNS];
  static float scales[ZMOE_MAX_COLUMNS / 16], biases[ZMOE_MAX_COLUMNS / 16];
  row_parts parts = {values, sizes, codes};
  if (decoded == w && decoded_row == row)
    return parts;
  decoded = w;
  decoded_row = row;
  CHECK_EQUAL(zmoe_weight_decode(w, row, values), ZMOE_OK);
  if (w->group != 0)
    zmoe_decode_scales(w, row, 0, scales);
  if (w->biases != NULL)
    zmoe_decode_scales(w, row, 1, biases);
  for (uint32_t k = 0; k < w->in_features; k++) {
    float scale = w->group != 0 ? fabsf(scales[k / w->group]) : 0.0f, bias = 0.0f;
    float centre = w->bits == 8 ? 128.0f : 8.0f;
    if (w->biases != NULL) {
      bias = biases[k / w->group];
      codes[k] = fabsf(values[k] - bias) + centre * scale;
    } else {
      codes[k] = fabsf(values[k]);
    }
    sizes[k] = fabsf(values[k]) + 2 * fabsf(bias) + 2 * centre * scale;
  }
  return parts;
}

/* The largest |x| of each group of `group`. */
static double largest_around(const double *x, uint32_t k, uint32_t group) {
  double largest = 0;
  for (uint32_t i = k / group * group; i < (k / group + 1) * group; i++)
    largest = fmax(largest, fabs(x[i]));
  return largest;
}

/* Bounds.  Every product and partial sum rounds by at most u = 2^-24 of itself,
 * and a term is part of at most in_features + 64 sums: (in_features + 64) u of the sum of sizes.
 * Integers of 22 bits move each x by at most 2^-21.9 of the largest of its group;
 * of 8 bits by 1/254 of the largest of 32.  Products of bf16 flush what is below
 * 2^-126. */
expected rig_expect(const zmoe_weight *w, uint32_t row, const double *x, const double *x_error) {
  row_parts parts = decode(w, row);
  expected e = {0, (w->in_features + 64.0) * 0x1p-126, 0, 0};
  double largest = 0, largest_of_32 = 0, sizes = 0;
  for (uint32_t k = 0; k < w->in_features; k++) {
    double size = fabs(x[k]) + (x_error != NULL ? x_error[k] : 0);
    e.value += parts.values[k] * x[k];
    sizes += parts.sizes[k] * size;
    e.spread += parts.sizes[k] * size * parts.sizes[k] * size;
    if (x_error != NULL)
      e.error += fabs((double)parts.values[k]) * x_error[k];
    if (w->bits == 0)
      continue;
    if (k % w->group == 0)
      largest = largest_around(x, k, w->group);
    if (k % 32 == 0 && w->group >= 32)
      largest_of_32 = largest_around(x, k, 32);
    e.error += 0x1p-21 * largest * parts.codes[k];
    e.int8_error += largest_of_32 / 253.0 * parts.codes[k];
  }
  e.error += (w->in_features + 64.0) * 0x1p-24 * sizes;
  e.spread = sqrt(e.spread);
  if (w->bias != NULL) {
    double bias = rig_load(w->bias, row, (zmoe_dtype)w->bias_dtype);
    e.value += bias;
    e.error += 0x1p-23 * (fabs(bias) + fabs(e.value));
  }
  return e;
}

double rig_rounding(double value, zmoe_dtype dtype) {
  switch (dtype) {
  case ZMOE_F32:
    return 0;
  case ZMOE_F16:
    return fabs(value) * 0x1p-11 + 0x1p-24;
  case ZMOE_BF16:
    return fabs(value) * 0x1p-8;
  }
  return 0;
}

int rig_agrees(double actual, double value, double error) {
  if (isnan(value))
    return isnan(actual);
  if (isinf(value))
    return actual == value;
  return fabs(actual - value) <= error;
}
