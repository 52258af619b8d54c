"""What gives way where a prompt is too long: its oldest exchanges, then the beginning of the user's message."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from rankalign.data import templates
from rankalign.data.chat import PROBE
from rankalign.data.messages import Message, Prompt, with_text
from rankalign.data.texts import begin_alike

Meta = dict[str, Any] | None


def shortened(
    ids: list[int],
    room: int,
    prompt: Prompt,
    meta: Meta,
    encode: Callable[[Prompt, Meta], list[int]],
    probed: bool,
    specials: Container[int],
) -> list[int]:
    """A prompt's tokens cut to ``room``.

    The oldest exchanges go first, whole. Where the last one alone is too long, the user's message in it loses its
    beginning. The beginning of the sequence, the system message, the headers of the turns that are left and what
    opens the answer stay, so long as there is room for them.

    Args:
        ids: the whole prompt's.
        room: most tokens.
        prompt: where ``ids`` come from.
        meta: the record's.
        encode: a prompt in tokens.
        probed: whether headers can be told, by encoding the prompt with nothing said in its first user's message.
        specials: ids of special tokens.
    """
    if len(ids) <= room:
        return ids
    last = prompt
    for start in [] if isinstance(prompt, str) else [i for i, m in enumerate(prompt) if m["role"] == "user"][1:]:
        last = _latest(prompt, start)
        ids = encode(last, meta)
        if len(ids) <= room:
            return ids
    head, tail = 0, 0
    if probed:
        other = encode(_probed(last), _probed_meta(meta))
        head = begin_alike(ids, other)
        tail = min(begin_alike(ids[::-1], other[::-1]), len(ids) - head)
    if not head or head + tail >= room:
        # The first token may be the start of the sequence, which models expect whatever else is lost.
        head = int(ids[0] in specials and room > 1)
    return ids[:head] + ids[len(ids) - (room - head) :]


def _latest(messages: Prompt, start: int) -> list[Message]:
    """The system messages of a list, and the others from ``start`` on."""
    return [m for i, m in enumerate(templates.as_messages(messages)) if i >= start or m["role"] == "system"]


def _probed(prompt: Prompt) -> Prompt:
    """The prompt with nothing said in its first user's message."""
    if isinstance(prompt, str):
        return PROBE
    first = next((i for i, m in enumerate(prompt) if m["role"] == "user"), len(prompt) - 1)
    return [with_text(m, PROBE) if i == first else m for i, m in enumerate(prompt)]


def _probed_meta(meta: dict[str, Any] | None) -> dict[str, Any]:
    told = dict(meta or {})
    if isinstance(told.get("alpaca"), dict):
        told["alpaca"] = {**told["alpaca"], "instruction": PROBE}
    return told
