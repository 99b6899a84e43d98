/* Multi-head latent attention: see decoder.h.  Between its matmuls a row is turned into
 * queries of latents and its own latent is written into the cache; the sums are those of any
 * attention (attention.h) with one head of keys, which are the values too. */
#include "attention.h"

#include <string.h>

#include "decoder.h"

enum { BLOCK_ROWS = 32 }; /* of a call, at a time: their queries take the most memory */

typedef zmoe_latent_attention latent;

/* The memory of a block of rows. */
struct memory {
  void *x;         /* (rows, width) of dtype */
  float *rank;     /* (rows, query rank): what query_down gives */
  void *rank_x;    /* the same, normed, of dtype */
  float *query;    /* (rows, heads, key_dim + rope_dims) */
  float *down;     /* (rows, latent_dim + rope_dims) */
  void *keys_in;   /* (heads, rows, key_dim) of dtype: what key_heads take */
  float *keys_out; /* (heads, rows, latent_dim) */
  float *queries;  /* (rows, heads, latent_dim + rope_dims) */
  void *sums;      /* (heads, rows, latent_dim) of dtype */
  void *values;    /* (heads, rows, value_dim) of dtype */
  void *out;       /* (rows, heads, value_dim) of dtype */
  float *y;        /* (rows, width) */
  zmoe_piece *pieces;
  int32_t *pair_rows, *pair_heads; /* (heads, rows) */
};

struct step {
  zmoe_attend attend;
  const latent *a;
  const struct memory *m;
  zmoe_tasks write_tasks, query_tasks, out_tasks;
};

static uint32_t query_dim(const latent *a) {
  return a->key_dim + a->rope_dims;
}

static uint32_t cached_dim(const latent *a) {
  return a->latent_dim + a->rope_dims;
}

static uint32_t query_rank(const latent *a) {
  return a->query_down == NULL ? 0 : a->query_down->out_features;
}

static uint32_t width_of(const latent *a) {
  return a->output->out_features;
}

/* ---- checks ------------------------------------------------------------------------ */

static int is_weight(const zmoe_weight *w, uint32_t in_features, size_t out_features) {
  return zmoe_weight_check(w) == ZMOE_OK && w->in_features == in_features &&
         w->out_features == out_features;
}

static int shapes_fit(const latent *a) {
  uint32_t width = width_of(a), rank = width;
  if (a->query_down != NULL) {
    rank = query_rank(a);
    if (!is_weight(a->query_down, width, rank) || !zmoe_norm_fits(&a->query_norm, rank))
      return 0;
  }
  for (uint32_t i = 0; i < a->heads; i++)
    if (!is_weight(&a->key_heads[i], a->key_dim, a->latent_dim) ||
        !is_weight(&a->value_heads[i], a->latent_dim, a->value_dim))
      return 0;
  return is_weight(a->query, rank, (size_t)a->heads * query_dim(a)) &&
         is_weight(a->down, width, cached_dim(a)) &&
         is_weight(a->output, a->heads * a->value_dim, width) && zmoe_norm_fits(&a->input, width) &&
         zmoe_norm_fits(&a->latent_norm, a->latent_dim);
}

static int is_known(const latent *a) {
  return a->heads > 0 && a->heads <= ZMOE_MAX_COLUMNS && a->latent_dim > 0 && a->key_dim > 0 &&
         a->value_dim > 0 && a->key_dim <= ZMOE_MAX_COLUMNS && a->value_dim <= ZMOE_MAX_COLUMNS &&
         a->latent_dim <= ZMOE_MAX_HEAD_DIM && a->rope_dims % 2 == 0 &&
         a->rope_dims <= ZMOE_MAX_HEAD_DIM - a->latent_dim &&
         (a->window == 0 ? a->keep == 0 : a->keep < a->window) &&
         zmoe_dtype_bytes((zmoe_dtype)a->dtype) != 0 && shapes_fit(a);
}

/* ---- as an attention of one head of keys -------------------------------------------------- */

/* Heads that share their keys are cut into as many groups as there are threads, if they can be:
 * for the sums these are heads of keys.  With `end` positions that make ranges enough for the
 * threads they stay together, so that each key is turned once. */
