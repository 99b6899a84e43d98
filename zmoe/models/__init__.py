"""Checkpoint folders, and the models made of them."""

from zmoe.models.experts_only import LoadedExperts, load_experts
from zmoe.models.inspection import inspect_model
from zmoe.models.loading import LoadedShard, load_shard

__all__ = ["LoadedExperts", "LoadedShard", "inspect_model", "load_experts", "load_shard"]
