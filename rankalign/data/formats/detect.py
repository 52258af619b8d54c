"""The format of a file, told by the keys of its first record."""

from __future__ import annotations

import os

from rankalign.data.formats import FORMATS
from rankalign.errors import InputError, RecordError
from rankalign.storage.sources import rows_of

# A record of ours has no other keys than these; `id` and `prompt` alone also stand in many foreign rows.
NATIVE = {"id", "prompt", "responses", "meta"}
# The keys that tell a format; the first line that fits is taken.
SHAPES: tuple[tuple[str, set[str]], ...] = (
    ("rrhf", {"query", "responses", "scores"}),
    ("rrhf", {"prompt", "response", "scores"}),
    ("llama-factory", {"conversations"}),
    ("halos", {"output_A", "output_B"}),
    ("halos", {"prompt", "output", "type"}),
    ("webgpt", {"answer_0", "answer_1"}),
    ("shp", {"history", "human_ref_A"}),
    ("stack-exchange", {"question", "response_j", "response_k"}),
    ("gpt4-compare", {"user_input", "completion_a"}),
    ("gpt4-compare", {"user_input", "responses_and_scores"}),
    ("ultrafeedback", {"instruction", "completions"}),
    ("nemo-rl", {"context", "completions"}),
    ("pro", {"prefix", "suffix", "reward"}),
    ("fastchat", {"question_id"}),
    ("text-score", {"text", "score"}),
    ("summarize", {"info", "summaries"}),
    ("summarize", {"subreddit", "post", "summary"}),
    ("minchatgpt", {"vanilla", "sft"}),
    ("minchatgpt", {"winner", "sft"}),
    ("columns", {"instruction", "response1", "response2"}),
    ("columns", {"input", "output_1", "output_2", "label"}),
    ("columns", {"prompt", "reference", "summary"}),
    ("columns", {"instruction", "reference", "candidates"}),
    ("columns", {"query", "responses"}),
    ("trl", {"chosen", "rejected"}),
    ("ms-swift", {"messages", "rejected_response"}),
    ("ms-swift", {"messages", "rejected_messages"}),
    ("trl", {"prompt", "completion"}),
    ("arena-hard", {"uid", "messages"}),
    ("trl", {"messages"}),
    ("alpaca-eval", {"instruction", "output", "generator"}),
    ("alpaca-eval", {"generator_2", "preference"}),
    ("alpaca", {"instruction"}),
    ("trl", {"prompt"}),
)


def detect(path: str | os.PathLike[str]) -> str:
    """Name of a file's format, by the keys of its first sound row.

    Raises:
        InputError: no format has such keys.
    """
    errors: list[RecordError] = []
    row = next((row for _, row in rows_of(path, errors.append)), {})
    if errors and not row:
        raise errors[0]
    keys = {key for key, value in row.items() if value is not None} or set(row)
    if {"id", "prompt"} <= keys <= NATIVE:
        return "rankalign"
    found = next((name for name, shape in SHAPES if shape <= keys), None)
    if found == "alpaca" and isinstance(row.get("output"), list):
        return "gpt4-compare"
    if found is None:
        raise InputError(
            f"{path}: cannot tell the format from the keys {', '.join(sorted(keys)) or '(none)'}; "
            f"name it with --format or --from (one of: {', '.join(FORMATS)})"
        )
    return found
