"""Compare tiny random models of ten families with mlx-lm on this machine's device.

    python tools/check_families.py [--small]

Each is computed by MLX on one node and on two, plain and with 4 bits, and is fed mlx-lm's greedy
tokens. In float32 each step's logits, and the best of them, have to be mlx-lm's within a tolerance.
In bfloat16 random models often have two experts that are as good, of which sums in another order
make the router choose the other: there half of the steps have to be. Exits with 1 if any is not.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.families import build
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec, PlacementRequest
from zmoe.config import EngineConfig
from zmoe.errors import ZmoeError

PROMPT = [(7 * i + 3) % 90 for i in range(20)]
TOKENS = 8
WIDE = {"moe_intermediate_size": 256}
LATENT = {"qk_nope_head_dim": 32, "v_head_dim": 32}  # a group of weights with 4 bits
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": WIDE,
    "gpt_oss": {"intermediate_size": 256},
    "qwen2_moe": WIDE,
    "deepseek_v2": WIDE,
    "deepseek_v3": WIDE | LATENT,
    "glm4_moe": WIDE,
    "dots1": WIDE,
    "mixtral": {"intermediate_size": 256},
    "longcat_flash": {"expert_ffn_hidden_size": 256} | LATENT,
    "nemotron_h": WIDE,
}
SMALL = 2  # families of --small
BITS4 = ("affine", 4, 32)
TOLERANCES = {True: 1e-4, False: 5e-2}  # of the largest logit, by whether it is exact

Logits = list[np.ndarray]


def reference(folder: Path) -> tuple[list[int], Logits]:
    """Greedy tokens of mlx-lm, and the logits (vocabulary,) of each step."""
    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    tokens, logits, todo = [], [], PROMPT
    for _ in range(TOKENS):
        row = model(mx.array([todo]), cache=cache)[0, -1]
        logits.append(np.array(row.astype(mx.float32)))
        tokens.append(int(logits[-1].argmax()))
        todo = tokens[-1:]
    return tokens, logits


def on_nodes(folder: Path, nodes: int, tokens: list[int]) -> tuple[Logits, str]:
    """Logits of each step when fed `tokens`, and how the nodes compute. Raises ZmoeError."""
    placement = PlacementRequest("slices" if nodes > 1 else "auto")
    spec = ClusterSpec(nodes, engine=EngineConfig(compute="mlx"), placement=placement)
    with Cluster(folder, spec=spec) as cluster:
        how = f"evaluated ({'; '.join(cluster.notices)})" if cluster.notices else "in the graph"
        step, todo, found = cluster.begin(), PROMPT, []
        for token in tokens:
            found.append(step(todo, False))
            todo = [token]
    return found, how


def compared(found: Logits, wanted: Logits, *, exact: bool) -> tuple[bool, str]:
    """Whether the steps agree, and by how much of the largest logit they differ."""
    scale = max(float(np.abs(row).max()) for row in wanted)
    differences = [float(np.abs(a - b).max()) / scale for a, b in zip(found, wanted)]
    ties = [float(b.max() - b[a.argmax()]) / scale for a, b in zip(found, wanted)]
    same = sum(tie == 0 for tie in ties)
    of_all = max if exact else statistics.median
    off = of_all([max(pair) for pair in zip(differences, ties)])
    words = f"logits differ by {of_all(differences):.1e}{'' if exact else ' in the median'}"
    return off <= TOLERANCES[exact], f"{same} of {len(ties)} tokens the same, {words}"


def cases(small: bool, plain: str) -> Iterator[tuple[str, str, tuple[str, int, int] | None]]:
    """Family, dtype and quantisation."""
    for family in list(FAMILIES)[: SMALL if small else None]:
        yield family, plain, None
        yield family, "bfloat16", BITS4
        yield family, "float32", BITS4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help=f"{SMALL} families only")
    options = parser.parse_args()
    # MLX's gathering matmuls take no plain bfloat16 on a CPU.
    plain = "float32" if mx.default_device() == mx.Device(mx.cpu) else "bfloat16"
    tokenizer, failed = resolve_model("zmoe-tiny"), 0
    for family, dtype, quantize in cases(options.small, plain):
        with tempfile.TemporaryDirectory() as place:
            folder = build(
                family, Path(place), dtype, quantize, vocab_size=1024, **FAMILIES[family]
            )
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tokenizer / name, folder)
            tokens, wanted = reference(folder)
            for nodes in (1, 2):
                try:
                    found, how = on_nodes(folder, nodes, tokens)
                    good, words = compared(found, wanted, exact=dtype == "float32")
                except ZmoeError as error:
                    good, how, words = False, "failed", str(error)
                failed += not good
                of = f"{family}, {dtype}{' and 4 bits' if quantize else ''}, nodes: {nodes}"
                print(f"{'ok' if good else 'FAILED'}: {of}, {how}: {words}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
