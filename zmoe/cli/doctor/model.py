"""The embedded model, cut to slices as large ones are, and what mlx-lm makes of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from zmoe.checkpoint.hub import resolve_model
from zmoe.config import DEFAULT_MODEL

PROMPT = "ROMEO:"
TOKENS = 24
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_wide(folder: Path) -> None:
    """Write the embedded model into `folder`, its experts twice as wide.

    They are padded with zeros, which change no output: as they are, 64 wide, they are one slice.
    """
    import mlx.core as mx

    source = resolve_model(DEFAULT_MODEL)
    config = json.loads((source / "config.json").read_text())
    experts, width = (config["ffn_config"][n] for n in ("moe_num_experts", "ffn_hidden_size"))
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    for name, weight in weights.items():
        if ".experts.mlp." in name:
            each = weight.reshape(experts, width, -1)
            padded = mx.pad(each, [(0, 0), (0, width), (0, 0)])
            weights[name] = padded.reshape(2 * experts * width, -1)
    config["ffn_config"]["ffn_hidden_size"] = 2 * width
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    for name in _TOKENIZER:
        shutil.copy(source / name, folder)


def main() -> int:
    """Write the model into the folder that is the argument; print mlx-lm's greedy tokens."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load

    folder = Path(sys.argv[1])
    write_wide(folder)
    model, tokenizer = load(str(folder))[:2]
    prompt = mx.array(tokenizer.encode(PROMPT))
    steps = generate_step(prompt, model, max_tokens=TOKENS)
    print(json.dumps([int(token) for token, _ in steps]))
    return 0
