"""Writes a trained model as a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_card import model_card
from tiny_data import END_OF_TEXT, Split
from tiny_eval import generate, measure_loss
from tiny_model import TinyConfig, TinyModel
from tiny_recipe import Stage, write_record
from tokenizers import Tokenizer
from torch import Tensor

REFERENCE_TOKENS = 256
SCORED_TOKENS = 80 * REFERENCE_TOKENS + 1


def checkpoint_config(config: TinyConfig, end_of_text_id: int) -> dict[str, Any]:
    """`config.json` with the fields of the published DBRX."""
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "attn_config": {
            "attn_pdrop": 0.0,
            "clip_qkv": config.clip_qkv,
            "kv_n_heads": config.kv_n_heads,
            "rope_theta": config.rope_theta,
        },
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": config.ffn_hidden_size,
            "moe_jitter_eps": 0.0,
            "moe_loss_weight": 0.01,
            "moe_normalize_expert_weights": 1.0,
            "moe_num_experts": config.moe_num_experts,
            "moe_top_k": config.moe_top_k,
        },
        "emb_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
    }


def tokenizer_config(config: TinyConfig) -> dict[str, Any]:
    """`tokenizer_config.json`: no token is added to a prompt, and there is no chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": None,
        "add_prefix_space": False,
        # Tidying spaces before punctuation would break the round trip.
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_seq_len,
    }


def load_weights(model: TinyModel, folder: Path) -> None:
    """Take the weights of a checkpoint folder of the same sizes."""
    model.load_state_dict(load_file(folder / "model.safetensors"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_folder(
    folder: Path, model: TinyModel, tokenizer: Tokenizer, split: Split, stages: list[Stage]
) -> None:
    """Replace `folder`; it is written beside its place and moved in whole."""
    staging = folder.with_name(folder.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (end_of_text_id,) = tokenizer.encode(END_OF_TEXT).ids
    write_json(staging / "config.json", checkpoint_config(model.config, end_of_text_id))
    ends = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id}
    write_json(staging / "generation_config.json", ends)
    write_json(staging / "tokenizer_config.json", tokenizer_config(model.config))
    tokenizer.save(str(staging / "tokenizer.json"))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes it readable by its owner only; a package is read by anyone.
    (staging / "model.safetensors").chmod(0o644)
    write_record(staging, stages)
    card = model_card(model, tokenizer, split, stages)
    (staging / "README.md").write_text(card, encoding="utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.inference_mode()
def write_reference(path: Path, model: TinyModel, tokenizer: Tokenizer, held_out: Tensor) -> None:
    """What another implementation must reproduce; see `check_tiny.py`.

    ids (R,) and logits (R, V); prompt (P,) and greedy (64,), its continuation; scored (S,) and
    nats_per_token (), its loss in windows of `context` tokens.
    """
    model.eval()
    ids, scored = held_out[:REFERENCE_TOKENS], held_out[:SCORED_TOKENS]
    prompt = torch.tensor(tokenizer.encode("ROMEO:").ids)
    np.savez(
        path,
        ids=ids.numpy(),
        logits=model(ids[None])[0][0].numpy(),
        prompt=prompt.numpy(),
        greedy=generate(model, prompt, 64).numpy(),
        scored=scored.numpy(),
        context=REFERENCE_TOKENS,
        nats_per_token=measure_loss(model, scored, REFERENCE_TOKENS, 1).nats_per_token,
    )
