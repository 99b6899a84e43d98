/* zmoe: the parts of a decoder layer around its experts, on a CPU node.
 *
 * For families whose attention is the usual one (grouped queries, rotary
 * positions, a cache of keys and values): what MLX would do in some thirty
 * small operations per layer is one call before the experts (attention), one
 * for the router, and the sums in between.  The residual stream `h` stays f32;
 * what goes into a matmul is rounded to the model's own type, as MLX has it.
 * A call that fails has changed nothing.
 */
#ifndef ZMOE_DECODER_H
#define ZMOE_DECODER_H

#include "compute.h"

#define ZMOE_MAX_HEAD_DIM 640

typedef enum zmoe_norm_kind {
  ZMOE_NORM_NONE = 0,
  ZMOE_NORM_RMS = 1,
  ZMOE_NORM_LAYER = 2
} zmoe_norm_kind;

/* Over the last `width` elements; weight and bias (width) f32, or NULL for 1 and 0. */
typedef struct zmoe_norm {
  uint32_t kind; /* zmoe_norm_kind */
  uint32_t width;
  float eps;
  const float *weight, *bias;
} zmoe_norm;

/* ---- both ends of a model ---------------------------------------------------------- */

/* h (count, width) f32 = the rows `tokens` of the embedding, rounded to `dtype`.  ZMOE_EINVAL, and
 * nothing is written, for a token without a row. */
int zmoe_embed(zmoe_thread_pool *pool, const zmoe_weight *embedding, const int32_t *tokens,
               uint32_t count, zmoe_dtype dtype, float *h);
/* logits (count, vocabulary) f32 = head * norm(h), of the rows `rows` of h (all, width) alone;
 * `dtype` is that of what goes into the matmul. */
int zmoe_logits(zmoe_thread_pool *pool, const zmoe_norm *norm, const zmoe_weight *head,
                zmoe_dtype dtype, const float *h, const uint32_t *rows, uint32_t count,
                float *logits, zmoe_precision precision);
size_t zmoe_logits_scratch(const zmoe_weight *head);

/* ---- attention ------------------------------------------------------------------ */

typedef struct zmoe_attention {
  zmoe_norm input; /* of h, before the projections */
  /* 3: queries, keys, values; 1: all of them, in this order, in one matrix. */
  const zmoe_weight *projections;
  uint32_t n_projections;
  const zmoe_weight *output;          /* heads * head_dim -> width */
  zmoe_norm query_norm, key_norm;     /* of each head, or of all heads: by their width */
  uint32_t heads, kv_heads, head_dim; /* head_dim: at most ZMOE_MAX_HEAD_DIM */
  float scale;                        /* of the scores */
  float clip;                         /* projections are clipped at -clip and clip; 0: not at all */
  uint32_t rope_dims;        /* the first elements of a head that are rotated; even; 0: none */
  uint32_t rope_traditional; /* 1: pairs are neighbours; 0: halves apart */
  const float *sinks;        /* (heads): a score more for the softmax alone; or NULL */
  uint32_t window;           /* a row sees that many keys at most, itself included; 0: all */
  uint32_t keep;             /* of a window: the first keys, which it never leaves; < window */
  /* 1: each head's query is followed by a gate (head_dim), whose logistic function multiplies
   * what the head gives; norms of queries are of each head then */
  uint32_t is_gated;
  uint32_t dtype; /* zmoe_dtype of what goes into matmuls, and of the cache */
} zmoe_attention;

#define ZMOE_KEY_BLOCK 64 /* positions of a block of keys and values */

/* The paged cache of a layer: keys (blocks, kv_heads, head_dim, 64), so that scores are sums
 * of whole vectors, and values (blocks, kv_heads, 64, head_dim), of `dtype`.  With 8 `bits`
 * they are integers within [-127, 127], and those of a head in a block are followed by 64
 * scales in f32: what the integers of each position are multiplied with. */
typedef struct zmoe_kv_cache {
  void *keys, *values;   /* aligned as floats are */
  uint32_t blocks, bits; /* bits: 8, or 0 for elements of `dtype` */
} zmoe_kv_cache;

