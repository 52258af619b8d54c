"""Candidates from a file of any known format, recognised by the keys of its first record."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rankalign import convert
from rankalign.convert import Intake
from rankalign.errors import InputError
from rankalign.formats import FORMATS
from rankalign.records import CandidateSet, read_rows

# A record of ours has no other keys than these; `id` and `prompt` alone also stand in many foreign rows.
NATIVE = {"id", "prompt", "responses", "meta"}
# The keys that tell a format; the first line that fits is taken.
SHAPES: tuple[tuple[str, set[str]], ...] = (
    ("rrhf", {"query", "responses", "scores"}),
    ("llama-factory", {"conversations", "chosen", "rejected"}),
    ("halos", {"output_A", "output_B"}),
    ("webgpt", {"answer_0", "answer_1"}),
    ("shp", {"history", "human_ref_A"}),
    ("stack-exchange", {"question", "response_j", "response_k"}),
    ("gpt4-compare", {"user_input", "completion_a"}),
    ("ultrafeedback", {"instruction", "completions"}),
    ("nemo-rl", {"context", "completions"}),
    ("pro", {"prefix", "suffix", "reward"}),
    ("text-score", {"text", "score"}),
    ("trl", {"chosen", "rejected"}),
    ("trl", {"prompt", "completion"}),
    ("trl", {"messages"}),
    ("alpaca-eval", {"instruction", "output", "generator"}),
    ("fastchat", {"question_id", "answer_id"}),
    ("alpaca", {"instruction", "output"}),
)


def detect(path: str | os.PathLike[str]) -> str:
    """Name of a file's format, by the keys of its first sound row.

    Raises:
        InputError: no format has such keys.
    """
    keys = set(next((row for _, row in read_rows(path, lambda error: None)), {}))
    if {"id", "prompt"} <= keys <= NATIVE:
        return "rankalign"
    found = next((name for name, shape in SHAPES if shape <= keys), None)
    if found is None:
        raise InputError(
            f"{path}: cannot tell the format from the keys {', '.join(sorted(keys)) or '(none)'}; "
            f"name it with --format (one of: {', '.join(FORMATS)})"
        )
    return found


def load(
    path: str | os.PathLike[str], format_name: str = "auto", intake: Intake | None = None
) -> Iterator[CandidateSet]:
    """Records of a file.

    Args:
        path: the file.
        format_name: a name in ``rankalign ls formats``, or ``auto``.
        intake: takes bad rows and counts; without one the first bad row raises.

    Raises:
        InputError: the format cannot be told.
        RecordError: a bad row.
    """
    name = detect(path) if format_name == "auto" else format_name
    return convert.load([path], name, intake or Intake(skip_invalid=False))
