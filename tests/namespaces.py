"""Machines that share only a network: network namespaces joined by a bridge."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

A, B, C = ADDRESSES = "10.213.7.1", "10.213.7.2", "10.213.7.3"
LINK = "zmoe0"  # the interface of each
PATIENCE_S = 60


class Unavailable(Exception):
    """Why this system has no namespaces for us."""


def ip(*arguments: str, check: bool = True) -> None:
    """Run `ip` of iproute2."""
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=PATIENCE_S)


@contextlib.contextmanager
def namespaces() -> Iterator[tuple[str, ...]]:
    """Names of namespaces with the addresses A, B and C; the first one's bridge joins them.

    Raises Unavailable.
    """
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise Unavailable("network namespaces need root and iproute2")
    names = tuple(f"zmoe{os.getpid()}{side}" for side in "abc")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", LINK, "type", "bridge")
        except subprocess.CalledProcessError as error:
            why = "this system does not allow network namespaces with a bridge"
            raise Unavailable(why) from error
        for name in names[1:]:
            port = ("link", "add", name[-5:], "netns", names[0], "type", "veth")
            ip(*port, "peer", LINK, "netns", name)
            ip("-n", names[0], "link", "set", name[-5:], "master", LINK, "up")
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", LINK)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", LINK, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def stand_in_for_ssh(folder: Path, names: tuple[str, ...]) -> None:
    """Write an `ssh` into `folder` that enters the namespace of the host's address."""
    script = folder / "ssh"
    script.write_text(
        "#!/bin/sh\nwhile [ $# -gt 2 ]; do shift; done\n"
        f"case $1 in {B}) host={names[1]};; {C}) host={names[2]};; esac\n"
        'exec ip netns exec $host sh -c "$2"\n'
    )
    script.chmod(0o755)
