"""What of a checkpoint a node reads, what it maps, and what it leaves alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from zmoe.checkpoint.select import Piece, Reader, of_experts, placeholder, select
from zmoe.kernels.experts import can_be_native
from zmoe.kernels.linear import Parts, may_be_mapped
from zmoe.loading.mapping import Mapping
from zmoe.loading.places import Place, Sanitize, Weights, trace
from zmoe.loading.skeleton import Feed, Skeleton
from zmoe.loading.slices import Cut, cuts_of
from zmoe.placement.types import ModelInfo

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Plan:
    """What a node takes of a checkpoint.

    `pieces` are what it reads, in the order of the files. Of these `mapped`
    stay in their files: the places of the parts (weight, scales, biases) of each
    linear layer, by its path in the model; of a layer in `cuts` only the slice
    is kept. Those `copied`, of layers that are cut and not mapped, MLX reads when a slice is
    made of them. Zeros stand in for `shapes`; the tensors `unused` are dropped by the model.
    """

    pieces: list[Piece]
    mapped: dict[str, dict[str, Place]]
    cuts: dict[str, Cut]
    copied: set[str]
    shapes: list[Piece]
    unused: set[str]

    @cached_property  # asked for at every piece, of which there may be tens of thousands
    def total(self) -> int:
        """Bytes to read or to page in."""
        cut_off = sum(
            piece.nbytes - cut.of(piece.nbytes)
            for path, cut in self.cuts.items()
            for place in self.mapped.get(path, {}).values()
            for piece in place.pieces
        )
        return sum(piece.nbytes for piece in self.pieces) - cut_off


def make_plan(
    info: ModelInfo,
    skeleton: Skeleton,
    owned: list[tuple[int, ...]],
    count: int,
    native: bool,
    dense: bool,
    kept_slice: tuple[int, int] | None,
) -> Plan:
    """What a node reads that owns the experts `owned` of each MoE layer, at most `count` in one.

    `native`: the kernels compute, on mapped weights where that can be. Without
    `dense`, experts alone are read, and with `kept_slice` only that range of
    their moe_intermediate_size. Raises ModelError, before anything is read, for tensors
    that do not make up this node's model.
    """
    own = dict(zip(info.moe_layers, owned, strict=True))
    pieces = select(skeleton.tensors, info.experts, own, count)
    unused: set[str] = set()
    untouched: dict[str, Place] = {}

    def feed(sanitize: Sanitize, _: Weights) -> Weights:
        nothing = {piece.name: placeholder(piece) for piece in pieces}
        unused.update(unused_names(sanitize, nothing))
        weights, places = trace(sanitize, nothing, pieces)
        untouched.update(places)
        return weights

    skeleton.load(feed, info.experts, count)
    kept = [piece for piece in pieces if piece.name not in unused]
    kept.sort(key=lambda piece: (piece.source.file, piece.source.start))
    shapes = []
    if not dense:
        needed = _in_switches(skeleton, untouched)
        needed |= {piece.name for piece in kept if of_experts(piece.source, info.experts, own)}
        shapes = [piece for piece in kept if piece.name not in needed]
        kept = [piece for piece in kept if piece.name in needed]
    cuts: dict[str, Cut] = {}
    copied: set[str] = set()
    experts_too = native or kept_slice is not None
    mapped = mappable(skeleton, untouched, native and dense, experts_too)
    if kept_slice is not None:
        assert info.slice_alignment, "a placement that was checked slices no such experts"
        cuts = cuts_of(skeleton.sites, kept_slice, info.moe_intermediate_size)
        copied = {p.name for p in kept if of_experts(p.source, info.experts, own)}
        copied -= _names(mapped)
    return Plan(kept, mapped, cuts, copied, shapes, unused)


def _names(mapped: dict[str, dict[str, Place]]) -> set[str]:
    """The checkpoint's names of what is mapped."""
    places = (place for parts in mapped.values() for place in parts.values())
    return {piece.name for place in places for piece in place.pieces}


