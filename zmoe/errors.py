"""Every error that zmoe raises on purpose.

Each message is one line that names the file, flag, peer or layer at fault. Commands return
`exit_code`: 2 for bad input, 1 for a failure while running.
"""

from __future__ import annotations


class ZmoeError(Exception):
    """Base of all zmoe errors; `exit_code` 1 unless a subclass says otherwise."""

    exit_code = 1


class InputError(ZmoeError):
    """Bad input that was noticed before anything ran, such as a flag, a prompt or a hostfile."""

    exit_code = 2


class SettingError(InputError):
    """A setting out of range: "nodes is 0: expected a number from 1 to 64".

    Attributes: `setting`, the argument or field as the library names it, and `problem`,
    the rest of the message. A command replaces `setting` by the name of its flag.
    """

    def __init__(self, setting: str, problem: str) -> None:
        self.setting, self.problem = setting, problem
        super().__init__(f"{setting} {problem}")


class ModelError(InputError):
    """A model folder that is missing, damaged, unknown or not a Mixture of Experts."""


class PlacementError(InputError):
    """A placement that is invalid, or experts that do not fit the given nodes."""


class LaunchError(InputError):
    """A node that could not be started or did not join."""


class AbsentError(LaunchError):
    """Nodes that have ended, or did not join the exchange: `ranks`, ascending."""

    def __init__(self, ranks: tuple[int, ...], message: str) -> None:
        self.ranks = ranks
        super().__init__(message)


class MismatchError(InputError):
    """A node whose model, dtype, protocol, rounding or placement differs from the leader's."""


class ProgramError(ZmoeError):
    """A program of the user's that has ended with `exit_code` on rank `rank`."""

    def __init__(self, rank: int, exit_code: int) -> None:
        self.rank, self.exit_code = rank, exit_code
        super().__init__(f"rank {rank} ended with exit code {exit_code}")


class QueueFullError(ZmoeError):
    """More requests than may wait; `waiting` is their number."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        super().__init__(f"{waiting} requests wait already, and no more may: try again later")


class QueueTimeoutError(ZmoeError):
    """A request that waited too long for others to end."""


class PeerError(ZmoeError):
    """A peer was lost, or missed its deadline, during a step.

    Attributes: the `rank` of the peer, and the `layer` (ordinal of the MoE layer, or None
    between layers) and `step` at which this process noticed; `reason` is the predicate of
    the message. `others`: the ranks that were lost with it.
    """

    def __init__(
        self,
        rank: int,
        layer: int | None,
        step: int,
        reason: str,
        others: tuple[int, ...] = (),
    ) -> None:
        self.rank, self.layer, self.step, self.reason = rank, layer, step, reason
        self.others = others
        where = "between layers" if layer is None else f"at layer {layer}"
        super().__init__(f"rank {rank} {reason} {where}, step {step}")


class DivergenceError(ZmoeError):
    """A peer is at another step or layer, or routed the same rows differently."""
