"""A file from which a text that was cut short goes on as it would have.

It has a line for the model, the prompt and the settings, and one for each token, in JSON. Every
line carries a digest of all lines so far. What a crash leaves of a last line is dropped; anything
else that does not fit is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeGuard

from zmoe.cluster.prompt_cache import PAGED, settings_of
from zmoe.config import EngineConfig, Sampling
from zmoe.engine.generate import Token
from zmoe.errors import InputError
from zmoe.placement.types import ModelInfo

_FORMAT = "zmoe journal 1"


@dataclass(frozen=True)
class Journaled:
    """What a journal says: the `sampling` has the seed; `size` bytes of the file are whole."""

    prompt: list[int]
    sampling: Sampling
    tokens: list[int]
    size: int
    digest: str


class Journal:
    """Writes a journal: the operating system has each line before its token is handed on."""

    def __init__(self, path: Path, file: BinaryIO, digest: str = "") -> None:
        self._path, self._file, self._digest = path, file, digest

    @classmethod
    def begin(
        cls,
        path: Path,
        info: ModelInfo,
        config: EngineConfig,
        prompt: Sequence[int],
        sampling: Sampling,
    ) -> Journal:
        """A journal in a new file `path`. Raises InputError for one that exists, or cannot be."""
        try:
            journal = cls(path, path.open("xb"))
        except OSError as error:
            raise _cannot_be_written(path, error) from None
        header = {"format": _FORMAT, **_settings(info, config), "prompt": list(prompt)}
        journal._write({**header, "sampling": dataclasses.asdict(sampling)})
        return journal

    @classmethod
    def go_on(cls, path: Path, found: Journaled) -> Journal:
        """The journal that read_journal() has `found`, without the rest of a line at its end."""
        try:
            os.truncate(path, found.size)
            return cls(path, path.open("ab"), found.digest)
        except OSError as error:
            raise _cannot_be_written(path, error) from None

    def write(self, generation: Iterable[Token]) -> Iterator[Token]:
        """The tokens, each written before it is handed on. Raises InputError."""
        for token in generation:
            self._write({"token": token.id, "finish_reason": token.finish_reason})
            yield token

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._digest = _digest(self._digest, line)
        try:
            self._file.write(json.dumps({**line, "digest": self._digest}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_be_written(self._path, error) from None


def read_journal(path: Path, info: ModelInfo, config: EngineConfig) -> Journaled:
    """What the file `path` says. Raises InputError for a file that is none or was altered, for
    one of another model or of other settings, and for a text that has ended.
    """
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
    except OSError as error:
        raise InputError(f"journal {path} cannot be read: {error.strerror}") from None
    digest, lines = "", []
    for number, raw in enumerate(whole.split(b"\n"), 1):
        try:
            line: dict[str, Any] = dict(json.loads(raw))
            digest = _digest(digest, {name: line[name] for name in line if name != "digest"})
        except (ValueError, TypeError, RecursionError):
            line = {}
        if not line or line.get("digest") != digest:
            raise InputError(f"journal {path} is damaged in line {number}")
        lines.append(line)
    header, *rest = lines
    if header.get("format") != _FORMAT:
        raise InputError(f"{path} is no journal that this zmoe reads")
    for name, ours in _settings(info, config).items():
        if header.get(name) != ours:
            raise InputError(
                f"journal {path} is of another run: its {name} is {header.get(name)}, here {ours}"
            )
    if rest and rest[-1].get("finish_reason") is not None:
        raise InputError(f"journal {path} is of a text that has ended")
    prompt, tokens = header.get("prompt"), [line.get("token") for line in rest]
    sampling = _sampling(header.get("sampling"))
    if sampling is None or not (_are_ids(prompt, info) and _are_ids(tokens, info)):
        raise InputError(f"journal {path} is damaged: this zmoe would not write such lines")
    return Journaled(prompt, sampling, tokens, len(whole) + 1, digest)


def _settings(info: ModelInfo, config: EngineConfig) -> dict[str, str]:
    """What two runs must have in common for their texts to be alike."""
    window = str(config.max_kv_size or "none")
    return settings_of(info, config, PAGED) | {"max_kv_size": window}


def _sampling(settings: Any) -> Sampling | None:
    """The settings as JSON has them, if they are some that have a seed."""
    try:
        if settings["logit_bias"] is not None:  # whose keys are text in JSON
            bias = {int(token): value for token, value in settings["logit_bias"].items()}
            settings = {**settings, "logit_bias": bias}
        sampling = Sampling(**settings)
    except (AttributeError, KeyError, TypeError, ValueError, InputError):
        return None
    return sampling if sampling.seed is not None else None


def _are_ids(tokens: Any, info: ModelInfo) -> TypeGuard[list[int]]:
    return isinstance(tokens, list) and all(
        type(token) is int and 0 <= token < info.vocabulary for token in tokens
    )


def _digest(before: str, line: dict[str, Any]) -> str:
    return blake2b((before + json.dumps(line)).encode(), digest_size=8).hexdigest()


def _cannot_be_written(path: Path, error: OSError) -> InputError:
    why = "it exists: --resume goes on with it" if isinstance(error, FileExistsError) else None
    return InputError(f"journal {path} cannot be written: {why or error.strerror}")
