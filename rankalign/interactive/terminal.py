"""Curves of a run drawn in the terminal, by plotext."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rankalign.errors import missing_extra
from rankalign.evaluation.tables import printable

ROWS = 12
"""Lines of one figure."""
NARROWEST = 40
_WORDS = {"waiting": "waiting for the run to begin", "running": "running", "finished": "finished"}


def draw(state: Mapping[str, Any], width: int, rows: int | None = None, colours: bool = False) -> str:
    """A run as text: a line of facts, its warnings, and one figure below the other.

    Args:
        state: of :meth:`rankalign.interactive.follow.Follower.state`.
        width: of the terminal in characters.
        rows: lines that there are; figures that do not fit are named. None draws all.
        colours: with escape codes for colours, for a terminal.

    Raises:
        InputError: plotext is not installed.
    """
    head = [_facts(state), *(f"warning, step {step}: {name}: {words}" for step, name, words in state["warnings"])]
    head = [printable(line) for line in [*head, *state["notes"], *([state["best"]] if state["best"] else [])]]
    panels = list(state["panels"])
    room = len(panels) if rows is None else max((rows - len(head) - 2) // ROWS, 1)
    shown = [_figure(panel, max(width, NARROWEST), colours) for panel in panels[:room]]
    left = [panel["title"] for panel in panels[room:]]
    foot = [f"no room for: {', '.join(left)}"] if left else []
    return "\n".join([*head, *shown, *foot])


def _facts(state: Mapping[str, Any]) -> str:
    parts = [f"{state['name']}: {_WORDS[state['status']]}"]
    if state["status"] != "waiting":
        parts.append(f"step {state['step']}")
    if state["epoch"] is not None:
        parts.append(f"epoch {state['epoch']:.3g}")
    if state["changed"] and state["status"] == "running":
        parts.append(f"last line {max(time.time() - state['changed'], 0):.0f} s ago")
    return ", ".join(parts)


def _figure(panel: Mapping[str, Any], width: int, colours: bool) -> str:
    try:
        import plotext
    except ImportError:
        raise missing_extra("--terminal", "report") from None
    plotext.clear_figure()
    plotext.theme("default" if colours else "clear")
    plotext.plotsize(width, ROWS)
    for series in panel["series"]:
        at, values = zip(*series["points"], strict=True)
        plotext.plot(at, values, label=series["name"] if len(panel["series"]) > 1 else None)
    steps = sorted({round(x) for series in panel["series"] for x, _ in series["points"]})
    marks = sorted({steps[round(place * (len(steps) - 1) / 4)] for place in range(5)})
    plotext.xticks(marks, [str(step) for step in marks])
    plotext.title(panel["title"])
    text = str(plotext.build())
    return text if colours else str(plotext.uncolorize(text))
