"""The report page: what it says, that hostile text stays text, and that a browser agrees."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.evaluation import EvalResult, tables
from rankalign.evaluation.report import page as report
from rankalign.evaluation.report import plots, samples, summary
from rankalign.evaluation.report.runs import Run, read_run
from rankalign.storage import jsonl

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "</script><script>document.title='pwned'</script>",
    "</style><img src=x onerror=\"document.title='pwned'\">",
    "'\"><svg onload=document.title='pwned'>",
    "{{ 7 * 7 }}{% for x in y %}<!-- ]]> $\\alpha$ $x",
    "\u202egpj.exe\u202c \x1b[31mred\x07 \u2028 &lt;b&gt;",
    "שלום <b>עולם</b>",
]


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self._open[-1:]:
            self.texts.setdefault(tag, []).append(data)

    def text(self, *tags: str) -> str:
        return "".join(text for tag in tags or self.texts for text in self.texts.get(tag, []))


def held_out(texts: list[str], scores: list[float], policy: str) -> list[CandidateSet]:
    return [
        CandidateSet(f"p{i}", f"Question {i}?", [Response(text, policy, scores={"rm": score})])
        for i, (text, score) in enumerate(zip(texts, scores, strict=True))
    ]


def make_run(folder: Path, hostile: bool = False, rise: float = 1.0) -> Path:
    rng = np.random.default_rng(0)
    plain = [f"Answer number {i} says something of its own about topic {i * 3}." for i in range(24)]
    texts = [*HOSTILE, *plain[len(HOSTILE) :]] if hostile else plain
    base = rng.normal(size=24)
    before = held_out(plain, base.tolist(), "start")
    after = held_out(texts, (base + rise + rng.normal(scale=0.1, size=24)).tolist(), "trained")
    if hostile:
        after[3].id = before[3].id = HOSTILE[0]
        after[4].prompt = before[4].prompt = HOSTILE[1]
    names = ["a", HOSTILE[0] if hostile else "b"]
    candidates = [
        CandidateSet(
            f"c{i}", "q", [Response(f"text {k}", name, scores={"rm": float(i + k)}) for k, name in enumerate(names)]
        )
        for i in range(5)
    ]
    for name, sets in (("before", before), ("after", after), ("candidates", candidates)):
        records.write(folder / f"{name}.jsonl", sets)
    log = [
        {"step": i, "loss": 3.0 / i, "rank_loss": 1.0 / i, "ranking_accuracy": 0.5, "epoch": 1} for i in range(1, 60)
    ]
    jsonl.write_rows(folder / "train" / "log.jsonl", [*log, {"step": 59, "train_runtime": 1.0}])
    note = HOSTILE[1] if hostile else "plain"
    result = {"perplexity_before": 9.5, "perplexity_after": 10.5, "seed": 1, "judge": "rm", "note": note}
    result["tables"] = [{"title": note, "columns": ["x", note], "rows": [[note, 1.5], ["y", None]]}]
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "train" / "manifest.json").write_text(
        json.dumps({"stage": note, "settings": {note: 1}}), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def plain_html(plain_folder: Path) -> str:
    return report.write_report(plain_folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write_report(make_run(tmp_path_factory.mktemp("hostile"), hostile=True))


def test_every_section_is_there(plain_html: str) -> None:
    page = Page(plain_html)
    headings = page.texts["h2"]
    assert headings == ["What happened", "Numbers", "Rewards", "Training", "Samples", "Manifest"]
    assert page.texts["h3"][:6] == [
        "Warnings", "Mean reward", "Distribution on held-out prompts", "Reward against length",
        "Training candidates by policy", "Loss",
    ]  # fmt: skip
    assert sum(tag == "article" for tag, _ in page.tags) == 24
    assert sum(tag == "svg" for tag, _ in page.tags) == 6
    assert "Answer number 5 says something" in page.text("p")
    targets = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert targets <= {f"#{ident}" for ident in ids}
    assert len(set(ids)) == len(ids)


def test_nothing_is_fetched_and_no_style_or_handler_is_inline(plain_html: str, hostile_path: Path) -> None:
    for html in (plain_html, hostile_path.read_text(encoding="utf-8")):
        for tag, attrs in Page(html).tags:
            assert "src" not in attrs
            assert "style" not in attrs, tag
            assert not [name for name in attrs if name.startswith("on")]
            assert str(attrs.get("href") or "#")[0] == "#" or attrs["href"] == "data:,"
        for call in ("url(http", "@import", "fetch(", "XMLHttpRequest", "//cdn"):
            assert call not in html


def test_policy_admits_just_the_pages_own_style_and_script(hostile_path: Path) -> None:
    html = hostile_path.read_text(encoding="utf-8")
    page = Page(html)
    policy = next(str(a["content"]) for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    for name, text in (("script-src", page.texts["script"][-1]), ("style-src", page.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_hostile_text_stays_text(hostile_path: Path) -> None:
    page = Page(hostile_path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "b", "iframe"})
    assert [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") != "img"] == []
    shown = page.text()
    for text in HOSTILE:
        assert tables.printable(text) in shown
    for char in "\x1b\x07\u202e\u202c":
        assert char not in shown
    assert "{{ 7 * 7 }}" in shown
    embedded = json.loads(page.texts["script"][0])
    assert embedded["note"] == HOSTILE[1]


@pytest.mark.parametrize("text", HOSTILE)
def test_embedded_json_holds_no_markup_and_reads_back(text: str) -> None:
    packed = report.embed({"x": text})
    assert not set("<>&\u2028\u2029") & set(packed)
    assert json.loads(packed) == {"x": text}


def test_a_browser_runs_no_script_of_the_data(hostile_path: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
         "--enable-logging=stderr", "--dump-dom", hostile_path.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "<title>" in done.stdout
    assert "pwned</title>" not in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "Content Security Policy" not in done.stderr


def test_pages_are_reproducible(plain_folder: Path, plain_html: str) -> None:
    assert report.render(read_run(plain_folder)) == plain_html


# --- what it says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "tone", "words"),
    [
        ({"difference": 0.5, "ci95": [0.2, 0.8]}, "good", "The interval lies above zero"),
        ({"difference": -0.5, "ci95": [-0.8, -0.2]}, "bad", "The interval lies below zero"),
        ({"difference": 0.1, "ci95": [-0.2, 0.4]}, "unclear", "includes zero"),
        ({"difference": 0.1, "ci95": [0, 0.4]}, "unclear", "includes zero"),
        (
            {"difference": 0.5, "ci95": [0.2, 0.8], "repetition_before": 0.01, "repetition_after": 0.2},
            "doubt",
            "repeated 3-grams rose from 1.0% to 20.0%",
        ),
    ],
)
def test_verdict_in_plain_words(result: dict[str, Any], tone: str, words: str) -> None:
    found = summary.headline(Run("r", result=result | {"n_prompts": 48}), [])
    assert found is not None
    assert (found.tone, found.n) == (tone, 48)
    assert words in found.verdict


def test_headline_is_computed_where_the_result_has_none(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    found = summary.headline(run, [])
    wanted = [
        a.responses[0].scores["rm"] - b.responses[0].scores["rm"] for a, b in zip(run.after, run.before, strict=True)
    ]
    assert found is not None
    assert found.value == pytest.approx(np.mean(wanted))
    assert found.bounds[0] < found.value < found.bounds[1]
    assert summary.headline(Run("r"), []) is None


def test_flags_make_a_rise_doubtful(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    for record in run.after:
        record.responses[0].text = "so good so good so good so good so good so good so good"
    html = report.render(run)
    assert 'class="headline doubt"' in html
    assert "<dt>repetition</dt>" in html


def test_table_before_and_after(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    run.result |= {"train_mean_reward": 1.25, "train_max_reward": 2.0}
    table = report.before_after(run, report.rewards_of(run))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["Perplexity, start model"] == ["9.5", "10.5", "+1"]
    assert rows["Repeated 3-grams"] == ["0.0 %", "0.0 %", "0.0 points"]
    assert rows["Length, words"] == ["11", "11", "0"]
    assert table.note == (
        "Reward of the training candidates: mean 1.25, best of each prompt 2. "
        "Changes of shares are in percentage points."
    )
    assert report.before_after(Run("r", result={"reward_after": -1.0}), {}).rows == [["Reward", None, "−1", None]]


def test_samples_keep_their_order_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = held_out(["a"] * 4, [0.0] * 4, "m")
    after = held_out(["b"] * 4, [0.1, -3.0, 0.2, 1.0], "m")
    monkeypatch.setattr(samples, "MOST_SAMPLES", 2)
    shown, total = report.samples(Run("r", before=before, after=after, judge="rm"))
    assert ([sample.id for sample in shown], total) == (["p1", "p3"], 4)
    assert [sample.gain for sample in shown] == [-3.0, 1.0]


@pytest.mark.parametrize("kept", ["result.json", "train/log.jsonl", "before.jsonl", "after.jsonl", "candidates.jsonl"])
def test_any_part_alone_makes_a_page(kept: str, tmp_path: Path) -> None:
    make_run(tmp_path / "whole")
    target = tmp_path / "part" / kept
    target.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / kept, target)
    html = report.write_report(tmp_path / "part").read_text(encoding="utf-8")
    assert "<h1>part</h1>" in html


def test_nothing_to_report_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no result\.json"):
        report.write_report(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        report.write_report(tmp_path / "absent")
    (tmp_path / "result.json").write_text("[1]")
    with pytest.raises(InputError, match="expected a JSON object"):
        report.write_report(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(InputError, match=r"result\.json: not valid JSON"):
        report.write_report(tmp_path)


def test_unreadable_lines_are_counted_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n')
    html = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "1 unreadable lines of log.jsonl are left out (first: line 2)." in html


# --- figures -----------------------------------------------------------------------------------------------------


def test_figures_take_their_colours_from_the_page() -> None:
    svg = plots.curves("c", "T & <x>", {"loss": [(1, 1.0), (2, 0.5)], "rank_loss": [(1, 0.3), (2, 0.2)]})
    for stand_in in (plots.INK, plots.GRID, *plots.SERIES):
        assert stand_in not in svg
    assert "var(--after)" in svg
    assert "var(--before)" in svg
    assert "style=" not in svg
    assert "<style" not in svg
    assert 'aria-label="T &amp; &lt;x&gt;"' in svg
    assert plots.curves("c", "T & <x>", {"loss": [(1, 1.0), (2, 0.5)], "rank_loss": [(1, 0.3), (2, 0.2)]}) == svg


def test_figures_of_degenerate_data() -> None:
    assert "<svg" in plots.histogram("h", "t", [1.0, 1.0], [1.0], "x")
    assert "<svg" in plots.scatter("s", "t", [(1.0, 1.0)], [(1.0, 1.0)], ("x", "y"))
    assert "<svg" in plots.spreads("p", "t", {"$x$ _hidden": [1.0]}, "x")
    assert "<svg" in plots.curves("c", "t", {"loss": [(1, 2.0)]})


def test_running_mean_by_hand() -> None:
    values = np.arange(50.0)
    smooth = plots.running_mean(values)  # two to either side
    assert smooth[:3] == pytest.approx([1.0, 1.5, 2.0])
    assert smooth[-1] == pytest.approx((47 + 48 + 49) / 3)
    assert plots.running_mean(values[:20]) is not None
    assert plots.running_mean(values[:20]).tolist() == values[:20].tolist()


# --- terminal tables ---------------------------------------------------------------------------------------------


def test_terminal_tables_are_inert(capsys: pytest.CaptureFixture[str]) -> None:
    table = tables.Table(
        "T [bold]x[/bold]", ["name", "value"], [["[red]\x1b[31mred\x07", 1234567.0], ["b", None]], "n = 2"
    )
    tables.render(table)
    out = capsys.readouterr()
    assert "[red]" in out.out
    assert "\x07" not in out.out
    assert "\x1b[31mred" not in out.out
    assert "1\N{THIN SPACE}234\N{THIN SPACE}567" in out.out
    assert out.err == ""
    tables.render(table, stderr=True)
    out = capsys.readouterr()
    assert out.out == ""
    assert "[bold]x[/bold]" in out.err


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, "–"),
        (3.0, "3"),
        (0.123456, "0.1235"),
        (12345.678, "12\N{THIN SPACE}345.7"),
        (True, "True"),
        ("a\tb\x00", "a\tb�"),
    ],
)
def test_cells(value: Any, wanted: str) -> None:
    assert tables.cell(value) == wanted


def test_table_of_a_result() -> None:
    table = tables.from_result("Reward", EvalResult({"mean": 0.5, "std": 1.0}, 7, {"mean": (0.25, 0.75)}))
    assert table.rows == [["mean", 0.5, "[0.25, 0.75]"], ["std", 1.0, "–"]]
    assert table.note.startswith("n = 7")


def test_a_page_of_many_prompts_stays_small(tmp_path: Path) -> None:
    """Samples are drawn and figures thinned; what is left out lies beside the page, and the page says so."""
    for name, gain in (("before", 0.0), ("after", 1.0)):
        made = [
            CandidateSet(f"{n}", f"asked {n}?", [Response("word " * (n % 40), scores={"rm": n % 7 + gain * (n % 5)})])
            for n in range(6000)
        ]
        records.write(tmp_path / f"{name}.jsonl", made)
    page = report.write_report(tmp_path).read_text()
    assert len(page) < 1.5e6
    assert "1500 of 6000 points, drawn at random" in page
    assert "the 400 whose score moved most are on this page; report.samples.jsonl beside it has all" in page
    rows = [json.loads(line) for line in (tmp_path / "report.samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(n) for n in range(6000)]
    assert rows[8]["score_after"] - rows[8]["score_before"] == 3.0
