"""The flags of commands that start a cluster: compute, placement, nodes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from zmoe.cli.common import Parser, add_hosts, add_settings, given_settings
from zmoe.cluster.hosts import HostList, check_env, hosts_from
from zmoe.cluster.spec import ClusterSpec, PlacementRequest, RemoteOptions
from zmoe.config import Batching, EngineConfig, Timing
from zmoe.errors import InputError


def add_cluster(parser: Parser) -> Callable[..., Any]:
    """Add the flags that cluster_spec() reads; returns what adds to those of the placement."""
    to_compute = parser.add_argument_group("compute").add_argument
    add_settings(to_compute, EngineConfig, "compute", "attention", "activations", "policy")
    to_placement = parser.add_argument_group("placement of the experts").add_argument
    add_settings(to_placement, PlacementRequest, "way", "usage", "memory_limit")
    add = parser.add_argument_group("nodes").add_argument
    add_settings(add, ClusterSpec, "nodes")
    add_hosts(add)
    add_settings(add, EngineConfig, "schedule")
    add_settings(add, ClusterSpec, "manual", "bind", "port", "ports", "key", "insecure")
    add_settings(add, ClusterSpec, "keep_alive")
    add_settings(add, RemoteOptions)
    add_settings(add, EngineConfig, "wire_dtype", "backend")
    add_settings(add, Timing)
    return to_placement


def cluster_spec(
    options: argparse.Namespace,
    *,
    parallel: int | None = None,
    record_usage: bool = False,
    keep_alive: float | None = None,
) -> ClusterSpec:
    """The cluster that the flags ask for, of `parallel` sequences where there is no flag for
    that. `keep_alive`: unless the flag says otherwise; None where only nodes that are started by
    hand can outlive the command. Raises InputError.
    """
    hosts = hosts_from(options.hosts, options.hostfile)
    asked, remote = given_settings(options, ClusterSpec), given_settings(options, RemoteOptions)
    if hosts is not None:
        asked.setdefault("nodes", len(hosts.hosts))
    env = tuple(check_env(setting, "--env") for setting in remote.get("env", ()))
    if keep_alive is not None:
        asked.setdefault("keep_alive", keep_alive)
    elif "keep_alive" in asked and "manual" not in asked:
        raise InputError("--keep-alive is for nodes that are started by hand: give --manual")
    _refuse_what_does_not_apply(asked, remote, hosts)
    engine = given_settings(options, EngineConfig)
    if parallel is not None:
        engine["parallel"] = parallel
    return ClusterSpec(
        **asked,
        record_usage=record_usage,
        hosts=hosts,
        remote=RemoteOptions(**{**remote, "env": (*(hosts.envs if hosts else ()), *env)}),
        timing=Timing(**given_settings(options, Timing)),
        engine=EngineConfig(**engine),
        batching=Batching(**given_settings(options, Batching)),
        placement=PlacementRequest(**given_settings(options, PlacementRequest)),
    )


def _refuse_what_does_not_apply(
    asked: dict[str, Any], remote: dict[str, Any], hosts: HostList | None
) -> None:
    """Raise InputError for flags that would change nothing."""
    manual = "manual" in asked
    if manual and asked.get("nodes", 1) == 1:
        raise InputError("--manual is for several nodes: give --nodes, --hosts or --hostfile")
    if not manual and hosts is not None and not all(h.is_local for h in hosts.hosts[1:]):
        return
    for flag in remote:
        raise InputError(f"--{flag} is for nodes on other hosts, started over ssh")
