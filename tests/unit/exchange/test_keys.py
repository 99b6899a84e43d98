"""Key files, and an exchange between ranks that have a key."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from zmoe.errors import InputError, LaunchError, ZmoeError
from zmoe.exchange import local
from zmoe.exchange.keys import KeyPair, read_key, write_new_key
from zmoe.exchange.local import Exchange, join
from zmoe.exchange.sockets import Context, Endpoint, bind


def test_a_new_file_is_its_owners_and_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "key"
    pair = write_new_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_key(file) == pair
    assert pair.secret not in repr(pair)
    with pytest.raises(InputError, match=f"key file {file} cannot be written: File exists"):
        write_new_key(file)
    file.chmod(0o440)  # as a Kubernetes secret is
    assert read_key(file) == pair


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "key"
    secret = KeyPair.fresh().secret
    with pytest.raises(InputError, match=f"key file {file} cannot be read: No such file"):
        read_key(file)
    for content, words in (
        (secret[:-1], "holds no key but 39 characters instead of 40"),
        ("", "0 characters"),
        (secret + "\n" + secret, "81 characters"),
        ("~" * 40, "characters that no key has"),
        ("\xff" * 40, "characters"),
    ):
        file.write_text(content)
        file.chmod(0o600)
        with pytest.raises(InputError, match=words):
            read_key(file)
    file.write_text(secret)
    for mode in (0o604, 0o602):
        file.chmod(mode)
        with pytest.raises(InputError, match=f"{file} is open to everyone: chmod o-rw {file}"):
            read_key(file)
    with pytest.raises(InputError, match="key file /dev/zero"):
        read_key("/dev/zero")


def joined(ports: list[int], keys: list[KeyPair | str | None]) -> list[object]:
    """What each rank's all-reduce gave, or how it failed."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    found: list[object] = [None] * len(ports)

    def take_part(rank: int) -> None:
        try:
            with join(rank, addresses, key=keys[rank], deadline_s=3) as exchange:
                found[rank] = exchange.all_reduce_numpy(np.full((1, 4), 1.5, np.float32)).sum()
        except ZmoeError as error:
            found[rank] = error

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(len(ports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_with_one_key_exchange_and_others_do_not(tmp_path: Path) -> None:
    write_new_key(tmp_path / "key")
    key, ports = str(tmp_path / "key"), [24870, 24872]
    assert joined(ports, [key, key]) == [12.0, 12.0]
    for mine in joined(ports, [key, KeyPair.fresh()]):
        assert isinstance(mine, LaunchError)
        assert "all need the key of this rank, whose public half is" in str(mine)


def test_without_a_key_ranks_are_of_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = [24874, 24876]
    assert joined(ports, [None, None]) == [12.0, 12.0]
    monkeypatch.setattr(local, "user_key", KeyPair.fresh)  # another one for each rank
    assert all(isinstance(mine, LaunchError) for mine in joined(ports, [None, None]))


def test_beyond_this_machine_links_need_a_key() -> None:
    with pytest.raises(InputError, match='"10.0.0.2:9800": beyond this machine links need a key'):
        join(0, ["127.0.0.1:9800", "10.0.0.2:9800"])


def test_a_peer_without_a_key_is_named() -> None:
    context = Context()
    with (
        Exchange(
            0,
            2,
            session=1,
            max_payload_bytes=4096,
            small_payload_bytes=64,
            context=context,
            keys=KeyPair.fresh(),
        ) as exchange,
        pytest.raises(InputError, match="rank 1 at 127.0.0.1:9 has no key"),
    ):
        exchange.start_connect([exchange.endpoint, Endpoint("127.0.0.1", 9, 10)])
    context.term()


class Taken:
    """A socket that is given ports of others `times` times."""

    def __init__(self, socket: zmq.Socket[bytes], times: int) -> None:
        self._socket, self._times = socket, times
        self.getsockopt_string = socket.getsockopt_string

    def bind(self, address: str) -> None:
        self._times -= 1
        if self._times >= 0:
            raise zmq.ZMQError(zmq.EADDRINUSE)
        self._socket.bind(address)


def test_a_port_that_another_process_was_given_too_is_tried_again() -> None:
    with Context() as context, context.socket(zmq.ROUTER) as socket:
        unlucky: Any = Taken(socket, 3)
        assert bind(unlucky, "127.0.0.1", 0) > 0
        hopeless: Any = Taken(socket, 1 << 20)
        with pytest.raises(InputError, match="cannot listen: 127.0.0.1 has no port free"):
            bind(hopeless, "127.0.0.1", 0)


def test_ports_are_those_of_the_range(free_port: int) -> None:
    ports = (free_port, free_port)
    with Context() as context, context.socket(zmq.ROUTER) as one, context.socket(zmq.XPUB) as other:
        assert bind(one, "127.0.0.1", 0, ports) == free_port
        with pytest.raises(InputError, match=f"no port free from {free_port} to {free_port}"):
            bind(other, "127.0.0.1", 0, ports)
