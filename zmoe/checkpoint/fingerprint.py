"""Whether two nodes hold the same checkpoint, without reading all of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zmoe.checkpoint.safetensors import Tensor

_SAMPLE_BYTES = 4096
_SAMPLES = 8  # per file, at equal distances


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """32 hex digits of the config, all tensors' names and shapes, and samples.

    Hashes the size of every file and a few KiB of its contents, which tells
    apart what training or another quantisation would have changed.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    shapes = sorted((t.name, t.dtype, t.shape) for t in tensors.values())
    digest.update(json.dumps(shapes, separators=(",", ":")).encode())
    for path in sorted({tensor.file for tensor in tensors.values()}):
        _sample(digest, path)
    return digest.hexdigest()[:32]


def _sample(digest: Any, path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{path.name}:{size}".encode())
        last = max(size - _SAMPLE_BYTES, 0)
        for sample in range(_SAMPLES):
            file.seek(last * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
