"""A node's slice of its experts: a range of their moe_intermediate_size (tensor-sliced experts).

The linear layers before the activation keep that range of their rows, the last
one that range of its columns. The outputs of all slices add up to the expert's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from zmoe.families.sites import Site, projections

if TYPE_CHECKING:
    from zmoe.kernels.linear import Parts


@dataclass(frozen=True)
class Cut:
    """The range [start, stop) of `width`, in elements, that is kept of a matrix's rows or columns.

    Its edges are multiples of the slice alignment, so that elements that are packed
    into one word, or share a scale, are kept or dropped together.
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
    """What the range `kept` of moe_intermediate_size, `width`, leaves of the experts' linear
    layers, by their paths in the model.
    """
    cuts: dict[str, Cut] = {}
    for site in sites:
        *before, last = site.linears
        cuts.update((path, Cut(*kept, width, of_columns=False)) for path in before)
        cuts[last] = Cut(*kept, width, of_columns=True)
    return cuts


def can_be_sliced(sites: Sequence[Site]) -> bool:
    """Whether the experts' outputs are added as they are."""
    return all(site.adapter is None or site.adapter.per_expert is None for site in sites)


def cut_copied(site: Site, cuts: Mapping[str, Cut]) -> None:
    """Keep the slices of those of the site's linear layers that are in `cuts`, by path: of weights
    that MLX makes of the checkpoint's, evaluated with the slice alone.
    """
    for path, layer in site.linears.items():
        if path not in cuts:
            continue
        cut = cuts[path]
        for name in ("weight", "scales", "biases"):
            if name in layer:
                array = layer[name]
                start, stop = cut.edges(array.shape[2 if cut.of_columns else 1])
                kept = array[..., start:stop] if cut.of_columns else array[:, start:stop]
                layer[name] = mx.contiguous(kept)


def cut_biases(site: Site, kept: tuple[int, int]) -> None:
    """Keep the slice's part of the biases before the activation; the first slice adds the last."""
    *before, last = projections(site.switch)
    for layer in before:
        if "bias" in layer:
            layer.bias = mx.contiguous(layer.bias[:, kept[0] : kept[1]])
    if "bias" in last and kept[0] > 0:
        last.bias = mx.zeros_like(last.bias)


def put_back(site: Site, mapped: dict[str, Parts]) -> None:
    """Move the slices out of `mapped` into the site's linear layers, for MLX to compute with."""
    for path, layer in site.linears.items():
        for part, stored in mapped.pop(path, {}).items():
            layer[part] = stored.as_array()
