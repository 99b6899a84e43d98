"""What a folder is said to hold, without reading its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tests.families import EXPERTS, FAMILIES, build, save
from zmoe.errors import ModelError
from zmoe.families.sites import model_classes
from zmoe.loading import Skeleton, describe


def test_a_description_in_full(tmp_path: Path) -> None:
    info = describe(Skeleton(build("deepseek_v3", tmp_path, dtype="bfloat16")))
    assert info.path == str(tmp_path)
    assert info.model_type == "deepseek_v3"
    assert (info.dtype, info.quantization) == ("bfloat16", "none")
    assert (info.layers, info.moe_layers) == (3, (1, 2))
    assert (info.experts, info.top_k) == (EXPERTS, 3)
    assert (info.hidden_size, info.exchange_width) == (64, 64)
    assert (info.moe_intermediate_size, info.slice_alignment) == (64, 64)
    assert (info.expert_parameters, info.expert_bytes) == (3 * 64 * 64, 2 * 3 * 64 * 64)
    assert info.context_length == 512


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_described(family: str, tmp_path: Path) -> None:
    info = describe(Skeleton(build(family, tmp_path)))
    assert info.experts == EXPERTS and info.hidden_size == 64
    assert info.top_k == (1 if family == "llama4" else 3)
    assert 1 <= len(info.moe_layers) <= info.layers
    # Experts at a latent width put less on the wire.
    latent = family in ("nemotron_h", "kimi_k3")
    assert info.exchange_width == (32 if latent else 64)
    assert info.context_length == (None if family == "phixtral" else 512)
    assert (
        info.moe_intermediate_size == (256 if family == "phixtral" else 64)
        and info.slice_alignment == 64
    )
    model, _ = load_model(tmp_path, get_model_classes=model_classes)
    held: Any = tree_flatten(model.parameters())
    experts = info.expert_bytes * info.experts * len(info.moe_layers)
    assert info.dense_bytes + experts == sum(array.nbytes for _, array in held)


def test_more_experts_per_token_than_there_are(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path)
    config = folder / "config.json"
    for count in (0, EXPERTS + 1):
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"num_experts_per_tok": count})
        )
        said = f"{config}: num_experts_per_tok is {count}: expected 1 to {EXPERTS}"
        with pytest.raises(ModelError, match=said):
            describe(Skeleton(folder))


def test_a_config_without_the_number_of_experts_per_token(tmp_path: Path) -> None:
    """mlx-lm has a default for it, which may be another model's."""
    folder = build("mixtral", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["num_experts_per_tok"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json names no number of experts per token"):
        describe(Skeleton(folder))


def test_slices_are_of_whole_groups(tmp_path: Path) -> None:
    for mode, bits, group, scales in (
        ("affine", 4, 32, 64),  # bits of scale and bias for each group, as float32 here
        ("affine", 8, 64, 64),
        ("mxfp4", 4, 32, 8),
    ):
        folder = build("mixtral", tmp_path / f"{mode}{group}", quantize=(mode, bits, group))
        info = describe(Skeleton(folder))
        assert (info.moe_intermediate_size, info.slice_alignment) == (64, group)
        assert info.expert_bytes == 3 * 64 * 64 * (bits + scales / group) / 8


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by us nor by MLX, which would need memory for it."""
    folder = build("mixtral", tmp_path)
    monkeypatch.delattr(os, "preadv")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    describe(Skeleton(folder))
    assert mx.get_peak_memory() - before < 65536


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_the_activations_are_as_wide_as_the_norms(tmp_path: Path) -> None:
    """Embeddings in mxfp4 put out bfloat16, whatever the rest is."""
    mxfp4 = ("mxfp4", 4, 32)
    for dtype, want in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")):
        folder = build("mixtral", tmp_path / dtype, dtype=dtype, quantize=mxfp4)
        assert describe(Skeleton(folder)).dtype == want
        model, _ = load_model(folder)
        assert str(model(mx.array([[1]])).dtype).endswith(want)
    folder = build("mixtral", tmp_path / "affine", dtype="float16", quantize=("affine", 4, 64))
    assert describe(Skeleton(folder)).dtype == "float16"


def test_the_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    one = describe(Skeleton(build("mixtral", tmp_path / "one"))).fingerprint
    assert describe(Skeleton(build("mixtral", tmp_path / "two"))).fingerprint == one
    others = [
        build("mixtral", tmp_path / "seed", seed=1),
        build("mixtral", tmp_path / "half", dtype="float16"),
        build("mixtral", tmp_path / "hf", layout="hf"),
    ]
    change_config(tmp_path / "two", rope_theta=5000.0)
    others.append(tmp_path / "two")
    marks = {describe(Skeleton(folder)).fingerprint for folder in others}
    assert len(marks) == 4 and one not in marks


def test_the_order_of_the_config_does_not_matter(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path)
    one = describe(Skeleton(folder)).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=2))
    assert describe(Skeleton(folder)).fingerprint == one


DENSE = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def test_models_that_cannot_be_spread_are_refused(tmp_path: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    model = llama.Model(llama.ModelArgs.from_dict(DENSE))
    folder = save(tmp_path / "dense", DENSE, dict(tree_flatten(model.parameters())))
    with pytest.raises(ModelError, match="no Mixture of Experts: type llama"):
        describe(Skeleton(folder))
    folder = build("mixtral", tmp_path / "odd")
    for kind in ("nosuchmodel", "switch_layers", "base"):
        change_config(folder, model_type=kind)
        with pytest.raises(ModelError, match=f"model type {kind} is not known"):
            describe(Skeleton(folder))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"num_hidden_layers": 3}, {"model_file": "evil.py"}],
    ids=str,
)
def test_configs_that_do_not_fit_are_refused_in_one_line(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = build("mixtral", tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ModelError) as raised:
        describe(Skeleton(folder))
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
