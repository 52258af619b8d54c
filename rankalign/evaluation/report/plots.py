"""Vector figures of the report: drawn by matplotlib, then stripped of style so that the page's own CSS colours them.

A figure has no colours of its own but stand-ins, which become CSS variables: one drawing is legible on light and on
dark paper. Style attributes become presentation attributes, because the page's content policy forbids inline style.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from rankalign.errors import missing_extra
from rankalign.evaluation.tables import printable

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"

INK, GRID, BEFORE, AFTER = "#010101", "#020202", "#030303", "#040404"
SERIES = (AFTER, BEFORE, "#050505", "#060606")
RUNS = (*SERIES, "#070707", "#080808")
DASHES = ("solid", "dashed", "dotted")
MOST_RUNS = len(RUNS) * len(DASHES)
"""Runs that can be told apart in one figure by colour and dash."""
_VARIABLES = {
    INK: "currentColor", GRID: "var(--line)", BEFORE: "var(--before)", AFTER: "var(--after)",
    SERIES[2]: "var(--third)", SERIES[3]: "var(--fourth)",
    RUNS[4]: "var(--fifth)", RUNS[5]: "var(--sixth)",
}  # fmt: skip
_KEPT = (
    "fill",
    "stroke",
    "opacity",
    "fill-opacity",
    "stroke-opacity",
    "stroke-width",
    "stroke-dasharray",
    "text-anchor",
)
# Texts stay texts that can be read out and selected, and a dollar sign in a policy's name begins no formula.
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}  # fmt: skip
LABEL = 22  # characters of a name beside a plot

Points = Sequence[tuple[float, float]]
MOST_POINTS = 1500
"""Marks of one colour in a figure, or places along a curve: more cannot be told apart, and each takes 100 bytes."""


def drawn(points: Points) -> np.ndarray:
    """(P, 2) points, :data:`MOST_POINTS` of them drawn where there are more, the same ones whenever it is asked."""
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    if len(table) <= MOST_POINTS:
        return table
    return table[np.sort(np.random.default_rng(0).choice(len(table), MOST_POINTS, replace=False))]


def binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most :data:`MOST_POINTS` places, each the mean of neighbours."""
    size = -(-len(steps) // MOST_POINTS)
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


class Canvas:
    """One figure, to be drawn in a ``with`` block; afterwards ``svg`` holds it.

    Args:
        name: makes the ids of this figure its own.
        title: what it shows, read by screen readers.
        size: width and height in inches.

    Raises:
        InputError: matplotlib is not installed.
    """

    def __init__(self, name: str, title: str, size: tuple[float, float] = (5.0, 3.0)) -> None:
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError:
            raise missing_extra("the report", "report") from None
        # Else ids are random, and equal runs have unequal pages.
        settings: dict[Any, Any] = {**_STYLE, "svg.hashsalt": name}
        self._settings = matplotlib.rc_context(settings)
        self._make, self.name, self.title, self.size, self.svg = Figure, name, title, size, ""

    def __enter__(self) -> Any:
        """The axes to draw on."""
        self._settings.__enter__()
        self._figure = self._make(figsize=self.size)
        return self._figure.subplots()

    def __exit__(self, *error: Any) -> None:
        out = io.StringIO()
        if error[0] is None:
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # a date would make equal pages differ
            self._figure.savefig(out, format="svg", transparent=True, metadata=nothing)
            self.svg = restyle(out.getvalue(), self.name, self.title)
        self._settings.__exit__(*error)


def restyle(source: str, name: str, title: str) -> str:
    """matplotlib's SVG as markup for the page: no style attributes, no metadata, ids of its own, a title."""
    ElementTree.register_namespace("", SVG[1:-1])
    root = ElementTree.fromstring(source)
    for parent, tag in [(root, "metadata"), *((defs, "style") for defs in root.findall(f"{SVG}defs"))]:
        for child in parent.findall(SVG + tag):
            parent.remove(child)
    for element in root.iter():
        _restyle_element(element, name)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _restyle_element(element: ElementTree.Element, name: str) -> None:
    rules = dict(re.findall(r"\s*([\w-]+)\s*:\s*([^;]+)", element.attrib.pop("style", "")))
    for key in _KEPT:
        if key in rules:
            element.set(key, _VARIABLES.get(rules[key].strip(), rules[key].strip()))
    if size := re.search(r"([\d.]+)px", rules.get("font") or rules.get("font-size") or ""):
        element.set("font-size", size[1])
        element.attrib.setdefault("fill", "currentColor")
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.attrib['id']}")
    if XLINK in element.attrib:
        element.set("href", f"#{name}-{element.attrib.pop(XLINK)[1:]}")
    if "clip-path" in element.attrib:
        element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))


