"""Messages in full, as the Chat Completions form has them: what they say beside a content, and their thoughts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Message = dict[str, Any]
Prompt = str | list[Message]

ROLES = ("system", "user", "assistant", "tool")
# By these a model's thought stands beside what it says; the first is what templates read, the others are names that
# servers and data sets give it, under which transformers finds it as well.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
# What a template can show beside a message's content.
SHOWN_FIELDS = ("tool_calls", "tool_call_id", "tool_plan", "name", *THOUGHT_FIELDS, "refusal", "documents", "citations")
# What no stage passes on: the form that tool calls had before 2024, and what is no text.
UNUSED_FIELDS = ("function_call", "image", "images", "audio", "audios", "video", "videos")
# What tells a model something beside a message's content, by the names that data sets and servers give it.
MESSAGE_FIELDS = (*SHOWN_FIELDS, *UNUSED_FIELDS)
# The same of a whole row: columns that change what a model reads, wherever a template has a place for them.
SHOWN_COLUMNS = ("tools", "chat_template_kwargs", "documents")
UNUSED_COLUMNS = ("functions", "image", "images", "audios", "videos")
ROW_FIELDS = (*SHOWN_COLUMNS, *UNUSED_COLUMNS)
# By these a message says that nobody should learn it.
MUTED: tuple[tuple[str, int | bool], ...] = (("weight", 0), ("train", False), ("training", False))
# Also as JSON spells it: tables often keep tools and arguments as text.
NOTHING: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {})
# Between these stand thoughts inside a content: R1 and most others, Magistral, Command A, Gemma's tunes, Claude's data.
THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)


def said(holder: Any, names: Iterable[str]) -> list[str]:
    """Those of ``names`` under which a mapping holds something."""
    return [name for name in names if holder.get(name) not in NOTHING] if isinstance(holder, dict) else []


def is_muted(message: Any) -> list[str]:
    """The keys by which a message says that nobody should learn it."""
    return [k for k, off in MUTED if k in message and message[k] == off] if isinstance(message, dict) else []


def is_begun(messages: Sequence[Message]) -> bool:
    """Whether the last turn is an answer that goes on; one that calls tools is whole."""
    return messages[-1]["role"] == "assistant" and not said(messages[-1], ("tool_calls",))


def text_of(message: Message) -> str:
    """What a message says in its content: a string, parts of text joined, nothing where it is null or missing."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return "" if content is None else str(content)


def with_text(message: Message, text: str) -> Message:
    """The message with another content; parts become one part, so that a template reads them in the same way."""
    parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}


def answer_text(messages: Sequence[Message]) -> str:
    """What the assistant says in the contents of an answer of several messages, a blank line between two."""
    texts = (text_of(message) for message in messages if message["role"] == "assistant")
    return "\n\n".join(text for text in texts if text.strip())


