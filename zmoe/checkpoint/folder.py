"""What a checkpoint folder holds, learned from its config and tensor headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zmoe.checkpoint.manifest import is_unfinished
from zmoe.checkpoint.safetensors import Tensor, read_header
from zmoe.checkpoint.verify import open_store
from zmoe.errors import ModelError
from zmoe.json_files import read_json


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`; ModelError when it is not usable."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a model folder: no such directory")
    if is_unfinished(folder):
        raise ModelError(f"{folder} is an unfinished store: run zmoe-prestack again to finish it")
    config = read_json(path, str(path), ModelError, absent=f"{folder} holds no config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that mlx-lm would load, by name; ModelError if some are missing."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no weights: no model*.safetensors")
    for name in _indexed_files(folder / "model.safetensors.index.json"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is incomplete: {name} is missing")
    return files


def _indexed_files(path: Path) -> list[str]:
    """The files that an index, where there is one, says the weights are in."""
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is corrupt") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name, from headers only, or from a store's manifest.

    Raises ModelError for files that are missing or damaged.
    """
    store = open_store(folder)
    if store is not None:
        return store.tensors
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for tensor in read_header(path):
            tensors[tensor.name] = tensor
    return tensors
