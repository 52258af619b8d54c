"""What data sets call the same things: prompts, answers, scores and who wrote an answer.

A column under another name than these is not guessed at: it is unread, and said to be so
(:mod:`rankalign.data.formats.unread`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rankalign.data.formats.answered import answered
from rankalign.data.formats.hh import read_dialogue
from rankalign.data.records import CandidateSet, Checker, Prompt, Response

PROMPTS = (
    "prompt", "instruction", "question", "query", "input", "problem", "user_input", "user_prompt", "prompt_text",
    "context", "messages", "conversation",
)  # fmt: skip
# One answer a row. `output` beside `instruction` is Alpaca's, `completion` beside `prompt` TRL's.
ANSWERS = (
    "response", "answer", "output", "completion", "solution", "target", "reply", "generation", "generated_text",
    "model_output", "model_response", "assistant",
)  # fmt: skip
LISTS = (
    "responses", "candidates", "completions", "generations", "outputs", "answers", "samples", "candidates_completions",
    "all_generated_responses", "response_list", "sampled_responses", "generated_responses",
)  # fmt: skip
MODELS = (
    "generation_models", "generations_models", "model_names", "candidate_policies", "policies", "generators", "models",
)  # fmt: skip
# Columns of numbers, one a candidate, by the judge that they become. Ranks are turned round, so that higher is better.
SCORE_LISTS = {
    "scores": "score", "score": "score", "rewards": "reward", "reward": "reward", "ratings": "rating",
    "rating": "rating", "rm_scores": "score", "all_rm_scores": "score", "reward_scores": "reward", "ranks": "rank",
    "rank": "rank", "labels": "label", "correct": "label", "is_correct": "label",
}  # fmt: skip
ENTRY_TEXTS = (
    "text",
    "response",
    "answer",
    "completion",
    "output",
    "content",
    "generated_text",
    "generation",
    "message",
)
ENTRY_MODELS = ("model", "policy", "generator", "model_name", "source")
ENTRY_SCORES = {
    "score": "score", "reward": "reward", "rating": "rating", "rm_score": "score", "rank": "rank",
    "overall_score": "overall_score", "label": "label", "correct": "label", "is_correct": "label",
}  # fmt: skip
# One number or truth value beside one answer.
AXES = {
    **{axis: axis for axis in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")},
    "score": "score", "rating": "rating", "stars": "rating", "reward": "reward", "rm_score": "score",
    "overall_score": "overall_score", "quality": "quality", "label": "label", "is_correct": "label", "correct": "label",
    "kto_tag": "label", "is_safe": "safe", "orig_score": "score",
}  # fmt: skip


def first(row: dict[str, Any], names: Iterable[str]) -> str:
    """The first of ``names`` that is a column of the row, or nothing."""
    return next((name for name in names if name in row), "")


def prompt_of(value: Any, path: str, check: Checker) -> Prompt:
    """A prompt: messages as they are, a dialogue in HH form as messages, any other text as one user message."""
    if not isinstance(value, str):
        return check.prompt(value, path)
    text = check.text(value, path, empty=False)
    if text.startswith("\n\nHuman:") and text.rstrip().endswith("\n\nAssistant:"):
        return check.prompt(read_dialogue(text.rstrip()), path)
    return [{"role": "user", "content": text}]


def spelling(value: Any, prompt: Prompt) -> str | bool:
    """What has to be known to write a prompt as it stood: nothing of messages, that a text was one, or the text."""
    return (
        value if isinstance(value, str) and prompt != [{"role": "user", "content": value}] else isinstance(value, str)
    )


def respelt(record: CandidateSet, known: str | bool) -> Any:
    """The prompt as it stood, from what :func:`spelling` kept."""
    lone = isinstance(record.prompt, list) and len(record.prompt) == 1
    return record.prompt[0]["content"] if known is True and lone else known or record.prompt  # type: ignore[index]


def number_in(value: Any, path: str, check: Checker) -> float | None:
    """A score: a number, one written as text, or true and false; null and ``N/A`` are missing."""
    if value is None or (isinstance(value, str) and value.strip() in ("", "N/A", "None", "nan")):
        return None
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise check.fail(path, f"expected a number, found {value!r}") from None
    return check.number(value, path)


def score_by(judge: str, value: Any, path: str, check: Checker) -> dict[str, float | None]:
    """A score by its judge; a rank is turned round, since 1 is the best."""
    number = number_in(value, path, check)
    return {judge: -number if judge == "rank" and number is not None else number}


def response_of(value: Any, path: str, check: Checker) -> tuple[Response, str]:
    """An answer: a text, one assistant message or a list of one, or an object with a text; and the key of its text.

    What else an object says stays in ``meta["entry"]``; the names of :data:`ENTRY_SCORES` are read.
    """
    if isinstance(value, dict) and not (value.get("role") and "content" in value):
        key = first(value, ENTRY_TEXTS)
        if not key:
            raise check.fail(path, f"holds no text (one of {', '.join(ENTRY_TEXTS)}; found: {', '.join(value)})")
        response = answered(check, value[key], f"{path}.{key}")
        response.meta["entry"] = {name: held for name, held in value.items() if name != key}
        named = first(value, ENTRY_MODELS)
        if named and isinstance(value[named], str) and value[named].strip():
            response.policy = value[named]
        for column in ENTRY_SCORES.keys() & value.keys():
            response.scores |= score_by(ENTRY_SCORES[column], value[column], f"{path}.{column}", check)
        return response, key
    if isinstance(value, dict):
        return answered(check, [value], path), "message"
    return answered(check, value, path), "" if isinstance(value, str) else "messages"
