"""The report page in a real Chromium: nothing is fetched, no text runs, keys reach everything, a phone shows it all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankalign.data import records
from rankalign.evaluation.report import page as report
from rankalign.storage.jsonl import read_rows, write_rows
from tests.unit.chromium import BROWSER, listened, playwright
from tests.unit.evaluation.report.test_report import HOSTILE, make_run

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section, hostile text in each."""
    folder = make_run(tmp_path_factory.mktemp("run"), hostile=True)
    after = list(records.read(folder / "after.jsonl"))
    after[12].responses[0].text = after[12].responses[0].text.replace("something", f"nothing {HOSTILE[0]}")
    records.write(folder / "after.jsonl", after)
    rows = [
        {"id": HOSTILE[k % 4], "epoch": k // 4, "step": k, "loss": 1.0 + k % 3, "margin": (-1) ** k * 1.0, "tau": 0.5}
        for k in range(4, 12)
    ]
    write_rows(folder / "ledger.jsonl", rows)
    metrics = {"pairs": 9, "half_drift": 0.1, "half_max_drift": 2, "half_changed": 1, "half_unstable": 2}
    (folder / "numerics.json").write_text(json.dumps({"metrics": metrics, "n": 3}))
    example = {"record": HOSTILE[0], "message": HOSTILE[2] + " long" * 60}
    lint = {"records": 3, "findings": {"odd": 1}, "examples": {"odd": [example]}}
    (folder / "lint.json").write_text(json.dumps(lint))
    log = [row for _, row in read_rows(folder / "train" / "log.jsonl")]
    log[-2]["warnings"] = {HOSTILE[1]: HOSTILE[3]}
    write_rows(folder / "train" / "log.jsonl", log)
    return report.write_report(folder)


@pytest.fixture
def page(browser: Any, page_path: Path) -> Iterator[Any]:
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    opened = listened(context.new_page())
    opened.goto(page_path.as_uri())
    yield opened
    assert opened.heard == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [page_path.as_uri()]
    assert "pwned" not in opened.title()
    context.close()


def test_hostile_text_is_shown_and_nothing_of_it_runs(page: Any) -> None:
    for text in HOSTILE[:4]:
        assert page.get_by_text(text, exact=False).count() >= 1
    assert page.locator("main img, main iframe, main script, main svg[onload]").count() == 0
    headings = page.locator("h2").all_inner_texts()
    assert headings[1:] == ["Numbers", "Rewards", "Training", "Training examples", "Checks", "Samples", "Manifest"]


def test_the_policy_of_the_page_stops_script_that_got_in(page: Any) -> None:
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    page.wait_for_function("document.images.length === 1")
    page.wait_for_timeout(200)
    assert page.title() != "1"
    assert len(page.heard) >= 1  # the browser says what it refused
    page.heard.clear()
    page.asked[:] = page.asked[:1]


TRAIL = """() => {
  const node = document.activeElement, box = node.getBoundingClientRect();
  const all = [...document.querySelectorAll('*')];
  const outline = getComputedStyle(node).outlineStyle;
  return [all.indexOf(node), node.tagName, node.id || node.className, box.width * box.height > 0, outline];
}"""


def test_tab_goes_through_the_page_in_order_and_shows_where_it_is(page: Any) -> None:
    trail = []
    for _ in range(80):
        page.keyboard.press("Tab")
        found = page.evaluate(TRAIL)
        if found[1] == "BODY":
            break
        trail.append(found)
    places = [place for place, *_ in trail]
    assert places == sorted(set(places))
    assert trail[0][1:3] == ["A", "skip"]
    assert all(visible and outline != "none" for *_, visible, outline in trail)
    reached = {name for _, name, *_ in trail}
    assert reached >= {"A", "DIV", "INPUT", "SELECT", "SUMMARY"}  # links, wide tables, search, order, manifests


def test_the_skip_link_leads_past_the_links(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_search_and_order_by_keyboard(page: Any) -> None:
    page.focus("#search")
    page.keyboard.type("Topic 60")
    texts = [text.lower() for text in page.locator("article").all_text_contents()]
    wanted = sum("topic" in text and "60" in text for text in texts)
    assert 0 < wanted < len(texts)
    assert page.locator("article:visible").count() == wanted
    assert page.locator("#count").inner_text().startswith(f"{wanted} of ")
    page.fill("#search", "")
    page.select_option("#order", "gain")
    gains = [float(text) for text in page.locator("article").evaluate_all("nodes => nodes.map(n => n.dataset.gain)")]
    assert gains == sorted(gains, reverse=True)


CONTRAST = """(selector) => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number)
      .map((v) => (v /= 255, v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [a, b] = [getComputedStyle(document.querySelector(selector)).color,
    getComputedStyle(document.body).backgroundColor].map(light).sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    for selector in ("body", ".note", "a", ".flags dt", ".before h4", ".after h4", "figcaption"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number)")
    assert (sum(paper[:3]) > 600) == (scheme == "light")


def test_a_phone_needs_no_sideways_scrolling_and_no_magnifier(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        "[...document.querySelectorAll('main p, main td, main th, main li, main dd, main input')]"
        ".filter((node) => parseFloat(getComputedStyle(node).fontSize) < 13).length"
    )
    assert small == 0
    assert page.evaluate("document.querySelector('#search').getBoundingClientRect().height") >= 36


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_short_and_its_links_unfold(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollHeight") < 7000
    assert page.locator("article:visible").count() == 20
    assert page.locator("#count").inner_text() == "20 of 24 prompts"
    page.click("#all")
    assert page.locator("article:visible").count() == 24
    assert not page.locator("#part-training figure").first.is_visible()
    page.click("nav a[href='#training']")
    playwright.expect(page.locator("#part-training figure").first).to_be_visible()
    ticks = page.locator("#part-training svg").first.locator("[id*=xtick] text").all_text_contents()
    assert len(ticks) > 1
    assert all(tick.isdecimal() for tick in ticks)  # steps are whole


def test_what_differs_between_two_answers_is_marked(page: Any) -> None:
    marks = page.locator("article ins, article del")
    assert marks.count() > 0
    side = "[...document.querySelectorAll('article')].map((a) => [...a.querySelectorAll('.sides .text')])"
    kept = page.evaluate(
        f"{side}.filter((pair) => pair.some((p) => p.querySelector('ins, del'))).map((pair) => pair.map((p) => "
        "[...p.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join('').replace(/\\s/g, '')))"
    )
    assert kept
    assert all(left == right for left, right in kept)  # what is not marked, both have


def test_a_table_that_goes_on_sideways_says_so(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    playwright.expect(page.locator(".scroll.wide").first).to_be_visible()
    wide = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map((box) => [box.scrollWidth > box.clientWidth + 1,"
        " box.classList.contains('wide'), getComputedStyle(box, '::before').content.includes('sideways')])"
    )
    assert any(over for over, *_ in wide)
    assert all(over == marked == said for over, marked, said in wide)