def curves(name: str, title: str, series: Mapping[str, Points], smooth: bool = True) -> str:
    """Lines over steps: the values thin, their running mean thick.

    Args:
        name: of the figure.
        title: what it shows.
        series: up to four, (step, value) points each.
        smooth: False draws the values alone.
    """
    canvas = Canvas(name, title)
    with canvas as axes:
        for colour, points in zip(SERIES, series.values(), strict=False):
            steps, values = np.array(points, dtype=np.float64).T
            if len(steps) > MOST_POINTS:
                steps, values = binned(steps, values)
            main = running_mean(values) if smooth else values
            if main is not values:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, main, color=colour, linewidth=1.8, marker="o" if len(steps) == 1 else None)
        axes.set_xlabel("step")
        _whole(axes, "x")
    return canvas.svg


def style(index: int) -> tuple[int, str] | None:
    """Colour, from 1, and dash of one of several runs; None for those that are too many to be drawn."""
    return (index % len(RUNS) + 1, DASHES[index // len(RUNS)]) if index < MOST_RUNS else None


def overlay(name: str, title: str, series: Mapping[str, Points], order: Sequence[str], smooth: bool = True) -> str:
    """One line a run over steps, the running mean alone; a run looks the same in all figures.

    Args:
        name: of the figure.
        title: what it shows.
        series: (step, value) points by run.
        order: names of all runs, which gives each its :func:`style`.
        smooth: False draws the values.
    """
    canvas = Canvas(name, title)
    with canvas as axes:
        for run, points in series.items():
            if (look := style(order.index(run))) is None:
                continue
            steps, values = np.array(points, dtype=np.float64).T
            if len(steps) > MOST_POINTS:
                steps, values = binned(steps, values)
            main = running_mean(values) if smooth else values
            mark = "o" if len(steps) == 1 else None
            axes.plot(steps, main, color=RUNS[look[0] - 1], linestyle=look[1], linewidth=1.8, marker=mark)
        axes.set_xlabel("step")
        _whole(axes, "x")
    return canvas.svg


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a 25th of the curve to either side, as far as there is one; short curves stay as they are."""
    reach = len(values) // 25
    if reach < 1:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def scatter(name: str, title: str, before: Points, after: Points, labels: tuple[str, str], whole: bool = False) -> str:
    """Points before as rings and after as dots; ``labels`` name the two axes, ``whole`` says that x is counted."""
    canvas = Canvas(name, title)
    with canvas as axes:
        for points, colour, fill in ((before, BEFORE, "none"), (after, AFTER, AFTER)):
            x, y = drawn(points).T
            axes.scatter(x, y, s=20, facecolors=fill, edgecolors=colour, linewidths=1.0, alpha=0.75)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        if whole:
            _whole(axes, "x")
    return canvas.svg


def histogram(name: str, title: str, before: Sequence[float], after: Sequence[float], label: str) -> str:
    """Two distributions over shared bins, counts of prompts."""
    canvas = Canvas(name, title)
    edges = np.histogram_bin_edges(np.array([*before, *after], dtype=np.float64), bins=min(24, max(6, len(after) // 4)))
    with canvas as axes:
        for values, colour in ((before, BEFORE), (after, AFTER)):
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(counts, edges, color=colour, linewidth=1.6)
        axes.set_xlabel(label)
        axes.set_ylabel("prompts")
        _whole(axes, "y")
    return canvas.svg


def spreads(name: str, title: str, groups: Mapping[str, Sequence[float]], label: str) -> str:
    """One line a group: 5 % to 95 % thin, quartiles thick, median a tick, mean a dot."""
    canvas = Canvas(name, title, (5.0, 1.0 + 0.34 * len(groups)))
    with canvas as axes:
        for row, values in enumerate(groups.values()):
            low, first, median, third, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            axes.hlines(row, low, high, color=INK, linewidth=0.9)
            axes.hlines(row, first, third, color=AFTER, linewidth=7, alpha=0.45)
            axes.vlines(median, row - 0.24, row + 0.24, color=INK, linewidth=1.4)
            axes.plot([np.mean(values)], [row], "o", color=AFTER, markersize=4.5)
        _names(axes, list(groups))
        axes.set_xlabel(label)
    return canvas.svg


def dots(name: str, title: str, values: Mapping[str, tuple[float, tuple[float, float] | None]], label: str) -> str:
    """One line a quantity: a dot with its interval where it has one; those named "before" and "after" in colour."""
    canvas = Canvas(name, title, (5.0, 0.8 + 0.34 * len(values)))
    with canvas as axes:
        for row, (key, (value, bounds)) in enumerate(values.items()):
            colour = {"before": BEFORE, "after": AFTER}.get(key, INK)
            if bounds is not None:
                axes.hlines(row, *bounds, color=colour, linewidth=2.2, alpha=0.55)
            axes.plot([value], [row], "o", color=colour, markersize=6)
        _names(axes, list(values))
        axes.set_xlabel(label)
    return canvas.svg


def _whole(axes: Any, axis: str) -> None:
    """What is counted has no half ticks."""
    axes.locator_params(axis=axis, integer=True)


def _names(axes: Any, names: Sequence[str]) -> None:
    """Row names down the left side, the first on top."""
    short = [name if len(name) <= LABEL else name[: LABEL - 1] + "…" for name in map(printable, names)]
    axes.set_yticks(range(len(names)), short)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
