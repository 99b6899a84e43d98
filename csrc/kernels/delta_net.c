/* Gated delta nets: see decoder.h.  Between the matmuls a unit of work is one head of keys of one
 * sequence, with its heads of values, row after row: however the rows are cut into calls, each is
 * computed alike. */
#include "attention.h"

#include <math.h>
#include <string.h>

static const float EPS = 1e-6f; /* of the lengths of queries and keys */

/* Consecutive rows of a sequence, from `first` on of those that are worked on; `begins`: they are
 * the first of the call. */
struct run {
  const zmoe_span *span;
  uint32_t first, rows, begins;
};

struct step {
  const zmoe_delta_net *net;
  const zmoe_vector_ops *ops;
  zmoe_isa isa;
  zmoe_dtype dtype;
  void *const *projected; /* [projection]: (rows, out_features) */
  const struct run *runs;
  uint32_t n_runs;
  unsigned char *out; /* (rows, value_heads * value_dim) */
  float *own;         /* [thread]: see own_floats */
  zmoe_tasks tasks;
};

/* The memory of a thread: rows of the unit's own channels, its queries, keys and values. */
struct unit {
  const struct run *run;
  uint32_t head;
  const unsigned char *before; /* this layer's part of what the sequence keeps; or NULL */
  unsigned char *after;
  float *window; /* (taps, channels) */
  float *x;      /* (channels): what the convolution gives */
  float *sigmoid, *gate, *result, *ab;
};

static uint32_t per_head(const zmoe_delta_net *net) {
  return net->value_heads / net->key_heads;
}

/* Of all heads. */
static size_t values_width(const zmoe_delta_net *net) {
  return (size_t)net->value_heads * net->value_dim;
}