/* Bytes of a head's keys, or of its values, in one block; 0 for other dtypes and `bits`. */
size_t zmoe_kv_head_bytes(uint32_t head_dim, zmoe_dtype dtype, uint32_t bits);

/* Consecutive rows of one sequence, the first at `position`.  Position p of the sequence is
 * in block blocks[p / 64] of the cache.  Where layers are recurrent, `state_before` is what they
 * keep of the rows before, NULL at the beginning, and `state_after` other memory for what they keep
 * then: each layer has a part of it, aligned as floats are. */
typedef struct zmoe_span {
  const uint32_t *blocks;
  uint32_t n_blocks, rows, position;
  const unsigned char *state_before;
  unsigned char *state_after;
} zmoe_span;

/* h (rows of all spans in order, width) f32 += attention of norm(h), causal within each
 * sequence; writes the rows' keys and values at their positions.  cosines and sines (positions,
 * rope_dims / 2) are by position, times the factor of scaled rotations where there is one;
 * unused without rope_dims.  A row's result depends on its own sequence's keys alone: neither
 * on other rows nor on threads.  ZMOE_EINVAL for a span beyond its blocks or a block beyond
 * the cache. */
int zmoe_attention_step(zmoe_thread_pool *pool, const zmoe_attention *attention,
                        const zmoe_kv_cache *cache, const zmoe_span *spans, uint32_t n_spans,
                        const float *cosines, const float *sines, float *h,
                        zmoe_precision precision);
/* Working memory of it, on that many threads. */
size_t zmoe_attention_scratch(const zmoe_attention *attention, uint32_t threads);

/* ---- latent attention --------------------------------------------------------------- */

/* Keys and values of all heads are made of one vector per position, the latent; beside it,
 * all heads share one rotated part of their keys.  A head's matrices are applied to its query
 * and to its sum of latents, so that latents are used as the cache has them. */
typedef struct zmoe_latent_attention {
  zmoe_norm input;                /* of h */
  const zmoe_weight *query_down;  /* width -> what `query` takes; NULL: it takes norm(h) */
  zmoe_norm query_norm;           /* of what query_down gives */
  const zmoe_weight *query;       /* -> heads * (key_dim + rope_dims) */
  const zmoe_weight *down;        /* width -> latent_dim + rope_dims: latent, shared part */
  zmoe_norm latent_norm;          /* of the latent */
  const zmoe_weight *key_heads;   /* [heads]: key_dim -> latent_dim */
  const zmoe_weight *value_heads; /* [heads]: latent_dim -> value_dim */
  const zmoe_weight *output;      /* heads * value_dim -> width */
  uint32_t heads;
  uint32_t latent_dim, rope_dims; /* together at most ZMOE_MAX_HEAD_DIM; rope_dims: even */
  uint32_t key_dim, value_dim;
  float scale; /* these, and the rest, as in zmoe_attention */
  uint32_t rope_traditional, window, keep, dtype;
} zmoe_latent_attention;

/* The same as zmoe_attention_step. The cache has `keys` alone, (blocks, 64, latent_dim +
 * rope_dims) of `dtype`, and `bits` of 0. */
int zmoe_latent_attention_step(zmoe_thread_pool *pool, const zmoe_latent_attention *attention,
                               const zmoe_kv_cache *cache, const zmoe_span *spans, uint32_t n_spans,
                               const float *cosines, const float *sines, float *h,
                               zmoe_precision precision);
size_t zmoe_latent_attention_scratch(const zmoe_latent_attention *attention, uint32_t threads);

/* ---- gated delta nets ------------------------------------------------------------------ */

typedef enum zmoe_delta_part {
  ZMOE_DELTA_QUERIES = 0, /* (key_dim) of each head of keys */
  ZMOE_DELTA_KEYS = 1,    /* likewise */
  ZMOE_DELTA_VALUES = 2,  /* (value_heads / key_heads, value_dim) */
  ZMOE_DELTA_GATES = 3,   /* likewise */
  ZMOE_DELTA_B = 4,       /* (value_heads / key_heads): how much of a value is taken in */
  ZMOE_DELTA_A = 5,       /* likewise: how much decays */
  ZMOE_DELTA_PARTS = 6
} zmoe_delta_part;

