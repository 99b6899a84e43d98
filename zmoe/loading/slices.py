"""A node's slice of its experts: a range of their inner width.

The layers before the activation lose rows by it, the last one columns. The
outputs of the slices add up to the expert's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from zmoe.families.sites import Site, projections

if TYPE_CHECKING:
    from zmoe.kernels.linear import Parts


@dataclass(frozen=True)
class Cut:
    """The range [start, stop) of `width` that is kept of matrices: of their rows, or columns.

    Elements that are packed into words, or share a scale, are kept or dropped together.
    """

    start: int
    stop: int
    width: int
    of_columns: bool

    def of(self, size: int) -> int:
        """How much of `size`, which stands for all of the width, is kept."""
        return self.edges(size)[1] - self.edges(size)[0]

    def edges(self, size: int) -> tuple[int, int]:
        """Where the range begins and ends if the width is `size` long."""
        (first, rest), (last, more) = (
            divmod(edge * size, self.width) for edge in (self.start, self.stop)
        )
        assert rest == more == 0, "a placement that was checked cuts between groups"
        return first, last


def cuts_of(sites: Sequence[Site], kept: tuple[int, int], width: int) -> dict[str, Cut]:
    """What of `width` is kept of every layer of the experts, by its path."""
    cuts: dict[str, Cut] = {}
    for site in sites:
        *before, last = site.linears
        cuts.update((path, Cut(*kept, width, of_columns=False)) for path in before)
        cuts[last] = Cut(*kept, width, of_columns=True)
    return cuts


def can_be_sliced(sites: Sequence[Site], in_place: Collection[str]) -> bool:
    """Whether the experts' outputs are added as they are, and all of their layers lie in
    the checkpoint as the model has them: those paths that are `in_place`.
    """
    return all(
        (site.adapter is None or site.adapter.per_expert is None)
        and all(path in in_place for path in site.linears)
        for site in sites
    )


def cut_biases(site: Site, kept: tuple[int, int]) -> None:
    """Keep the slice's part of the biases before the activation; the first slice adds the last."""
    *before, last = projections(site.switch)
    for layer in before:
        if "bias" in layer:
            layer.bias = mx.contiguous(layer.bias[:, kept[0] : kept[1]])
    if "bias" in last and kept[0] > 0:
        last.bias = mx.zeros_like(last.bias)


def put_back(site: Site, mapped: dict[str, Parts]) -> None:
    """Move what was cut out of the mapped files into the layers, for MLX to compute with."""
    for path, layer in site.linears.items():
        for part, stored in mapped.pop(path).items():
            layer[part] = stored.as_array()
