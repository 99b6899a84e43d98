"""zmoe-plan --calibrate: measure this machine and the exchange between nodes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from zmoe import __version__
from zmoe.calibration.link import Hosts, measure_link
from zmoe.calibration.machine import measure_machine
from zmoe.cli.common import check_writable
from zmoe.cluster.hosts import hosts_from
from zmoe.cluster.spec import ClusterSpec, RemoteOptions
from zmoe.errors import InputError
from zmoe.perf.profile import Profile, is_profile, read_profile, write_profile


def hosts_of(prog: str, names: str | None, file: Path | None, python: str | None) -> Hosts:
    """What --hosts, --hostfile and --python of the command `prog` say. Raises InputError."""
    found = hosts_from(names, file)
    if found is None:
        if python is not None:
            raise InputError("--python is for --hosts or --hostfile")
        return Hosts()
    nodes = len(found.hosts)
    if nodes < 2:
        raise InputError("--hosts: an exchange takes at least two, this machine first")
    ClusterSpec(nodes=nodes, hosts=found)  # which checks that they can reach this one
    return Hosts(found, RemoteOptions(python, env=found.envs))


def calibrate(path: Path, hosts: Hosts, *, as_json: bool) -> None:
    """Measure this machine, write the profile to `path` and print it.

    Raises InputError naming `path` if it holds anything but a profile, or cannot be
    written.
    """
    if path.exists() and not is_profile(path):
        read_profile(path)  # says what it is; of what is there only a profile may be replaced
    check_writable("--calibrate", path)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        _say(
            f"warning: the machine is busy (load {load:.1f} on {cores} cores): "
            "measure again when it is idle"
        )
    link = measure_link(hosts, _say)  # first: hosts that can't be reached should not come last
    profile = Profile(measure_machine(_say), link)
    write_profile(path, profile)
    if as_json:
        results = json.loads(path.read_text(encoding="utf-8"))
        environment = {"zmoe": __version__, "source": profile.machine.source}
        print(json.dumps({"environment": environment, "results": [results]}, indent=1))
    else:
        _show(path, profile)


def _say(text: str) -> None:
    print(f"zmoe-plan: {text}", file=sys.stderr, flush=True)


def _show(path: Path, profile: Profile) -> None:
    machine, link = profile.machine, profile.link
    print(f"memory     {machine.memory_bytes / 2**30:.1f} GiB")
    print(f"reading    {machine.bandwidth / 1e9:.1f} GB/s")
    print(f"matmuls    {machine.rate / 1e9:.0f} GFLOP/s")
    for rate in machine.rates:
        dense, experts, many = (each / 1e9 for each in (rate.dense, rate.experts, rate.many))
        print(
            f"- {rate.format}, {rate.nodes} x {rate.threads} threads: {dense:.1f} GB/s dense, "
            f"{experts:.1f} GB/s experts, {many:.0f} GFLOP/s each"
        )
    print(f"per layer  {1e6 * machine.layer_s:.0f} us, and {1e6 * machine.step_s:.0f} us per step")
    for step in machine.steps:
        layer, once = 1e6 * step.layer_s, 1e6 * step.step_s
        print(
            f"- {step.nodes} nodes, {step.schedule}, {step.policy}: {layer:.0f} us, {once:.0f} us"
        )
    if machine.sync_s:
        print(f"mx.eval    {1e6 * machine.sync_s:.0f} us")
    if machine.crossing_s is not None:
        print(f"crossing   {1e6 * machine.crossing_s:.0f} us, from MLX's graph to the CPU and back")
    print(f"exchange   {1e6 * link.latency_s:.0f} us, {link.bandwidth / 1e9:.2f} GB/s, {link.name}")
    print(f"third peer {1e6 * link.per_peer_s:.0f} us")
    print(f"written to {path}")
