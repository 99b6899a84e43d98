"""The page in Chromium, on a cluster of two nodes and on a server that plays bad ones."""

from __future__ import annotations

import json
import shutil
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.conftest import unused_port
from tests.server.serving import Server, serving
from zmoe.server import page

if not (shutil.which("chromium") and shutil.which("chromedriver")):
    reason = "there is no chromium with chromedriver (Debian: chromium, chromium-driver)"
    pytest.skip(reason, allow_module_level=True)


PATIENCE_S = 60.0
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800")


class Browser:
    """A page in Chromium."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options, service)

    def open(self, url: str, width: int = 1280) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(url)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def until(self, happens: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not happens():
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.05)

    def send(self, text: str) -> None:
        self.find("#prompt").send_keys(text, Keys.ENTER)

    def wait_for_the_answer(self) -> None:
        self.until(lambda: self.all(".assistant") and not self.all(".busy"))

    def set(self, **fields: str) -> None:
        """Set fields of the settings, and close them."""
        self.find("#open-settings").click()
        for name, value in fields.items():
            self.find(f"#{name}").clear()
            self.find(f"#{name}").send_keys(value)
        self.find("#settings .primary").click()

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def complaints(self) -> list[str]:
        """What the console says, but for answers with an error, which some tests want."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if "Failed to load resource" not in e["message"]]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """One without anything to complain of; each test begins with what nobody has set."""
    yield chromium
    found = chromium.complaints()
    chromium.run("if (location.host) { localStorage.clear(); sessionStorage.clear(); }")
    assert found == []


# ---- on a real server ----------------------------------------------------------------


def test_a_chat(browser: Browser, server: Server) -> None:
    """The answers are those that the API gives for the same messages."""
    browser.open(server.url)
    browser.set(temperature="0", max_tokens="40")
    messages: list[dict[str, str]] = []
    for turn, asked in enumerate(("ROMEO:", "JULIET:")):
        browser.send(asked)
        browser.wait_for_the_answer()
        messages.append({"role": "user", "content": asked})
        body = {"messages": messages, "temperature": 0, "max_tokens": 40}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        content = answer["choices"][0]["message"]["content"]
        shown = browser.all(".assistant .text")[turn]
        assert shown.get_property("textContent").strip() == content.strip() != ""
        messages.append({"role": "assistant", "content": content})
    assert "tokens/s" in browser.text(".assistant:last-child .meta")
    assert [each.text for each in browser.all(".user")] == ["ROMEO:", "JULIET:"]
    browser.find("#new").click()
    assert browser.all(".message") == []


def test_the_settings_are_sent_and_kept(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.set(system="Speak as a king.", temperature="1.5", top_p="0.5", max_tokens="3", seed="7")
    browser.driver.refresh()
    browser.run(
        "const real = window.fetch; window.sent = [];"
        "window.fetch = (path, o) => (o.body && window.sent.push(o.body), real(path, o));"
    )
    browser.send("ROMEO:")
    browser.wait_for_the_answer()
    body = json.loads(browser.run("return window.sent[0]"))
    assert body == {
        "messages": [
            {"role": "system", "content": "Speak as a king."},
            {"role": "user", "content": "ROMEO:"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 1.5,
        "top_p": 0.5,
        "max_tokens": 3,
        "seed": 7,
    }
    assert "3 tokens" in browser.text(".assistant .meta")
    assert "ended at the limit" in browser.text(".assistant .meta")


def test_settings_that_cannot_be(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.set(temperature="9")
    assert "Temperature" in browser.text("#settings-problem")
    assert browser.find("#settings").get_property("open")
    assert browser.find("#temperature") == browser.driver.switch_to.active_element
    browser.find("#reset").click()
    browser.find("#settings .primary").click()
    assert not browser.find("#settings").get_property("open")


@pytest.mark.parametrize("by", ["button", "escape"])
def test_stop(browser: Browser, server: Server, by: str) -> None:
    browser.open(server.url)
    browser.send("KING")
    browser.until(lambda: browser.all(".busy .text") and browser.text(".busy .text"))
    assert not browser.find("#send").is_displayed()
    if by == "button":
        browser.find("#stop").click()
    else:
        browser.find("#prompt").send_keys(Keys.ESCAPE)
    browser.wait_for_the_answer()
    assert "stopped" in browser.text(".assistant .meta")
    assert browser.find("#send").is_displayed() and not browser.find("#stop").is_displayed()
    state = f"{server.url}/v1/cluster"
    browser.until(lambda: httpx.get(state).json()["queue"]["running"] == 0)


def test_what_the_server_refuses_is_told(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.run("document.getElementById('prompt').value = 'ROMEO '.repeat(2000)")
    browser.send("")
    browser.wait_for_the_answer()
    assert "context" in browser.text(".error")
    assert browser.find(".error").get_attribute("role") == "alert"
    browser.find(".retry").click()
    browser.wait_for_the_answer()
    assert len(browser.all(".assistant")) == 1


def test_the_cluster(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.set(max_tokens="60")
    browser.send("KING")
    browser.wait_for_the_answer()
    browser.until(lambda: "%" in browser.text(".legend"))
    state = httpx.get(f"{server.url}/v1/cluster").json()
    assert browser.text("#status") == "ready" and browser.text("#model") == "zmoe-tiny"
    rows = [row.text for row in browser.all("#nodes tr")]
    assert len(rows) == 2
    for row, node in zip(rows, state["nodes"]):
        assert "8 of 16" in row and "50% of all" in row and "MiB" in row
        assert all(str(port) in row for port in node["listens"])
    assert "leader" in rows[0] and "linked" in rows[1]
    widths = browser.run(
        "return [...document.querySelectorAll('#bar i')].map(i => parseFloat(i.style.width))"
    )
    assert len(widths) == 4 and sum(widths) == pytest.approx(100)
    about = browser.text("#about")
    for known in ("dbrx", "decentralized", state["compute"], state["placement"]["name"]):
        assert known in about


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out(browser: Browser, server: Server, width: int) -> None:
    browser.open(server.url, width)
    browser.until(lambda: browser.text("#status") == "ready")
    for view in ("cluster", "chat"):
        if width < 960:
            browser.find(f".views [data-view={view}]").click()
            assert browser.find(f".{view}").is_displayed()
        wide = browser.run("return document.documentElement.scrollWidth")
        assert wide <= width
        inner = browser.run(
            "return [...document.querySelectorAll('.cluster, .scroller')]"
            ".filter(e => e.scrollWidth > e.clientWidth).map(e => e.className)"
        )
        assert inner == []


def test_a_screen_reader_has_names_for_everything(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.until(lambda: browser.text("#status") == "ready")

    def check(selectors: str) -> None:
        shown = [element for element in browser.all(selectors) if element.is_displayed()]
        assert shown
        for element in shown:
            assert element.accessible_name, element.get_attribute("outerHTML")

    check("button, textarea, aside, section, nav, table, meter")
    browser.find("#open-settings").click()
    check("dialog, dialog button, dialog input, dialog textarea")
    browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.find("#settings").get_property("open")


def test_a_key(browser: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-ours\n")
    keys.chmod(stat.S_IRUSR)
    with serving("--api-key-file", str(keys)) as guarded:
        browser.open(guarded.url)
        browser.until(lambda: browser.find("#key-form").is_displayed())
        browser.find("#key").send_keys("another-key", Keys.ENTER)
        browser.until(lambda: "does not know" in browser.text("#key-problem"))
        browser.find("#key").send_keys("a-key-of-ours", Keys.ENTER)
        browser.until(lambda: browser.text("#status") == "ready")
        assert not browser.find("#key-form").is_displayed()
        browser.set(max_tokens="4")
        browser.send("KING")
        browser.wait_for_the_answer()
        assert browser.all(".error") == []
        browser.driver.get("about:blank")  # or it would go on asking a server that closes


# ---- on one that plays a part ------------------------------------------------------------


class Stage:
    """A server with the page, whose answers the tests write."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.cluster: dict[str, Any] = {"status": "loading", "reason": None, "nodes": []}
        self.cluster["model"] = {"id": "a model"}
        routes = [
            *page.routes(),
            Route("/v1/cluster", self._cluster),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        port = unused_port()
        config = uvicorn.Config(Starlette(routes=routes), port=port, log_level="error")
        self.url, self.server = f"http://127.0.0.1:{port}", uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)

    def says(self, *deltas: dict[str, str], end: str = "data: [DONE]\n\n") -> None:
        chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        self.events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + [end]

    async def _cluster(self, _: Request) -> Response:
        return JSONResponse(self.cluster)

    async def _chat(self, _: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield ": keep-alive\n\n"
            for event in self.events:
                half = len(event) // 2
                yield event[:half]
                yield event[half:]

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture
def stage(browser: Browser) -> Iterator[Stage]:
    stage = Stage()
    browser.open(stage.url)
    yield stage
    browser.driver.get("about:blank")
    stage.close()


def test_reasoning_is_folded(browser: Browser, stage: Stage) -> None:
    stage.says({"reasoning_content": "Let me "}, {"reasoning_content": "see."}, {"content": "Yes."})
    browser.send("Is it?")
    browser.wait_for_the_answer()
    assert browser.text(".text") == "Yes."
    assert not browser.find(".reasoning div").is_displayed()
    browser.find(".reasoning summary").click()
    assert browser.text(".reasoning div") == "Let me see."


def test_text_is_no_html(browser: Browser, stage: Stage) -> None:
    bad = "<img src=x onerror=alert(1)><b>no</b>"
    stage.says({"content": f"{bad} and `{bad}`, **bold**\n\n```html\n{bad}\n```\nlast"})
    browser.send(bad)
    browser.wait_for_the_answer()
    assert browser.all(".message img, .message b") == []
    assert browser.text(".user") == bad
    codes = [code.get_property("textContent") for code in browser.all(".text code")]
    assert codes == [bad, bad]
    assert browser.text(".text strong") == "bold"
    assert browser.text(".text").startswith(bad) and browser.text(".text").endswith("last")


def test_an_error_within_a_stream(browser: Browser, stage: Stage) -> None:
    error = {"error": {"message": "the cluster has ended", "type": "server_error"}}
    stage.says({"content": "So far"}, end=f"data: {json.dumps(error)}\n\n")
    browser.send("Go on")
    browser.wait_for_the_answer()
    assert browser.text(".text") == "So far"
    assert browser.text(".error") == "the cluster has ended"


def test_a_stream_that_breaks_off(browser: Browser, stage: Stage) -> None:
    stage.says({"content": "So far"}, end="")
    browser.send("Go on")
    browser.wait_for_the_answer()
    assert "broke off" in browser.text(".error")


def test_a_cluster_that_loads_fails_and_goes(browser: Browser, stage: Stage) -> None:
    browser.until(lambda: browser.text("#status") == "loading")
    assert browser.text("#empty-text") == "The model is loading."
    stage.cluster |= {"status": "failed", "reason": "node 1 was lost"}
    browser.until(lambda: browser.text("#status") == "failed")
    assert browser.text("#trouble") == "node 1 was lost"
    stage.close()
    browser.until(lambda: browser.text("#status") == "unreachable")
    assert "cannot be reached" in browser.text("#trouble")
    browser.send("Hello?")
    browser.wait_for_the_answer()
    assert "cannot be reached" in browser.text(".error")
