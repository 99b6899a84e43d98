/* Gated delta nets: see decoder.h.  A unit of work is one head of keys of one sequence, with its
 * heads of values, row after row. */
#include "layer.h"

#include <math.h>
#include <string.h>

#include "decoder.h"

static const float EPS = 1e-6f; /* of the lengths of queries and keys */

struct step {
  const zmoe_delta_net *net;
  const zmoe_vector_ops *ops;
  zmoe_isa isa;
  const zmoe_slices *parts;
  zmoe_dtype dtype;
  uint32_t sequences, rows;
  const unsigned char *conv_in;
  unsigned char *conv_out, *out;
  const float *state_in;
  float *state_out, *own; /* [thread]: see own_floats */
  zmoe_tasks tasks;
};

/* The memory of a thread: rows of the unit's own channels, its queries, keys and values. */
struct unit {
  uint32_t sequence, head;
  float *window; /* (taps, channels) */
  float *x;      /* (channels): what the convolution gives */
  float *sigmoid, *gate, *result, *ab;
};

static uint32_t per_head(const zmoe_delta_net *net) {
  return net->value_heads / net->key_heads;
}

/* Of one head of keys. */
static uint32_t channels(const zmoe_delta_net *net) {
  return 2 * net->key_dim + per_head(net) * net->value_dim;
}

static size_t own_floats(const zmoe_delta_net *net) {
  size_t values = (size_t)per_head(net) * net->value_dim;
  size_t floats = (net->taps + 2) * (size_t)channels(net) + values + net->value_dim;
  return zmoe_round_up(floats + 2 * (size_t)per_head(net), 16);
}

static struct unit unit_at(const struct step *s, uint32_t thread, uint32_t task) {
  const zmoe_delta_net *net = s->net;
  struct unit u = {.sequence = task / net->key_heads, .head = task % net->key_heads};
  u.window = s->own + thread * own_floats(net);
  u.x = u.window + (size_t)net->taps * channels(net);
  u.sigmoid = u.x + channels(net);
  u.gate = u.sigmoid + channels(net);
  u.result = u.gate + (size_t)per_head(net) * net->value_dim;
  u.ab = u.result + net->value_dim;
  return u;
}

/* ---- rows in and out ------------------------------------------------------------------ */

/* How many elements of a part belong to one head of keys. */
static uint32_t part_width(const zmoe_delta_net *net, int part) {
  uint32_t widths[] = {
      net->key_dim,  net->key_dim, per_head(net) * net->value_dim, per_head(net) * net->value_dim,
      per_head(net), per_head(net)};
  return widths[part];
}

static void read_part(const struct step *s, const struct unit *u, uint32_t row, int part,
                      float *to) {
  const zmoe_slices *of = &s->parts[part];
  size_t at = ((size_t)u->sequence * s->rows + row) * of->width + of->at + u->head * of->stride;
  (void)zmoe_convert(to, ZMOE_F32,
                     (const unsigned char *)of->data + at * zmoe_dtype_bytes(s->dtype), s->dtype,
                     part_width(s->net, part), s->isa);
}

/* Where part `part` of a unit begins in a row of conv_in or conv_out, in bytes. */
static size_t conv_at(const struct step *s, const struct unit *u, uint32_t row, int part) {
  const zmoe_delta_net *net = s->net;
  size_t keys = (size_t)net->key_heads * net->key_dim;
  size_t all = 2 * keys + (size_t)net->value_heads * net->value_dim;
  size_t at = (size_t)part * keys + u->head * (size_t)part_width(net, part);
  return (((size_t)u->sequence * (net->taps - 1) + row) * all + at) * zmoe_dtype_bytes(s->dtype);
}

/* The rows before the first one; zeros where there are none. */
static void open_window(const struct step *s, const struct unit *u) {
  uint32_t n = channels(s->net), rows = s->net->taps - 1;
  memset(u->window, 0, (size_t)rows * n * sizeof *u->window);
  for (uint32_t r = 0; r < rows && s->conv_in != NULL; r++)
    for (int part = 0; part <= ZMOE_DELTA_VALUES; part++)
      (void)zmoe_convert(u->window + (size_t)r * n + (uint32_t)part * s->net->key_dim, ZMOE_F32,
                         s->conv_in + conv_at(s, u, r, part), s->dtype, part_width(s->net, part),
                         s->isa);
}

