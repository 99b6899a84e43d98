"""What of a store has been written so far, so that a run that was killed goes on from there."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

from zmoe.checkpoint.manifest import Range
from zmoe.errors import InputError


class Journal:
    """A file with one line for each range that is written, added after its bytes.

    Opening it locks it; an error to open one of another identity, or one that
    another process has open. Whoever reads it compares the checksums: a line
    may have reached the disk before its bytes.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._file = path.open("a+b")
        self._done: dict[tuple[str, int], str] = {}
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(path, identity)
        except BlockingIOError:
            self._file.close()
            raise InputError(f"{path.parent} is being written by another process") from None
        except InputError:
            self._file.close()
            raise

    def _read(self, path: Path, identity: str) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._file.truncate(len(whole))  # the end of a line that was cut short
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            first = lines[0] if lines else identity
            self._done = {(name, start): checksum for name, start, checksum in lines[1:]}
        except (ValueError, TypeError):
            raise InputError(f"{path} is corrupt: remove {path.parent} to begin anew") from None
        if first != identity:
            raise InputError(
                f"{path.parent} holds the unfinished store of another model, or in another "
                "format: remove it, or name another folder"
            )
        if not lines:
            self._add(identity)

    def checksum(self, file: str, part: Range) -> str | None:
        """What the range's bytes should hash to, if they were written."""
        return self._done.get((file, part.start))

    def add(self, file: str, part: Range, checksum: str) -> None:
        """The range is written."""
        self._add([file, part.start, checksum])

    def _add(self, entry: object) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
