"""Published layouts load to what mlx-lm makes of them, cut to the node's experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tests.families import EXPERTS, FAMILIES, build, random_model, save
from tests.families.layouts import deepseek_fp8_hf
from tests.ranks import Meeting, ThreadReducer
from zmoe.checkpoint.folder import read_tensors
from zmoe.loading import LoadedShard, Skeleton, describe, load_shard
from zmoe.obs import Spans
from zmoe.placement.types import Placement

HF = [name for name, family in FAMILIES.items() if family.to_hf is not None]
OWNED = ((0, 3, 5), (1, 2, 4))


def shard(folder: Path, rank: int = 0, owned: tuple[tuple[int, ...], ...] = OWNED) -> LoadedShard:
    info = describe(Skeleton(folder))
    placement = Placement(len(owned), EXPERTS, (owned,) * len(info.moe_layers))
    return load_shard(info, placement, ThreadReducer(rank, Meeting(len(owned))), spans=Spans())


def arrays(model: Any) -> dict[str, np.ndarray]:
    """Parameters by the names that mlx-lm gives them, with our wrappers' parts left out."""
    found = {}
    for name, array in tree_flatten(model.parameters()):
        bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        found[name.replace(".block.", ".")] = np.array(bits)
    return found


def stacked(reference: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """mlx-lm's DBRX keeps a list of experts; the same under the names of a switch layer."""
    names = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
    out: dict[str, Any] = {}
    for name, array in reference.items():
        head, found, tail = name.partition(".ffn.experts.")
        if not found:
            out[name] = array
            continue
        expert, projection, kind = tail.split(".")
        rows = out.setdefault(f"{head}.ffn.experts.{names[projection]}.{kind}", {})
        rows[int(expert)] = array
    return {
        name: np.stack([value[e] for e in sorted(value)]) if isinstance(value, dict) else value
        for name, value in out.items()
    }


def check_against_mlx(folder: Path, is_dbrx: bool = False) -> None:
    theirs = arrays(load_model(folder)[0])
    theirs = stacked(theirs) if is_dbrx else theirs
    for rank, ids in enumerate(OWNED):
        ours = arrays(shard(folder, rank).model)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            want = theirs[name]
            if array.shape != want.shape:
                assert want.shape[0] == EXPERTS, name
                want = want[list(ids)]
            np.testing.assert_array_equal(array, want, err_msg=name)


@pytest.mark.parametrize("family", HF)
def test_published_layouts(family: str, tmp_path: Path) -> None:
    check_against_mlx(build(family, tmp_path, layout="hf"), family == "dbrx")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["dbrx", "mixtral", "qwen3_moe"])
def test_half_precision_checkpoints(family: str, dtype: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path, dtype=dtype, layout="hf")
    assert describe(Skeleton(folder)).dtype == dtype
    check_against_mlx(folder, family == "dbrx")


@pytest.mark.parametrize("mode", [("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32)])
@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_quantised_checkpoints(mode: tuple[str, int, int], layout: str, tmp_path: Path) -> None:
    """With the experts stacked, and one by one as older conversions have them."""
    folder = build("mixtral", tmp_path, dtype="bfloat16", quantize=mode, layout=layout)
    check_against_mlx(folder)
    assert describe(Skeleton(folder)).quantization == f"{mode[0]}-{mode[1]}bit-g{mode[2]}"
    assert describe(Skeleton(folder)).dtype == "bfloat16"


def test_quantised_dbrx_as_mlx_lm_converts_it(tmp_path: Path) -> None:
    folder = build("dbrx", tmp_path, quantize=("affine", 4, 64))
    check_against_mlx(folder, is_dbrx=True)


def test_fp8_blocks_with_their_scales(tmp_path: Path) -> None:
    config = dict(FAMILIES["deepseek_v3"].config)
    weights = dict(tree_flatten(random_model(config).parameters()))
    check_against_mlx(save(tmp_path, config, deepseek_fp8_hf(weights, config)))


def test_what_mlx_lm_drops_is_not_read(tmp_path: Path) -> None:
    """A drafting layer with experts of its own, and an image encoder."""
    lean = shard(build("qwen3_5_moe", tmp_path / "lean"))
    config = FAMILIES["qwen3_5_moe"].config
    weights = dict(tree_flatten(random_model(config).parameters()))
    weights["vision_tower.blocks.0.mlp.fc1.weight"] = mx.zeros((64, 64))
    for expert in range(EXPERTS):
        weights[f"mtp.layers.0.mlp.experts.{expert}.up_proj.weight"] = mx.zeros((64, 64))
    weights["language_model.mtp.layers.1.mlp.experts.up_proj"] = mx.zeros((EXPERTS, 8, 8))
    laden = shard(save(tmp_path / "laden", config, weights))
    assert laden.bytes_read == lean.bytes_read == lean.share_bytes


@pytest.mark.parametrize("family", ["dbrx", "granitemoe", "llama4", "qwen3_5_moe", "qwen3_vl_moe"])
def test_slices_and_transposes_are_laid_out_anew(family: str, tmp_path: Path) -> None:
    """Products with strided weights would copy them at every token."""
    loaded = shard(build(family, tmp_path, layout="hf"))
    for name, array in tree_flatten(loaded.model.parameters()):
        assert memoryview(array).c_contiguous, name


@pytest.mark.parametrize("layout", ["mlx", "hf"])
@pytest.mark.parametrize("family", ["mixtral", "dbrx", "deepseek_v3", "gpt_oss"])
def test_bytes_read_are_those_of_the_share(family: str, layout: str, tmp_path: Path) -> None:
    """Counted anew, by name: a layer's own experts, and all that is not an expert's."""
    folder = build(family, tmp_path, layout=layout)
    for owned in (OWNED, ((), (0, 1, 2, 3, 4, 5)), ((2,), (0, 1, 3, 4, 5))):
        for rank, ids in enumerate(owned):
            want = 0
            for name, tensor in read_tensors(folder).items():
                parts = name.split(".")
                own = {str(e) for e in ids}
                if "experts" in parts and parts[parts.index("experts") + 1].isdecimal():
                    want += tensor.nbytes * (parts[parts.index("experts") + 1] in own)
                elif "experts" in parts or "switch_mlp" in parts:
                    want += tensor.nbytes * len(ids) // EXPERTS
                else:
                    want += tensor.nbytes
            assert shard(folder, rank, owned).bytes_read == want
