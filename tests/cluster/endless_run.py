"""zmoe-run, whose text goes on after an end token: it ends with what happens to its nodes."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from zmoe.cli import run
from zmoe.cluster.cluster import Cluster
from zmoe.config import Sampling
from zmoe.engine.generate import Generation

_generate = Cluster.generate


def endlessly(cluster: Cluster, prompt: str, sampling: Sampling, **how: Any) -> Generation:
    return _generate(cluster, prompt, replace(sampling, ignore_eos=True), **how)


if __name__ == "__main__":
    setattr(Cluster, "generate", endlessly)  # noqa: B010 (mypy lets nobody assign to a method)
    sys.exit(run.main())