def unused_names(sanitize: Sanitize, weights: Weights) -> set[str]:
    """Names of whole parts of the checkpoint that `sanitize` drops; `weights` are never evaluated.

    Checkpoints hold more than a text model needs (image encoders, layers for
    drafting). A part is what names have in common up to their first number,
    or a module outside the layers. It is in use if any of its arrays comes out
    as it went in, or if the result has other names without it.
    """
    result = sanitize(dict(weights))
    survivors = {id(array) for array in result.values()}
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for name in weights:
        parts[_part_of(name)].add(name)

    def is_idle(names: set[str]) -> bool:
        rest = {name: array for name, array in weights.items() if name not in names}
        try:
            return sanitize(rest).keys() == result.keys()
        except Exception:  # whatever it raises, it cannot do without them
            return False

    suspects = [
        names
        for names in parts.values()
        if not any(id(weights[name]) in survivors for name in names)
    ]
    together: set[str] = set().union(*suspects)
    if not together or is_idle(together):
        return together
    return set().union(*(names for names in suspects if is_idle(names)))


def _part_of(name: str) -> str:
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdecimal():
            return ".".join(words[: place + 1])
    return ".".join(words[:-1])


def _in_switches(skeleton: Skeleton, untouched: dict[str, Place]) -> set[str]:
    """The checkpoint's names of all that the switch layers hold, whether an expert's own or not."""
    paths = tuple(f"{site.switch_name}." for site in skeleton.sites)
    inside = [place for name, place in untouched.items() if name.startswith(paths)]
    return {piece.name for place in inside for piece in place.pieces}


def mappable(
    skeleton: Skeleton, untouched: dict[str, Place], dense: bool, experts: bool
) -> dict[str, dict[str, Place]]:
    """The linear layers, `dense` ones or those of `experts`, whose weights all lie in the
    checkpoint in a form that can be mapped: by path, the place of each part.
    """
    modules = skeleton.module.named_modules() if dense else []
    paths = {path: False for path, module in modules if may_be_mapped(module)}
    for site in skeleton.sites:
        if experts and can_be_native(site.switch):
            paths.update(dict.fromkeys(site.linears, True))
    found = {}
    for path, is_switch in paths.items():
        names = {part: f"{path}.{part}" for part in ("weight", "scales", "biases")}
        parts = {part: untouched[name] for part, name in names.items() if name in untouched}
        if is_switch:
            parts = {part: place.taken_apart() for part, place in parts.items()}
        present = {part for part, name in names.items() if name in skeleton.parameters}
        if parts.keys() == present and all(place.can_be_mapped for place in parts.values()):
            found[path] = parts
    return found


def reading(plan: Plan, reader: Reader, progress: Progress) -> Feed:
    """A feed that reads what is planned; what is mapped or unused stays unread.

    `progress` gets the bytes read so far and `plan.total` after each piece.
    """
    mapped = _names(plan.mapped)

    def feed(sanitize: Sanitize, offered: Weights) -> Weights:
        weights = {name: offered[name] for name in plan.unused if name in offered}
        weights |= {piece.name: placeholder(piece) for piece in plan.shapes}
        for piece in plan.pieces:
            if piece.name in mapped:
                weights[piece.name] = placeholder(piece)
                continue
            if piece.name in plan.copied and piece.name in offered:  # a store's are not
                weights[piece.name] = offered[piece.name]
                reader.bytes_read += piece.nbytes
            else:
                weights[piece.name] = reader.read(piece)
            progress(reader.bytes_read, plan.total)
        return sanitize(weights)

    return feed


def map_plan(plan: Plan, mapping: Mapping, progress: Callable[[], None]) -> dict[str, Parts]:
    """Map the planned layers: by path, each part's bytes where they lie, or its slice copied.

    `mapping` is to live for as long as they are used. `progress` is called now
    and then. Raises ModelError for a file that is truncated or cannot be mapped.
    """
    return {
        path: {
            part: mapping.stored(place, lambda _: progress(), plan.cuts.get(path))
            for part, place in parts.items()
        }
        for path, parts in plan.mapped.items()
    }
