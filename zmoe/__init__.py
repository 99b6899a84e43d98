"""zmoe runs Mixture-of-Experts models whose experts are spread over several nodes.

Example::

    with zmoe.Cluster("zmoe-tiny", nodes=2) as cluster:
        for token in cluster.generate("ROMEO:", max_tokens=64):
            print(token.text, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zmoe.cluster.cluster import Cluster
    from zmoe.cluster.hosts import Host, HostList
    from zmoe.cluster.spec import ClusterSpec, PlacementRequest, RemoteOptions
    from zmoe.config import Batching, EngineConfig, Sampling, Timing
    from zmoe.engine.generate import Generation, Token
    from zmoe.errors import (
        DivergenceError,
        InputError,
        LaunchError,
        MismatchError,
        ModelError,
        PeerError,
        PlacementError,
        QueueFullError,
        SettingError,
        ZmoeError,
    )
    from zmoe.exchange.local import Exchange, join
    from zmoe.placement.usage import Usage

# Imported on first use: a command that only refuses a flag need not load MLX.
_HOMES = {
    "Batching": "zmoe.config",
    "Cluster": "zmoe.cluster.cluster",
    "ClusterSpec": "zmoe.cluster.spec",
    "DivergenceError": "zmoe.errors",
    "EngineConfig": "zmoe.config",
    "Exchange": "zmoe.exchange.local",
    "Generation": "zmoe.engine.generate",
    "Host": "zmoe.cluster.hosts",
    "HostList": "zmoe.cluster.hosts",
    "InputError": "zmoe.errors",
    "LaunchError": "zmoe.errors",
    "MismatchError": "zmoe.errors",
    "ModelError": "zmoe.errors",
    "PeerError": "zmoe.errors",
    "PlacementError": "zmoe.errors",
    "PlacementRequest": "zmoe.cluster.spec",
    "QueueFullError": "zmoe.errors",
    "RemoteOptions": "zmoe.cluster.spec",
    "Sampling": "zmoe.config",
    "SettingError": "zmoe.errors",
    "Timing": "zmoe.config",
    "Token": "zmoe.engine.generate",
    "Usage": "zmoe.placement.usage",
    "ZmoeError": "zmoe.errors",
    "join": "zmoe.exchange.local",
}

__all__ = [
    "Batching",
    "Cluster",
    "ClusterSpec",
    "DivergenceError",
    "EngineConfig",
    "Exchange",
    "Generation",
    "Host",
    "HostList",
    "InputError",
    "LaunchError",
    "MismatchError",
    "ModelError",
    "PeerError",
    "PlacementError",
    "PlacementRequest",
    "QueueFullError",
    "RemoteOptions",
    "Sampling",
    "SettingError",
    "Timing",
    "Token",
    "Usage",
    "ZmoeError",
    "__version__",
    "join",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zmoe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
