"""What of a checkpoint a node reads, what it maps, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx.nn.layers.base import Module

from zmoe.checkpoint.folder import read_tensors
from zmoe.checkpoint.select import Piece, Reader, of_experts, placeholder, select
from zmoe.families.sites import find_sites
from zmoe.kernels.experts import can_be_native, switch_layers
from zmoe.kernels.linear import Parts, may_be_mapped
from zmoe.loading.assembly import Feed, Sanitize, Weights, assemble
from zmoe.loading.mapping import Mapping, Place, trace
from zmoe.loading.slices import Cut, cuts_of
from zmoe.loading.unused import unused_names
from zmoe.placement.types import ModelInfo

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Plan:
    """What to read, in the order of the files; what of it to map, by layer and
    part; what of the mapped to keep, by layer; what only its shape is taken of;
    and the names of what the model has no use for.
    """

    pieces: list[Piece]
    mapped: dict[str, dict[str, Place]]
    cuts: dict[str, Cut]
    shapes: list[Piece]
    unused: set[str]

    @cached_property  # asked for at every piece, of which there may be tens of thousands
    def total(self) -> int:
        cut_off = sum(
            piece.nbytes - cut.of(piece.nbytes)
            for path, cut in self.cuts.items()
            for place in self.mapped[path].values()
            for piece in place.pieces
        )
        return sum(piece.nbytes for piece in self.pieces) - cut_off


def make_plan(
    info: ModelInfo,
    owned: list[tuple[int, ...]],
    count: int,
    native: bool,
    dense: bool,
    kept_slice: tuple[int, int] | None,
) -> Plan:
    """Found by putting the model together without any weights, so faults show
    before anything is read.
    """
    path = Path(info.path)
    own = dict(zip(info.moe_layers, owned, strict=True))
    pieces = select(read_tensors(path), info.experts, own, count)
    unused: set[str] = set()
    untouched: dict[str, Place] = {}

    def feed(sanitize: Sanitize, _: Weights) -> Weights:
        nothing = {piece.name: placeholder(piece) for piece in pieces}
        unused.update(unused_names(sanitize, nothing))
        weights, places = trace(sanitize, nothing, pieces)
        untouched.update(places)
        return weights

    model, _ = assemble(path, feed, (info.experts, count))
    kept = [piece for piece in pieces if piece.name not in unused]
    kept.sort(key=lambda piece: (piece.source.file, piece.source.start))
    shapes = []
    if not dense:
        held = _in_switches(model, untouched)
        held |= {piece.name for piece in kept if of_experts(piece.source, info.experts, own)}
        shapes = [piece for piece in kept if piece.name not in held]
        kept = [piece for piece in kept if piece.name in held]
    cuts: dict[str, Cut] = {}
    mapped = places_of(model, untouched, native and dense, native or kept_slice is not None)
    if kept_slice is not None:
        assert info.granule, "a placement that was checked slices no such experts"
        cuts = cuts_of(find_sites(model), kept_slice, info.expert_hidden)
    return Plan(kept, mapped, cuts, shapes, unused)


def _in_switches(model: Module, untouched: dict[str, Place]) -> set[str]:
    """Names in the checkpoint of all that a switch layer has, be it no expert's own."""
    paths = tuple(f"{site.path}.{site.switch_path}." for site in find_sites(model))
    inside = [place for name, place in untouched.items() if name.startswith(paths)]
    return {piece.name for place in inside for piece in place.pieces}


def places_of(
    model: Module, untouched: dict[str, Place], dense: bool, experts: bool
) -> dict[str, dict[str, Place]]:
    """The layers, `dense` ones or `experts`, whose weights are in the checkpoint as they are."""
    paths = dict.fromkeys(
        (p for p, m in model.named_modules() if dense and may_be_mapped(m)), False
    )
    for site in find_sites(model):
        if experts and can_be_native(site.switch):
            prefix = f"{site.path}.{site.switch_path}"
            paths.update((f"{prefix}.{name}", True) for name in switch_layers(site.switch))
    found = {}
    for path, is_switch in paths.items():
        names = {part: f"{path}.{part}" for part in ("weight", "scales", "biases")}
        parts = {part: untouched[name] for part, name in names.items() if name in untouched}
        if is_switch:
            parts = {part: place.taken_apart() for part, place in parts.items()}
        present = {part for part, name in names.items() if _has(model, name)}
        if parts.keys() == present and all(place.can_be_mapped for place in parts.values()):
            found[path] = parts
    return found


def _has(model: Any, name: str) -> bool:
    for word in name.split("."):
        model = model[int(word)] if isinstance(model, list) else model.get(word)
        if model is None:
            return False
    return True


def reading(plan: Plan, reader: Reader, progress: Progress) -> Feed:
    """A feed of what the files hold; what is mapped or of no use stays unread."""
    places = [place for parts in plan.mapped.values() for place in parts.values()]
    mapped = {piece.name for place in places for piece in place.pieces}

    def feed(sanitize: Sanitize, offered: Weights) -> Weights:
        weights = {name: offered[name] for name in plan.unused if name in offered}
        weights |= {piece.name: placeholder(piece) for piece in plan.shapes}
        for piece in plan.pieces:
            if piece.name in mapped:
                weights[piece.name] = placeholder(piece)
                continue
            weights[piece.name] = reader.read(piece)
            progress(reader.bytes_read, plan.total)
        return sanitize(weights)

    return feed


def map_plan(plan: Plan, mapping: Mapping, progress: Callable[[], None]) -> dict[str, Parts]:
    return {
        path: {
            part: mapping.stored(place, lambda _: progress(), plan.cuts.get(path))
            for part, place in parts.items()
        }
        for path, parts in plan.mapped.items()
    }
