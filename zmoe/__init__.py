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
    from zmoe.cluster.leader import ClusterSpec
    from zmoe.cluster.placing import PlacementRequest
    from zmoe.config import EngineConfig, Sampling, Timing
    from zmoe.engine.generate import Generation, Token
    from zmoe.errors import InputError, ModelError, PeerError, ZmoeError
    from zmoe.moe.exchange import Exchange, join

# Imported on first use: a command that only refuses a flag need not load MLX.
_HOMES = {
    "Cluster": "zmoe.cluster.cluster",
    "ClusterSpec": "zmoe.cluster.leader",
    "EngineConfig": "zmoe.config",
    "Exchange": "zmoe.moe.exchange",
    "Generation": "zmoe.engine.generate",
    "InputError": "zmoe.errors",
    "ModelError": "zmoe.errors",
    "PeerError": "zmoe.errors",
    "PlacementRequest": "zmoe.cluster.placing",
    "Sampling": "zmoe.config",
    "Timing": "zmoe.config",
    "Token": "zmoe.engine.generate",
    "ZmoeError": "zmoe.errors",
    "join": "zmoe.moe.exchange",
}

__all__ = [
    "Cluster",
    "ClusterSpec",
    "EngineConfig",
    "Exchange",
    "Generation",
    "InputError",
    "ModelError",
    "PeerError",
    "PlacementRequest",
    "Sampling",
    "Timing",
    "Token",
    "ZmoeError",
    "__version__",
    "join",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zmoe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
