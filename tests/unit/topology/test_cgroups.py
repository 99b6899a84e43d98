"""Limits of made-up control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmoe.topology.cgroups import cpu_limit, memory_limit

NO_LIMIT_1 = 9223372036854771712  # version 1 has no word for none


def system(root: Path, groups: str, *mounts: str) -> Path:
    """`mounts`: what is mounted, where, the kind and its options."""
    folder = root / "proc/self"
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(groups)
    lines = ["22 27 0:21 / /proc rw - proc proc rw", "23 27 0:22 / /odd rw - fuse  rw"]
    for mount in mounts:
        mounted, point, kind, options = mount.split()
        lines.append(f"30 23 0:26 {mounted} {point} rw,nosuid shared:4 - {kind} {kind} {options}")
    (folder / "mountinfo").write_text("\n".join(lines) + "\n")
    return root


def write(root: Path, folder: str, **files: object) -> None:
    path = root / "sys/fs/cgroup" / folder
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(f"{text}\n")


UNIFIED = "/ /sys/fs/cgroup cgroup2 rw"


def test_the_tightest_of_nested_groups(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/pod/box/inner\n", UNIFIED)
    write(root, "pod", cpu__max="250000 100000", memory__max=6 << 30)
    write(root, "pod/box", cpu__max="400000 100000", memory__max=8 << 30)
    write(root, "pod/box/inner", cpu__max="max 100000", memory__max="max")
    write(root, "pod/other", cpu__max="1000 100000", memory__max=5)
    assert cpu_limit(root) == 2.5
    assert memory_limit(root) == 6 << 30


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", UNIFIED)
    write(root, ".", cpu__max="200000 100000", memory__max=1 << 30)
    assert (cpu_limit(root), memory_limit(root)) == (2.0, 1 << 30)


@pytest.mark.parametrize("mounted", ["/", "/docker/7f"])
def test_version_1(mounted: str, tmp_path: Path) -> None:
    """Where the whole tree is mounted, or a container's own group only."""
    root = system(
        tmp_path,
        "4:memory:/docker/7f\n3:cpu,cpuacct:/docker/7f\n1:name=systemd:/docker/7f\n0::/\n",
        f"{mounted} /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct",
        f"{mounted} /sys/fs/cgroup/memory cgroup rw,memory",
        f"{mounted} /sys/fs/cgroup/systemd cgroup rw,name=systemd",
        "/ /sys/fs/cgroup/unified cgroup2 rw",
    )
    inside = "docker/7f" if mounted == "/" else "."
    write(root, "cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    write(root, "memory", memory__limit_in_bytes=NO_LIMIT_1)
    write(root, f"cpu,cpuacct/{inside}", cpu__cfs_quota_us=150000, cpu__cfs_period_us=50000)
    write(root, f"memory/{inside}", memory__limit_in_bytes=3 << 30)
    assert (cpu_limit(root), memory_limit(root)) == (3.0, 3 << 30)


def test_no_limits(tmp_path: Path) -> None:
    assert cpu_limit(tmp_path) is None and memory_limit(tmp_path) is None
    root = system(tmp_path, "0::/../elsewhere\n", UNIFIED)
    write(root, "../elsewhere", cpu__max="1 100000", memory__max=1)  # not of what is mounted
    assert cpu_limit(root) is None and memory_limit(root) is None
    write(root, ".", cpu__max="max 100000")
    assert cpu_limit(root) is None
