"""Well-known models, from their published configurations.

`PUBLISHED` is what their makers say in billions: (all parameters, those active
for a token). A test compares the shapes with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from zmoe.perf.shape import FP8_BLOCKS, MXFP4, GroupedAttention, LatentAttention, ModelShape

_DEEPSEEK_ATTENTION = LatentAttention(128, 1536, 512, 128, 64, 128)

_SHAPES = (
    ModelShape("dbrx", 6144, 40, GroupedAttention(48, 8, 128), 16, 4, 10752, 100352),
    ModelShape("mixtral-8x7b", 4096, 32, GroupedAttention(32, 8, 128), 8, 2, 14336, 32000),
    ModelShape("mixtral-8x22b", 6144, 56, GroupedAttention(48, 8, 128), 8, 2, 16384, 32768),
    ModelShape("qwen3-30b-a3b", 2048, 48, GroupedAttention(32, 4, 128), 128, 8, 768, 151936),
    ModelShape("qwen3-235b-a22b", 4096, 94, GroupedAttention(64, 4, 128), 128, 8, 1536, 151936),
    ModelShape("olmoe", 2048, 16, GroupedAttention(16, 16, 128), 64, 8, 1024, 50304),
    ModelShape("phi-3.5-moe", 4096, 32, GroupedAttention(32, 8, 128), 16, 2, 6400, 32064),
    ModelShape("minimax-m2", 3072, 62, GroupedAttention(48, 8, 128), 256, 8, 1536, 200064),
    ModelShape(
        "deepseek-v3",
        hidden=7168,
        layers=61,
        attention=_DEEPSEEK_ATTENTION,
        experts=256,
        top_k=8,
        expert_hidden=2048,
        vocabulary=129280,
        dense_layers=3,
        dense_hidden=18432,
        shared_hidden=2048,
        dense_format=FP8_BLOCKS,
        expert_format=FP8_BLOCKS,
    ),
    ModelShape(
        "deepseek-v2-lite",
        hidden=2048,
        layers=27,
        attention=LatentAttention(16, 0, 512, 128, 64, 128),
        experts=64,
        top_k=6,
        expert_hidden=1408,
        vocabulary=102400,
        dense_layers=1,
        dense_hidden=10944,
        shared_hidden=2 * 1408,
    ),
    ModelShape(
        "kimi-k2",
        hidden=7168,
        layers=61,
        attention=LatentAttention(64, 1536, 512, 128, 64, 128),
        experts=384,
        top_k=8,
        expert_hidden=2048,
        vocabulary=163840,
        dense_layers=1,
        dense_hidden=18432,
        shared_hidden=2048,
        dense_format=FP8_BLOCKS,
        expert_format=FP8_BLOCKS,
    ),
    ModelShape(
        "gpt-oss-120b",
        hidden=2880,
        layers=36,
        attention=GroupedAttention(64, 8, 64, window=128, windowed_layers=18),
        experts=128,
        top_k=4,
        expert_hidden=2880,
        vocabulary=201088,
        expert_format=MXFP4,
        slice_alignment=MXFP4.slice_alignment,
    ),
    ModelShape(
        "gpt-oss-20b",
        hidden=2880,
        layers=24,
        attention=GroupedAttention(64, 8, 64, window=128, windowed_layers=12),
        experts=32,
        top_k=4,
        expert_hidden=2880,
        vocabulary=201088,
        expert_format=MXFP4,
        slice_alignment=MXFP4.slice_alignment,
    ),
    ModelShape(
        "glm-4.5",
        hidden=5120,
        layers=92,
        attention=GroupedAttention(96, 8, 128),
        experts=160,
        top_k=8,
        expert_hidden=1536,
        vocabulary=151552,
        dense_layers=3,
        dense_hidden=12288,
        shared_hidden=1536,
    ),
    ModelShape(
        "glm-4.5-air",
        hidden=4096,
        layers=46,
        attention=GroupedAttention(96, 8, 128),
        experts=128,
        top_k=8,
        expert_hidden=1408,
        vocabulary=151552,
        dense_layers=1,
        dense_hidden=10944,
        shared_hidden=1408,
    ),
)

MODELS: Mapping[str, ModelShape] = {shape.name: shape for shape in _SHAPES}

# From the models' cards and papers, rounded as there. Some count the input
# embedding among the active parameters, some do not.
PUBLISHED: Mapping[str, tuple[float, float]] = {
    "dbrx": (132, 36),
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (141, 39),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "olmoe": (6.9, 1.3),
    "phi-3.5-moe": (41.9, 6.6),
    "minimax-m2": (230, 10),
    "deepseek-v3": (671, 37),
    "deepseek-v2-lite": (15.7, 2.4),
    "kimi-k2": (1000, 32),
    "gpt-oss-120b": (116.8, 5.1),
    "gpt-oss-20b": (20.9, 3.6),
    "glm-4.5": (355, 32),
    "glm-4.5-air": (106, 12),
}
