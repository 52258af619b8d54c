"""Where results are kept, and on which processor they came about; imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("RESULTS.md")


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = [re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in ("model name", "cpu family", "model")]
    name, family, model = (found.group(1) if found else "?" for found in facts)
    return f"{name} (family {family}, model {model})"


def write_section(title: str, lines: Sequence[str]) -> None:
    """Put a section into RESULTS.md, in the place of the one of that name."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Benchmarks\n"
    kept = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    RESULTS.write_text(kept.rstrip() + f"\n\n## {title}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