static void close_window(const struct step *s, const struct unit *u) {
  uint32_t n = channels(s->net);
  for (uint32_t r = 0; r + 1 < s->net->taps; r++)
    for (int part = 0; part <= ZMOE_DELTA_VALUES; part++)
      (void)zmoe_convert(s->conv_out + conv_at(s, u, r, part), s->dtype,
                         u->window + (size_t)r * n + (uint32_t)part * s->net->key_dim, ZMOE_F32,
                         part_width(s->net, part), s->isa);
}

/* ---- one row ---------------------------------------------------------------------------- */

/* x = SiLU(convolution) of the row, which moves into the window. */
static void convolve(const struct step *s, const struct unit *u, uint32_t row) {
  const zmoe_delta_net *net = s->net;
  uint32_t n = channels(net), last = net->taps - 1;
  size_t keys = (size_t)net->key_heads * net->key_dim;
  size_t all = 2 * keys + (size_t)net->value_heads * net->value_dim;
  for (int part = 0; part <= ZMOE_DELTA_VALUES; part++)
    read_part(s, u, row, part, u->window + (size_t)last * n + (uint32_t)part * net->key_dim);
  memset(u->x, 0, n * sizeof *u->x);
  for (int part = 0; part <= ZMOE_DELTA_VALUES; part++) {
    uint32_t from = (uint32_t)part * net->key_dim, width = part_width(net, part);
    for (uint32_t t = 0; t < net->taps; t++) {
      const float *w = net->conv + t * all + (size_t)part * keys + u->head * (size_t)width;
      const float *x = u->window + (size_t)t * n + from;
      for (uint32_t c = 0; c < width; c++)
        u->x[from + c] += w[c] * x[c];
    }
  }
  memmove(u->window, u->window + n, (size_t)last * n * sizeof *u->window);
  memcpy(u->sigmoid, u->x, n * sizeof *u->x);
  s->ops->sigmoid(u->sigmoid, n);
  for (uint32_t c = 0; c < n; c++)
    u->x[c] *= u->sigmoid[c];
}

/* Queries and keys of length 1; the results are scaled as scores are, by the queries. */
static void normalize(const struct step *s, const struct unit *u) {
  uint32_t dim = s->net->key_dim;
  const zmoe_norm norm = {ZMOE_NORM_RMS, dim, EPS / (float)dim, NULL, NULL};
  float *query = u->x, *key = u->x + dim, length = 1.0f / sqrtf((float)dim);
  s->ops->norm(&norm, query, query, ZMOE_F32);
  s->ops->norm(&norm, key, key, ZMOE_F32);
  for (uint32_t d = 0; d < dim; d++)
    query[d] *= length * length, key[d] *= length;
}

/* exp(-decay * softplus(a + offset)) */
static float decay_of(const zmoe_delta_net *net, uint32_t value_head, float a) {
  double x = (double)(a + net->offset[value_head]);
  double softplus = x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
  return (float)exp(-(double)net->decay[value_head] * softplus);
}

static void put_out(const struct step *s, const struct unit *u, uint32_t row, uint32_t i) {
  const zmoe_delta_net *net = s->net;
  const zmoe_expert_layer silu = {.activation = ZMOE_SILU};
  size_t value_head = (size_t)u->head * per_head(net) + i;
  size_t at = (((size_t)u->sequence * s->rows + row) * net->value_heads + value_head) *
              net->value_dim * zmoe_dtype_bytes(s->dtype);
  s->ops->norm(&net->norm, u->result, u->result, ZMOE_F32);
  s->ops->activate(&silu, u->gate + (size_t)i * net->value_dim, u->result, net->value_dim,
                   u->result);
  (void)zmoe_convert(s->out + at, s->dtype, u->result, ZMOE_F32, net->value_dim, s->isa);
}

