"""The labelling page in a real Chromium: by keyboard alone, through a reload, by pointer, on a phone, hostile text."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rankalign.data.records import CandidateSet, Response, read
from rankalign.interactive.pages.label import LabelServer
from rankalign.interactive.ranking import Session, shown_order
from tests.unit.chromium import BROWSER, listened, playwright

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

HOSTILE = [
    "<script>document.title = 'pwned'; console.log('pwned')</script>",
    "<img src=x onerror=\"document.title='pwned'\"> </li></ul><iframe src=https://evil.example></iframe>",
    "pay \u202etxet esrever\u202c and \x1b[31mred\x07 zero\u200bwidth \U000e0041tag",
    "",
    "مرحبا بالعالم",
    "line one\r\nline two\n\n\tindented " + "verylongword" * 40,
]


def make_sets(count: int = 10, width: int = 4) -> list[CandidateSet]:
    return [
        CandidateSet(f"set-{k}", [{"role": "user", "content": f"Question {k}?"}], [
            Response(f"answer {k}.{i}", f"model-{i}", scores={"rm": float(i)}) for i in range(width)
        ])
        for k in range(count)
    ]  # fmt: skip


Opener = Callable[..., Any]


@pytest.fixture
def label(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    """Opens the page for an annotator; at the end, nothing was complained of and nothing left the loopback address."""
    undo: list[Callable[[], Any]] = []

    def opened(sets: list[CandidateSet], annotator: str = "ann", **context: Any) -> Any:
        session = Session(sets, tmp_path / "out.jsonl", annotator)
        server = LabelServer(session)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        own = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **context})
        page = listened(own.new_page())
        page.session, page.server = session, server

        def close() -> None:
            own.close()
            server.shutdown()
            thread.join()
            server.server_close()
            session.__exit__()
            assert page.heard == []
            assert all(url.startswith((f"http://127.0.0.1:{server.server_port}/", "data:")) for url in page.asked)

        undo.append(close)
        page.goto(server.url)
        page.wait_for_selector(".card, #end:not([hidden])")
        return page

    yield opened
    for close in reversed(undo):
        close()


def at_set(page: Any, number: int) -> None:
    playwright.expect(page.locator("#title")).to_have_text(re.compile(f"^Set {number} of"))


def shown(page: Any) -> list[str]:
    return page.locator(".card .text").all_inner_texts()


def ranking(page: Any) -> list[list[str]]:
    """The ranking as the page shows it, as numbers of answers."""
    return [rank.locator(".chip").all_inner_texts() for rank in page.locator("#ranking .rank").all()]


def keys(page: Any, *names: str) -> None:
    for name in names:
        page.keyboard.press(name)


def saved(page: Any, at: int, levels: list[list[int]]) -> None:
    """Wait until the draft, in places as shown, is on disk."""
    record = page.session.queue[at]
    order = shown_order(record, page.session.annotator, 0)
    wanted = [[order[place] for place in level] for level in levels]
    for _ in range(200):
        if page.session.rankings.drafts.get(record.id) == wanted:
            return
        page.wait_for_timeout(20)
    pytest.fail(f"draft is {page.session.rankings.drafts.get(record.id)}, not {wanted}")


def test_ten_sets_by_keyboard_with_a_reload_a_tie_a_skip_and_an_undo(label: Opener, tmp_path: Path) -> None:
    sets = make_sets()
    page = label(sets)
    order = {k: shown_order(record, "ann", 0) for k, record in enumerate(sets)}
    expected: dict[int, list[list[int]]] = {}

    def rank(k: int, *strokes: str, levels: list[list[int]]) -> None:
        at_set(page, k + 1)
        assert shown(page) == [f"answer {k}.{i}" for i in order[k]]
        keys(page, *strokes, "Enter")
        expected[k] = [[order[k][place] for place in level] for level in levels]

    rank(0, "3", "1", "4", "2", levels=[[2], [0], [3], [1]])
    rank(1, "2", "=", "3", "1", "4", levels=[[1, 2], [0], [3]])  # a tie
    rank(2, "1", "Shift+Digit2", "4", "3", levels=[[0, 1], [3], [2]])  # a tie in one stroke
    at_set(page, 4)
    keys(page, "4", "2")
    saved(page, 3, [[3], [1]])
    page.reload()  # in the middle of a set
    at_set(page, 4)
    assert ranking(page) == [["4"], ["2"]]
    rank(3, "1", "3", levels=[[3], [1], [0], [2]])
    at_set(page, 5)
    keys(page, "s")  # skipped
    rank(5, "1", "2", "Backspace", "3", "2", "4", levels=[[0], [2], [1], [3]])  # a step taken back
    at_set(page, 7)
    keys(page, "u")  # the commit taken back
    at_set(page, 6)
    assert ranking(page) == [["1"], ["3"], ["2"], ["4"]]
    rank(5, "u", "u", "4", "2", levels=[[0], [2], [3], [1]])
    at_set(page, 7)
    keys(page, "ArrowDown", "ArrowDown", "Space", "ArrowUp", "Shift+Space", "Enter")
    assert "2 answers are not placed" in page.locator("#status").inner_text()
    keys(page, "Enter")  # the rest is left out on purpose
    expected[6] = [[order[6][1], order[6][0]]]
    for k in (7, 8, 9):
        rank(k, "4", "3", "2", "1", levels=[[3], [2], [1], [0]])
    page.wait_for_selector("#end:not([hidden])")
    assert page.locator("#title").inner_text() == "All 10 sets are done"
    assert "ranked 9 and skipped 1" in page.locator("#summary").inner_text()
    found = list(read(tmp_path / "out.jsonl"))
    for k, (record, before) in enumerate(zip(found, sets, strict=True)):
        scores: list[float | None] = [None] * 4
        for depth, level in enumerate(expected.get(k, [])):
            for index in level:
                scores[index] = float(len(expected[k]) - depth)
        assert record.scores("ann") == scores, record.id
        assert record.scores("rm") == before.scores("rm")
        assert [r.text for r in record.responses] == [r.text for r in before.responses]


def test_a_second_annotator_sees_another_order_and_then_the_agreement(label: Opener, tmp_path: Path) -> None:
    sets = make_sets(3)
    first, second = label(sets, "ann"), label(sets, "bob")
    assert shown(first) != shown(second)
    assert sorted(shown(first)) == sorted(shown(second))
    for page, taken in ((first, (0, 1, 2, 3)), (second, (0, 1, 3, 2))):  # of six pairs, the two agree on five
        for k in range(3):
            at_set(page, k + 1)
            texts = shown(page)
            keys(page, *(str(texts.index(f"answer {k}.{i}") + 1) for i in taken), "Enter")
        page.wait_for_selector("#end:not([hidden])")
    assert "no agreement" in first.locator("#agreement").inner_text()
    cells = {
        row.locator("th").inner_text(): row.locator("td").first.inner_text() for row in second.locator("tbody tr").all()
    }
    assert cells["Kendall’s tau-b"] == "0.667"
    assert set(cells) == {"Kendall’s tau-b", "Krippendorff’s alpha", "rankings all tied, without tau-b"}
    assert "ann, bob on 3 sets" in second.locator("caption").inner_text()
    assert [r.scores for r in next(iter(read(tmp_path / "out.jsonl"))).responses] == [
        {"rm": float(i), "ann": 4.0 - i, "bob": b} for i, b in enumerate([4.0, 3.0, 1.0, 2.0])
    ]


def drag(page: Any, source: Any, target: Any) -> None:
    a, b = source.bounding_box(), target.bounding_box()
    page.mouse.move(a["x"] + a["width"] / 2, a["y"] + a["height"] / 2)
    page.mouse.down()
    page.mouse.move(b["x"] + b["width"] / 2, b["y"] + b["height"] / 2, steps=4)
    page.mouse.up()


def test_dragging_places_ties_reorders_and_takes_out(label: Opener) -> None:
    page = label(make_sets(1))
    handle, gaps = page.locator(".handle"), page.locator("#ranking .gap")
    drag(page, handle.nth(1), gaps.nth(0))
    assert ranking(page) == [["2"]]
    drag(page, handle.nth(3), gaps.nth(1))
    assert ranking(page) == [["2"], ["4"]]
    drag(page, handle.nth(0), gaps.nth(1))
    assert ranking(page) == [["2"], ["1"], ["4"]]
    drag(page, handle.nth(2), page.locator(".rank").nth(2).locator(".note"))
    assert ranking(page) == [["2"], ["1"], ["4", "3"]]
    drag(page, page.locator(".chip").nth(0), gaps.nth(3))
    assert ranking(page) == [["1"], ["4", "3"], ["2"]]
    drag(page, page.locator(".chip").nth(0), page.locator("#answers"))
    assert ranking(page) == [["4", "3"], ["2"]]
    handle.nth(0).click()
    page.locator(".chip").nth(1).click()
    assert ranking(page) == [["4"], ["2"], ["1"]]
    handle.nth(2).click(modifiers=["Shift"])
    page.locator("#undo").click()
    assert ranking(page) == [["4"], ["2"], ["1"]]
    saved(page, 0, [[3], [1], [0]])


def test_tied_answers_stay_in_the_order_they_were_put(label: Opener) -> None:
    page = label(make_sets(1))
    keys(page, "4", "=", "2", "=", "3")
    wanted = [["4", "2", "3"]]
    assert ranking(page) == wanted
    saved(page, 0, [[3, 1, 2]])
    page.reload()
    page.wait_for_selector(".card")
    assert ranking(page) == wanted


def test_cards_are_wide_enough_to_read_and_one_column_is_remembered(label: Opener) -> None:
    page = label(make_sets(2))
    lefts = "[...new Set([...document.querySelectorAll('.card')].map((c) => Math.round(c.getBoundingClientRect().x)))]"
    widths = "[...document.querySelectorAll('.card')].map((card) => card.getBoundingClientRect().width)"
    assert len(page.evaluate(lefts)) == 2
    assert min(page.evaluate(widths)) >= 480
    keys(page, "c")
    playwright.expect(page.locator("#columns")).to_have_attribute("aria-pressed", "true")
    assert len(page.evaluate(lefts)) == 1
    keys(page, "1", "2")  # no step is lost
    assert ranking(page) == [["1"], ["2"]]
    page.reload()
    page.wait_for_selector(".card")
    assert len(page.evaluate(lefts)) == 1
    page.locator("#columns").click()
    playwright.expect(page.locator("#columns")).to_have_attribute("aria-pressed", "false")
    assert len(page.evaluate(lefts)) == 2


def test_going_back_and_committing_anew_replaces_the_ranking(label: Opener) -> None:
    page = label(make_sets(2, 2))
    keys(page, "1", "2", "Enter")
    at_set(page, 2)
    keys(page, "p")
    at_set(page, 1)
    assert "Ranked already" in page.locator("#status").inner_text()
    assert ranking(page) == [["1"], ["2"]]
    keys(page, "1", "1", "Enter")
    at_set(page, 2)
    order = shown_order(page.session.queue[0], "ann", 0)
    assert page.session.rankings.done["set-0"] == [[order[1]], [order[0]]]
    assert page.session.counts()["left"] == 1


def test_enter_needs_two_answers_and_says_so(label: Opener) -> None:
    page = label(make_sets(1))
    for strokes in ((), ("2",)):
        keys(page, *strokes, "Enter")
        assert "Place two answers or more" in page.locator("#status").inner_text()
    assert page.session.counts()["left"] == 1


def test_the_finish_button_stops_the_server(label: Opener) -> None:
    page = label(make_sets(1, 2))
    keys(page, "2", "1", "Enter")
    page.locator("#finish").click()
    playwright.expect(page.locator("#title")).to_have_text("Finished")
    assert page.locator("button:enabled").count() == 0


def test_a_step_that_cannot_be_saved_is_kept_and_said(label: Opener) -> None:
    page = label(make_sets(1))
    page.context.set_offline(True)
    keys(page, "2", "1")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "does not answer" in page.locator("#trouble").inner_text()
    page.heard.clear()  # the browser's own complaint
    page.context.set_offline(False)
    keys(page, "4")
    saved(page, 0, [[1], [0], [3]])
    page.wait_for_selector("#trouble", state="hidden")


def test_without_the_token_there_is_nothing_to_see(label: Opener) -> None:
    page = label(make_sets(1))
    page.goto("about:blank")
    page.goto(page.server.url.split("#")[0])
    page.wait_for_selector("#trouble:not([hidden])")
    assert "address that the command printed" in page.locator("#trouble").inner_text()
    assert page.locator(".card").count() == 0
    page.heard.clear()  # 403, says the browser


def hostile_sets() -> list[CandidateSet]:
    return [CandidateSet(HOSTILE[0], HOSTILE[0] + HOSTILE[2], [Response(text, HOSTILE[1]) for text in HOSTILE])]


def test_hostile_text_is_shown_and_nothing_of_it_acts(label: Opener) -> None:
    page = label(hostile_sets())
    texts = "\n".join(shown(page))
    for text in (HOSTILE[0], "</li></ul><iframe", "U+202E", "U+001B", "U+0007", "U+200B", "U+E0041", "(empty)"):
        assert text in texts
    assert not {"\u202e", "\x1b", "\x07", "\u200b", "\U000e0041"} & set(texts + page.locator("#prompt").inner_text())
    assert page.locator("main img, main iframe, main script").count() == 0
    assert page.locator(".card").count() == len(HOSTILE)
    assert page.title() == "0/1 rankalign label"


def test_the_policy_of_the_page_stops_script_that_got_in(label: Opener) -> None:
    page = label(make_sets(1))
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    page.wait_for_timeout(200)
    assert page.title() != "1"
    assert page.heard  # the browser says what it refused
    page.heard.clear()


TRAIL = """() => {
  const node = document.activeElement, box = node.getBoundingClientRect();
  return [[...document.querySelectorAll('*')].indexOf(node), node.tagName, node.id || node.className,
    box.width * box.height > 0, getComputedStyle(node).outlineStyle,
    node.getAttribute('aria-label') || node.textContent];
}"""


def test_tab_reaches_everything_in_order_and_shows_where_it_is(label: Opener) -> None:
    page = label(make_sets(2))
    keys(page, "1", "2")
    trail = []
    page.focus("#help")
    for _ in range(30):
        trail.append(page.evaluate(TRAIL))
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "BODY":
            break
    places = [place for place, *_ in trail]
    assert places == sorted(set(places))
    assert all(visible and outline != "none" and name.strip() for *_, visible, outline, name in trail)
    names = [name for _, _, name, *_ in trail]
    assert names == ["help", "next", "columns", *["handle"] * 4, *["chip"] * 2, "undo", "skip", "commit"]


def test_the_help_opens_by_key_and_holds_the_others_back(label: Opener) -> None:
    page = label(make_sets(1))
    keys(page, "?", "1", "s")
    assert page.locator("#keys").is_visible()
    keys(page, "Escape")
    assert not page.locator("#keys").is_visible()
    assert ranking(page) == []


CONTRAST = """(selector) => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number)
      .map((v) => (v /= 255, v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const node = document.querySelector(selector);
  let ground = node;
  while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
  const [a, b] = [getComputedStyle(node).color, getComputedStyle(ground).backgroundColor]
    .map(light).sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(label: Opener, scheme: str) -> None:
    page = label(hostile_sets(), color_scheme=scheme)
    keys(page, "1", "3", "2")
    places = [".card.placed .place", ".card:not(.placed) .place", ".card .text", ".sign", ".chip", ".handle", ".role"]
    for selector in ["body", ".note", "#commit", "#help", "#status", *places]:
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number)")
    assert (sum(paper[:3]) > 600) == (scheme == "light")


def test_a_phone_needs_no_sideways_scrolling_and_the_finger_ranks(label: Opener) -> None:
    page = label(hostile_sets() + make_sets(1), viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        "[...document.querySelectorAll('main *, .bar *, .top *')].filter((node) => node.textContent.trim()"
        " && parseFloat(getComputedStyle(node).fontSize) < 13).length"
    )
    assert small == 0
    for index in (5, 0, 2):
        page.locator(".handle").nth(index).tap()
    assert ranking(page) == [["6"], ["1"], ["3"]]
    for button in page.locator(".handle, .chip, .actions button").all():
        assert button.bounding_box()["height"] >= 40
    bars = [page.locator(name).bounding_box() for name in ("#undo", "#skip", "#commit")]
    assert all(a["x"] + a["width"] <= b["x"] and a["y"] == b["y"] for a, b in itertools.pairwise(bars))
