"""The page of ``rankalign watch``: what it draws of a run that grows, hostile text, strangers, a phone."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.interactive.follow import Follower
from rankalign.interactive.pages.watch import WatchServer
from tests.unit.chromium import BROWSER, listened, playwright
from tests.unit.evaluation.report.test_report import HOSTILE
from tests.unit.interactive.test_follow import add, line

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[WatchServer]:
    with WatchServer(Follower(tmp_path / "run")) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def watch(browser: Any, served: WatchServer) -> Iterator[Callable[..., Any]]:
    contexts = []

    def opened(**context: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **context}))
        page = listened(contexts[-1].new_page())
        page.goto(served.url)
        page.wait_for_selector("#status span")
        return page

    yield opened
    for context in contexts:
        for page in context.pages:
            assert page.heard == []
            assert all(url.startswith((f"http://127.0.0.1:{served.server_port}/", "data:")) for url in page.asked)
            assert "pwned" not in page.title()
        context.close()


@needs_browser
def test_a_run_from_before_its_beginning_to_its_end(watch: Any, tmp_path: Path) -> None:
    page, folder = watch(), tmp_path / "run"
    playwright.expect(page.locator("#status")).to_contain_text("Waiting for the run to begin")
    add(folder / "log.jsonl", line(1, epoch=0.1) + line(2, epoch=0.2)[:12])
    playwright.expect(page.locator("#status")).to_contain_text("step 1", timeout=20_000)
    rest = "".join(line(s, grad_norm=1.0, rank_loss=0.1 * s) for s in range(3, 60))
    add(folder / "log.jsonl", line(2, epoch=0.2)[12:] + rest)
    playwright.expect(page.locator("#status")).to_contain_text("step 59", timeout=20_000)
    assert page.locator("figure h3").all_inner_texts() == ["Loss", "Gradient norm"]
    assert page.locator("figure").first.locator("path.thick").count() == 2
    ticks = page.locator("figure").first.locator("text[text-anchor=middle]").all_text_contents()
    assert ticks == ["20", "40"]
    box = page.locator("figure svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "step" in page.locator("figure .legend").first.inner_text()
    (folder / "log.jsonl").write_text(line(1, kl=0.5))  # begun anew
    playwright.expect(page.locator("#status")).to_contain_text("begun anew once", timeout=20_000)
    assert page.locator("figure h3").all_inner_texts() == ["Loss", "KL to the start model"]
    add(folder / "manifest.json", "{}")
    add(folder / "log.jsonl", line(2))
    playwright.expect(page.locator("#status")).to_contain_text("Finished", timeout=20_000)


def hostile_run(folder: Path) -> None:
    add(folder / "log.jsonl", line(1, warnings={HOSTILE[0]: HOSTILE[2]}) + line(2))
    answers = [Response(text, HOSTILE[1], scores={HOSTILE[0]: 1.0}) for text in (*HOSTILE, "long " * 400)]
    records.write(folder / "after.jsonl", [CandidateSet(HOSTILE[0], HOSTILE[2] + HOSTILE[5], answers)])


@needs_browser
def test_hostile_text_is_shown_and_nothing_of_it_acts(watch: Any, tmp_path: Path) -> None:
    hostile_run(tmp_path / "run")
    page = watch()
    page.wait_for_selector("#samples details")
    text = page.locator("main").inner_text()
    assert HOSTILE[0] in text
    assert "onerror" in text
    assert "U+202E" in text
    assert page.locator("main img, main iframe, main script, main b, main svg[onload]").count() == 0


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(watch: Any, tmp_path: Path, scheme: str) -> None:
    hostile_run(tmp_path / "run")
    page = watch(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme)
    page.wait_for_selector("#samples details")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # Letters in a drawing shrink with it.
    size = page.evaluate(
        "(() => { const svg = document.querySelector('svg'); "
        "return 14 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width; })()"
    )
    assert size >= 11


@needs_browser
def test_a_command_that_ended_is_said(watch: Any, served: WatchServer, tmp_path: Path) -> None:
    add(tmp_path / "run" / "log.jsonl", line(1))
    page = watch()
    page.context.set_offline(True)
    page.wait_for_selector("#trouble:not([hidden])", timeout=20_000)
    assert "does not answer" in page.locator("#trouble").inner_text()
    page.context.set_offline(False)
    page.wait_for_selector("#trouble", state="hidden", timeout=20_000)
    page.heard.clear()  # the browser's own complaint


def ask(server: WatchServer, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_only_the_page_itself_gets_an_answer(served: WatchServer, tmp_path: Path) -> None:
    add(tmp_path / "run" / "log.jsonl", line(1))
    token = {"Authorization": f"Bearer {served.token}"}
    status, body = ask(served, "GET", "/api/state?seen=", **token)
    assert status == 200
    state = json.loads(body)
    assert state["step"] == 1
    assert json.loads(ask(served, "GET", f"/api/state?seen={state['version']}", **token)[1]) == {
        "version": state["version"]
    }
    for strange in ({}, {"Authorization": "Bearer x"}, {**token, "Host": "evil.example"}, {**token, "Origin": "null"}):
        assert ask(served, "GET", "/api/state", **strange)[0] == 403
    assert ask(served, "POST", "/api/state", **token)[0] == 404
    for path in ("/../../etc/passwd", "/log.jsonl", "/run/log.jsonl"):
        assert ask(served, "GET", path, **token)[0] == 404
    assert served.server_address[0] == "127.0.0.1"
    assert len(served.token) >= 40
