"""The format of a file, told by the columns of its first record that hold anything."""

from __future__ import annotations

import os
from typing import Any

from rankalign.data.formats import FORMATS
from rankalign.data.formats.aliases import ANSWERS, LISTS, PROMPTS, first
from rankalign.data.formats.hh import MARK
from rankalign.data.formats.layout import NAMES, fits
from rankalign.data.formats.pairs import PAIRS
from rankalign.data.messages import SHOWN_COLUMNS
from rankalign.errors import InputError, RecordError
from rankalign.storage.sources import rows_of
from rankalign.storage.spreadsheet import columns_of, is_spreadsheet
from rankalign.storage.wrapped import advice

# A record of ours has no other keys than these; `id` and `prompt` alone also stand in many foreign rows.
NATIVE = {"id", "prompt", "responses", "meta", *SHOWN_COLUMNS}
# The columns that tell a format; the first line that fits is taken, so that what is told by more columns stands first.
SHAPES: tuple[tuple[str, set[str]], ...] = (
    ("arena-battles", {"model_a", "model_b", "conversation_a"}),
    ("arena-battles", {"model_a", "model_b", "response_a", "winner_model_a"}),
    ("pku", {"response_0", "response_1", "better_response_id"}),
    ("pku", {"response_0", "response_1", "safer_response_id"}),
    ("prometheus", {"orig_instruction", "orig_response_A"}),
    ("prometheus", {"orig_instruction", "orig_response"}),
    ("openhermes-preferences", {"candidates_completions", "ranks"}),
    ("ultrainteract", {"trajectory", "chosen", "rejected"}),
    ("helpsteer", {"response_1", "response_2", "preference_strength"}),
    ("helpsteer", {"response1", "response2", "overall_preference"}),
    ("helpsteer", {"response", "helpfulness"}),
    ("beavertails", {"prompt", "response", "is_safe"}),
    ("nectar", {"prompt", "answers", "good_natured"}),
    ("rrhf", {"query", "responses", "scores"}),
    ("rrhf", {"prompt", "response", "scores"}),
    ("llama-factory", {"conversations"}),
    ("halos", {"output_A", "output_B"}),
    ("halos", {"prompt", "output", "type"}),
    ("webgpt", {"answer_0", "answer_1", "score_0"}),
    ("shp", {"history", "human_ref_A"}),
    ("stack-exchange", {"question", "response_j", "response_k"}),
    ("gpt4-compare", {"user_input", "completion_a"}),
    ("gpt4-compare", {"user_input", "responses_and_scores"}),
    ("pro", {"prefix", "suffix", "reward"}),
    *(("fastchat", {"question_id", column}) for column in ("text", "turns", "choices", "generation", "review_id")),
    ("text-score", {"text", "score"}),
    ("summarize", {"info", "summaries"}),
    ("summarize", {"subreddit", "post", "summary"}),
    ("minchatgpt", {"vanilla", "sft"}),
    ("minchatgpt", {"winner", "sft"}),
    ("columns", {"instruction", "response1", "response2"}),
    ("columns", {"input", "output_1", "output_2", "label"}),
    ("columns", {"prompt", "reference", "summary"}),
    ("columns", {"instruction", "reference", "candidates"}),
    ("trl", {"chosen", "rejected"}),
    ("ms-swift", {"messages", "rejected_response"}),
    ("ms-swift", {"messages", "rejected_messages"}),
    ("alpaca-eval", {"instruction", "output", "generator"}),
    ("alpaca-eval", {"generator_2", "preference"}),
    ("arena-hard", {"uid", "messages"}),
    ("arena-hard", {"uid", "prompt"}),
)
# Told by less, and only where none of the guesses between them and the lines above fits.
LAST: tuple[tuple[str, set[str]], ...] = (
    ("trl", {"prompt", "completion"}),
    ("trl", {"messages"}),
    ("trl", {"conversation"}),
    ("alpaca", {"instruction", "output"}),
)
BARE: tuple[tuple[str, set[str]], ...] = (
    ("alpaca", {"instruction"}),
    ("trl", {"prompt"}),
    ("fastchat", {"question_id"}),
)


def detect(path: str | os.PathLike[str]) -> str:
    """Name of a file's format, by the columns of its first sound row.

    Raises:
        InputError: no format has such columns.
        RecordError: no row is sound.
    """
    errors: list[RecordError] = []
    columns = list(columns_of(path)) if is_spreadsheet(path) else []
    if columns and fits(set(columns)):
        return "table"
    row = next((row for _, row in rows_of(path, errors.append)), {})
    if errors and not row:
        raise errors[0]
    if not row and not columns:
        raise InputError(f"{path}: holds no rows")
    # An empty cell in the first row of a spreadsheet is a column all the same.
    return detect_row(dict.fromkeys(columns, "") | row, str(path))


def detect_row(row: dict[str, Any], file: str = "<memory>") -> str:
    """Name of the format of a row, see :func:`detect`."""
    held = {key: value for key, value in row.items() if value is not None} or row  # tables give every row all columns
    if {"id", "prompt"} <= held.keys() <= NATIVE:
        return "rankalign"
    found = _named(held, SHAPES) or _listed(held) or _named(held, LAST) or _guessed(held) or _named(held, BARE)
    if found == "alpaca" and isinstance(row.get("output"), list):
        return "gpt4-compare"
    if found == "trl" and _graded(held):
        return "table"
    if found == "trl" and "prompt" not in held and _are_dialogues(held.get("chosen"), held.get("rejected")):
        return "hh"
    if not found:
        raise InputError(
            f"{file}: cannot tell the format from the keys {', '.join(sorted(held)) or '(none)'}; "
            f"{advice(held)}"
            f"name it with --format or --from (one of: {', '.join(FORMATS)}), "
            "or say what they are with `convert --columns`"
        )
    return found


def _graded(row: dict[str, Any]) -> bool:
    """Whether a prompt and a completion have a number beside them, which TRL has no meaning for and a table has."""
    texts = all(isinstance(row.get(name), str) for name in ("prompt", "completion"))
    numbers = [isinstance(row.get(name), int | float) for name in NAMES["score"]]
    return texts and any(numbers) and "label" not in row


def _are_dialogues(*sides: Any) -> bool:
    """Whether a pair holds whole dialogues in HH form: read as TRL's, their prompt would end where their texts part."""
    return all(isinstance(side, str) and side.lstrip().startswith("Human:") and MARK in side for side in sides)


def _named(row: dict[str, Any], shapes: tuple[tuple[str, set[str]], ...]) -> str:
    return next((name for name, shape in shapes if shape <= row.keys()), "")


def _listed(row: dict[str, Any]) -> str:
    """A prompt with a list of answers; what stands in the list tells whose it is."""
    if "query" in row and isinstance(row.get("responses"), dict):
        return "columns"
    column = first({key: value for key, value in row.items() if isinstance(value, list)}, LISTS)
    if not column or not first(row, PROMPTS):
        return ""
    entry = next(iter(row[column]), None)
    if column == "completions" and isinstance(entry, dict):
        if "context" in row and "completion" in entry:
            return "nemo-rl"
        if "instruction" in row and "response" in entry:
            return "ultrafeedback"
    return "distilabel" if column == "generations" and "instruction" in row else "best-of-n"


def _guessed(row: dict[str, Any]) -> str:
    """Two answers in columns, or one, under any of their usual names."""
    if PAIRS.fits(row):
        return "pairs"
    asked = first(row, PROMPTS)
    return "prompt-response" if asked and first({key: row[key] for key in row if key != asked}, ANSWERS) else ""