static void run_row(const struct step *s, const struct unit *u, uint32_t row) {
  const zmoe_delta_net *net = s->net;
  uint32_t dim = net->key_dim, count = per_head(net);
  convolve(s, u, row);
  normalize(s, u);
  read_part(s, u, row, ZMOE_DELTA_GATES, u->gate);
  read_part(s, u, row, ZMOE_DELTA_B, u->ab);
  read_part(s, u, row, ZMOE_DELTA_A, u->ab + count);
  s->ops->sigmoid(u->ab, count);
  for (uint32_t i = 0; i < count; i++) {
    uint32_t value_head = u->head * count + i;
    size_t head_floats = (size_t)net->value_dim * dim;
    size_t at = ((size_t)u->sequence * net->value_heads + value_head) * head_floats;
    const float *from = (row == 0 ? s->state_in : s->state_out) + at;
    const float *value = u->x + 2 * (size_t)dim + (size_t)i * net->value_dim;
    float decay = decay_of(net, value_head, u->ab[count + i]);
    for (uint32_t v = 0; v < net->value_dim; v++)
      u->result[v] = s->ops->delta(from + (size_t)v * dim, s->state_out + at + (size_t)v * dim,
                                   u->x + dim, u->x, dim, decay, value[v], u->ab[i]);
    put_out(s, u, row, i);
  }
}

/* ---- the call ------------------------------------------------------------------------------ */

static void work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool;
  struct step *s = argument;
  for (uint32_t task; (task = zmoe_take(&s->tasks)) < s->sequences * s->net->key_heads;) {
    struct unit u = unit_at(s, thread, task);
    open_window(s, &u);
    for (uint32_t r = 0; r < s->rows; r++)
      run_row(s, &u, r);
    close_window(s, &u);
  }
}

size_t zmoe_delta_scratch(const zmoe_delta_net *net, uint32_t threads) {
  return threads * own_floats(net) * sizeof(float) + 64;
}

static int is_known(const zmoe_delta_net *net, const zmoe_slices *parts, zmoe_dtype dtype) {
  if (net->key_heads == 0 || net->value_heads == 0 || net->value_heads % net->key_heads != 0 ||
      net->key_dim == 0 || net->value_dim == 0 || net->taps == 0 || zmoe_dtype_bytes(dtype) == 0 ||
      net->norm.kind == ZMOE_NORM_NONE || !zmoe_norm_fits(&net->norm, net->value_dim))
    return 0;
  for (int part = 0; part < ZMOE_DELTA_PARTS; part++) {
    uint64_t end = parts[part].at + (uint64_t)(net->key_heads - 1) * parts[part].stride;
    if (end + part_width(net, part) > parts[part].width)
      return 0;
  }
  return 1;
}

int zmoe_delta_step(zmoe_thread_pool *pool, const zmoe_delta_net *net, const zmoe_slices *parts,
                    zmoe_dtype dtype, uint32_t sequences, uint32_t rows, const void *conv_in,
                    void *conv_out, const float *state_in, float *state_out, void *out) {
  if (!is_known(net, parts, dtype) || rows == 0)
    return ZMOE_EINVAL;
  size_t state = (size_t)net->value_heads * net->value_dim * net->key_dim;
  if (state_in == NULL)
    state_in = memset(state_out, 0, sequences * state * sizeof *state_out);
  size_t mark = zmoe_thread_pool_mark(pool);
  struct step s = {.net = net,
                   .ops = zmoe_vector_ops_for(zmoe_thread_pool_isa(pool)),
                   .isa = zmoe_thread_pool_isa(pool),
                   .parts = parts,
                   .dtype = dtype,
                   .sequences = sequences,
                   .rows = rows,
                   .conv_in = conv_in,
                   .conv_out = conv_out,
                   .state_in = state_in,
                   .state_out = state_out,
                   .out = out};
  s.own = zmoe_thread_pool_scratch(pool, zmoe_delta_scratch(net, zmoe_thread_pool_threads(pool)));
  if (s.own != NULL)
    zmoe_thread_pool_run(pool, work, &s);
  zmoe_thread_pool_release(pool, mark);
  return s.own != NULL ? ZMOE_OK : ZMOE_ENOMEM;
}
