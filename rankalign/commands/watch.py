"""A run while it trains: a live page of its curves, warnings and latest answers, or plots in the terminal.

DIR is the folder of `rankalign train` (any method), `run` or `iterate`; it need not be there yet. The page is served on
127.0.0.1 alone and shows; nothing can be changed through it. Ctrl-C ends the watching, not the run.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rankalign.commands import show_facts
from rankalign.errors import InputError

EXAMPLE = "rankalign watch runs/rrhf"
EVERY = 2.0  # seconds between two looks of the terminal
CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and where it is shown."""
    parser.add_argument("folder", metavar="DIR", help="folder of the run")
    parser.add_argument("--terminal", action="store_true", help="plots here instead of a page")
    parser.add_argument("--once", action="store_true", help="show how things stand in the terminal, and end")
    parser.add_argument("--port", type=int, default=0, help="port on the loopback address; 0 takes a free one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Watch until Ctrl-C, in the terminal also until the run is finished; returns how things stood last."""
    from rankalign.evaluation.tables import some
    from rankalign.interactive.follow import Follower, logs_of

    folder = Path(args.folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give the folder of a run")
    if not folder.exists():
        if args.once:
            raise InputError(f"{folder}: no such folder")
        print(f"{folder} is not there yet: waiting for a run to begin in it", file=sys.stderr)
    if not logs_of(folder) and (runs := sorted(path.parent for path in folder.glob("*/log.jsonl"))):
        raise InputError(
            f"{folder}: holds several runs, and no log of its own; name one of them: {some([str(run) for run in runs])}"
        )
    follower = Follower(folder)
    if args.terminal or args.once:
        return _terminal(follower, args.once, args.json)
    from rankalign.interactive.pages.watch import WatchServer

    with WatchServer(follower, args.port) as server:
        print(f"{server.url}  (Ctrl-C ends)", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.1)
        return _facts(follower)


def _terminal(follower: Any, once: bool, quiet: bool) -> dict[str, Any]:
    from rankalign.interactive.terminal import draw

    out = sys.__stdout__ or sys.stdout
    live = out.isatty() and not once
    seen, done = 0, False
    with contextlib.suppress(KeyboardInterrupt):
        while not done:
            version, size = follower.poll(), shutil.get_terminal_size((80, 24))
            state = follower.state()
            done = once or not live or state["status"] == "finished"
            if not quiet and (done or version != seen):
                text = draw(state, size.columns, size.lines if live else None, live)
                print(f"{CLEAR}{text}" if live else text, file=out, flush=True)
            seen = version
            if not done:
                time.sleep(EVERY)
    return _facts(follower)


def _facts(follower: Any) -> dict[str, Any]:
    follower.poll()
    state = follower.state()
    last = {s["name"]: s["points"][-1][1] for panel in state["panels"] for s in panel["series"]}
    return {key: state[key] for key in ("name", "status", "step", "epoch", "warnings")} | {"last": last}


def show(result: dict[str, Any]) -> None:
    """Print how things stood."""
    show_facts({key: value for key, value in result.items() if key not in ("last", "warnings")} | result["last"])