static zmoe_attention as_attention(const latent *a, uint32_t threads, uint32_t end) {
  uint32_t group = zmoe_min(a->heads, ZMOE_UNIT_VECTORS);
  int is_long = end / ZMOE_RANGE_KEYS >= 2 * threads;
  while (a->heads % group != 0 || (!is_long && group > 1 && a->heads / group < threads))
    group--;
  return (zmoe_attention){.heads = a->heads,
                          .kv_heads = a->heads / group,
                          .head_dim = cached_dim(a),
                          .window = a->window,
                          .keep = a->keep,
                          .dtype = a->dtype};
}

/* The positions of the sequence that has the fewest. */
static uint32_t shortest(const zmoe_span *spans, uint32_t n_spans) {
  uint32_t least = UINT32_MAX;
  for (uint32_t i = 0; i < n_spans; i++)
    least = zmoe_min(least, spans[i].position + spans[i].rows);
  return least;
}

/* ---- memory ------------------------------------------------------------------------ */

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

/* Of the calls within, one at a time. */
static size_t inner_bytes(const latent *a, uint32_t threads) {
  const zmoe_attention cut = as_attention(a, threads, 0), whole = as_attention(a, 1, 0);
  size_t attend = larger(zmoe_attend_bytes(&cut, threads), zmoe_attend_bytes(&whole, threads));
  size_t linear = larger(zmoe_linear_scratch(width_of(a)), zmoe_linear_scratch(query_rank(a)));
  linear = larger(linear, zmoe_linear_scratch(a->output->in_features));
  size_t heads = larger(zmoe_experts_scratch(a->key_dim, a->latent_dim, 1),
                        zmoe_experts_scratch(a->latent_dim, a->value_dim, 1));
  heads += a->heads * 4 * sizeof(uint64_t);
  return larger(larger(linear, heads), attend);
}

/* Pieces of a pool's working memory; without a pool they are only added up. */
struct taken {
  zmoe_thread_pool *pool;
  size_t bytes;
  int lacks;
};

static void *take(struct taken *t, size_t bytes) {
  t->bytes += zmoe_round_up(bytes, 64);
  void *memory = t->pool == NULL ? NULL : zmoe_thread_pool_scratch(t->pool, bytes);
  t->lacks |= memory == NULL;
  return memory;
}

static struct memory take_memory(struct taken *t, const latent *a, size_t rows) {
  size_t item = zmoe_dtype_bytes((zmoe_dtype)a->dtype), each = rows * a->heads;
  return (struct memory){.x = take(t, rows * width_of(a) * item),
                         .rank = take(t, rows * query_rank(a) * sizeof(float)),
                         .rank_x = take(t, rows * query_rank(a) * item),
                         .query = take(t, each * query_dim(a) * sizeof(float)),
                         .down = take(t, rows * cached_dim(a) * sizeof(float)),
                         .keys_in = take(t, each * a->key_dim * item),
                         .keys_out = take(t, each * a->latent_dim * sizeof(float)),
                         .queries = take(t, each * cached_dim(a) * sizeof(float)),
                         .sums = take(t, each * a->latent_dim * item),
                         .values = take(t, each * a->value_dim * item),
                         .out = take(t, each * a->value_dim * item),
                         .y = take(t, rows * width_of(a) * sizeof(float)),
                         .pieces = take(t, rows * sizeof(zmoe_piece)),
                         .pair_rows = take(t, each * sizeof(int32_t)),
                         .pair_heads = take(t, each * sizeof(int32_t))};
}

size_t zmoe_latent_attention_scratch(const zmoe_latent_attention *a, uint32_t threads) {
  struct taken t = {0};
  (void)take_memory(&t, a, BLOCK_ROWS);
  return t.bytes + inner_bytes(a, threads);
}

/* ---- between the matmuls -------------------------------------------------------------------- */

static void rotate(const struct step *s, uint32_t position, float *x) {
  const latent *a = s->a;
  size_t at = (size_t)position * (a->rope_dims / 2);
  if (a->rope_dims > 0)
    s->attend.ops->rotate(x, s->attend.cosines + at, s->attend.sines + at, a->rope_dims,
                          a->rope_traditional);
}

/* The rest of a row's key and value, written into the cache. */
static void write_row(const struct step *s, const zmoe_piece *piece, uint32_t i) {
  const latent *a = s->a;
  uint32_t dim = cached_dim(a), position = piece->position + i;
  float *x = s->m->down + (size_t)(piece->first + i) * dim;
  if (a->latent_norm.kind != ZMOE_NORM_NONE)
    s->attend.ops->norm(&a->latent_norm, x, x, ZMOE_F32);
  rotate(s, position, x + a->latent_dim);
  size_t item = zmoe_dtype_bytes(s->attend.dtype), at = position % ZMOE_KEY_BLOCK * dim;
  unsigned char *block =
      (unsigned char *)s->attend.cache->keys +
      (size_t)piece->span->blocks[position / ZMOE_KEY_BLOCK] * ZMOE_KEY_BLOCK * dim * item;
  (void)zmoe_convert(block + at * item, s->attend.dtype, x, ZMOE_F32, dim, s->attend.isa);
}

