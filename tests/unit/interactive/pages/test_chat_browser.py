"""The page of ``rankalign chat`` in a real Chromium, by gradio_client, and under hostile requests."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rankalign.data.records import CandidateSet, Response, read
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.interactive.conversation import Chat, Options
from rankalign.interactive.votes import VoteFile
from rankalign.models import tiny
from tests.unit.chromium import BROWSER, playwright

pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
HOSTILE = (
    "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script> **b** def f():\n    ok 中😀"
)


class Scripted(HFEngine):
    """Says what it is told to, a piece at a time; between pieces it waits for ``go``."""

    def __init__(self, name: str, answers: list[list[str]], go: threading.Event | None = None) -> None:
        super().__init__(Policy(name, model=f"model-of-{name}"))
        self.answers, self.go, self.stopped = answers, go, threading.Event()

    def stream(self, prompt: CandidateSet, stopping: Callable[[], bool] = lambda: False) -> Iterator[Response]:
        pieces = self.answers.pop(0)
        for text in itertools.accumulate(pieces):
            yield Response(text, self.policy.name, finished=text == "".join(pieces))
            while self.go is not None and not self.go.wait(0.02) and not stopping():
                pass
            if stopping():
                self.stopped.set()
                return


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Callable[..., Any]:
    from rankalign.interactive.pages.chat import Served

    def start(chat: Chat, options: Options | None = None) -> Any:
        served = Served(chat, options or Options())
        request.addfinalizer(served.close)
        return served

    return start


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[[str], Any]]:
    contexts = []

    def opened(url: str) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 1000}))
        page = contexts[-1].new_page()
        page.heard, page.asked = [], []
        page.on("console", lambda m: page.heard.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("request", lambda r: page.asked.append(r.url))
        page.on("response", lambda r: page.heard.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.set_default_timeout(120_000)  # a busy machine
        page.goto(url)
        page.wait_for_selector("#message textarea")
        return page

    yield opened
    for context in contexts:
        for page in context.pages:
            away = [
                u for u in page.asked if urlsplit(u).hostname != "127.0.0.1" and not u.startswith(("data:", "blob:"))
            ]
            assert away == []
            assert page.heard == []
            assert "pwned" not in page.title()
        context.close()


def say(page: Any, text: str) -> None:
    page.fill("#message textarea", text)
    page.click("#send")


def last(page: Any, pane: int = 0) -> Any:
    return page.locator(f"#pane{pane} .bot.message, #pane{pane} .message.bot").last


@needs_browser
def test_votes_side_by_side(serve: Any, open_page: Any, tmp_path: Path) -> None:
    go = threading.Event()
    base = Scripted("base", [["Base one.", HOSTILE], ["base two"]], go)
    aligned = Scripted("aligned", [["Aligned", " one."], ["aligned two"]], go)
    with contextlib.closing(VoteFile(tmp_path / "votes.jsonl")) as votes:
        served = serve(Chat([base, aligned], seed=3, votes=votes, voter="ann"))
        page = open_page(served.url)
        assert page.locator("#vote-left").is_disabled()
        say(page, "Why? <b>你好</b>")
        page.get_by_text("Base one.").wait_for()
        page.screenshot(path=tmp_path / "streaming.png")
        assert page.get_by_text("one.", exact=True).count() == 0
        go.set()
        page.get_by_text("Aligned one.").wait_for()
        playwright.expect(page.locator("#vote-tie")).to_be_enabled(timeout=120_000)
        for text in ("<b>你好</b>", "<img src=x onerror", "**b** def f():\n    ok 中😀"):
            assert text in page.locator("#pane0").inner_text() + page.locator("#pane1").inner_text()
        assert page.locator("#pane0 img[src=x], #pane1 img[src=x], #pane0 b, #pane1 strong").count() == 0
        content = page.content()
        assert "model-of" not in content
        assert "aligned" not in content
        page.screenshot(path=tmp_path / "duel.png")
        side = "left" if "Aligned one." in page.locator("#pane0").inner_text() else "right"
        page.click(f"#vote-{side}")
        playwright.expect(page.locator("#vote-tie")).to_be_disabled(timeout=120_000)
        playwright.expect(page.locator("#status")).to_have_text(f"Stored: {side} is better. 1 vote in the file.")
        assert "Base one." not in page.locator("#pane0").inner_text() + page.locator("#pane1").inner_text()
        say(page, "And?")
        playwright.expect(page.locator("#vote-tie")).to_be_enabled(timeout=120_000)
        page.click("#vote-tie")
        playwright.expect(page.locator("#vote-tie")).to_be_disabled(timeout=120_000)
        first, second = read(tmp_path / "votes.jsonl")
    assert [r.policy for r in first.responses] == ["base", "aligned"]
    assert first.responses[0].text == "Base one." + HOSTILE
    assert first.scores("ann") == [0, 1]
    assert first.meta["vote"] == first.meta["left" if first.meta["left"] == "aligned" else "right"].replace(
        "aligned", side
    )
    assert second.scores("ann") == [0.5, 0.5]
    assert [m["content"] for m in second.prompt] == ["Why? <b>你好</b>", "Aligned one.", "And?"]


class Cut(Scripted):
    """One whose answers the token limit ends."""

    def stream(self, prompt: CandidateSet, stopping: Callable[[], bool] = lambda: False) -> Iterator[Response]:
        for response in super().stream(prompt, stopping):
            yield Response(response.text, response.policy, finished=False)


@needs_browser
def test_enter_sends_shift_enter_breaks_and_a_cut_answer_says_so(serve: Any, open_page: Any) -> None:
    options = Options(SamplingParams(max_new_tokens=7))
    page = open_page(serve(Chat([Cut("aligned", [["it ends in the mid"]])]), options).url)
    box = page.locator("#message textarea")
    box.fill("first")
    box.press("Shift+Enter")
    page.keyboard.type("second")
    assert box.input_value() == "first\nsecond"
    box.press("Enter")
    status = "The answer was cut at the limit of 7 tokens; “Most new tokens” under Settings raises it."
    playwright.expect(page.locator("#status")).to_have_text(status, timeout=120_000)
    assert "first\nsecond" in page.locator("#pane0").inner_text()
    assert box.input_value() == ""
    page.click("#fresh")
    playwright.expect(page.locator("#status")).to_have_text("", timeout=120_000)


@needs_browser
def test_votes_stay_in_reach_on_a_phone_and_the_pane_grows(serve: Any, open_page: Any, tmp_path: Path) -> None:
    speakers = [Scripted(name, [["word " * 300]]) for name in ("base", "aligned")]
    with contextlib.closing(VoteFile(tmp_path / "votes.jsonl")) as votes:
        page = open_page(serve(Chat(speakers, votes=votes)).url)
        page.set_viewport_size({"width": 390, "height": 844})
        empty = page.locator("#pane0").bounding_box()["height"]
        page.fill("#message textarea", "Why?")
        page.press("#message textarea", "Enter")
        playwright.expect(page.locator("#vote-tie")).to_be_enabled(timeout=120_000)
        assert page.locator("#pane0").bounding_box()["height"] > empty + 50
        for at in (0, 10_000):
            page.evaluate(f"scrollTo(0, {at})")
            for name in ("#vote-left", "#vote-right", "#vote-tie"):
                box = page.locator(name).bounding_box()
                assert 0 <= box["y"] <= 844 - box["height"]
                assert box["height"] >= 40
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_browser
def test_stop_keeps_what_is_there_and_new_forgets_it(serve: Any, open_page: Any, tmp_path: Path) -> None:
    engine = Scripted("aligned", [["One", " two"], ["again"], [""]], threading.Event())
    page = open_page(serve(Chat([engine])).url)
    say(page, "first")
    page.get_by_text("One", exact=True).wait_for()
    page.click("#stop")
    assert engine.stopped.wait(20)
    engine.go.set()
    page.wait_for_timeout(300)
    assert page.get_by_text("One", exact=True).count() == 1
    say(page, "second")
    page.get_by_text("again", exact=True).wait_for()
    page.get_by_text("Settings").click()
    page.wait_for_timeout(300)
    page.screenshot(path=tmp_path / "settings.png", full_page=True)
    limits = [(r.get_attribute("min"), r.get_attribute("max")) for r in page.locator("input[type=range]").all()]
    assert limits == [("0", "2"), ("0.05", "1"), ("0", "200"), ("1", "8"), ("1", "2048")]
    page.click("#fresh")
    page.get_by_text("again", exact=True).wait_for(state="detached")
    say(page, "third")
    page.get_by_text("the model ended at once").wait_for()


@pytest.fixture(scope="module")
def served_tiny() -> Iterator[Any]:
    from rankalign.interactive.pages.chat import Served

    engine = HFEngine(Policy("aligned", model="tiny"))
    engine.model, engine.tokenizer = tiny.build_model(), tiny.build_tokenizer()
    served = Served(Chat([engine]), Options())
    yield served, engine
    served.close()


def test_gradio_client_gets_what_sample_says(served_tiny: Any) -> None:
    served, engine = served_tiny
    client = gradio_client.Client(served.url, verbose=False)
    sampling = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=5)
    job = client.submit("Hi", "", 0.9, 0.95, 50, 1, 24, 5, "auto", api_name="/chat")
    final, parts = job.result(), job.outputs()
    prompt = CandidateSet("chat-00001", [{"role": "user", "content": "Hi"}])
    [[wanted]] = engine.under(Policy("aligned", model="tiny", sampling=sampling)).generate([prompt])
    assert final == wanted.text
    assert len(parts) > 10
    assert all(later.startswith(part) for part, later in itertools.pairwise(parts))
    assert parts[-1] == final
    with pytest.raises(Exception, match="temperature must not be negative"):
        client.predict("Hi", "", -1, api_name="/chat")


def ask(url: str, method: str, path: str, body: str | None = None, **headers: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in {**headers, **({"Content-Length": str(len(body))} if body else {})}.items():
            connection.putheader(name, value)
        connection.endheaders(body.encode() if body else None)
        return connection.getresponse().status
    finally:
        connection.close()


def test_other_hosts_and_origins_are_refused(served_tiny: Any) -> None:
    url = served_tiny[0].url
    port = urlsplit(url).port
    join = '{"data": ["x"], "fn_index": 0, "session_hash": "a"}'
    assert ask(url, "GET", "/") == 200
    assert ask(url, "GET", "/", Host=f"localhost:{port}", Origin=f"http://localhost:{port}") == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""):
        assert ask(url, "GET", "/config", Host=host) == 403
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", f"http://127.0.0.1:{port}1", "file://"):
        assert ask(url, "POST", "/gradio_api/queue/join", join, Origin=origin) == 403
        assert ask(url, "POST", "/gradio_api/call/chat", join, Origin=origin) == 403


def test_nothing_of_the_disk_is_served(served_tiny: Any, tmp_path: Path) -> None:
    url = served_tiny[0].url
    (tmp_path / "secret.txt").write_text("secret")
    for path in (tmp_path / "secret.txt", Path(__file__), "/etc/passwd", "pyproject.toml"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/assets/../../../../"):
            assert ask(url, "GET", f"{route}{path}") in (403, 404)
    for escape in ("/assets/%2e%2e/%2e%2e/routes.py", "/static/../../routes.py", "/assets//etc/passwd"):
        assert ask(url, "GET", escape) in (403, 404)
    assert ask(url, "POST", "/gradio_api/upload", "x") == 403
    assert ask(url, "GET", "/docs") == 403


def test_it_listens_on_loopback_alone(served_tiny: Any) -> None:
    assert served_tiny[0]._socket.getsockname()[0] == "127.0.0.1"
