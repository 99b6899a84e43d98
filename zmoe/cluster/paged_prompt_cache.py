"""Prompt caches of the C kernels: the full blocks of a prompt.

The file has `tokens`, and one tensor per layer for the keys and for the values, or one for the
latents of both, each (blocks, kv_heads, 64 * head_dim), or with `kv_bits` bytes
(blocks, kv_heads, 64 * head_dim + 256), in which 64 scales in float32 follow the integers. Where
layers are recurrent, `state` (1, bytes) is what all of these keep after the last block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from zmoe.batch.plan import BLOCK
from zmoe.checkpoint.safetensors import Tensor
from zmoe.cluster.prompt_cache import PAGED, PromptCache, damaged, replacing, settings_of
from zmoe.config import EngineConfig
from zmoe.errors import InputError
from zmoe.placement.types import ModelInfo

Array = npt.NDArray[Any]
Memory = Mapping[str, Array]  # parts of the caches, by block
# numpy has no bfloat16.
_DTYPES = {"uint8": "U8", "uint16": "BF16", "float16": "F16", "float32": "F32"}


def check_blocks(saved: PromptCache, memory: Memory, state_bytes: int) -> None:
    """Raise InputError unless the tensors of `saved` are blocks of `memory`, all layers' keys and
    values, and a state of so many bytes, if any.
    """
    blocks = len(saved.tokens) // BLOCK
    wanted = {
        name: (_DTYPES[part.dtype.name], (blocks, *part.shape[1:])) for name, part in memory.items()
    }
    if state_bytes:
        wanted["state"] = "U8", (1, state_bytes)
    found = {t.name: (t.dtype, t.shape) for t in saved.tensors.values() if t.name != "tokens"}
    if found != wanted:
        at = sorted(found.items() ^ wanted.items())[0][0]
        raise InputError(
            f"prompt cache {saved.path} is not of this model: its tensor {at} is "
            f"{found.get(at, 'absent')}, expected {wanted.get(at, 'none')}"
        )


def read_blocks(
    saved: PromptCache, memory: Memory, blocks: Sequence[int], state: Array | None
) -> None:
    """Write the first blocks of `saved` into `blocks` of `memory`, and its state, if any, into
    `state`. Raises InputError.
    """
    check_blocks(saved, memory, 0 if state is None else state.nbytes)
    digest = blake2b(np.array(saved.tokens, np.uint32).tobytes(), digest_size=16)
    surplus = [None] * (len(saved.tokens) // BLOCK - len(blocks))
    try:
        with saved.path.open("rb") as file:
            for name, part, places in _parts(memory, blocks, state):
                for data, place in zip(_read(file, saved.tensors[name], part), [*places, *surplus]):
                    digest.update(data.tobytes())
                    if place is not None:
                        part[place] = data
    except OSError as error:
        raise InputError(f"prompt cache {saved.path} cannot be read: {error.strerror}") from None
    if digest.hexdigest() != saved.digest:
        raise damaged(saved.path, "its contents are not those that were written")


def write_blocks(
    path: Path,
    info: ModelInfo,
    config: EngineConfig,
    tokens: Sequence[int],
    memory: Memory,
    blocks: Sequence[int],
    state: Array | None,
) -> None:
    """Write the file `path`, which is there when it is whole: the text `tokens` is in `blocks` of
    `memory`, and has this `state`, if any. Raises InputError where it cannot be written.
    """
    numbers, parts = np.array(tokens, np.uint32), _parts(memory, blocks, state)
    digest = blake2b(numbers.tobytes(), digest_size=16)
    header: dict[str, Any] = {"tokens": _entry("U32", numbers.shape, 0, numbers.nbytes)}
    at = numbers.nbytes
    for name, part, places in parts:
        for place in places:
            digest.update(part[place].tobytes())
        shape, size = (len(places), *part.shape[1:]), len(places) * part[0].nbytes
        header[name] = _entry(_DTYPES[part.dtype.name], shape, at, size)
        at += size
    settings = settings_of(info, config, PAGED)
    metadata = {"format": PAGED, **settings, "digest": digest.hexdigest()}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + numbers.tobytes())
        for _, part, places in parts:
            for place in places:
                file.write(part[place].tobytes())


def _parts(
    memory: Memory, blocks: Sequence[int], state: Array | None
) -> list[tuple[str, Array, Sequence[int]]]:
    """What is in a file: each tensor's name, and where its elements along the first axis lie."""
    parts: list[tuple[str, Array, Sequence[int]]] = [(n, p, blocks) for n, p in memory.items()]
    return parts if state is None else [*parts, ("state", state[None], [0])]


def _entry(dtype: str, shape: tuple[int, ...], at: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}


def _read(file: BinaryIO, tensor: Tensor, part: Array) -> Iterator[Array]:
    """The blocks of `tensor`, which has the shape and dtype of a block of `part`."""
    file.seek(tensor.start)
    for _ in range(tensor.shape[0]):
        data = np.empty_like(part[0])
        if file.readinto(memoryview(data).cast("B")) != data.nbytes:  # type: ignore[attr-defined]
            raise damaged(tensor.file, "it ends early")
        yield data