/* What the heads' matrices take of a row's queries. */
static void split_row(const struct step *s, uint32_t row) {
  const latent *a = s->a;
  size_t item = zmoe_dtype_bytes(s->attend.dtype);
  for (size_t head = 0; head < a->heads; head++) {
    const float *query = s->m->query + (row * (size_t)a->heads + head) * query_dim(a);
    size_t at = (head * s->attend.rows + row) * a->key_dim * item;
    (void)zmoe_convert((unsigned char *)s->m->keys_in + at, s->attend.dtype, query, ZMOE_F32,
                       a->key_dim, s->attend.isa);
  }
}

static void split(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool, (void)thread;
  struct step *s = argument;
  for (uint32_t p; (p = zmoe_take(&s->write_tasks)) < s->attend.n_pieces;) {
    const zmoe_piece *piece = &s->attend.pieces[p];
    for (uint32_t i = 0; i < piece->rows; i++) {
      write_row(s, piece, i);
      split_row(s, piece->first + i);
    }
  }
}

/* Queries of latents, ready for the scores: a piece's of one group of heads. */
static void prepare(const struct step *s, const zmoe_piece *piece, uint32_t group) {
  const latent *a = s->a;
  uint32_t heads = s->attend.group;
  for (uint32_t v = 0; v < piece->rows * heads; v++) {
    size_t row = piece->first + v / heads, head = (size_t)group * heads + v % heads;
    float *to = s->attend.qkv + row * s->attend.row_width + head * cached_dim(a);
    const float *rest = s->m->query + (row * a->heads + head) * query_dim(a) + a->key_dim;
    memcpy(to, s->m->keys_out + (head * s->attend.rows + row) * a->latent_dim,
           a->latent_dim * sizeof *to);
    memcpy(to + a->latent_dim, rest, a->rope_dims * sizeof *to);
    rotate(s, piece->position + v / heads, to + a->latent_dim);
    for (uint32_t d = 0; d < cached_dim(a); d++)
      to[d] *= a->scale;
  }
}

static void attend(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  struct step *s = argument; /* its first member is the zmoe_attend */
  uint32_t groups = s->attend.attention->kv_heads;
  for (uint32_t unit; (unit = zmoe_take(&s->query_tasks)) < s->attend.n_pieces * groups;)
    prepare(s, &s->attend.pieces[unit / groups], unit % groups);
  zmoe_thread_pool_barrier(pool);
  zmoe_attend_sums(pool, &s->attend, thread);
}

/* The heads of a row beside each other. */
static void join(zmoe_thread_pool *pool, void *argument, uint32_t thread) {
  (void)pool, (void)thread;
  struct step *s = argument;
  size_t bytes = s->a->value_dim * zmoe_dtype_bytes(s->attend.dtype);
  for (uint32_t r; (r = zmoe_take(&s->out_tasks)) < s->attend.rows;)
    for (size_t head = 0; head < s->a->heads; head++)
      memcpy((unsigned char *)s->m->out + (r * (size_t)s->a->heads + head) * bytes,
             (unsigned char *)s->m->values + (head * s->attend.rows + r) * bytes, bytes);
}

/* ---- the matmuls --------------------------------------------------------------------------- */

static int project(zmoe_thread_pool *pool, const struct step *s, zmoe_precision precision) {
  const latent *a = s->a;
  const struct memory *m = s->m;
  zmoe_dtype dtype = s->attend.dtype;
  const zmoe_weight *first[] = {a->query_down != NULL ? a->query_down : a->query, a->down};
  void *ys[] = {a->query_down != NULL ? m->rank : m->query, m->down};
  const size_t strides[] = {first[0]->out_features, cached_dim(a)};
  int status =
      zmoe_linear(pool, first, 2, m->x, dtype, s->attend.rows, ys, strides, ZMOE_F32, precision);
  if (status != ZMOE_OK || a->query_down == NULL)
    return status;
  zmoe_norm_all(pool, &a->query_norm, query_rank(a), m->rank, s->attend.rows, m->rank_x, dtype);
  void *query[] = {m->query};
  const size_t stride[] = {a->query->out_features};
  return zmoe_linear(pool, &a->query, 1, m->rank_x, dtype, s->attend.rows, query, stride, ZMOE_F32,
                     precision);
}

