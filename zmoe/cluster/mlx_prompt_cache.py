"""Prompt caches of mlx-lm, of one sequence in all layers, in mlx-lm's own format.

What mlx-lm lets us add names the run, the tokens, and a digest of all else in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_caches
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from zmoe.cluster.prompt_cache import MLX, PromptCache, damaged, replacing, settings_of
from zmoe.config import EngineConfig
from zmoe.errors import InputError
from zmoe.placement.types import ModelInfo

Caches = list[Any]  # one per layer
_UNKNOWN = b"?" * 32  # the digest, while it is computed


def check_caches(caches: Caches, info: ModelInfo) -> None:
    """Raise InputError for caches that mlx-lm would not find the class of."""
    if any(type(cache).__module__ != mlx_lm_caches.__name__ for cache in caches):
        raise InputError(
            f"no prompt cache: {info.model_type} has caches of its own, which mlx-lm does not "
            "read from files"
        )


def write_caches(
    path: Path, info: ModelInfo, config: EngineConfig, tokens: Sequence[int], caches: Caches
) -> None:
    """Write the file `path`, which is there when it is whole: `caches` hold the text `tokens`.

    Raises InputError where it cannot be written.
    """
    metadata = {
        "format": MLX,
        **settings_of(info, config, MLX),
        "tokens": " ".join(map(str, tokens)),
        "digest": _UNKNOWN.decode(),
    }
    with replacing(path) as beside:
        try:
            save_prompt_cache(str(beside), caches, metadata)
        except RuntimeError as error:
            raise InputError(f"prompt cache {path} cannot be written: {error}") from None
        digest = _digest(beside, _UNKNOWN)
        with beside.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            file.seek(8 + file.read(size).index(_UNKNOWN))
            file.write(digest.encode())


def read_caches(saved: PromptCache) -> Caches:
    """The caches of all layers, evaluated. Raises InputError for a damaged file."""
    try:
        digest = _digest(saved.path, saved.digest.encode())
    except OSError as error:
        raise InputError(f"prompt cache {saved.path} cannot be read: {error.strerror}") from None
    if digest != saved.digest:
        raise damaged(saved.path, "its contents are not those that were written")
    try:
        with TemporaryDirectory() as folder:
            link = Path(folder) / "prompt.safetensors"  # mlx looks at the name
            link.symlink_to(saved.path)
            caches: Caches = load_prompt_cache(str(link))
            mx.eval([cache.state for cache in caches])
    except Exception as error:  # whatever a header that nobody wrote makes mlx-lm raise
        raise damaged(saved.path, f"mlx-lm does not read it ({error!r})") from None
    return caches


def _digest(path: Path, stated: bytes) -> str:
    """Of all of the file but the digest that it states."""
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        hashed.update(size + header.replace(stated, _UNKNOWN))
        return hashlib.file_digest(file, lambda: hashed).hexdigest()
