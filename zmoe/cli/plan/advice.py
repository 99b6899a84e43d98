"""What to conclude from predictions, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from zmoe.cli.plan.forms import compare
from zmoe.perf.hardware import Machine
from zmoe.perf.units import in_bytes
from zmoe.placement.build import most_nodes
from zmoe.placement.predict import Prediction, Setup, predict
from zmoe.placement.remedy import counted, remedy

MOST_NODES = 8  # that advice on what to buy looks at


def best(predictions: Sequence[Prediction]) -> Prediction | None:
    """The fastest that fits; of equals the one with fewest nodes."""
    fitting = [p for p in predictions if p.fits]
    return max(fitting, key=lambda p: (p.tokens_per_second, -p.nodes), default=None)


def conclusions(predictions: Sequence[Prediction]) -> list[str]:
    """Which number of nodes is best, where more are slower, and what doesn't fit."""
    said = [does_not_fit(p) for p in predictions if not p.fits][:1]
    fastest = best(predictions)
    if fastest is None:
        return said
    share = fastest.decode.communication_share
    said.append(
        f"Fastest: {counted(fastest.nodes)}, {fastest.tokens_per_second:.3g} tokens/s, "
        f"{share:.0%} of the time for communication."
    )
    said += _slower(predictions)
    priced = [(p.tokens_per_second / p.price_usd, p) for p in predictions if p.fits and p.price_usd]
    if len(priced) > 1:
        per_dollar, cheapest = max(priced, key=lambda pair: (pair[0], -pair[1].nodes))
        said.append(
            f"Most for the money: {counted(cheapest.nodes)}, {1000 * per_dollar:.3g} tokens/s "
            "per 1000 USD."
        )
    return said


def _slower(predictions: Sequence[Prediction]) -> Iterator[str]:
    """The first step up at which more nodes are slower, said plainly."""
    fitting = sorted((p for p in predictions if p.fits), key=lambda p: p.nodes)
    for fewer, more in pairwise(fitting):
        if more.tokens_per_second < fewer.tokens_per_second:
            lost = 1 - more.tokens_per_second / fewer.tokens_per_second
            yield (
                f"More nodes are slower: {counted(more.nodes)} give {more.tokens_per_second:.3g} "
                f"tokens/s, {lost:.0%} less than {fewer.nodes}."
            )
            return


def does_not_fit(prediction: Prediction) -> str:
    """What is missing, and what would do."""
    setup, nodes = prediction.setup, prediction.nodes
    lacking = f"{in_bytes(prediction.missing)} are missing per node"
    return f"{setup.shape.name} does not fit {counted(nodes)}: {lacking}; {remedy(setup, nodes)}."


@dataclass(frozen=True)
class Purchase:
    """The cheapest nodes of one kind that reach a speed."""

    machine: str
    nodes: int
    tokens_per_second: float
    price_usd: float


def purchases(setup: Setup, target: float, machines: Mapping[str, Machine]) -> list[Purchase]:
    """Of each supported machine with a price the fewest nodes that reach `target` tokens/s.

    Cheapest first; over the same link, up to MOST_NODES nodes, the network's
    price not counted.
    """
    found = []
    for name, machine in machines.items():
        if machine.price_usd is None or not machine.supported:
            continue
        kind = replace(setup, machines=(machine,), one_machine=False)
        for nodes in range(1, min(MOST_NODES, most_nodes(setup.placement, setup.shape)) + 1):
            made = _as_run(kind, predict(kind, nodes))
            if made.fits and made.tokens_per_second >= target:
                speed, price = made.tokens_per_second, nodes * machine.price_usd
                found.append(Purchase(name, nodes, speed, price))
                break
    return sorted(found, key=lambda purchase: purchase.price_usd)


def _as_run(setup: Setup, evaluated: Prediction) -> Prediction:
    """In the form that a run takes: in MLX's graph where that can be."""
    compared = compare(setup, [evaluated])
    return compared[0].best() or evaluated if compared else evaluated


def what_to_buy(setup: Setup, target: float, found: Sequence[Purchase]) -> list[str]:
    assert setup.link is not None, "several nodes are looked at"
    link = setup.link.name
    if not found:
        return [
            f"Nothing in the table reaches {target:g} tokens/s with up to {MOST_NODES} nodes "
            f"over {link}: try fewer bits, another link or a smaller model."
        ]
    first = [
        f"{counted(p.nodes)} of {p.machine} ({p.tokens_per_second:.3g} tokens/s, "
        f"{p.price_usd:,.0f} USD)"
        for p in found[:3]
    ]
    cheapest, *others = first
    also = f" Next: {'; '.join(others)}." if others else ""
    return [f"Cheapest for {target:g} tokens/s over {link}: {cheapest}.{also}"]


def caveats(setup: Setup, predictions: Sequence[Prediction]) -> list[str]:
    """What the reader must know of the figures."""
    said = []
    for name in dict.fromkeys(m.name for m in setup.machines if not m.supported):
        said.append(f"{name} stands here for comparison: zmoe does not run like that.")
    if setup.link is not None and not setup.link.supported:
        said.append(
            f"zmoe has no transport for {setup.link.name} yet: the figures show what it would do. "
            "In MLX's graph another --backend may have one."
        )
    samples = max(p.busiest.standard_error for p in predictions)
    if samples:
        said.append(f"Executed experts are sampled; standard error {samples:.1g}.")
    return said
