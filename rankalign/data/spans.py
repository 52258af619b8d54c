"""Which part of an answer is learned: what the assistant writes, not what tools gave back nor thoughts that are masked.

Places are those of characters in what the chat template writes of the whole conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rankalign.data.chat import PROBE, Conversation, Said, common
from rankalign.data.messages import THOUGHT_FIELDS, THOUGHT_MARKS, Message, is_muted, said, thoughts_in
from rankalign.data.special import BREAK
from rankalign.errors import InputError

Span = tuple[int, int]


def unlearned(conversation: Conversation, answer: Said, start: int, end: int, mask_thoughts: bool) -> list[Span]:
    """The spans within ``[start, end)`` of the whole conversation that get no loss.

    Args:
        conversation: the prompt.
        answer: what follows it.
        start: where the answer begins.
        end: where it ends, with what ends its turn.
        mask_thoughts: whether thoughts get no loss.

    Raises:
        InputError: where a message of the assistant begins or ends cannot be told.
    """
    told = [(start, end)]
    if not isinstance(answer, str) and (len(answer) > 1 or any(map(is_muted, answer))):
        told = _assistant(conversation, answer, start, end)
    if mask_thoughts:
        told = without(told, thoughts(conversation, answer, told))
    return without([(start, end)], told)


def _assistant(conversation: Conversation, answer: Sequence[Message], start: int, end: int) -> list[Span]:
    """What the assistant writes of an answer: by the template's own marks, else by what the template adds with each of
    its messages."""
    marked, muted = conversation.spans(answer), any(map(is_muted, answer))
    if marked is not None and not muted:
        return [_with_end(conversation, answer, span) for span in marked]
    turns = [
        turn(conversation, answer, place, start, end)
        for place, message in enumerate(answer)
        if message["role"] == "assistant" and not is_muted(message)
    ]
    if marked is None:
        return turns
    return without([_with_end(conversation, answer, span) for span in marked], without([(0, end)], turns))


def _with_end(conversation: Conversation, answer: Sequence[Message], span: Span) -> Span:
    """Some templates end their mark before the token that ends the turn, which the assistant writes all the same."""
    rest = conversation.whole(tuple(answer))[span[1] :]
    for ending in (conversation.end.strip(), conversation.closing(tuple(answer))[1].strip()):
        if ending and rest.lstrip().startswith(ending):
            return span[0], span[1] + rest.index(ending) + len(ending)
    return span


def turn(conversation: Conversation, answer: Sequence[Message], place: int, start: int, end: int) -> Span:
    """Where one message of the assistant stands, from behind its header to the token that ends its turn.

    Raises:
        InputError: the template writes it in another way once other messages follow.
    """
    whole = conversation.whole(tuple(answer))
    first = start if not place else _header(conversation, answer, place, whole)
    if place == len(answer) - 1:
        return first, end
    alone = conversation.follow(answer, place + 1)
    ending = conversation.turn_end(alone)[1]
    if whole.startswith(alone):
        return first, len(alone) - len(conversation.turn_end(alone)[0]) + len(ending)
    # Written in another way when it stands last: it ends before whatever changes with the next message's content.
    following = {**answer[place + 1], "content": PROBE}
    other = conversation.whole((*answer[: place + 1], following, *answer[place + 2 :]))
    last = whole.rfind(ending.strip(), first, len(common(whole, other))) if ending.strip() else -1
    if last < 0:
        raise InputError("where the assistant's turn ends before a tool's result cannot be told of the chat template")
    return first, last + len(ending.strip())


def _header(conversation: Conversation, answer: Sequence[Message], place: int, whole: str) -> int:
    opened = conversation.follow(answer, place, generation=True)
    if whole.startswith(opened):
        return len(opened)
    before = conversation.shared(opened, [whole])
    # No part of the message before it.
    if before is not None and len(before) >= len(common(conversation.follow(answer, place), whole)):
        return len(before)
    raise InputError("the model's chat template writes earlier messages of an answer in another way once others follow")


def thoughts(conversation: Conversation, answer: Said, within: Sequence[Span]) -> list[Span]:
    """Where thoughts stand, their marks included."""
    whole = conversation.whole(answer)
    found = [span for start, end in within for span in _marked(whole, start, end)]
    for place, message in enumerate(() if isinstance(answer, str) else answer):
        if names := said(message, THOUGHT_FIELDS):
            found += _beside(conversation, answer, place, names, whole)  # type: ignore[arg-type]
    return joined(found)


def _marked(whole: str, start: int, end: int) -> list[Span]:
    """Thoughts between marks; a mark that is a control token and stands in a content has a break in it."""
    places = [place for place in range(start, end) if whole[place] != BREAK]
    spans = thoughts_in("".join(whole[place] for place in places))
    return [(places[a], places[b - 1] + 1) for a, b in spans]


def _beside(
    conversation: Conversation, answer: Sequence[Message], place: int, names: Iterable[str], whole: str
) -> list[Span]:
    """Where the thought beside a content stands: what changes when another takes its place."""
    changed = {**answer[place], **dict.fromkeys(names, PROBE)}
    other = conversation.whole((*answer[:place], changed, *answer[place + 1 :]))
    before, found, after = other.partition(PROBE)
    if not (found and whole.startswith(before) and whole.endswith(after)):
        return []  # the template leaves it out, which is said elsewhere
    start, end = len(before), len(whole) - len(after)
    for opening, closing in THOUGHT_MARKS:
        if before.rstrip().endswith(opening) and after.lstrip().startswith(closing):
            start = before.rindex(opening)
            end += after.index(closing) + len(closing)
    return [(start, end)]


def joined(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those that touch as one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif start < end:
            found.append((start, end))
    return found


def without(spans: Iterable[Span], holes: Iterable[Span]) -> list[Span]:
    """Spans less what lies in holes."""
    left = joined(spans)
    for low, high in joined(holes):
        left = [part for a, b in left for part in ((a, min(b, low)), (max(a, high), b)) if part[0] < part[1]]
    return left
