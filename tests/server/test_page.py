"""The page, without a browser: its files, what they may do, and what they ask for."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.testclient import TestClient

from tests.server.serving import Server
from zmoe.server import page
from zmoe.server.security import Guard

FOLDER = Path(page.__file__).parent
SCRIPTS = sorted(FOLDER.glob("*.js"))


class Elements(HTMLParser):
    """All elements of a page: (tag, attributes)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def index() -> list[tuple[str, dict[str, str | None]]]:
    return Elements((FOLDER / "index.html").read_text()).found


def test_all_of_its_files_are_served(server: Server) -> None:
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for file in FOLDER.iterdir():
        if file.suffix == ".py" or file.name == "__pycache__":
            assert httpx.get(f"{server.url}/page/{file.name}").status_code == 404
            continue
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == 200 and answer.content == file.read_bytes(), path
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind == kinds.get(file.suffix[1:], "text/html")
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_comes_from_elsewhere(server: Server) -> None:
    """By the policy, and because nothing in the files asks for it."""
    policy = httpx.get(f"{server.url}/").headers["content-security-policy"]
    directives = dict(each.strip().partition(" ")[::2] for each in policy.split(";"))
    assert directives.pop("default-src") == "'none'"
    assert directives.pop("require-trusted-types-for") == "'script'"
    assert {"script-src", "style-src", "connect-src"} <= set(directives)
    assert {"frame-ancestors", "base-uri", "form-action"} <= set(directives)
    assert set(directives.values()) <= {"'self'", "'none'"}
    for file in FOLDER.glob("*.*"):
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\w://|@import|innerHTML|eval\(|document\.write", text), file


def test_nothing_is_inline() -> None:
    for tag, attributes in index():
        assert tag != "style" and "style" not in attributes, (tag, attributes)
        assert tag != "script" or attributes.get("src"), attributes
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)


def test_what_it_refers_to_is_there() -> None:
    served = {route.path for route in page.routes()}
    used = [a.get("src") or a.get("href") for _, a in index() if a.get("src") or a.get("href")]
    assert len(used) > 3
    ids = {attributes["id"] for _, attributes in index() if "id" in attributes}
    for reference in map(str, used):
        assert reference in served or reference.removeprefix("#") in ids, reference
    for script in SCRIPTS:
        text = script.read_text()
        assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= ids, script
        modules = re.findall(r'from "\./([\w.]+)"', text)
        assert {f"/page/{module}" for module in modules} <= served, script


def test_each_endpoint_that_it_calls_exists(server: Server) -> None:
    text = "".join(script.read_text() for script in SCRIPTS)
    called = set(re.findall(r'ask\("([^"]+)"', text))
    assert called == {"/v1/chat/completions", "/v1/cluster"}
    described = httpx.get(f"{server.url}/openapi.json").json()
    assert called <= set(described["paths"])
    chat = described["components"]["schemas"]["ChatRequest"]["properties"]
    sent = {"messages", "stream", "stream_options"}
    sent |= {str(a["name"]) for _, a in index() if "name" in a} - {
        "system",
        "viewport",
        "color-scheme",
    }
    assert {"temperature", "top_p", "max_tokens", "seed"} < sent <= set(chat)


def test_every_field_has_a_label_and_every_button_a_name() -> None:
    elements = index()
    labelled = {attributes.get("for") for tag, attributes in elements if tag == "label"}
    fields = [a for tag, a in elements if tag in ("input", "textarea")]
    assert len(fields) == 7
    assert all(attributes["id"] in labelled for attributes in fields)


def test_it_needs_no_key() -> None:
    """Or nobody could give one."""
    app = Guard(Starlette(routes=page.routes()), ["a-key-of-ours"], "127.0.0.1", 10.0)
    client = TestClient(app, base_url="http://localhost")
    for route in page.routes():
        assert client.get(route.path).status_code == 200
    assert client.get("/v1/cluster").status_code == 401
