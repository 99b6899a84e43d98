/* GEMM, in the vectors of vec.h: weights into panels, and the product of
 * panels.  Before including this, a variant defines WORDS, a register of LANES
 * words, load_e8m0 as in gemv_body.h, and
 *   load_row(src, n)      n words, the rest zero and not touched,
 *   transpose(words)      LANES registers in place: word j of register i for word i of j,
 *   half_of(words, format, high)  the low or high 16 bits of each, as floats,
 *   value_of(words, i, bits, affine)  code i of each as a float,
 * and afterwards calls gemm_pack and gemm_tile. */
#include <string.h>

#include "kernels.h"
#include "weight.h"

/* Words [word, word + LANES) of LANES outputs from `first` on, one register per
 * word; what lies beyond `n_out` outputs or `words` words is zero. */
KERNEL void load_words(const zmoe_weight *w, uint32_t first, uint32_t n_out, size_t word,
                       uint32_t words, WORDS v[LANES]) {
  size_t row_bytes = zmoe_weight_row_bytes(w);
  const unsigned char *data = (const unsigned char *)w->data + first * row_bytes + word * 4;
  EACH(i, LANES)
    v[i] = i < n_out ? load_row(data + i * row_bytes, words) : (WORDS){0};
  transpose(v);
}

/* ---- formats ---------------------------------------------------------------------
 * Each packs LANES outputs into as many columns of the panel. */

KERNEL void store_floats(float *to, VEC value) {
  memcpy(to, &value, sizeof value);
}

KERNEL void pack_f32(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0, uint32_t k1,
                     float *panel) {
  WORDS v[LANES];
  for (uint32_t k = k0; k < k1; k += LANES) {
    uint32_t words = k1 - k < LANES ? k1 - k : LANES;
    load_words(w, first, n_out, k, words, v);
    for (uint32_t j = 0; j < words; j++)
      memcpy(panel + (size_t)(k - k0 + j) * ZMOE_PANEL, &v[j], sizeof v[j]);
  }
}

/* Two elements a word; rows of an odd length start in the middle of one, and
 * are left to the generic way. */
KERNEL void pack_halves(const zmoe_weight *w, uint32_t format, uint32_t first, uint32_t n_out,
                        uint32_t k0, uint32_t k1, float *panel) {
  WORDS v[LANES];
  for (uint32_t k = k0; k < k1; k += 2 * LANES) {
    uint32_t words = k1 - k < 2 * LANES ? (k1 - k) / 2 : LANES;
    load_words(w, first, n_out, k / 2, words, v);
    for (uint32_t j = 0; j < words; j++) {
      float *to = panel + (size_t)(k - k0 + 2 * j) * ZMOE_PANEL;
      store_floats(to, half_of(v[j], format, 0));
      store_floats(to + ZMOE_PANEL, half_of(v[j], format, 1));
    }
  }
}

/* The scale and bias of LANES outputs for one group. */
KERNEL void load_group(const zmoe_weight *w, int affine, uint32_t first, uint32_t n_out,
                       uint32_t group, VEC *scale, VEC *bias) {
  float scales[LANES] = {0}, biases[LANES] = {0};
  for (uint32_t i = 0; i < n_out; i++) {
    const unsigned char *at = zmoe_row_scales(w, first + i);
    if (affine) {
      scales[i] = load_scalar(at, group, (zmoe_dtype)w->scale_dtype);
      biases[i] = load_scalar(zmoe_row_biases(w, first + i), group, (zmoe_dtype)w->scale_dtype);
    } else {
      scales[i] = load_e8m0(at + group, 1)[0];
    }
  }
  memcpy(scale, scales, sizeof *scale);
  memcpy(bias, biases, sizeof *bias);
}

KERNEL void pack_codes(const zmoe_weight *w, const uint32_t bits, int affine, uint32_t first,
                       uint32_t n_out, uint32_t k0, uint32_t k1, float *panel) {
  const uint32_t per_word = 32 / bits;
  uint32_t loaded = UINT32_MAX;
  VEC scale = vec_splat(0.0f), bias = scale;
  WORDS v[LANES];
  for (uint32_t k = k0; k < k1; k += LANES * per_word) {
    uint32_t words = (k1 - k) / per_word < LANES ? (k1 - k) / per_word : LANES;
    load_words(w, first, n_out, k / per_word, words, v);
    for (uint32_t j = 0; j < words; j++) {
      uint32_t element = k + j * per_word;
      if (element / w->group != loaded) {
        loaded = element / w->group;
        load_group(w, affine, first, n_out, loaded, &scale, &bias);
      }
      float *to = panel + (size_t)(element - k0) * ZMOE_PANEL;
      EACH(i, per_word)
        store_floats(to + i * ZMOE_PANEL, vec_fma(value_of(v[j], i, bits, affine), scale, bias));
    }
  }
}

