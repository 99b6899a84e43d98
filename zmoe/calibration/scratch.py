"""Room on disk for what a measurement reads, which is gigabytes and shall not stay behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zmoe.errors import InputError

PREFIX = "zmoe-calibrate-"


@contextmanager
def scratch(nbytes: int) -> Iterator[Path]:
    """A folder among the temporary ones with room for `nbytes`, removed afterwards, as are
    those first that killed measurements have left.

    Raises InputError where there is less room.
    """
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise InputError(f"measuring needs a temporary folder: {error.strerror}") from None
    for folder in parent.glob(f"{PREFIX}*"):
        _remove_if_left(folder)
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise InputError(
            f"measuring needs {nbytes / 1e9:.1f} GB in the temporary folder {parent}, which has "
            f"{free / 1e9:.1f} GB left (the variable TMPDIR names another folder)"
        )
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, _locked(Path(name)):
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock on `folder`, which ends with this process at the latest.

    Raises OSError where another process holds it, or the folder is another user's.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_if_left(folder: Path) -> None:
    with suppress(OSError), _locked(folder):
        shutil.rmtree(folder)