def decoded(value: Any) -> Any:
    """Tools, keyword arguments or arguments of a call, which tables and servers keep as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


# --- thoughts ----------------------------------------------------------------------------------------------------


def thought_in(text: str, opened: bool = True) -> tuple[int, int] | None:
    """Where a text's first thought begins and ends, its marks included; None where there is none.

    Args:
        text: an answer.
        opened: whether a closing mark alone ends a thought that the generation prompt had opened. An opening one alone
            at the beginning of an answer that was cut goes on to its end.
    """
    for opening, closing in THOUGHT_MARKS:
        start, end = text.find(opening), text.find(closing)
        if start > end >= 0 and not opened:
            end = text.find(closing, start)
        if end >= 0 and (0 <= start < end or opened):
            return (start if 0 <= start < end else 0), end + len(closing)
        if start >= 0 and not text[:start].strip():
            return start, len(text)
    return None


def thoughts_in(text: str) -> list[tuple[int, int]]:
    """Where all thoughts of a text begin and end."""
    found, place = list[tuple[int, int]](), 0
    while next_one := thought_in(text[place:], opened=not found):
        found.append((place + next_one[0], place + next_one[1]))
        place = found[-1][1]
    return found


def without_thought(text: str) -> str:
    """A text without its thoughts and the blanks behind them."""
    if not (found := thoughts_in(text)):
        return text
    ends = [0, *(end for _, end in found)]
    kept = [text[end:start] for end, (start, _) in zip(ends, found, strict=False)]
    pieces = [kept[0], *(piece.lstrip() for piece in (*kept[1:], text[ends[-1] :]))]
    return "".join(pieces)


def thought_of(text: str) -> str:
    """The thoughts of a text, marks and all; empty where there are none."""
    return "\n".join(text[start:end] for start, end in thoughts_in(text))


def no_thoughts(messages: Iterable[Message]) -> list[Message]:
    """Messages without what the assistant thought, beside its contents and in them; the very ones that hold none."""
    return [_no_thought(message) if message.get("role") == "assistant" else message for message in messages]


def _no_thought(message: Message) -> Message:
    held = [name for name in THOUGHT_FIELDS if name in message]
    bare = {key: value for key, value in message.items() if key not in held} if held else message
    text = text_of(bare)
    shorter = without_thought(text)
    return bare if shorter == text else with_text(bare, shorter)


def thoughts_of(messages: Iterable[Message]) -> str:
    """All that the assistant thought in some messages, a line break between two thoughts."""
    return "\n".join(
        found for message in messages if message.get("role") == "assistant" for found in _thoughts(message)
    )


def _thoughts(message: Message) -> Iterator[str]:
    yield from (str(message[name]) for name in said(message, THOUGHT_FIELDS)[:1])
    if found := thought_of(text_of(message)):
        yield found


# --- for people and judges ---------------------------------------------------------------------------------------


def tool_names(meta: dict[str, Any]) -> list[str]:
    """Names of the tools that a record offers, with their parameters: ``get_weather(city)``."""
    found = decoded(meta.get("tools"))
    told = [decoded(tool) for tool in found] if isinstance(found, list) else []
    return [_signature(tool.get("function", tool)) for tool in told if isinstance(tool, dict)]


def _signature(tool: Any) -> str:
    if not isinstance(tool, dict):
        return str(tool)
    parameters = tool.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return f"{tool.get('name', '?')}({', '.join(properties) if isinstance(properties, dict) else ''})"


def call_text(call: Any) -> str:
    """One call of a tool in a line: ``get_weather({"city": "Oslo"})``."""
    told = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(told, dict) or "name" not in told:
        return json.dumps(call, ensure_ascii=False)
    arguments = decoded(told.get("arguments"))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments if arguments is not None else {}, ensure_ascii=False)
    return f"{told['name']}({arguments})"


def message_text(message: Message, thoughts: bool = False) -> str:
    """A message as people read it: its content, then its calls of tools; its thought in front where asked for."""
    shown = message if thoughts else no_thoughts([message])[0]
    lines = [f"[thought] {shown[name]}" for name in said(shown, THOUGHT_FIELDS)[:1]]
    lines += [text_of(shown)] if text_of(shown) else []
    calls = decoded(shown.get("tool_calls"))
    lines += [f"[call] {call_text(call)}" for call in (calls if isinstance(calls, list) else [])]
    lines += [f"[{name}] {shown[name]}" for name in said(shown, ("tool_plan", "refusal"))]
    return "\n".join(lines)


def answer_shown(messages: Sequence[Message], thoughts: bool = False) -> str:
    """An answer of several messages as people read it: what tools gave back is marked so."""
    lines = []
    for message in messages:
        text = message_text(message, thoughts)
        who = f"[result of {message['name']}] " if message.get("name") else "[result] "
        lines.append(
            text if message["role"] == "assistant" else (who if message["role"] == "tool" else "[user] ") + text
        )
    return "\n".join(line for line in lines if line)