/* A matrix per head, of (heads, rows, in_features). */
static int multiply_heads(zmoe_thread_pool *pool, const struct step *s, const zmoe_weight *heads,
                          const void *x, void *y, zmoe_dtype y_dtype, zmoe_precision precision) {
  uint32_t count = s->a->heads * s->attend.rows;
  return zmoe_gather_linear(pool, heads, s->a->heads, x, s->attend.dtype, count, s->m->pair_rows,
                            s->m->pair_heads, count, y, y_dtype, precision);
}

static int step_block(zmoe_thread_pool *pool, struct step *s, float *h, zmoe_precision precision) {
  const latent *a = s->a;
  const struct memory *m = s->m;
  uint32_t rows = s->attend.rows;
  for (uint32_t i = 0; i < a->heads * rows; i++)
    m->pair_rows[i] = (int32_t)i, m->pair_heads[i] = (int32_t)(i / rows);
  zmoe_norm_all(pool, &a->input, width_of(a), h, rows, m->x, s->attend.dtype);
  int status = project(pool, s, precision);
  if (status != ZMOE_OK)
    return status;
  zmoe_run_rows(pool, split, s, rows);
  status = multiply_heads(pool, s, a->key_heads, m->keys_in, m->keys_out, ZMOE_F32, precision);
  if (status != ZMOE_OK)
    return status;
  zmoe_attend_run(pool, &s->attend, attend);
  status = multiply_heads(pool, s, a->value_heads, m->sums, m->values, s->attend.dtype, precision);
  if (status != ZMOE_OK)
    return status;
  zmoe_run_rows(pool, join, s, rows);
  return zmoe_add_output(pool, a->output, m->out, s->attend.dtype, rows, m->y, h, precision);
}

int zmoe_latent_attention_step(zmoe_thread_pool *pool, const zmoe_latent_attention *attention,
                               const zmoe_kv_cache *cache, const zmoe_span *spans, uint32_t n_spans,
                               const float *cosines, const float *sines, float *h,
                               zmoe_precision precision) {
  uint32_t all, threads = zmoe_thread_pool_threads(pool);
  if (!is_known(attention) || cache->bits != 0 || !zmoe_spans_fit(spans, n_spans, cache, &all) ||
      (attention->rope_dims > 0 && (cosines == NULL || sines == NULL)))
    return ZMOE_EINVAL;
  if (all == 0)
    return ZMOE_OK;
  const zmoe_attention plain = as_attention(attention, threads, shortest(spans, n_spans));
  size_t mark = zmoe_thread_pool_mark(pool);
  struct taken taken = {.pool = pool};
  const struct memory m = take_memory(&taken, attention, zmoe_min(all, BLOCK_ROWS));
  size_t inner = zmoe_thread_pool_mark(pool);
  (void)take(&taken, inner_bytes(attention, threads) + threads * ZMOE_THREAD_SCRATCH);
  zmoe_thread_pool_release(pool, inner);
  int status = taken.lacks ? ZMOE_ENOMEM : ZMOE_OK;
  for (uint32_t first = 0; first < all && status == ZMOE_OK; first += BLOCK_ROWS) {
    uint32_t rows = zmoe_min(all - first, BLOCK_ROWS);
    struct step s = {.a = attention,
                     .m = &m,
                     .attend = {.attention = &plain,
                                .ops = zmoe_vector_ops_for(zmoe_thread_pool_isa(pool)),
                                .isa = zmoe_thread_pool_isa(pool),
                                .dtype = (zmoe_dtype)attention->dtype,
                                .cache = cache,
                                .cosines = cosines,
                                .sines = sines,
                                .pieces = m.pieces,
                                .rows = rows,
                                .qkv = m.queries,
                                .row_width = (size_t)attention->heads * plain.head_dim,
                                .out = m.sums,
                                .out_row = attention->latent_dim,
                                .out_head = (size_t)rows * attention->latent_dim,
                                .out_dim = attention->latent_dim,
                                .is_latent = 1}};
    s.attend.n_pieces = zmoe_attend_cut(&plain, spans, first, rows, m.pieces);
    status = step_block(pool, &s, h + (size_t)first * width_of(attention), precision);
  }
  zmoe_thread_pool_release(pool, mark);
  return status;
}
