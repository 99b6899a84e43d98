"""How fast some cores together read memory. Prints one JSON object."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from process import cores, main, pin
from products import READ_BYTES, seconds

from zmoe.kernels.threads import ThreadPool

BUDGET_S = 0.5


def program() -> dict[str, Any]:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("cores", type=cores, help="such as 0,1")
    wanted = made.parse_args().cores
    pin(wanted)
    memory, pool = np.ones(READ_BYTES, np.uint8), ThreadPool(wanted)
    taken = seconds(lambda: pool.read(memory), BUDGET_S)
    return {"gb_per_s": round(READ_BYTES / taken / 1e9, 2)}


if __name__ == "__main__":
    main(program)