static size_t all_channels(const zmoe_delta_net *net) {
  return 2 * (size_t)net->key_heads * net->key_dim + values_width(net);
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
  const struct run *run = &s->runs[task / net->key_heads];
  struct unit u = {.run = run, .head = task % net->key_heads};
  u.after = run->span->state_after + net->state_at;
  if (!run->begins)
    u.before = u.after;
  else if (run->span->state_before != NULL)
    u.before = run->span->state_before + net->state_at;
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

/* Row `row` of the unit's. */
static void read_part(const struct step *s, const struct unit *u, uint32_t row, int part,
                      float *to) {
  const zmoe_slices *of = &s->net->parts[part];
  size_t width = s->net->projections[of->projection].out_features;
  size_t at = (u->run->first + row) * width + of->at + u->head * (size_t)of->stride;
  const unsigned char *data = s->projected[of->projection];
  (void)zmoe_convert(to, ZMOE_F32, data + at * zmoe_dtype_bytes(s->dtype), s->dtype,
                     part_width(s->net, part), s->isa);
}

/* The rows before the first one are kept in `dtype`; after them, in f32, the states of all heads.
 */
static size_t kept_rows_bytes(const zmoe_delta_net *net) {
  size_t item = zmoe_dtype_bytes((zmoe_dtype)net->dtype);
  return zmoe_round_up((net->taps - 1) * all_channels(net) * item, 64);
}

size_t zmoe_delta_state_bytes(const zmoe_delta_net *net) {
  size_t floats = values_width(net) * net->key_dim;
  return kept_rows_bytes(net) + zmoe_round_up(floats * sizeof(float), 64);
}

/* Where part `part` of a unit begins in a kept row, in bytes. */
static size_t kept_at(const struct step *s, const struct unit *u, uint32_t row, int part) {
  const zmoe_delta_net *net = s->net;
  size_t keys = (size_t)net->key_heads * net->key_dim;
  size_t at = (size_t)part * keys + u->head * (size_t)part_width(net, part);
  return (row * all_channels(net) + at) * zmoe_dtype_bytes(s->dtype);
}

/* The rows before the first one; zeros where there are none. */
static void open_window(const struct step *s, const struct unit *u) {
  uint32_t n = channels(s->net), rows = s->net->taps - 1;
  memset(u->window, 0, (size_t)rows * n * sizeof *u->window);
  for (uint32_t r = 0; r < rows && u->before != NULL; r++)
    for (int part = 0; part <= ZMOE_DELTA_VALUES; part++)
      (void)zmoe_convert(u->window + (size_t)r * n + (uint32_t)part * s->net->key_dim, ZMOE_F32,
                         u->before + kept_at(s, u, r, part), s->dtype, part_width(s->net, part),
                         s->isa);
}

static void close_window(const struct step *s, const struct unit *u) {
  uint32_t n = channels(s->net);
  for (uint32_t r = 0; r + 1 < s->net->taps; r++)
    for (int part = 0; part <= ZMOE_DELTA_VALUES; part++)
      (void)zmoe_convert(u->after + kept_at(s, u, r, part), s->dtype,
                         u->window + (size_t)r * n + (uint32_t)part * s->net->key_dim, ZMOE_F32,
                         part_width(s->net, part), s->isa);
}

/* ---- one row ---------------------------------------------------------------------------- */

/* x = SiLU(convolution) of the row, which moves into the window. */
static void convolve(const struct step *s, const struct unit *u, uint32_t row) {
  const zmoe_delta_net *net = s->net;
  uint32_t n = channels(net), last = net->taps - 1;
  size_t keys = (size_t)net->key_heads * net->key_dim, all = all_channels(net);
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
  size_t at = (u->run->first + row) * values_width(net) + value_head * net->value_dim;
  s->ops->norm(&net->norm, u->result, u->result, ZMOE_F32);
  s->ops->activate(&silu, u->gate + (size_t)i * net->value_dim, u->result, net->value_dim,
                   u->result);
  (void)zmoe_convert(s->out + at * zmoe_dtype_bytes(s->dtype), s->dtype, u->result, ZMOE_F32,
                     net->value_dim, s->isa);
}

static void run_row(const struct step *s, const struct unit *u, uint32_t row) {
  const zmoe_delta_net *net = s->net;
  uint32_t dim = net->key_dim, count = per_head(net);
  size_t head_bytes = (size_t)net->value_dim * dim * sizeof(float);
  convolve(s, u, row);
  normalize(s, u);
  read_part(s, u, row, ZMOE_DELTA_GATES, u->gate);
  read_part(s, u, row, ZMOE_DELTA_B, u->ab);
  read_part(s, u, row, ZMOE_DELTA_A, u->ab + count);
  s->ops->sigmoid(u->ab, count);
  for (uint32_t i = 0; i < count; i++) {
    uint32_t value_head = u->head * count + i;
    size_t at = kept_rows_bytes(net) + value_head * head_bytes;
    float *to = (float *)(void *)(u->after + at);
    const float *from = to;
    if (row == 0 && u->before != NULL)
      from = (const float *)(const void *)(u->before + at);
    else if (row == 0)
      memset(to, 0, head_bytes);
    const float *value = u->x + 2 * (size_t)dim + (size_t)i * net->value_dim;
    float decay = decay_of(net, value_head, u->ab[count + i]);
    for (uint32_t v = 0; v < net->value_dim; v++)
      u->result[v] = s->ops->delta(from + (size_t)v * dim, to + (size_t)v * dim, u->x + dim, u->x,
                                   dim, decay, value[v], u->ab[i]);
    put_out(s, u, row, i);
  }
}

/* ---- the call ------------------------------------------------------------------------------ */

/* For up to ZMOE_ROW_BLOCK rows at a time. */
struct memory {
  void *x;                           /* (rows, width) of dtype: what the projections take */
  void *projected[ZMOE_DELTA_PARTS]; /* (rows, out_features) of dtype */
  void *out;                         /* (rows, value_heads * value_dim) of dtype */
  float *y;                          /* (rows, width): what the output projection gives */
  float *own;
  struct run *runs;
};

static void work(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool;
  struct step *s = argument;
  for (uint32_t task; (task = zmoe_take(&s->tasks)) < s->n_runs * s->net->key_heads;) {
    struct unit u = unit_at(s, thread, task);
    open_window(s, &u);
    for (uint32_t r = 0; r < u.run->rows; r++)
      run_row(s, &u, r);
    close_window(s, &u);
  }
}

static uint32_t widest(const zmoe_delta_net *net) {
  return net->output->in_features > net->output->out_features ? net->output->in_features
                                                              : net->output->out_features;
}

/* Of a row, in all of `memory`. */
static size_t row_bytes(const zmoe_delta_net *net) {
  size_t elements = net->output->out_features + values_width(net);
  for (uint32_t i = 0; i < net->n_projections; i++)
    elements += net->projections[i].out_features;
  return elements * zmoe_dtype_bytes((zmoe_dtype)net->dtype) +
         net->output->out_features * sizeof(float) + sizeof(struct run);
}

size_t zmoe_delta_scratch(const zmoe_delta_net *net, uint32_t threads) {
  return ZMOE_ROW_BLOCK * row_bytes(net) + threads * own_floats(net) * sizeof(float) +
         (5 + ZMOE_DELTA_PARTS) * 64 + zmoe_linear_scratch(widest(net));
}

/* Takes all that the call needs, or finds out that there is too little. */
static int take_memory(zmoe_thread_pool *pool, const zmoe_delta_net *net, uint32_t rows,
                       struct memory *m) {
  size_t item = zmoe_dtype_bytes((zmoe_dtype)net->dtype), n = zmoe_min(rows, ZMOE_ROW_BLOCK);
  uint32_t threads = zmoe_thread_pool_threads(pool), width = net->output->out_features;
  m->x = zmoe_thread_pool_scratch(pool, n * width * item);
  m->out = zmoe_thread_pool_scratch(pool, n * values_width(net) * item);
  m->y = zmoe_thread_pool_scratch(pool, n * width * sizeof *m->y);
  m->own = zmoe_thread_pool_scratch(pool, threads * own_floats(net) * sizeof *m->own);
  m->runs = zmoe_thread_pool_scratch(pool, n * sizeof *m->runs);
  int all = m->x != NULL && m->out != NULL && m->y != NULL && m->own != NULL && m->runs != NULL;
  for (uint32_t i = 0; i < net->n_projections; i++) {
    m->projected[i] = zmoe_thread_pool_scratch(pool, n * net->projections[i].out_features * item);
    all = all && m->projected[i] != NULL;
  }
  return all && zmoe_linear_has_room(pool, widest(net)) ? ZMOE_OK : ZMOE_ENOMEM;
}

static int is_weight(const zmoe_weight *w, size_t in_features, size_t out_features) {
  return zmoe_weight_check(w) == ZMOE_OK && w->in_features == in_features &&
         w->out_features == out_features;
}

static int parts_fit(const zmoe_delta_net *net) {
  for (int part = 0; part < ZMOE_DELTA_PARTS; part++) {
    const zmoe_slices *of = &net->parts[part];
    uint64_t end = of->at + (uint64_t)(net->key_heads - 1) * of->stride + part_width(net, part);
    if (of->projection >= net->n_projections || end > net->projections[of->projection].out_features)
      return 0;
  }
  return 1;
}

static int is_known(const zmoe_delta_net *net) {
  if (net->key_heads == 0 || net->value_heads == 0 || net->value_heads % net->key_heads != 0 ||
      net->key_dim == 0 || net->value_dim == 0 || net->taps == 0 ||
      net->state_at % sizeof(float) != 0 || zmoe_dtype_bytes((zmoe_dtype)net->dtype) == 0 ||
      net->norm.kind == ZMOE_NORM_NONE || !zmoe_norm_fits(&net->norm, net->value_dim) ||
      net->n_projections == 0 || net->n_projections > ZMOE_DELTA_PARTS)
    return 0;
  uint32_t width = net->output->out_features;
  for (uint32_t i = 0; i < net->n_projections; i++)
    if (!is_weight(&net->projections[i], width, net->projections[i].out_features))
      return 0;
  return is_weight(net->output, values_width(net), width) && zmoe_norm_fits(&net->input, width) &&
         parts_fit(net);
}

static int spans_have_states(const zmoe_span *spans, uint32_t n_spans, uint32_t *rows) {
  *rows = 0;
  for (uint32_t i = 0; i < n_spans; i++) {
    if (spans[i].rows == 0 || spans[i].rows > UINT32_MAX - *rows || spans[i].state_after == NULL ||
        spans[i].state_after == spans[i].state_before)
      return 0;
    *rows += spans[i].rows;
  }
  return 1;
}

/* Rows [first, first + rows) of the spans, as runs; how many. */
static uint32_t cut(const zmoe_span *spans, uint32_t first, uint32_t rows, struct run *runs) {
  uint32_t n = 0, at = 0; /* the first row of the span */
  while (at + spans->rows <= first)
    at += spans++->rows;
  for (uint32_t row = first; row < first + rows; at += spans++->rows) {
    uint32_t count = zmoe_min(at + spans->rows, first + rows) - row;
    runs[n++] = (struct run){spans, row - first, count, row == at};
    row += count;
  }
  return n;
}

static int project(zmoe_thread_pool *pool, const zmoe_delta_net *net, const struct memory *m,
                   uint32_t rows, zmoe_precision precision) {
  const zmoe_weight *weights[ZMOE_DELTA_PARTS];
  size_t strides[ZMOE_DELTA_PARTS];
  for (uint32_t i = 0; i < net->n_projections; i++) {
    weights[i] = &net->projections[i];
    strides[i] = net->projections[i].out_features;
  }
  zmoe_dtype dtype = (zmoe_dtype)net->dtype;
  return zmoe_linear(pool, weights, net->n_projections, m->x, dtype, rows, m->projected, strides,
                     dtype, precision);
}

/* Rows [first, first + rows), at most ZMOE_ROW_BLOCK. */
static int step_block(zmoe_thread_pool *pool, const zmoe_delta_net *net, const zmoe_span *spans,
                      uint32_t first, uint32_t rows, float *h, const struct memory *m,
                      zmoe_precision precision) {
  zmoe_dtype dtype = (zmoe_dtype)net->dtype;
  uint32_t width = net->output->out_features;
  h += (size_t)first * width;
  zmoe_norm_all(pool, &net->input, width, h, rows, m->x, dtype);
  int status = project(pool, net, m, rows, precision);
  if (status != ZMOE_OK)
    return status;
  struct step s = {.net = net,
                   .ops = zmoe_vector_ops_for(zmoe_thread_pool_isa(pool)),
                   .isa = zmoe_thread_pool_isa(pool),
                   .dtype = dtype,
                   .projected = m->projected,
                   .runs = m->runs,
                   .n_runs = cut(spans, first, rows, m->runs),
                   .out = m->out,
                   .own = m->own};
  zmoe_thread_pool_run(pool, work, &s);
  return zmoe_add_output(pool, net->output, m->out, dtype, rows, m->y, h, precision);
}

int zmoe_delta_step(zmoe_thread_pool *pool, const zmoe_delta_net *net, const zmoe_span *spans,
                    uint32_t n_spans, float *h, zmoe_precision precision) {
  uint32_t rows;
  if (!is_known(net) || !spans_have_states(spans, n_spans, &rows))
    return ZMOE_EINVAL;
  size_t mark = zmoe_thread_pool_mark(pool);
  struct memory memory;
  int status = take_memory(pool, net, rows, &memory);
  for (uint32_t first = 0; first < rows && status == ZMOE_OK; first += ZMOE_ROW_BLOCK)
    status = step_block(pool, net, spans, first, zmoe_min(rows - first, ZMOE_ROW_BLOCK), h, &memory,
                        precision);
  zmoe_thread_pool_release(pool, mark);
  return status;
}
