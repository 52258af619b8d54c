"""Answers as foreign rows have them: a text, or messages with calls of tools, their results and thoughts."""

from __future__ import annotations

from typing import Any

from rankalign.data.messages import MESSAGE_FIELDS, Message, answer_text, said
from rankalign.data.records import Checker, Response
from rankalign.storage.jsonl import kind


def answered(check: Checker, value: Any, path: str, **fields: Any) -> Response:
    """A completion as a response: a string, or the messages of an answer, the assistant's first and last.

    Where one message says all in a text, its further keys are kept in ``meta["message"]``; else the messages are kept.
    """
    if isinstance(value, str):
        return Response(check.text(value, path), **fields)
    if not isinstance(value, list):
        raise check.fail(path, f"expected a string or a list of messages, found {kind(value)}")
    return of_messages(check.answer(value, path), **fields)


def of_messages(messages: list[Message], **fields: Any) -> Response:
    """An answer of messages that are checked already."""
    (first, *more) = messages
    if more or said(first, MESSAGE_FIELDS) or not isinstance(first.get("content"), str):
        return Response(answer_text(messages), messages=messages, **fields)
    further = {key: value for key, value in first.items() if key not in ("role", "content")}
    return Response(first["content"], meta={"message": further} if further else {}, **fields)


def answer_messages(response: Response) -> list[Message]:
    """A response as messages."""
    if response.messages is not None:
        return response.messages
    return [{"role": "assistant", "content": response.text, **response.meta.get("message", {})}]


def spelt(response: Response, text: bool = True) -> Any:
    """A response as a string where that is its form and says all of it, else as messages."""
    return response.text if text and response.messages is None else answer_messages(response)


def talk(check: Checker, value: Any, path: str, **fields: Any) -> tuple[list[Message], list[Response]]:
    """A whole conversation as a prompt and, where the assistant has the last word, what follows the last user's turn.

    The calls of tools that led to the last word, and what came of them, belong to the answer.
    """
    messages = check.prompt(value, path)
    if isinstance(messages, str):
        raise check.fail(path, "expected a list of messages, found a string")
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        return messages, []
    start = max((i + 1 for i, m in enumerate(messages) if m["role"] not in ("assistant", "tool")), default=0)
    # Where no call of a tool begins what follows, the last word alone is the answer.
    if not start or not said(messages[start], ("tool_calls",)):
        start = len(messages) - 1
    check.prompt(messages[:start], path)
    return messages[:start], [of_messages(messages[start:], **fields)]
