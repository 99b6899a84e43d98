"""The leader's log of the last two plans, which a recovery may have to repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from zmoe.errors import ZmoeError


class Numbered(Protocol):
    """A plan, of which nothing but its number matters here."""

    @property
    def step(self) -> int:
        """Rises from plan to plan."""


class StepLog:
    """Two plans suffice. Before the leader has finished a step it sends no other one, and before
    all nodes have begun a step nobody finishes it. So of any two nodes, the one that is behind
    has finished the last step but one.
    """

    def __init__(self, kept: int) -> None:
        """`kept` is the step before the first one that is added."""
        self._kept = kept
        self._plans: tuple[Numbered, ...] = ()
        self._done = kept
        self.known = kept  # the last step that the leader has ever finished

    @property
    def last(self) -> int:
        """The number of the last plan."""
        return self._plans[-1].step if self._plans else self._kept

    def add(self, plan: Numbered) -> None:
        """A new plan is about to be sent.

        Raises ZmoeError for one that does not follow the last plan, or comes before its end.
        """
        if plan.step <= self.last:
            raise ZmoeError(f"plan {plan.step} comes after plan {self.last}")
        if self._done != self.last:
            raise ZmoeError(f"plan {plan.step} comes before plan {self.last} is finished")
        if len(self._plans) == 2:
            self._kept = self._plans[0].step
        self._plans = (*self._plans[-1:], plan)

    def finish(self, step: int) -> None:
        """The leader has finished `step`, for the first time or again. Raises ZmoeError."""
        following = self.after(self._done)
        if not following or step != following[0].step:
            raise ZmoeError(f"step {step} is finished after step {self._done}")
        self._done = step
        self.known = max(self.known, step)

    def go_back(self, done: Mapping[int, int]) -> int:
        """The last step that all nodes have finished, from which the log goes on.

        `done`: the last finished step by rank. Raises ZmoeError for one that cannot be.
        """
        steps = [self._kept, *(plan.step for plan in self._plans)]
        for rank, step in done.items():
            if step not in steps:
                known = ", ".join(map(str, steps))
                raise ZmoeError(f"node {rank} has finished step {step}: expected one of {known}")
        base, latest = min(done.values()), max(done.values())
        if steps.index(latest) - steps.index(base) > 1:
            ranks = [next(rank for rank in done if done[rank] == step) for step in (latest, base)]
            raise ZmoeError(
                f"node {ranks[0]} has finished step {latest}, node {ranks[1]} only step {base}: "
                "expected a difference of one step at most"
            )
        self._done = base
        return base

    def after(self, base: int) -> tuple[Numbered, ...]:
        """The plans that follow step `base`."""
        return tuple(plan for plan in self._plans if plan.step > base)

    def forget(self, step: int) -> None:
        """Begin anew after `step`, with nothing to repeat."""
        self._kept = self._done = self.known = step
        self._plans = ()
