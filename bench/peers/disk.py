"""Files as a reader finds them after a restart of the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def to_disk_only(path: Path) -> None:
    """Write the file out and drop it from the page cache, where the system can do that.

    What has just been written lies there in small pages; what is read from the disk, in large ones.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
