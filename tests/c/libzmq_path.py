"""Prints the path of the libzmq that pyzmq brings, or of the system's."""

from __future__ import annotations

import ctypes.util
from pathlib import Path

import zmq


def libzmq_path() -> str:
    """The library's file; empty when there is none that C could open alone."""
    package = Path(zmq.__file__).parent
    for folder in (package.parent / "pyzmq.libs", package / ".dylibs"):
        for path in sorted(folder.glob("libzmq*")):
            return str(path)
    return ctypes.util.find_library("zmq") or ""


if __name__ == "__main__":
    print(libzmq_path())
