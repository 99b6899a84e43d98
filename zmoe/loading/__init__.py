"""From a checkpoint folder to the model of one node, which reads its share alone.

skeleton      the model without weights, built once per node
inspect       a skeleton's ModelInfo
places        where in the checkpoint the model's arrays lie
slices        a node's slice of its experts
plan          what to read, what to map, what to leave alone
mapping       weights that stay in their files
load          a node's share as a model that computes with its peers
experts_only  the share of a worker of the centralised schedule
attention     a node's share of the attention heads
graph         whether exchanges are operations of MLX's graph
fuse          whole layers on the kernels
"""

from zmoe.loading.attention import check_attention, divides_heads
from zmoe.loading.experts_only import LoadedExperts, load_experts
from zmoe.loading.graph import RECORDED, form_of, why_evaluated
from zmoe.loading.inspect import describe
from zmoe.loading.load import LoadedShard, load_shard
from zmoe.loading.skeleton import Skeleton

__all__ = [
    "RECORDED",
    "LoadedExperts",
    "LoadedShard",
    "Skeleton",
    "check_attention",
    "describe",
    "divides_heads",
    "form_of",
    "load_experts",
    "load_shard",
    "why_evaluated",
]
