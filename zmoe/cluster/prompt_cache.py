"""A file with the keys and values of a prompt's beginning, for later runs of the same model.

It is a safetensors file of full blocks: `tokens`, and one tensor per layer for the keys
and for the values, each (blocks, kv_heads, 64 * head_dim), or with `kv_bits` bytes
(blocks, kv_heads, 64 * head_dim + 256), in which 64 scales in float32 follow the integers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from zmoe.batch.plan import BLOCK
from zmoe.checkpoint.safetensors import Tensor, read_header, read_metadata
from zmoe.config import EngineConfig
from zmoe.errors import InputError
from zmoe.placement.types import ModelInfo

Array = npt.NDArray[Any]
_FORMAT = "zmoe prompt cache 1"
# numpy has no bfloat16.
_DTYPES = {"uint8": "U8", "uint16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class PromptCache:
    """A file whose header has been checked; `digest` is what its contents must have."""

    path: Path
    tokens: list[int]
    digest: str
    tensors: dict[str, Tensor]

    def check(self, memory: Sequence[Array]) -> None:
        """Raise InputError unless its tensors are blocks of `memory`, all layers' keys and
        values.
        """
        blocks = len(self.tokens) // BLOCK
        wanted = {
            name: (_DTYPES[part.dtype.name], (blocks, *part.shape[1:]))
            for name, part in zip(_names(len(memory)), memory)
        }
        found = {t.name: (t.dtype, t.shape) for t in self.tensors.values() if t.name != "tokens"}
        if found != wanted:
            at = sorted(found.items() ^ wanted.items())[0][0]
            raise InputError(
                f"prompt cache {self.path} is not of this model: its tensor {at} is "
                f"{found.get(at, 'absent')}, expected {wanted.get(at, 'none')}"
            )

    def fill(self, memory: Sequence[Array], blocks: Sequence[int]) -> None:
        """Write the first of its blocks into `blocks` of `memory`. Raises InputError."""
        self.check(memory)
        digest = blake2b(np.array(self.tokens, np.uint32).tobytes(), digest_size=16)
        try:
            with self.path.open("rb") as file:
                for name, part in zip(_names(len(memory)), memory):
                    for data, block in zip(_read(file, self.tensors[name], part), self._to(blocks)):
                        digest.update(data.tobytes())
                        if block is not None:
                            part[block] = data
        except OSError as error:
            raise InputError(f"prompt cache {self.path} cannot be read: {error.strerror}") from None
        if digest.hexdigest() != self.digest:
            raise _damaged(self.path, "its contents are not those that were written")

    def _to(self, blocks: Sequence[int]) -> list[int | None]:
        return [*blocks, *[None] * (len(self.tokens) // BLOCK - len(blocks))]


def read_prompt_cache(path: Path, info: ModelInfo, config: EngineConfig) -> PromptCache:
    """The prompt cache in the file `path`. Raises InputError for one that is damaged, or of a
    run whose keys and values would differ.
    """
    header = {tensor.name: tensor for tensor in read_header(path)}
    metadata = read_metadata(path)
    if metadata.get("format") != _FORMAT or "tokens" not in header:
        raise InputError(f"{path} is no prompt cache that this zmoe reads")
    for name, ours in _settings(info, config).items():
        theirs = metadata.get(name)
        if theirs != ours:
            raise InputError(
                f"prompt cache {path} is of another run: its {name} is {str(theirs)[:40]}, "
                f"here {ours}; give another file"
            )
    tensor = header["tokens"]
    count = tensor.shape[0] if len(tensor.shape) == 1 else 0
    if tensor.dtype != "U32" or not count or count % BLOCK:
        raise _damaged(path, f"it has tokens of {tensor.dtype} {tensor.shape}")
    try:
        tokens = np.fromfile(path, np.uint32, count, offset=tensor.start).tolist()
    except OSError as error:
        raise InputError(f"prompt cache {path} cannot be read: {error.strerror}") from None
    if len(tokens) != count or max(tokens) >= info.vocabulary:
        raise _damaged(path, f"it has tokens outside of 0 to {info.vocabulary - 1}")
    digest = str(metadata.get("digest"))
    if not re.fullmatch("[0-9a-f]{32}", digest):
        raise _damaged(path, "it has no digest")
    return PromptCache(path, tokens, digest, header)


def write_prompt_cache(
    path: Path,
    info: ModelInfo,
    config: EngineConfig,
    tokens: Sequence[int],
    memory: Sequence[Array],
    blocks: Sequence[int],
) -> None:
    """Write the file `path`, which is there when it is whole: the text `tokens` is in `blocks` of
    `memory`. Raises InputError where it cannot be written.
    """
    numbers, index = np.array(tokens, np.uint32), list(blocks)
    digest = blake2b(numbers.tobytes(), digest_size=16)
    header: dict[str, Any] = {"tokens": _entry("U32", numbers.shape, 0, numbers.nbytes)}
    at = numbers.nbytes
    for name, part in zip(_names(len(memory)), memory):
        for block in index:
            digest.update(part[block].tobytes())
        shape, size = (len(index), *part.shape[1:]), len(index) * part[0].nbytes
        header[name] = _entry(_DTYPES[part.dtype.name], shape, at, size)
        at += size
    metadata = {"format": _FORMAT, **_settings(info, config), "digest": digest.hexdigest()}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + numbers.tobytes())
            for part in memory:
                for block in index:
                    file.write(part[block].tobytes())
        beside.replace(path)
    except OSError as error:
        raise InputError(f"prompt cache {path} cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def _settings(info: ModelInfo, config: EngineConfig) -> dict[str, str]:
    """What two runs must have in common for their keys and values to be alike."""
    return {
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "activations": config.activations,
        "kv_bits": str(config.kv_bits or "none"),
        "block": str(BLOCK),
    }


def _names(count: int) -> list[str]:
    """The tensors of `count` arrays: keys and values of each layer."""
    return [f"layers.{at // 2}.{'values' if at % 2 else 'keys'}" for at in range(count)]


def _entry(dtype: str, shape: tuple[int, ...], at: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}


def _read(file: BinaryIO, tensor: Tensor, part: Array) -> Iterator[Array]:
    """The blocks of `tensor`, which has the shape and dtype of a block of `part`."""
    file.seek(tensor.start)
    for _ in range(tensor.shape[0]):
        data = np.empty_like(part[0])
        if file.readinto(memoryview(data).cast("B")) != data.nbytes:  # type: ignore[attr-defined]
            raise _damaged(tensor.file, "it ends early")
        yield data


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"prompt cache {path} is damaged: {why}; delete it, or give another file")
