"""Python runs this first in a worker that has this folder on its PYTHONPATH.

The worker kills itself where it comes to a site of a recovery, if the folder ZMOE_FAIL has a file
`<rank>.<site>`, which is removed.
"""

import os
import signal
from pathlib import Path

from zmoe.cluster import worker
from zmoe.cluster.node import Node

FOLDER = Path(os.environ["ZMOE_FAIL"])


def fail(node: Node, site: str) -> None:
    file = FOLDER / f"{node.rank}.{site}"
    if file.exists():
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def at(site, function):  # type: ignore[no-untyped-def]
    """`function`, whose first argument is the node, as a site."""

    def failing(node, *given):  # type: ignore[no-untyped-def]
        fail(node, site)
        return function(node, *given)

    return failing


worker.open_view = at("open", worker.open_view)
worker.join_view = at("connect", worker.join_view)
Node.adopt = at("adopt", Node.adopt)  # type: ignore[method-assign]
