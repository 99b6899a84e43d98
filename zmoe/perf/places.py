"""Where matmuls are computed: a machine, or a core that several of its nodes take turns on."""

from __future__ import annotations

from dataclasses import dataclass

from zmoe.perf.busiest import Cost
from zmoe.perf.hardware import Machine
from zmoe.perf.measured import MatmulRate, Speed, rates_of
from zmoe.perf.shape import Format


@dataclass(frozen=True)
class Place:
    """`threads` of a node of `machine`, one of `beside` such places of the machine (one if
    the machine is the node's own). `nodes` take turns on it, all of them with the same.
    """

    machine: Machine
    threads: int = 1
    beside: int = 1
    nodes: int = 1

    def matmul(
        self, format: Format, parameters: float, operations: float, alone: bool = False
    ) -> Cost:
        """Loading dense weights once while computing with them, by one node; `alone`: while
        the other places wait, else they do the same.
        """
        amount = format.bytes(parameters)
        speed = self._speed(format, "dense")
        return self._cost(format, speed.seconds(amount, 0 if alone else amount), operations)

    def experts(
        self, format: Format, number: float, parameters: float, beside: float, operations: float
    ) -> Cost:
        """The same with the weights of a `number` of experts, while the other places have
        `beside` parameters each.
        """
        speed, measured = self._speed(format, "experts"), self._measured(format)
        load = speed.seconds(format.bytes(parameters), format.bytes(beside))
        if measured is not None:
            load += number * measured[1].expert_s
        return self._cost(format, load, operations)

    def _measured(self, format: Format) -> tuple[MatmulRate, MatmulRate] | None:
        return rates_of(self.machine.rates, format.name, self.threads, self.beside)

    def _speed(self, format: Format, what: str) -> Speed:
        """Bytes a second."""
        measured = self._measured(format)
        if measured is None:
            # The machine of a place is what one of its nodes has.
            each = self.machine.reached_bandwidth * self.nodes
            return Speed(each, each)
        return Speed(*(getattr(rate, what) for rate in measured))

    def _cost(self, format: Format, load: float, operations: float) -> Cost:
        measured = self._measured(format)
        rate = self.machine.reached_rate * self.nodes if measured is None else measured[1].many
        return Cost(load, max(0.0, operations / rate - self.machine.overlap * load))
