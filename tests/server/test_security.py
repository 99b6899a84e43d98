"""Who is let in, and what strangers can hold up."""

from __future__ import annotations

import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.serving import Server, serving
from zmoe.errors import InputError
from zmoe.server.keys import read_api_keys

KEYS = ("first-key-0123", "second-key-4567")
BODY = {"messages": [{"role": "user", "content": "KING"}], "temperature": 0, "max_tokens": 4}


def key_file(folder: Path, text: str) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP)
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    text = f"# of the family\n\n{KEYS[0]}\n  {KEYS[1]}  \n"
    path = key_file(tmp_path_factory.mktemp("keys"), text)
    with serving("--api-key-file", str(path)) as server:
        yield server


def chat(server: Server, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=BODY, headers=headers, timeout=60)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_lets_in(guarded: Server, key: str) -> None:
    assert chat(guarded, Authorization=f"Bearer {key}").status_code == 200
    assert chat(guarded, **{"x-api-key": key}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": f"Bearer {KEYS[0][:-1]}"},
        {"x-api-key": "# of the family"},
        {"x-api-key": "ü"},
    ],
    ids=str,
)
def test_anything_else_does_not(guarded: Server, headers: dict[str, str]) -> None:
    given = {name: value.encode() for name, value in headers.items()}
    answer = httpx.post(f"{guarded.url}/v1/chat/completions", json=BODY, headers=given)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_health_is_open_and_nothing_else_is(guarded: Server) -> None:
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/v1/cluster", "/no/such", "//health", "/health/"):
        assert httpx.get(f"{guarded.url}{path}").status_code == 401, path


def test_keys_do_not_share_what_is_cached(guarded: Server) -> None:
    """How long the first token takes must not tell what others have asked."""
    body = {**BODY, "messages": [{"role": "user", "content": "KING " * 100}]}

    def cached(key: str) -> int:
        url, headers = f"{guarded.url}/v1/chat/completions", {"x-api-key": key}
        usage = httpx.post(url, json=body, headers=headers, timeout=60).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    first, again, other, other_again = map(cached, (KEYS[0], KEYS[0], KEYS[1], KEYS[1]))
    assert first == other == 0
    assert again == other_again >= 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("long-enough-key\nshort\n", "line 2: expected a key of at least 8"),
        ("a key with spaces\n", "line 1"),
        ("Schlüssel-0123\n", "line 1"),
    ],
)
def test_key_files_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_api_keys(key_file(tmp_path, text))


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": ""},
    ],
    ids=str,
)
def test_pages_of_others_are_refused(server: Server, headers: dict[str, str]) -> None:
    assert chat(server, **headers).status_code == 403


def test_our_own_page_is_served(server: Server) -> None:
    assert chat(server, Origin=server.url).status_code == 200
    name = f"localhost:{server.port}"
    assert chat(server, Host=name, Origin=f"http://{name}").status_code == 200


def test_who_listens_to_others_without_keys_is_warned() -> None:
    server = Server("--host", "0.0.0.0")
    server.wait_until_ready()
    code, said = server.end()
    assert code == 0
    assert said.count("\n") == 1
    assert "whoever reaches 0.0.0.0 may use this server" in said


def test_bodies_are_bounded(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    answer = httpx.post(url, content=b" " * (10 << 20), timeout=60)
    assert answer.status_code == 413
    assert "more than 8 MiB" in answer.json()["error"]["message"]
    assert httpx.post(url, content=b"[" * 100_000).status_code == 400
    assert chat(server).status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"]
)
def test_connections_without_a_request_hold_nobody_up(server: Server, sent: bytes) -> None:
    address = ("127.0.0.1", server.port)
    idle = [socket.create_connection(address) for _ in range(500)]
    try:
        for each in idle:
            each.sendall(sent)
        assert chat(server).status_code == 200
    finally:
        for each in idle:
            each.close()


def test_heads_are_bounded(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as stranger:
        stranger.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 20))
        assert stranger.recv(100).startswith(b"HTTP/1.1 400 ")
