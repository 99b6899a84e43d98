"""grpc: a unary call to every peer carries the payload, the answer is empty; numpy's sum.

The paper's transport, written with care: one channel a peer, the calls to all
peers in flight at once, no protobuf.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from worker import RUN_DEADLINE_S, Worker, timed

worker = Worker()
inboxes = {peer: queue.SimpleQueue[bytes]() for peer in worker.peers}


def put_from(peer: int) -> grpc.RpcMethodHandler:
    """The method with which `peer` brings its payload."""

    def put(payload: bytes, context: grpc.ServicerContext) -> bytes:
        inboxes[peer].put(payload)
        return b""

    return grpc.unary_unary_rpc_method_handler(put)


server = grpc.server(ThreadPoolExecutor(worker.nodes))
server.add_generic_rpc_handlers(
    (
        grpc.method_handlers_generic_handler(
            "bench", {f"put{peer}": put_from(peer) for peer in worker.peers}
        ),
    )
)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
ports = worker.meet(str(port))
channels = [grpc.insecure_channel(f"127.0.0.1:{ports[peer]}") for peer in worker.peers]
calls = [channel.unary_unary(f"/bench/put{worker.rank}") for channel in channels]
for channel in channels:
    grpc.channel_ready_future(channel).result(RUN_DEADLINE_S)


def make_step(size: int) -> Callable[[], Any]:
    mine, total = worker.payload(size), worker.payload(size)

    def step() -> Any:
        payload = mine.tobytes()
        answers = [call.future(payload) for call in calls[1:]]
        calls[0](payload)  # waits without the help of another thread: faster
        np.copyto(total, mine)
        for inbox in inboxes.values():
            np.add(total, np.frombuffer(inbox.get(), np.float32), out=total)
        for answer in answers:
            answer.result()
        return total

    return step


worker.serve(timed(worker, make_step))
