"""A file with the keys and values of a prompt's beginning, for later runs of the same model.

It is a safetensors file in one of two formats: blocks of the C kernels
(paged_prompt_cache.py), or caches as mlx-lm writes them (mlx_prompt_cache.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from zmoe.batch.plan import BLOCK
from zmoe.checkpoint.safetensors import Tensor, read_header, read_metadata
from zmoe.config import EngineConfig
from zmoe.errors import InputError
from zmoe.placement.types import ModelInfo

PAGED = "zmoe prompt cache 1"
MLX = "zmoe prompt cache of mlx-lm 1"


@dataclass(frozen=True)
class PromptCache:
    """A file whose header has been checked; `digest` is what its contents must have."""

    path: Path
    format: str  # PAGED or MLX
    tokens: list[int]
    digest: str
    tensors: dict[str, Tensor]


def read_prompt_cache(path: Path, info: ModelInfo, config: EngineConfig) -> PromptCache:
    """The prompt cache in the file `path`. Raises InputError for one that is damaged, or of a
    run whose keys and values would differ.
    """
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    metadata = read_metadata(path)
    if "0.format" in metadata:  # mlx-lm's own come after what it was given, which is its first
        metadata = {name[2:]: it for name, it in metadata.items() if name.startswith("0.")}
    format = metadata.get("format")
    if format not in (PAGED, MLX) or (format == PAGED and "tokens" not in tensors):
        raise InputError(f"{path} is no prompt cache that this zmoe reads")
    for name, ours in settings_of(info, config, format).items():
        theirs = metadata.get(name)
        if theirs != ours:
            raise InputError(
                f"prompt cache {path} is of another run: its {name} is {str(theirs)[:40]}, "
                f"here {ours}; give another file"
            )
    if format == PAGED:
        tokens = _numbers_in(tensors["tokens"])
    else:
        words = str(metadata.get("tokens")).split()
        tokens = [int(word) if re.fullmatch("[0-9]{1,9}", word) else -1 for word in words]
    if not tokens or not 0 <= min(tokens) <= max(tokens) < info.vocabulary:
        raise damaged(path, f"it has tokens outside of 0 to {info.vocabulary - 1}")
    digest = str(metadata.get("digest"))
    if not re.fullmatch("[0-9a-f]{32}", digest):
        raise damaged(path, "it has no digest")
    return PromptCache(path, format, tokens, digest, tensors)


def settings_of(info: ModelInfo, config: EngineConfig, format: str) -> dict[str, str]:
    """What two runs must have in common for their keys and values to be alike."""
    settings = {
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "activations": config.activations,
        "kv_bits": str(config.kv_bits or "none"),
    }
    if format == PAGED:
        return settings | {"block": str(BLOCK)}
    window = str(config.max_kv_size or "none")
    return settings | {"max_kv_size": window, "mlx_lm": version("mlx-lm")}


def _numbers_in(tensor: Tensor) -> list[int]:
    """The tokens of a file of blocks."""
    path, count = tensor.file, tensor.shape[0] if len(tensor.shape) == 1 else 0
    if tensor.dtype != "U32" or not count or count % BLOCK:
        raise damaged(path, f"it has tokens of {tensor.dtype} {tensor.shape}")
    try:
        numbers = np.fromfile(path, np.uint32, count, offset=tensor.start)
    except OSError as error:
        raise InputError(f"prompt cache {path} cannot be read: {error.strerror}") from None
    if len(numbers) != count:
        raise damaged(path, "it ends early")
    return [int(number) for number in numbers]


def damaged(path: Path, why: str) -> InputError:
    return InputError(f"prompt cache {path} is damaged: {why}; delete it, or give another file")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which becomes `path` when it is whole.

    Raises InputError where it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        beside.touch()
        yield beside
        beside.replace(path)
    except OSError as error:
        raise InputError(f"prompt cache {path} cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
