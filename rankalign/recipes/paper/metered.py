"""Run one command of rankalign in this process and write down what it took, as a module of its own.

The peak is the kernel's high-water mark of this very process. ``ru_maxrss`` would not do: a child inherits in it the
size that its parent had when it was started (https://man7.org/linux/man-pages/man2/getrusage.2.html).
"""

from __future__ import annotations

import resource
import runpy
import sys
import time
from pathlib import Path

from rankalign.storage.files import write_text
from rankalign.storage.jsonl import dumps

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The most memory that this process has held so far (resident set), in bytes."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, which has no /proc
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def metered(output: str, words: list[str]) -> int:
    """Run ``rankalign words`` and, if it went well, leave ``{"seconds", "peak_bytes"}`` in ``output``; exit code."""
    started = time.monotonic()
    code = _command(words)
    if not code:
        took = {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}
        write_text(output, dumps(took) + "\n")
    return code


def _command(words: list[str]) -> int:
    """Exit code of the command line as a user starts it: it stands above this room, so it is run and not imported."""
    sys.argv = ["rankalign", *words]
    try:
        runpy.run_module("rankalign", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(metered(sys.argv[1], sys.argv[2:]))
