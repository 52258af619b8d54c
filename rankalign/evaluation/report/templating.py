"""From templates to pages: one file each, with a content policy that admits their own style and script alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankalign.errors import missing_extra
from rankalign.evaluation.tables import cell, interval, printable

TEMPLATES = Path(__file__).parent / "templates"
GIST = 90  # characters of a prompt beside its folded sample


def fill(name: str, **content: Any) -> str:
    """A page of the report's look.

    Args:
        name: of the template, without its ending.
        **content: what it shows; texts are escaped where they stand.

    Raises:
        InputError: Jinja2 is missing.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise missing_extra("the report", "report") from None
    css, script = ((TEMPLATES / file).read_text(encoding="utf-8") for file in ("report.css", "report.js"))
    pages = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {
        "cell": cell,
        "interval": interval,
        "printable": printable,
        "pretty": _pretty,
        "gist": _gist,
        "signed": signed,
    }
    pages.globals["counted"] = _counted
    # The content policy lets in what has these hashes and nothing else.
    hashes = {"css_hash": _hash(css), "script_hash": _hash(script)}
    return pages.get_template(f"{name}.html").render(css=css, script=script, **hashes, **content)


def signed(value: float) -> str:
    """Three digits of a difference, with its sign."""
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}", 1)


def _gist(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[: 4 * GIST].split())
    return line if len(line) <= GIST else line[: GIST - 1] + "…"


def _counted(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) > 1)}" if things else ""


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _pretty(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False, indent=2))
