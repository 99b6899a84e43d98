"""A request's tokens do not depend on its neighbours: the same bits alone and among others.

Every family whose layers are in C, in every format, on every instruction set of this CPU, on 1
to 4 nodes; the other settings take turns.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.batches import FEW_BLOCKS, PARALLEL, asks, thread_nodes
from tests.families import FAMILIES, build
from zmoe.native import Isa

C_FAMILIES = ("dbrx", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe")
FORMATS: list[tuple[str, tuple[str, int, int] | None]] = [
    ("float32", None),
    ("bfloat16", ("affine", 4, 32)),
    ("bfloat16", None),
    ("float32", ("mxfp4", 4, 32)),
    ("float16", None),
    ("bfloat16", ("affine", 8, 64)),
    ("bfloat16", ("mxfp4", 4, 32)),
    ("float32", ("affine", 4, 64)),
]
ISAS = [isa.name for isa in Isa if isa.supported]
CASES = range(len(C_FAMILIES) * len(ISAS))


def settings_of(case: int) -> tuple[str, tuple[Any, ...], str, int, dict[str, str]]:
    """(family, format, instruction set, nodes, other settings): cycles of unlike lengths."""
    turn, number = divmod(case, len(C_FAMILIES))
    dtype, quantize = FORMATS[(number + 3 * turn) % len(FORMATS)]
    nodes = (1, 2, 3, 4)[(case + turn) % 4]
    wires = ["auto", "bf16", "q8", "f32"] + ["f16"] * (dtype == "float16")
    others = {
        "schedule": ("decentralized", "centralized")[(case // 2 + number) % 2],
        "placement": ("experts", "slices", "replicas")[case % 3],
        "wire_dtype": wires[case % len(wires)],
        "policy": ("selected", "busy-full", "router-aided")[(case // 3) % 3],
        "activations": "int8" if case % 5 == 4 and ISAS[turn] != "GENERIC" else "exact",
    }
    return C_FAMILIES[number], (dtype, quantize), ISAS[turn], nodes, others


def described(case: int) -> str:
    family, (dtype, quantize), isa, nodes, others = settings_of(case)
    return "-".join(map(str, (family, dtype, *(quantize or ()), isa, nodes, *others.values())))


@pytest.mark.parametrize("case", CASES, ids=described)
def test_a_request_is_served_as_if_it_were_alone(case: int, tmp_path: Path) -> None:
    family, (dtype, quantize), isa, nodes, others = settings_of(case)
    config: dict[str, Any] = {"intermediate_size": 64 * nodes, "moe_intermediate_size": 64 * nodes}
    if family == "dbrx":
        config = {
            "ffn_config": FAMILIES["dbrx"].config["ffn_config"] | {"ffn_hidden_size": 64 * nodes}
        }
    folder = build(family, tmp_path / family, dtype, quantize, **config)
    given = asks()
    with thread_nodes(folder, nodes, isa=isa, threads=1 + (nodes == 1), **others) as cluster:
        alone = [cluster.alone(ask) for ask in given]
        assert len({ids for text in alone for ids, _ in text}) > 50, "the texts say little"
        chunk = (1, 5, 16, 33)[case % 4]
        assert [cluster.alone(ask, chunk) for ask in given[:4]] == alone[:4]
        together = cluster.serve(given)
        assert together.most == PARALLEL
        assert together.given == alone
        arrivals = cluster.serve(
            given,
            chunk=(33, 50, 64, 200)[case % 4],
            blocks=FEW_BLOCKS,
            speculate="3",
            arrivals=random.Random(case),
        )
        assert arrivals.preemptions and arrivals.cached and arrivals.accepted
        assert arrivals.given == alone
