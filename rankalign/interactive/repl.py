"""Talking to a model in the terminal: answers stream, Ctrl-C ends an answer, and no answer can steer the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from rankalign.errors import InputError
from rankalign.evaluation.tables import UNSAFE
from rankalign.interactive.conversation import EMPTY, Conversation, Options

HELP = "/reset begins anew, /system TEXT sets the system message, /quit ends; Ctrl-C stops an answer"


def printable(text: str) -> str:
    """The text with characters that act on a terminal written as ``\\x1b`` or ``\\u202e``."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Repl:
    """Reads lines and answers them.

    Args:
        talk: with one model.
        chosen: how answers are made.
        read: gives the next line, or raises EOFError.
        out: where answers go.
        say: where everything else goes.

    Attributes:
        answers: how many were given.
        empty: how many of them had no text.
    """

    def __init__(
        self, talk: Conversation, chosen: Options, read: Callable[[], str], out: IO[str], say: Callable[[str], Any]
    ) -> None:
        self.talk, self.chosen, self.read, self.out, self.say = talk, chosen, read, out, say
        self.answers = self.empty = 0

    def run(self) -> None:
        """Until /quit, or the end of the input."""
        self.say(HELP)
        while True:
            try:
                line = self.read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.say("\n/quit ends")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            elif line:
                self._answer(line)

    def _command(self, name: str, text: str = "") -> None:
        if name == "/reset":
            self.talk.reset()
            self.say("begun anew")
        elif name == "/system":
            self.chosen = dataclasses.replace(self.chosen, system=text)
            self.say(f"system message: {printable(text) or 'none'}")
        else:
            self.say(HELP if name == "/help" else f"unknown command {printable(name)}; {HELP}")

    def _answer(self, text: str) -> None:
        try:
            with stopped_by_interrupt(self.talk.stopping):
                written = self._write(text)
        except InputError as error:
            self.say(printable(f"{error}"))
            return
        self.answers += 1
        self.empty += not written
        if not written:
            self.say(EMPTY)
        if self.talk.stopping.is_set():
            self.say("(stopped)")
        elif any(self.talk.cut):
            limit = self.chosen.sampling.max_new_tokens
            self.say(f"(cut at the limit of {limit} tokens; --max_new_tokens raises it)")

    def _write(self, text: str) -> str:
        """Print the answer as it grows; returns all of it."""
        written = ""
        for [shown] in self.talk.ask(text, self.chosen):
            self.out.write(printable(shown[len(written) :]))
            self.out.flush()
            written = shown
        self.out.write("\n")
        self.out.flush()
        return written


@contextlib.contextmanager
def stopped_by_interrupt(stopping: threading.Event) -> Iterator[None]:
    """Within, the first Ctrl-C sets the event, and the second interrupts as usual; other threads have no Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def reader(source: IO[str], terminal: bool) -> Callable[[], str]:
    """Gives a line after the other: with a prompt and line editing in a terminal, plainly where input is piped."""
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (being imported is what gives ``input`` its editing)
        return lambda: input("> ")
    if isinstance(source, io.TextIOWrapper):
        source.reconfigure(encoding="utf-8", errors="replace")

    def read() -> str:
        line = source.readline()
        if not line:
            raise EOFError
        return line

    return read