typedef void pack_columns(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,
                          uint32_t k1, float *panel);
#define PACK(name, body, ...)                                                                      \
  TARGET static void name(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,       \
                          uint32_t k1, float *panel) {                                             \
    body(w, __VA_ARGS__, first, n_out, k0, k1, panel);                                             \
  }

PACK(pack_f16, pack_halves, ZMOE_FORMAT_F16)
PACK(pack_bf16, pack_halves, ZMOE_FORMAT_BF16)
PACK(pack_fp4, pack_codes, 4, 0)
PACK(pack_codes4, pack_codes, 4, 1)
PACK(pack_codes8, pack_codes, 8, 1)

TARGET static void pack_plain(const zmoe_weight *w, uint32_t first, uint32_t n_out, uint32_t k0,
                              uint32_t k1, float *panel) {
  pack_f32(w, first, n_out, k0, k1, panel);
}

static pack_columns *packer_of(const zmoe_weight *w) {
  int even = w->in_features % 2 == 0;
  switch (w->format) {
  case ZMOE_FORMAT_F32:
    return pack_plain;
  case ZMOE_FORMAT_F16:
    return even ? pack_f16 : NULL;
  case ZMOE_FORMAT_BF16:
    return even ? pack_bf16 : NULL;
  case ZMOE_FORMAT_MXFP4:
    return pack_fp4;
  case ZMOE_FORMAT_AFFINE:
    if (w->bits == 4)
      return pack_codes4;
    return w->bits == 8 ? pack_codes8 : NULL;
  }
  return NULL;
}

static void gemm_pack(const zmoe_weight *w, uint32_t first, uint32_t last, uint32_t k0, uint32_t k1,
                      float *panel) {
  pack_columns *pack = packer_of(w);
  if (pack == NULL) {
    zmoe_generic_pack_panel(w, first, last, k0, k1, panel);
    return;
  }
  for (uint32_t at = 0; at < ZMOE_PANEL; at += LANES) {
    uint32_t left = last > first + at ? last - first - at : 0;
    pack(w, first + at, left < LANES ? left : LANES, k0, k1, panel + at);
  }
}

/* ---- the product of a panel --------------------------------------------------------- */

/* Outputs at a time, and most rows: their sums and one row of the panel fill the registers. */
enum { TILE_OUTS = 16, TILE_VECS = TILE_OUTS / LANES, TILE_MOST = 6 };

KERNEL void tile_rows(const float *panel, uint32_t depth, const float *const *xs,
                      const uint32_t rows, float *sums, int add) {
  VEC sum[TILE_MOST][TILE_VECS], weights[TILE_VECS];
  EACH(r, rows)
    EACH(v, TILE_VECS)
      if (add)
        memcpy(&sum[r][v], sums + r * ZMOE_PANEL + v * LANES, sizeof sum[r][v]);
      else
        sum[r][v] = vec_splat(0.0f);
  for (uint32_t k = 0; k < depth; k++) {
    EACH(v, TILE_VECS)
      memcpy(&weights[v], panel + (size_t)k * ZMOE_PANEL + v * LANES, sizeof weights[v]);
    EACH(r, rows) {
      VEC x = vec_splat(xs[r][k]);
      EACH(v, TILE_VECS)
        sum[r][v] = vec_fma(x, weights[v], sum[r][v]);
    }
  }
  EACH(r, rows)
    EACH(v, TILE_VECS)
      store_floats(sums + r * ZMOE_PANEL + v * LANES, sum[r][v]);
}

TARGET static void tile_half(const float *panel, uint32_t depth, const float *const *xs,
                             uint32_t rows, float *sums, int add) {
  for (; rows >= TILE_MOST; rows -= TILE_MOST, xs += TILE_MOST, sums += TILE_MOST * ZMOE_PANEL)
    tile_rows(panel, depth, xs, TILE_MOST, sums, add);
  if (rows >= 4) {
    tile_rows(panel, depth, xs, 4, sums, add);
    rows -= 4, xs += 4, sums += 4 * ZMOE_PANEL;
  }
  if (rows >= 2) {
    tile_rows(panel, depth, xs, 2, sums, add);
    rows -= 2, xs += 2, sums += 2 * ZMOE_PANEL;
  }
  if (rows >= 1)
    tile_rows(panel, depth, xs, 1, sums, add);
}

static void gemm_tile(const float *panel, uint32_t depth, const float *const *xs, uint32_t rows,
                      float *sums, int add) {
  for (uint32_t at = 0; at < ZMOE_PANEL; at += TILE_OUTS)
    tile_half(panel + at, depth, xs, rows, sums + at, add);
}
