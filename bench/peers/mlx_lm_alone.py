"""mlx-lm in one process, as llama-bench would measure it. Prints one JSON object.

On a CPU a token may take more than a second: the defaults are few.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from process import (
    ABSENT,
    BAD_INPUT,
    PeerFailure,
    checked,
    main,
    parser,
    peak_bytes,
    report,
    tokens,
)

SEED = 1


def about() -> dict[str, Any]:
    """Versions of what is measured."""
    try:
        import mlx.core as mx
        import mlx_lm.utils  # noqa: F401 - what Context needs
    except ImportError as error:
        raise PeerFailure(f"cannot import mlx_lm: {error}", ABSENT) from None
    return {"build": f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}, {mx.default_device()}"}


class Context:
    """A loaded model and one sequence."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load_model

        try:
            self._model, config = load_model(folder)
        except (OSError, ValueError, KeyError) as error:
            raise PeerFailure(
                f"cannot load {folder}: {' '.join(str(error).split())}", BAD_INPUT
            ) from None
        self.vocabulary: int = config["vocab_size"]
        self.clear()

    def clear(self) -> None:
        """Forget the sequence."""
        from mlx_lm.models.cache import make_prompt_cache

        self._cache: list[Any] = make_prompt_cache(self._model)

    def append(self, ids: Sequence[int]) -> None:
        """Run `ids` as one batch; the logits after the last are there on return."""
        import mlx.core as mx

        logits = self._model(mx.array([list(ids)]), cache=self._cache)
        mx.eval(logits[0, -1], [each.state for each in self._cache])


def measure(options: argparse.Namespace, context: Context) -> dict[str, Any]:
    """Tokens/s over the repetitions, after one that isn't counted; decoding follows the prompt."""
    prompt = tokens(SEED, options.prompt_tokens, context.vocabulary)
    steps = tokens(SEED + 2, options.tokens, context.vocabulary)
    prompt_s, decode_s = [], []
    for _ in range(options.repetitions + (not options.no_warm_up)):
        context.clear()
        begun = time.perf_counter()
        context.append(prompt)
        prompt_s.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        for step in steps:
            context.append([step])
        decode_s.append(time.perf_counter() - begun)
    counted = slice(-options.repetitions, None)
    return report(len(prompt), prompt_s[counted], len(steps), decode_s[counted])


def program() -> dict[str, Any]:
    options = checked(parser((__doc__ or "").splitlines()[0], 16, 4, 1))
    build = about()
    if options.about:
        return build
    try:
        measured = measure(options, Context(Path(options.model)))
    except RuntimeError as error:  # what MLX cannot compute on this device
        raise PeerFailure(" ".join(str(error).split())) from None
    return {**measured, **build, "peak_memory": [peak_bytes()]}


if __name__ == "__main__":
    main(program)
