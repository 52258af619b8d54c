"""A real Chromium for tests of pages, and what a page complains of and asks for."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def listened(page: Any) -> Any:
    """The page with ``heard``, what it says on its console and in dialogs, and ``asked``, every URL it requests."""
    page.heard, page.asked = [], []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("dialog", lambda dialog: page.heard.append("dialog"))
    page.on("request", lambda request: page.asked.append(request.url))
    return page
