"""A request's tokens do not depend on its neighbours: the same bits alone and among others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.batches import FEW_BLOCKS, PARALLEL, asks, thread_nodes
from tests.families import FAMILIES, build
from zmoe.kernels.threads import best_isa_name
from zmoe.native import Isa

FORMATS: dict[str, tuple[str, tuple[str, int, int] | None]] = {
    "f32": ("float32", None),
    "f32 4-bit": ("float32", ("affine", 4, 64)),
    "f32 mxfp4": ("float32", ("mxfp4", 4, 32)),
    "f16": ("float16", None),
    "bf16": ("bfloat16", None),
    "bf16 4-bit": ("bfloat16", ("affine", 4, 32)),
    "bf16 8-bit": ("bfloat16", ("affine", 8, 64)),
    "bf16 mxfp4": ("bfloat16", ("mxfp4", 4, 32)),
}


class Case(NamedTuple):
    """A model and the nodes that serve it. A CPU without the instruction set uses its best one."""

    family: str
    format: str
    isa: str
    nodes: int = 1
    schedule: str = "decentralized"
    placement: str = "experts"
    wire_dtype: str = "auto"
    policy: str = "selected"
    activations: str = "exact"


# Every kind of layer in C, and most of the pairs that the other columns can form.
CASES = [
    Case("gpt_oss", "f16", "GENERIC"),
    Case("olmoe", "bf16 8-bit", "GENERIC"),
    Case("glm4_moe", "f32", "AVX2"),
    Case("deepseek_v3", "bf16 4-bit", "AVX512"),
    Case("minimax", "f32", "AVX512"),
    Case("qwen2_moe", "bf16 4-bit", "AVX512", activations="int8"),
    Case("dbrx", "f32", "AVX512_BF16"),
    Case("qwen3_moe", "bf16", "AVX512_BF16"),
    Case("dbrx", "bf16 8-bit", "AVX512_BF16", 2, "centralized", "replicas", "auto", "router-aided"),
    Case("gpt_oss", "bf16 4-bit", "AVX2", 4, "decentralized", "replicas", "bf16"),
    Case("mixtral", "f32", "GENERIC", 2, "decentralized", "slices", "f32", "busy-full"),
    Case("olmoe", "f16", "AVX512", 3, "centralized", "slices", "q8"),
    Case("qwen2_moe", "bf16", "AVX2", 3, "centralized", "experts", "f32", "router-aided"),
    Case("minimax", "f32 mxfp4", "AVX2", 4, "centralized", "slices", "bf16", "router-aided"),
    Case("dbrx", "bf16 mxfp4", "AVX512", 3, "decentralized", "replicas", "q8", "busy-full"),
    Case("gpt_oss", "bf16 mxfp4", "AVX512_BF16", 2, "centralized", "experts", "f32"),
    Case("mixtral", "bf16 4-bit", "AVX512_BF16", 3, "centralized", "experts", "bf16", "busy-full"),
    Case("qwen3_moe", "f32 4-bit", "AVX2", 2, "centralized", "slices", "q8", activations="int8"),
    Case("glm4_moe", "bf16", "AVX512", 2, "decentralized", "replicas", "bf16"),
    Case("deepseek_v3", "f32", "AVX2", 3, "decentralized", "replicas", "q8"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_request_is_served_as_if_it_were_alone(case: Case, tmp_path: Path) -> None:
    """In whichever chunks, beside whomever, preempted or not, with its prefix cached or not.

    On several nodes every fifth one is run alone, which are of each kind; all are among others.
    """
    turn, wide = CASES.index(case), 64 * case.nodes
    config: dict[str, Any] = {"intermediate_size": wide, "moe_intermediate_size": wide}
    if case.family == "dbrx":
        ffn = FAMILIES["dbrx"].config["ffn_config"]
        config = {"ffn_config": {**ffn, "ffn_hidden_size": wide}}
    folder = build(case.family, tmp_path / case.family, *FORMATS[case.format], **config)
    isa = case.isa if Isa[case.isa].supported else best_isa_name()
    given, each = asks(), 1 if case.nodes == 1 else 5
    with thread_nodes(folder, isa, *case[3:]) as cluster:
        alone = [cluster.alone(ask) for ask in given[::each]]
        chunk = (1, 5, 16, 33)[turn % 4]
        assert [cluster.alone(ask, chunk) for ask in given[::each][:3]] == alone[:3]
        together = cluster.serve(given)
        assert together.most == PARALLEL
        assert together.given[::each] == alone
        texts = together.given
        assert len({token for text in texts for token, _ in text}) > 50, "the texts say little"
        arriving = cluster.serve(
            given,
            chunk=(33, 50, 64, 200)[turn % 4],
            blocks=FEW_BLOCKS,
            speculate="3",
            arrivals=random.Random(turn),
        )
        assert arriving.preemptions and arriving.cached and arriving.accepted
        assert arriving.given == texts
