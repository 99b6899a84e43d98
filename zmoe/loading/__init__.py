"""From a checkpoint folder to the model of one node, which reads its share alone."""

from zmoe.loading.experts_only import LoadedExperts, load_experts
from zmoe.loading.inspect import describe, inspect_model
from zmoe.loading.load import LoadedShard, load_shard
from zmoe.loading.skeleton import Skeleton

__all__ = [
    "LoadedExperts",
    "LoadedShard",
    "Skeleton",
    "describe",
    "inspect_model",
    "load_experts",
    "load_shard",
]