/* Some elements of what a projection gives: those of head h begin at `at` + h * `stride`. */
typedef struct zmoe_slices {
  uint32_t projection, at, stride;
} zmoe_slices;

/* A gated delta net (Yang et al., 2024).  Between its projections: a causal convolution over rows
 * for each channel, SiLU, queries and keys of length 1, and for each head of values a state
 * (value_dim, key_dim) that decays, and takes what is new in a value at its key. */
typedef struct zmoe_delta_net {
  zmoe_norm input; /* of h, before the projections */
  const zmoe_weight *projections;
  uint32_t n_projections;
  const zmoe_weight *output;       /* value_heads * value_dim -> width */
  const zmoe_slices *parts;        /* [ZMOE_DELTA_PARTS] */
  uint32_t key_heads, value_heads; /* the latter a multiple of the former */
  uint32_t key_dim, value_dim, taps;
  const float *conv;           /* (taps, channels): all queries, all keys, all values */
  const float *decay, *offset; /* (value_heads): what the `a` of a row is made a decay with */
  zmoe_norm norm;              /* of a head's result, before its gate */
  size_t state_at; /* the first of the zmoe_delta_state_bytes of it in a sequence's state */
  uint32_t dtype;  /* zmoe_dtype of what goes into matmuls, and of the rows that are kept */
} zmoe_delta_net;

/* h (rows of all spans in order, width) f32 += net(norm(h)), from the spans' states before to those
 * after.  A row's result depends on its own sequence's earlier rows alone.  ZMOE_EINVAL for a span
 * without rows, or without a state after them. */
int zmoe_delta_step(zmoe_thread_pool *pool, const zmoe_delta_net *net, const zmoe_span *spans,
                    uint32_t n_spans, float *h, zmoe_precision precision);
size_t zmoe_delta_scratch(const zmoe_delta_net *net, uint32_t threads);
/* What a sequence keeps of its rows for this layer, a multiple of 64. */
size_t zmoe_delta_state_bytes(const zmoe_delta_net *net);

/* ---- router ---------------------------------------------------------------------- */

typedef enum zmoe_route_kind {
  ZMOE_SOFTMAX_TOP_K = 0, /* probabilities over all experts, of which the k best */
  ZMOE_TOP_K_SOFTMAX = 1, /* probabilities over the k best alone */
  ZMOE_SIGMOID_TOP_K = 2, /* each expert's logistic function, of which the k best */
} zmoe_route_kind;

#define ZMOE_MAX_GROUPS 256

typedef struct zmoe_router {
  zmoe_norm input;         /* of h */
  const zmoe_weight *gate; /* width -> experts */
  uint32_t kind;           /* zmoe_route_kind */
  uint32_t top_k;
  uint32_t normalize; /* 1: a row's weights are divided by their sum */
  const float *bias;  /* (experts): more for the choice, but not for the weights; or NULL */
  /* Experts in `groups` equal groups of two or more, at most ZMOE_MAX_GROUPS; 0: none.  All but
   * the `kept` ones with the best two experts are chosen from as if their scores were 0. */
  uint32_t groups, kept;
  float scale; /* of the weights; 0: 1 */
} zmoe_router;

/* x (rows, width) of `x_dtype` = norm(h); ids, weights (rows, top_k): the experts of
 * each row, best first (the lower id where two are equal), and their weights. */
int zmoe_route(zmoe_thread_pool *pool, const zmoe_router *router, const float *h, uint32_t rows,
               void *x, zmoe_dtype x_dtype, int32_t *ids, float *weights);
size_t zmoe_route_scratch(const zmoe_router *router);

/* Pairs (row, expert), ordered by row; room for rows * top_k of each. */
typedef struct zmoe_pairs {
  int32_t *rows, *experts; /* experts as this node numbers its own */
  float *weights;
  uint32_t count;
  uint64_t digest; /* of the whole routing, whatever the order within a row */
} zmoe_pairs;

/* Of ids and weights (rows, top_k) the pairs whose expert is in `local` (experts):
 * this node's number of each expert, -1 for another's.  Of an expert with several
 * owners only the pairs of `rank` by `ranks` (rows, top_k), where it is not NULL:
 * what zmoe_assign said.  `sorted` (rows, top_k) is working memory. */
