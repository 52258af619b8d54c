"""A progress bar with rate and time left on stderr; plain lines, now and then, where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 15.0


class Progress:
    """Counts work done.

    Args:
        what: a verb in the present participle ("sampling").
        total: how much there is; None where that is not known before the end.
        unit: what is counted, in the singular.
        done: how much was finished before (it does not count into the rate).
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.count, self._first = what, total, unit, done, done
        self._start = self._last = time.monotonic()
        self._shown = done
        tty = sys.stderr.isatty()
        self._bar = tqdm(desc=what, total=total, unit=unit, initial=done, file=sys.stderr) if tty else None

    def add(self, count: int = 1) -> None:
        """Note ``count`` more as done."""
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            self._line()

    def _line(self) -> None:
        rate = (self.count - self._first) / max(time.monotonic() - self._start, 1e-9)
        text = f"{self.what}: {self.count} {self.unit}s, {rate:.2f} a second"
        if self.total is not None:
            left = (self.total - self.count) / rate if rate else 0.0
            text = f"{self.what}: {self.count}/{self.total} {self.unit}s, {rate:.2f} a second, {left:.0f} s left"
        print(text, file=sys.stderr, flush=True)
        self._shown = self.count

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self.count > self._shown:
            self._line()
