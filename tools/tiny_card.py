"""The model card: measures a trained model and fills in the template."""

from __future__ import annotations

import math

from tiny_data import Split, encode
from tiny_eval import Loss, Usage, complete, measure_loss, measure_usage
from tiny_model import TinyModel
from tiny_recipe import Stage
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
it. But it did choose: the settings, among a dozen runs (most of them short), and the step whose
weights are stored. There is no third split, so the figures below are somewhat optimistic.

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
Shares of the (token, expert) pairs on held-out text, windows of 256; even would be
{even:.2%} each. Entropy is that of the shares, divided by that of even shares.

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


def describe_training(stages: list[Stage]) -> str:
    """One column a stage; what the stages share is said below the table."""
    recipes = [stage.recipe for stage in stages]
    header = ["stage", *(str(number + 1) for number in range(len(stages)))]
    rows = [
        ["window (tokens)", *(str(r.context) for r in recipes)],
        ["tokens in a step", *(str(r.batch_tokens) for r in recipes)],
        ["steps", *(str(r.steps) for r in recipes)],
        ["best step", *(str(stage.best_step) for stage in stages)],
        ["peak learning rate", *(f"{r.learning_rate:g}" for r in recipes)],
        ["warm-up steps", *(str(r.warmup_steps) for r in recipes)],
        ["dropout", *(f"{r.dropout:g}" for r in recipes)],
        ["weight of the repetition loss", *(f"{r.repetition_weight:g}" for r in recipes)],
        ["BPE dropout", *(f"{r.bpe_dropout:g}" for r in recipes)],
    ]
    last = recipes[-1]
    notes = [
        f"AdamW (betas 0.9 and 0.98, weight decay {last.weight_decay:g} on matrices), gradients "
        "clipped at norm 1; after the warm-up a cosine to a hundredth of the peak.",
        "Windows at random places. A stage starts from the previous one's best weights, by "
        "held-out loss at its own window length; the last one teaches long contexts.",
        "Dropout on embeddings and on what a block adds; BPE dropout (other spellings of the same "
        f"words) against overfitting, but not in the last {last.plain_share:.0%} of the steps.",
        f"Load-balancing loss of the Switch Transformer, weight {last.balance_weight:g}; router "
        f"z-loss of ST-MoE, weight {last.z_weight:g}. No token is dropped.",
        "Repetition loss: DITTO (Xu et al. 2022), against loops in greedy text.",
        f"PyTorch on a CPU, seed {last.seed}: `tools/train_tiny.py`.",
    ]
    notes += [stage.note for stage in stages if stage.note]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


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


def model_card(model: TinyModel, tokenizer: Tokenizer, split: Split, stages: list[Stage]) -> str:
    """The text of `README.md`, with every figure measured on the given model."""
    config = model.config
    ids = encode(tokenizer, split.held_out)
    held_characters = len(split.held_out)
    contexts = sorted({256, 512, config.max_seq_len})
    return TEMPLATE.format(
        architecture=describe_architecture(model),
        characters=len(split.train) + held_characters,
        held_characters=held_characters,
        vocabulary=config.vocab_size,
        chars_per_token=held_characters / ids.numel(),
        training=describe_training(stages),
        losses=loss_table([measure_loss(model, ids, n, held_characters) for n in contexts]),
        uniform=math.log(config.vocab_size),
        even=1 / config.moe_num_experts,
        usages=usage_table(measure_usage(model, ids, 256)),
        samples=sample_texts(model, tokenizer),
        max_seq_len=config.max_seq_len,
    )