void zmoe_own_pairs(const int32_t *ids, const float *weights, uint32_t rows, uint32_t top_k,
                    const int32_t *local, uint32_t experts, const uint64_t *ranks, uint32_t rank,
                    int32_t *sorted, zmoe_pairs *out);

/* ---- feed-forward networks ------------------------------------------------------------ */

/* A dense network, or a shared expert: an expert to which every row goes. */
typedef struct zmoe_mlp {
  zmoe_norm input;                 /* of h */
  const zmoe_expert_layer *expert; /* of one expert */
  const zmoe_router *weight;       /* of one expert: its weight multiplies the output; or NULL */
  uint32_t dtype;                  /* zmoe_dtype of what goes into matmuls */
} zmoe_mlp;

/* out (rows, width) = mlp(norm(h)), f32; not in place. */
int zmoe_mlp_output(zmoe_thread_pool *pool, const zmoe_mlp *mlp, const float *h, uint32_t rows,
                    float *out, zmoe_precision precision);
size_t zmoe_mlp_scratch(const zmoe_mlp *mlp);

/* A router with what this node owns of its experts. */
typedef struct zmoe_moe {
  const zmoe_router *router;
  const zmoe_expert_layer *experts; /* this node's own */
  const int32_t *local;             /* (n_experts): see zmoe_own_pairs */
  uint32_t n_experts;
  const zmoe_mlp *shared; /* what is added beside the experts; or NULL */
  uint32_t dtype;         /* zmoe_dtype of what goes into the experts */
} zmoe_moe;

/* A routing of some rows, in memory of the caller. */
typedef struct zmoe_routing {
  void *x;      /* (rows, width) of the zmoe_moe's dtype = norm(h) */
  int32_t *ids; /* (rows, top_k), as are the next two: see zmoe_route */
  float *weights;
  int32_t *sorted;   /* working memory */
  zmoe_pairs *pairs; /* this node's own */
  float *sum;        /* (rows, width): the pairs' weighted outputs; what no pair adds to is 0 */
} zmoe_routing;

/* How far the last sublayer of a chain goes, if it is a zmoe_moe. */
typedef enum zmoe_extent {
  ZMOE_EXTENT_ROUTE = 0, /* x, ids and weights of the routing */
  ZMOE_EXTENT_PAIRS = 1, /* and its pairs */
  ZMOE_EXTENT_SUM = 2,   /* and their sum */
  ZMOE_EXTENT_ALL = 3,   /* all is added to h, and the routing is not used */
} zmoe_extent;

/* ---- chains ----------------------------------------------------------------------- */

/* Angles by position: (positions, rope_dims / 2) each; see zmoe_attention_step. */
typedef struct zmoe_rope {
  const float *cosines, *sines;
  uint32_t positions;
} zmoe_rope;

/* A part of a decoder layer, h += part(norm(h)): one of the first five, the others being NULL. */
typedef struct zmoe_sublayer {
  const zmoe_attention *attention;
  const zmoe_latent_attention *latent;
  const zmoe_delta_net *delta;
  const zmoe_mlp *mlp;
  const zmoe_moe *moe;
  const zmoe_kv_cache *cache; /* of either attention */
  const zmoe_rope *rope;
} zmoe_sublayer;

/* Runs `count` sublayers one after the other on h (rows, width) f32, the rows being those of the
 * spans where there is attention or a delta net.  `experts_ns` grows by the nanoseconds that routed
 * experts took.  ZMOE_EINVAL for what any sublayer refuses, for spans of other rows and for angles
 * of too few positions: h is then what the sublayers before have made of it. */
int zmoe_chain(zmoe_thread_pool *pool, const zmoe_sublayer *sublayers, uint32_t count,
               const zmoe_span *spans, uint32_t n_spans, float *h, uint32_t rows,
               zmoe_extent extent, zmoe_routing *routing, uint64_t *experts_ns,
               zmoe_precision precision);
size_t zmoe_moe_scratch(const zmoe_moe *moe);

#endif
