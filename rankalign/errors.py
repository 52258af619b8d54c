"""Errors that are the user's to mend. The command line prints them on one line and exits 1; a traceback means a bug."""

from __future__ import annotations


class InputError(Exception):
    """Bad input or configuration: the message says what is wrong, where, and what to do."""


class RecordError(InputError):
    """One record of one file is wrong.

    Args:
        file: path as the user gave it.
        line: 1-based line (or element of a JSON list) in that file.
        field: path of the offending field, such as ``responses[2].scores.rm``; empty for the whole line.
        reason: what is wrong, in words.
    """

    def __init__(self, file: str, line: int, field: str, reason: str) -> None:
        self.file, self.line, self.field, self.reason = file, line, field, reason
        super().__init__(f"{file}:{line}: {field + ': ' if field else ''}{reason}")

    def as_dict(self) -> dict[str, str | int]:
        """The error as the ``errors`` entry of ``--json`` output."""
        return {"file": self.file, "line": self.line, "field": self.field, "reason": self.reason}


def missing_extra(what: str, extra: str) -> InputError:
    """The error for an optional package that is not installed, e.g. ``missing_extra("engine 'vllm'", "vllm")``."""
    return InputError(f"{what} needs: pip install 'rankalign[{extra}]'")
