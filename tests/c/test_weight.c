/* Weights: what their codes stand for, and which are refused. */
#include "kernel_rig.h"

/* ---- known values --------------------------------------------------------------- */

static void test_fp4_and_fp8(void) {
  static const float e2m1[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                 -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  unsigned char codes[16], scale[2] = {128, 127}; /* 2 and 1 */
  for (int i = 0; i < 16; i++)
    codes[i] = (unsigned char)((2 * i % 16) | (2 * i + 1) % 16 << 4);
  zmoe_weight w = {.data = codes,
                   .scales = scale,
                   .out_features = 1,
                   .in_features = 32,
                   .format = ZMOE_FORMAT_MXFP4,
                   .bits = 4,
                   .group = 32};
  float out[32];
  CHECK_EQUAL(zmoe_weight_decode(&w, 0, out), ZMOE_OK);
  for (int i = 0; i < 32; i++)
    CHECK(out[i] == 2 * e2m1[i % 16]);
  unsigned char nvfp4_scale[2] = {0x38, 0x01}; /* 1, and the least, 2^-9 */
  w.format = ZMOE_FORMAT_NVFP4, w.group = 16, w.scales = nvfp4_scale;
  CHECK_EQUAL(zmoe_weight_decode(&w, 0, out), ZMOE_OK);
  CHECK(out[7] == 6 && out[15] == -6 && out[16 + 7] == 6 * 0x1p-9f);
  unsigned char bytes[32] = {0x00, 0x80, 0x01, 0x08, 0x38, 0x39, 0x7e, 0xfe, 0x7f, 0xff, 0xb8};
  w = (zmoe_weight){.data = bytes,
                    .scales = scale + 1,
                    .out_features = 1,
                    .in_features = 32,
                    .format = ZMOE_FORMAT_MXFP8,
                    .bits = 8,
                    .group = 32};
  CHECK_EQUAL(zmoe_weight_decode(&w, 0, out), ZMOE_OK);
  CHECK(out[0] == 0 && out[2] == 0x1p-9f && out[3] == 0x1p-6f && out[4] == 1 && out[5] == 1.125f);
  CHECK(out[6] == 448 && out[7] == -448 && isnan(out[8]) && isnan(out[9]) && out[10] == -1);
}

static void test_power_of_two_scales(void) {
  unsigned char codes[16], scale;
  float out[32];
  memset(codes, 0x22, sizeof codes); /* ones */
  zmoe_weight w = {.data = codes,
                   .scales = &scale,
                   .out_features = 1,
                   .in_features = 32,
                   .format = ZMOE_FORMAT_MXFP4,
                   .bits = 4,
                   .group = 32};
  for (int code = 0; code < 256; code++) {
    scale = (unsigned char)code;
    CHECK_EQUAL(zmoe_weight_decode(&w, 0, out), ZMOE_OK);
    CHECK(code == 255 ? isnan(out[0]) : out[0] == ldexpf(1.0f, code - 127));
  }
}

/* MLX's packing: element i is bits [i b, (i + 1) b) of a little-endian stream. */
static void test_affine_codes_are_a_stream_of_bits(void) {
  static const uint32_t widths[] = {1, 2, 3, 4, 5, 6, 8};
  for (int n = 0; n < 7; n++) {
    uint32_t bits = widths[n], in_features = 64;
    unsigned char data[64] = {0};
    float scales[2] = {0.5f, 2.0f}, biases[2] = {-1.0f, 3.0f}, out[64];
    for (uint32_t i = 0; i < in_features; i++)
      for (uint32_t b = 0; b < bits; b++)
        if ((i * 7 + 3) >> b & 1)
          data[(i * bits + b) / 8] |= (unsigned char)(1u << (i * bits + b) % 8);
    zmoe_weight w = {.data = data,
                     .scales = scales,
                     .biases = biases,
                     .out_features = 1,
                     .in_features = in_features,
                     .format = ZMOE_FORMAT_AFFINE,
                     .bits = bits,
                     .group = 32};
    CHECK_EQUAL(zmoe_weight_row_bytes(&w), in_features * bits / 8);
    CHECK_EQUAL(zmoe_weight_decode(&w, 0, out), ZMOE_OK);
    for (uint32_t i = 0; i < in_features; i++)
      CHECK(out[i] == (float)((i * 7 + 3) % (1u << bits)) * scales[i / 32] + biases[i / 32]);
  }
}

/* ---- refusals --------------------------------------------------------------------- */

static zmoe_weight good(void) {
  static const unsigned char data[64], scales[64];
  return (zmoe_weight){.data = data,
                       .scales = scales,
                       .biases = scales,
                       .out_features = 1,
                       .in_features = 64,
                       .format = ZMOE_FORMAT_AFFINE,
                       .bits = 4,
                       .group = 64};
}

#define REFUSED(change)                                                                            \
  do {                                                                                             \
    zmoe_weight w = good();                                                                        \
    float out[ZMOE_MAX_COLUMNS / 64];                                                              \
    CHECK_EQUAL(zmoe_weight_check(&w), ZMOE_OK);                                                   \
    change;                                                                                        \
    CHECK_EQUAL(zmoe_weight_check(&w), ZMOE_EINVAL);                                               \
    CHECK_EQUAL(zmoe_weight_decode(&w, 0, out), ZMOE_EINVAL);                                      \
  } while (0)

static void test_refusals(void) {
  REFUSED(w.format = 7);
  REFUSED(w.bits = 0);
  REFUSED(w.bits = 7);
  REFUSED(w.bits = 9);
  REFUSED(w.group = 16);
  REFUSED(w.group = 0);
  REFUSED(w.group = 256);
  REFUSED(w.scale_dtype = 3);
  REFUSED(w.bias_dtype = 3);
  REFUSED(w.data = NULL);
  REFUSED(w.scales = NULL);
  REFUSED(w.biases = NULL);
  REFUSED(w.out_features = 0);
  REFUSED(w.in_features = 0);
  REFUSED(w.in_features = 96); /* no whole groups */
  REFUSED(w.in_features = ZMOE_MAX_COLUMNS + 64);
  REFUSED(w.format = ZMOE_FORMAT_F32);                                    /* has no bits */
  REFUSED((w.format = ZMOE_FORMAT_MXFP4, w.group = 32));                  /* has no biases */
  REFUSED((w.format = ZMOE_FORMAT_MXFP4, w.biases = NULL));               /* has groups of 32 */
  REFUSED((w.format = ZMOE_FORMAT_NVFP4, w.biases = NULL));               /* of 16 */
  REFUSED((w.format = ZMOE_FORMAT_MXFP8, w.biases = NULL, w.group = 32)); /* 8 bits */
  zmoe_weight w = good();
  float out[64];
  CHECK_EQUAL(zmoe_weight_decode(&w, 1, out), ZMOE_EINVAL); /* there is one row */
}

int main(void) {
  static const test_case tests[] = {
      {"fp4 and fp8 are what their bits say", test_fp4_and_fp8},
      {"all powers of two", test_power_of_two_scales},
      {"affine codes are a stream of bits", test_affine_codes_are_a_stream_of_bits},
      {"unknown formats and sizes are refused", test_refusals},
  };
  RUN(tests);
  return 0;
}
