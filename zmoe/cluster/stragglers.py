"""Which nodes are slow: they compute much longer in a step than the others, who wait for them.

All nodes run the same steps, so what they compute in these is compared, and neither the size of
the steps nor the speed of the model matters. It takes several rounds to call a node slow, and as
many to take that back at a lower threshold, so that a moment's noise does neither.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median, median_low

ROUND_S = 0.5  # between two comparisons, at least
_ROUNDS = 5
_SLOW, _NOT_SLOW = 4.0, 2.0  # times what the others compute, in the median of these rounds
_LEAST_S = 0.01  # that the others wait for it in a step; less is no trouble


class Stragglers:
    """Compares the nodes, round after round."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}  # of computing in a step, by rank, in the last round
        self.slow: dict[int, str] = {}  # by rank: how slow, for users
        self._hosts: Sequence[int | None] = ()
        self._ratios: defaultdict[int, deque[float]]
        self._forget()

    def _forget(self) -> None:
        self.slow, self._ratios = {}, defaultdict(partial(deque[float], maxlen=_ROUNDS))

    def add(self, seconds: Mapping[int, float], hosts: Sequence[int | None]) -> list[str]:
        """A round, in which each node has computed so many `seconds` in a step, by rank.

        `hosts` is by shard the rank that computes it; when it changes, the comparison begins anew,
        and a node that computes several shares may take as much longer. Returns a line for the
        user for each node that has become slow, or is no longer.
        """
        if hosts != self._hosts:
            self._hosts = hosts
            self._forget()
        self.seconds = dict(seconds)
        shares = {rank: spent / max(1, hosts.count(rank)) for rank, spent in seconds.items()}
        return [line for rank in shares if len(shares) > 1 for line in self._judge(rank, shares)]

    def _judge(self, rank: int, shares: Mapping[int, float]) -> list[str]:
        own = shares[rank]
        usual = median_low(spent for other, spent in shares.items() if other != rank)
        ratios, was_slow = self._ratios[rank], rank in self.slow
        ratios.append(own / max(usual, 1e-6) if own - usual >= _LEAST_S else 1.0)
        if len(ratios) == _ROUNDS and median(ratios) >= (_NOT_SLOW if was_slow else _SLOW):
            how = f"it computes {1e3 * own:.0f} ms in a step, and others {1e3 * usual:.0f} ms"
            self.slow[rank] = how
            return [] if was_slow else [f"node {rank} is slow: {how}"]
        self.slow.pop(rank, None)
        return [f"node {rank} is no longer slow"] if was_slow else []
