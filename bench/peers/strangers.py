"""Strangers at the ports that are the arguments, until this process is ended.

It takes cores only when nobody else wants them, as if the strangers were on another machine. The
first argument says what they do: `silent` keeps 1,000 connections that say nothing, each made anew
when it is closed; a number makes so many connections each second, one after the other, each of
which shows a wrong token, and then sends a message that does not end.

`listen N` takes in such strangers at N ports, which it prints, in place of a run: what they cost
there is what their own work costs.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from contextlib import suppress

SILENT = 1000  # connections, among all ports
SILENCE_S = 5.0  # as zmoe has it
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"PLAIN".ljust(20, b"\0") + bytes(32)
HELLO = b"\x04\x11\x05HELLO\x04zmoe\x05guess"
PARTS = (b"\x01\xff" + bytes(255)) * 256


def connect(port: int) -> socket.socket | None:
    with suppress(OSError):  # too many files, say
        return socket.create_connection(("127.0.0.1", port), 5)
    return None


def silent(ports: list[int]) -> None:
    selector = selectors.DefaultSelector()

    def add(port: int) -> None:
        if end := connect(port):
            selector.register(end, selectors.EVENT_READ, port)

    for i in range(SILENT):
        add(ports[i % len(ports)])
    while True:
        for key, _ in selector.select():
            end = key.fileobj
            assert isinstance(end, socket.socket)
            with suppress(OSError):
                if end.recv(4096):
                    continue
            selector.unregister(end)
            end.close()
            add(key.data)


def wrong_tokens(ports: list[int], per_second: int) -> None:
    began = time.monotonic()
    count = 0
    while True:
        end = connect(ports[count % len(ports)])
        count += 1
        if end is not None:
            with suppress(OSError), end:  # refused
                end.sendall(GREETING + HELLO)
                while True:
                    end.sendall(PARTS)
        time.sleep(max(0.0, began + count / per_second - time.monotonic()))


def listen(count: int) -> None:
    """Close each connection that says something, or has said nothing for SILENCE_S."""
    selector = selectors.DefaultSelector()
    for _ in range(count):
        listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        selector.register(listener, selectors.EVENT_READ, listener)
        print(listener.getsockname()[1], flush=True)
    since: dict[socket.socket, float] = {}  # by age
    while True:
        ended = []
        for key, _ in selector.select(0.1):
            if key.data is not None:
                end, _ = key.data.accept()
                selector.register(end, selectors.EVENT_READ)
                since[end] = time.monotonic()
            else:
                ended.append(key.fileobj)
        until = time.monotonic() - SILENCE_S
        ended += [end for end, came in since.items() if came < until]
        for end in dict.fromkeys(ended):
            selector.unregister(end)
            end.close()
            del since[end]


if __name__ == "__main__":
    os.nice(19)
    kind, ports = sys.argv[1], [int(port) for port in sys.argv[2:]]
    if kind == "listen":
        listen(*ports)
    elif kind == "silent":
        silent(ports)
    else:
        wrong_tokens(ports, int(kind))
