"""Checkpoint folders, and the models made of them."""

from zmoe.models.inspection import inspect_model
from zmoe.models.loading import LoadedShard, load_shard

__all__ = ["LoadedShard", "inspect_model", "load_shard"]
