"""Errors that are the user's to mend. The command line prints them on one line and exits 1; a traceback means a bug."""

from __future__ import annotations


class InputError(Exception):
    """Bad input or configuration: the message says what is wrong, where, and what to do."""


class Interrupted(Exception):
    """Training stopped early on Ctrl-C or SIGTERM, after a checkpoint. The command line exits 130, as on Ctrl-C."""


class Line(int):
    """The number of a line, which also knows the element of a JSON list that starts on it, and the shard it is in.

    Attributes:
        element: its 1-based number in the list, 0 where the file is no list.
        file: the shard, empty where the data is one file.
        row: the row's 1-based number over all shards, 0 where the data is one file.
    """

    element: int = 0
    file: str = ""
    row: int = 0

    @classmethod
    def of(cls, line: int, element: int = 0, file: str = "", row: int = 0) -> Line:
        """Element number ``element``, which starts on ``line``, or that line of a shard."""
        made = cls(line)
        made.element, made.file, made.row = element, file, row
        return made

    def __reduce__(self) -> tuple[object, tuple[int, int, str, int]]:
        return Line.of, (int(self), self.element, self.file, self.row)  # from one process to another


def number_of(line: int) -> int:
    """What tells a row from the others of its data: its number over all shards or in a JSON list, else its line."""
    return (line.row or line.element or int(line)) if isinstance(line, Line) else line


def on_line(line: int) -> str:
    """Where a row stands, in words: ``on line 3``, ``in element 3`` of a list whose elements may share a line."""
    if isinstance(line, Line) and line.file:
        return f"on line {line} of {line.file}"
    return f"in element {line.element}" if isinstance(line, Line) and line.element else f"on line {line}"


class RecordError(InputError):
    """One record of one file is wrong.

    Args:
        file: path as the user gave it.
        line: 1-based line in that file, a :class:`Line` for an element of a JSON list.
        field: path of the offending field, such as ``responses[2].scores.rm``; empty for the whole line.
        reason: what is wrong, in words.
    """

    def __init__(self, file: str, line: int, field: str, reason: str) -> None:
        file = (line.file or file) if isinstance(line, Line) else file
        self.file, self.line, self.field, self.reason = file, line, field, reason
        self.element = line.element if isinstance(line, Line) else 0
        where = f" (element {self.element} of the list)" if self.element else ""
        super().__init__(f"{file}:{int(line)}: {field + ': ' if field else ''}{reason}{where}")

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, int, str, str]]:
        return type(self), (self.file, self.line, self.field, self.reason)  # from one process to another

    def as_dict(self) -> dict[str, str | int]:
        """The error as the ``errors`` entry of ``--json`` output."""
        error: dict[str, str | int] = {
            "file": self.file,
            "line": int(self.line),
            "field": self.field,
            "reason": self.reason,
        }
        return {**error, "element": self.element} if self.element else error


def missing_extra(what: str, extra: str) -> InputError:
    """The error for an optional package that is not installed, e.g. ``missing_extra("engine 'vllm'", "vllm")``."""
    return InputError(f"{what} needs: pip install 'rankalign[{extra}]'")
