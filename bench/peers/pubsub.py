"""pyzmq: PUB/SUB written with care in Python, and numpy's sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import zmq
from worker import Worker, timed

worker = Worker()
context = zmq.Context()
context.setsockopt(zmq.LINGER, 0)
publisher = context.socket(zmq.XPUB)  # a PUB that tells who has subscribed
publisher.setsockopt(zmq.XPUB_VERBOSE, 1)  # of each peer, not of the first only
publisher.setsockopt(zmq.SNDHWM, 0)
port = publisher.bind_to_random_port("tcp://127.0.0.1")
ports = worker.meet(str(port))

# One socket a peer: a fast peer's next frame never comes before a slow one's.
subscribers = []
for peer in worker.peers:
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.RCVHWM, 0)
    subscriber.subscribe(b"")
    subscriber.connect(f"tcp://127.0.0.1:{ports[peer]}")
    subscribers.append(subscriber)
for _ in worker.peers:
    publisher.recv()


def make_step(size: int) -> Callable[[], Any]:
    mine, total = worker.payload(size), worker.payload(size)

    def step() -> Any:
        publisher.send(mine.data, copy=False)
        np.copyto(total, mine)
        for subscriber in subscribers:
            frame = subscriber.recv(copy=False)
            np.add(total, np.frombuffer(frame.buffer, np.float32), out=total)
        return total

    return step


worker.serve(timed(worker, make_step))
