"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A shell that starts the tests in the background has them ignore Ctrl-C, and processes that they start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Runs of the tests keep their tokens to themselves, and none is left.
os.environ["RANKALIGN_TOKEN_CACHE"] = tempfile.mkdtemp(prefix="rankalign-tokens-")
atexit.register(shutil.rmtree, os.environ["RANKALIGN_TOKEN_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def data_kit() -> Path:
    """The optional folder of real data (RANKALIGN_DATA, or shared/data beside the checkout); skips where absent."""
    folder = Path(os.environ.get("RANKALIGN_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real-data kit is not on this machine")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium."""
    from tests.unit.chromium import BROWSER, playwright

    with playwright.sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()
