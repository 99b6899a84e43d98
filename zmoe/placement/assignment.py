"""What this node computes of a MoE layer: the experts assigned to it, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from zmoe.native import Owners, ffi
from zmoe.obs import Recorder
from zmoe.placement.pairs import Ints, LocalPairs, no_experts
from zmoe.placement.types import Placement

if TYPE_CHECKING:
    from zmoe.native import CData


def layer_owners(placement: Placement, layer: int) -> Owners:
    """The owners of a layer, an ordinal, by expert and slice."""
    return Owners(
        placement.experts, placement.owned[layer], _slice_numbers(placement), placement.speeds
    )


def _slice_numbers(placement: Placement) -> list[int]:
    """Of each rank's slice among those that there are."""
    slices = sorted(set(placement.slices))
    return [slices.index(each) for each in placement.slices] or [0] * placement.nodes


class Idle:
    """Which of a rank's experts its policy runs for nothing, in one layer.

    "selected": none; "busy-full": all that are idle; "router-aided": so many, the
    least recently run first, that it runs as many as the busiest rank does.
    """

    def __init__(self, policy: str, owned: int) -> None:
        """`owned` experts, numbered from 0."""
        self._policy, self._owned = policy, owned
        self._last_run = np.zeros(owned, np.int64)
        self._clock = 0

    @property
    def most(self) -> int:
        """How many there may be."""
        return 0 if self._policy == "selected" else self._owned

    @property
    def needs_busiest(self) -> bool:
        return self._policy == "router-aided"

    def beside(self, mine: Ints, busiest: int) -> Ints:
        """Those to run beside `mine`, ascending, once per routing; `busiest`: the
        number of experts that the busiest rank runs.
        """
        if self._policy == "selected":
            return no_experts()
        rest = np.ones(self._owned, np.bool_)
        rest[mine] = False
        idle = np.flatnonzero(rest).astype(np.int32)
        if self._policy == "router-aided":
            oldest = idle[np.argsort(self._last_run[idle], kind="stable")]
            idle = np.sort(oldest[: max(0, min(busiest, self._owned) - len(mine))])
            self._clock += 1
            self._last_run[mine] = self._last_run[idle] = self._clock
        return idle


class Ownership:
    """One rank's part of one layer: a pure function of the routing and the placement.

    Its own experts are numbered from 0, in the order of their ids. Which of them
    it runs besides those assigned to it, on a row that nobody needs, is Idle's.
    """

    def __init__(
        self,
        placement: Placement,
        layer: int,
        rank: int,
        policy: str = "selected",
        recorder: Recorder | None = None,
    ) -> None:
        """`layer` is the ordinal; `recorder` is told of every routing."""
        owned = placement.owned[layer]
        numbers = _slice_numbers(placement)
        self.rank, self.experts, self.owned = rank, placement.experts, owned[rank]
        # The last entry, -1, stands for every id outside [0, experts).
        self.local: Ints = np.full(self.experts + 1, -1, np.int32)
        self.local[list(self.owned)] = np.arange(len(self.owned))
        self._layer, self._recorder = layer, recorder
        self._idle = Idle(policy, len(self.owned))
        self._owners = layer_owners(placement, layer)
        self._shared = _have_replicas([ids for ids, n in zip(owned, numbers) if n == numbers[rank]])
        self.local_pointer = ffi.from_buffer("int32_t[]", self.local)

    @property
    def most_padding(self) -> int:
        """How many experts may be run on no row at all."""
        return self._idle.most

    @property
    def is_fixed(self) -> bool:
        """Whether it is the experts owned alone that say what of a routing is computed here."""
        shares = self._shared or self._idle.needs_busiest
        return not shares and self._idle.most == 0 and self._recorder is None

    def assign(self, ids: Ints) -> CData:
        """Share out the experts `ids` (rows, k) among their owners, each row by itself.

        Returns where C finds who computes each pair, uint64 (rows, k) with bit r for rank r,
        or NULL where this rank's experts are nobody else's. Valid until the next call.
        """
        if self._shared or self._idle.needs_busiest:
            self._owners.assign(ids)
        return self._owners.pointer if self._shared else ffi.NULL

    def pairs(self, ids: Ints) -> LocalPairs:
        """What there is to compute of `ids` (rows, k) here."""
        ids = np.ascontiguousarray(ids)
        local = self.local[np.where((ids >= 0) & (ids < self.experts), ids, -1)]
        if self._shared or self._idle.needs_busiest:
            mine = self._owners.assign(ids) >> np.uint64(self.rank) & np.uint64(1)
            local = np.where(mine, local, -1)
        rows, slots = np.nonzero(local >= 0)
        own = local[rows, slots]
        padding = self.padding(ids, own)
        return LocalPairs(rows.astype(np.int32), slots.astype(np.int32), own, padding)

    def padding(self, ids: Ints, own: Ints) -> Ints:
        """The idle experts to run beside `own`, those of the pairs; once per routing.

        `ids` are what assign() was given.
        """
        if self._idle.most == 0 and self._recorder is None:
            return no_experts()
        mine = np.flatnonzero(np.bincount(own, minlength=len(self.owned))).astype(np.int32)
        idle = self._idle.beside(mine, int(self._owners.counts.max()))
        if self._recorder is not None:
            held = np.array(self.owned, np.int32)
            executed = np.sort(np.concatenate([mine, idle]))
            self._recorder(self._layer, ids, held[mine], held[executed])
        return idle


def _have_replicas(owned: Sequence[Sequence[int]]) -> bool:
    return sum(map(len, owned)) > len(set().union(*owned))
