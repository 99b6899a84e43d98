"""The model card: measures a trained model and fills in the template."""

from __future__ import annotations

import math

from tiny_data import Split, encode
from tiny_eval import Loss, Usage, complete, measure_loss, measure_usage
from tiny_model import TinyConfig, TinyModel
from tiny_recipe import Recipe
from tokenizers import Tokenizer

SAMPLES = (("ROMEO:", 0.0), ("ROMEO:", 0.8), ("First Citizen:", 0.8))  # prompt, temperature

TEMPLATE = """\
---
license: cc0-1.0
language: en
pipeline_tag: text-generation
---
# zmoe-tiny

A real, if very small, Mixture-of-Experts language model in the DBRX architecture. It is here so
that expert parallelism can be run, tested and explained without a download: its router was trained,
its experts differ, and its text shows at a glance whether a change broke the arithmetic.

## Architecture
{architecture}

Tensor names and layouts are those of the checkpoints published as DBRX, in float32: a layer's
experts are stacked in `transformer.blocks.N.ffn.experts.mlp.w1`, `v1` and `w2`. No bias anywhere;
embeddings and output head are not tied. The router is a softmax over all experts; the weights of
the chosen ones are divided by their sum.

## Data and licence
"Tiny Shakespeare": {characters:,} characters of Shakespeare's plays, which are in the public
domain; the weights are offered under CC0 as well. The last tenth of the file
({held_characters:,} characters) is held out: neither the weights nor the tokenizer were fitted to
it. The stored weights are those of the evaluation with the least held-out loss, so the figures
below are slightly optimistic.

## Tokenizer
Byte-level BPE, {vocabulary} entries: 256 bytes, merges learnt on the training text only, and
`<|endoftext|>`. Any UTF-8 text round-trips; {chars_per_token:.2f} characters a token on held-out
text. `<|endoftext|>` never occurs in the training text, so the model does not end by itself: give a
maximum number of tokens. No chat template: it continues text.

## Training
{training}

## Held-out loss
Consecutive windows, each token scored once, no context carried from one window to the next. The
text is ASCII: bits a character are bits a byte.

{losses}

A uniform guess is {uniform:.2f} nats/token.

## Router usage
Shares of the (token, expert) pairs on held-out text; even would be {even:.2%} each. Entropy is that
of the shares, divided by that of even shares.

{usages}

## Samples
{samples}

## Limits
It has seen one megabyte of verse. It writes speaker names, verse lines and mostly real words; it
has no knowledge, no plot, and no memory beyond a few lines. Greedy text repeats itself sooner or
later. Trained up to {max_seq_len} positions; beyond that nothing is promised. Not for any use but
testing, teaching and measuring software.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_architecture(model: TinyModel) -> str:
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    expert = 3 * config.d_model * config.ffn_hidden_size
    idle = config.n_layers * (config.moe_num_experts - config.moe_top_k) * expert
    return table(
        ["", ""],
        [
            ["parameters", f"{total:,}, of which {total - idle:,} are used for a token"],
            ["layers", str(config.n_layers)],
            ["width", str(config.d_model)],
            [
                "attention",
                f"{config.n_heads} query heads and {config.kv_n_heads} key/value heads of "
                f"{config.head_dim}, rotary base {config.rope_theta:g}, QKV clipped at "
                f"{config.clip_qkv:g}",
            ],
            [
                "experts",
                f"{config.moe_num_experts} a layer, {config.moe_top_k} a token, SwiGLU of width "
                f"{config.ffn_hidden_size}",
            ],
            ["positions", str(config.max_seq_len)],
        ],
    )


def describe_training(config: TinyConfig, recipe: Recipe, step: int) -> str:
    facts = [
        f"{recipe.steps} steps of {recipe.batch_tokens} tokens; the weights are from step {step}.",
        f"AdamW (betas 0.9 and 0.98, weight decay {recipe.weight_decay:g} on matrices), gradients "
        "clipped at norm 1.",
        f"Learning rate {recipe.learning_rate:g}, {recipe.warmup_steps} steps of warm-up, then a "
        "cosine to a hundredth.",
        f"Windows of {recipe.context} tokens at random places, and of {config.max_seq_len} in the "
        f"last {recipe.long_share:.0%} of the steps, so that long contexts work.",
        f"Dropout {config.dropout:g} on embeddings and on what a block adds.",
        f"Load-balancing loss of the Switch Transformer, weight {recipe.balance_weight:g}; router "
        f"z-loss of ST-MoE, weight {recipe.z_weight:g}. No token is dropped.",
        f"PyTorch on a CPU, seed {recipe.seed}: `tools/train_tiny.py`.",
    ]
    if recipe.bpe_dropout:
        text = (
            f"BPE dropout {recipe.bpe_dropout:g} against overfitting, none in the last "
            f"{recipe.plain_share:.0%} of the steps."
        )
        facts.insert(5, text)
    return "\n".join(f"- {fact}" for fact in facts)


def loss_table(losses: list[Loss]) -> str:
    header = ["window (tokens)", "nats/token", "perplexity", "bits/character"]
    rows = [
        [str(x.context), f"{x.nats_per_token:.4f}", f"{x.perplexity:.2f}", f"{x.bits_per_char:.4f}"]
        for x in losses
    ]
    return table(header, rows)


def usage_table(usages: list[Usage]) -> str:
    header = ["layer", "least used", "most used", "entropy"]
    rows = [
        [str(x.layer), f"{x.min_share:.2%}", f"{x.max_share:.2%}", f"{x.relative_entropy:.4f}"]
        for x in usages
    ]
    return table(header, rows)


def sample_texts(model: TinyModel, tokenizer: Tokenizer) -> str:
    parts = []
    for seed, (prompt, temperature) in enumerate(SAMPLES):
        text = complete(model, tokenizer, prompt, 100, temperature, seed)
        how = f"temperature {temperature:g}" if temperature else "greedy"
        parts.append(f"`{prompt}`, {how}, 100 tokens:\n```text\n{text}\n```")
    return "\n\n".join(parts)


def model_card(
    model: TinyModel, tokenizer: Tokenizer, split: Split, recipe: Recipe, step: int
) -> str:
    """The text of `README.md`, with every figure measured on the given model."""
    config = model.config
    ids = encode(tokenizer, split.held_out)
    held_characters = len(split.held_out)
    contexts = sorted({recipe.context, 512, config.max_seq_len})
    return TEMPLATE.format(
        architecture=describe_architecture(model),
        characters=len(split.train) + held_characters,
        held_characters=held_characters,
        vocabulary=config.vocab_size,
        chars_per_token=held_characters / ids.numel(),
        training=describe_training(config, recipe, step),
        losses=loss_table([measure_loss(model, ids, n, held_characters) for n in contexts]),
        uniform=math.log(config.vocab_size),
        even=1 / config.moe_num_experts,
        usages=usage_table(measure_usage(model, ids, recipe.context)),
        samples=sample_texts(model, tokenizer),
        max_seq_len=config.max_seq_len,
    )
