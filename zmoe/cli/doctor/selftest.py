"""Whether every mode of this machine's device generates what mlx-lm does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from zmoe.cli.doctor.check import Check, output, python
from zmoe.cli.doctor.model import PROMPT, TOKENS
from zmoe.errors import ZmoeError

_RUN_S = 90.0
_CROSSING_S = 60.0
_SLICES = ("--nodes", "2", "--compute", "mlx", "--placement", "slices", "--backend")
KERNELS: Mapping[str, tuple[str, ...]] = {
    "kernels, 1 node": ("--compute", "native"),
    "kernels, 2 nodes": ("--compute", "native", "--nodes", "2"),
}
MLX: Mapping[str, tuple[str, ...]] = {
    "MLX, 1 node": ("--compute", "mlx"),
    "MLX, 2 nodes, evaluated": ("--compute", "mlx", "--nodes", "2", "--placement", "experts"),
    "MLX, 2 nodes, graph over zmq": (*_SLICES, "zmq"),
    "MLX, 2 nodes, graph over ring": (*_SLICES, "ring"),
}


class SelfTest:
    """Runs of the embedded model, which is written into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._expected: list[int] = []

    def mlx_lm(self) -> str:
        """Have mlx-lm generate, without zmoe."""
        out, _ = output(python("zmoe.cli.doctor.model", str(self._folder)), _RUN_S)
        self._expected = json.loads(out)
        return f"{len(self._expected)} tokens"

    def mode(self, flags: tuple[str, ...]) -> str:
        """Have zmoe-run generate; what it has to say makes another mode of it."""
        if not self._expected:
            raise ZmoeError("there are no tokens of mlx-lm to compare with")
        usual = ("--model", str(self._folder), "--temp", "0", "--max-tokens", str(TOKENS))
        words = ("--ignore-chat-template", "--json", *usual, *flags, PROMPT)
        out, said = output(python("zmoe.cli.run", *words), _RUN_S)
        notices = [line for line in said.splitlines() if line.startswith("zmoe-run:")]
        if notices:
            raise ZmoeError("; ".join(notices))
        return compared(json.loads(out)["tokens"], self._expected)

    def checks(self, *, on_gpu: bool) -> list[Check]:
        modes = MLX if on_gpu else {**KERNELS, **MLX}
        found = [Check(name, partial(self.mode, flags)) for name, flags in modes.items()]
        return [Check("mlx-lm", self.mlx_lm), *found]


def compared(tokens: list[int], expected: list[int]) -> str:
    """Say that both are the same. Raises ZmoeError that says where they are not."""
    if tokens == expected:
        return f"the same {len(tokens)} tokens"
    same = next((at for at, (a, b) in enumerate(zip(tokens, expected)) if a != b), len(tokens))
    ours, theirs = tokens[same : same + 1], expected[same : same + 1]
    raise ZmoeError(f"token {same} is {ours}, and {theirs} with mlx-lm")


def crossing(env: Mapping[str, str]) -> str:
    """An exchange in MLX's graph, with `env` added to the environment."""
    out, _ = output(python("zmoe.calibration.crossing"), _CROSSING_S, env)
    found = json.loads(out)
    return f"{found['crossing_us']:.0f} us a layer, and {found['exchange_us']:.0f} us the exchange"


def crossings(*, metal: bool) -> list[Check]:
    """With and without fast synch, which may hang: that comes last, and on Metal only."""
    settings = {"crossing": "0", "crossing, fast synch": "1"} if metal else {"crossing": "0"}
    return [
        Check(name, partial(crossing, {"MLX_METAL_FAST_SYNCH": value}))
        for name, value in settings.items()
    ]
