"""LLaMA-Factory: preference, KTO and supervised rows in its ``alpaca`` and ``sharegpt`` forms.

``sharegpt`` turns named ``function_call`` hold calls of tools as JSON, those named ``observation`` what came of them.

``alpaca``: ``instruction``, ``input``, ``chosen``/``rejected`` or ``output`` (with ``kto_tag``), ``system``,
``history``. ``sharegpt``: ``conversations`` of ``{"from", "value"}``, ``chosen``/``rejected`` of the same kind,
``kto_tag``, ``system``. The older ranking rows, ``output: [better, worse]``, are format ``gpt4-compare``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.alpaca import read_instruction
from rankalign.data.formats.answered import answer_messages, answered, talk
from rankalign.data.formats.common import PairFormat, instruction_text
from rankalign.data.formats.kept import keep, note_of
from rankalign.data.formats.ranking import label_column, paired, wanted
from rankalign.data.messages import NOTHING, decoded, text_of
from rankalign.data.records import CandidateSet, Checker, Message, Prompt, Response
from rankalign.data.templates import as_messages

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
# Other spellings; a message keeps its own under "from".
ALIASES = {"user": "user", "assistant": "assistant", "tool": "tool"}
CALL = "function_call"
TAGS = {role: tag for tag, role in ROLES.items()}
TURNS = ("conversations", "chosen", "rejected", "kto_tag", "system")
COLUMNS = ("instruction", "input", "output", "chosen", "rejected", "kto_tag", "system", "history")


@dataclass(frozen=True)
class LlamaFactory(PairFormat):
    """Pairs are judge ``preference``, ``kto_tag`` is judge ``label``."""

    name = "llama-factory"
    own_system = ("system",)
    full = True
    # What OpenHermes says of its conversations.
    reads = frozenset({"custom_instruction", "skip_prompt_formatting", "title", "views", "avatarUrl"})

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of either form."""
        sharegpt = "conversations" in row
        messages, note = self._read_turns(row, check) if sharegpt else self._read_instruction(row, check)
        if system := _system(row, check):
            messages = [{"role": "system", "content": system}, *messages]
            note["system"] = True
        read = _read_turn if sharegpt else _read_text
        if "chosen" in row or "rejected" in row:
            sides = [read(check.need(row, side), side, check) for side in ("chosen", "rejected")]
            responses = paired(*sides)
        elif sharegpt:
            messages, responses = talk(check, messages, "conversations", policy="output")
        else:
            responses = [_read_text(row["output"], "output", check)] if "output" in row else []
        self._label(row, check, responses)
        unused = {"output"} if "chosen" in row else set()  # not read beside a pair, so it waits in meta
        unused |= set() if "system" in note else {"system"}
        used = [key for key in (TURNS if sharegpt else COLUMNS) if key not in unused]
        return CandidateSet(
            "",
            check.prompt(messages, "conversations" if sharegpt else "instruction"),
            responses,
            keep(self.name, note, row, used),
        )

    def _label(self, row: dict[str, Any], check: Checker, responses: list[Response]) -> None:
        if "kto_tag" not in row:
            return
        if len(responses) != 1:
            raise check.fail("kto_tag", f"stands beside one answer, not {len(responses)}")
        responses[0].scores = {"label": wanted(check, row["kto_tag"], "kto_tag")}

    def _read_turns(self, row: dict[str, Any], check: Checker) -> tuple[list[Message], dict[str, Any]]:
        turns = check.array(row["conversations"], "conversations", at_least=1)
        return [_message(turn, f"conversations[{index}]", check) for index, turn in enumerate(turns)], {"turns": True}

    def _read_instruction(self, row: dict[str, Any], check: Checker) -> tuple[list[Message], dict[str, Any]]:
        prompt, note = read_instruction(row, check)
        messages: list[Message] = []
        if "history" not in row:
            return prompt, dict(note)
        for index, pair in enumerate(check.array(row["history"], "history")):
            for role, text in zip(("user", "assistant"), _exchange(pair, f"history[{index}]", check), strict=True):
                messages.append({"role": role, "content": text})
        return messages + prompt, {**note, "history": len(messages) // 2}

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """As in other formats of pairs; an answer of a pair is one turn here, so longer ones are left out."""
        several = [response for response in record.responses if len(answer_messages(response)) > 1]
        if several and len(record.responses) > 1:
            losses.add("responses of several turns", len(several))
            kept = [response for response in record.responses if response not in several]
            if len(kept) < 2:
                losses.add("prompts without a strict pair")
                return
            record = dataclasses.replace(record, responses=kept)
        yield from super().rows(record, losses)

    def pair_row(self, record: CandidateSet, chosen: Response, rejected: Response) -> dict[str, Any]:
        """The form it came in; ``sharegpt`` for what comes from elsewhere."""
        row = self._prompt(record, chosen, rejected)
        spell = _turns if "conversations" in row else _text
        return {**row, "chosen": spell(chosen), "rejected": spell(rejected)}

    def single_row(self, record: CandidateSet) -> dict[str, Any]:
        """In the same forms, with ``kto_tag`` for a label."""
        row = self._prompt(record, *record.responses)
        for response in record.responses:
            if "conversations" in row:
                row["conversations"] += [_turn_of(message) for message in answer_messages(response)]
            else:
                row["output"] = response.text
            row |= label_column(response, "kto_tag")
        return row

    def _prompt(self, record: CandidateSet, *answers: Response) -> dict[str, Any]:
        note, messages = note_of(record, self.name) or {}, as_messages(record.prompt)
        row: dict[str, Any] = {}
        if note.get("system") and messages[0]["role"] == "system":
            row["system"] = messages.pop(0)["content"]
        # Only turns have a place for calls of tools.
        if (parts := _parts(messages, note)) and all(answer.messages is None for answer in answers):
            return {**parts, **row}
        return {"conversations": [_turn_of(message) for message in messages], **row}


def _parts(messages: Prompt, note: dict[str, Any]) -> dict[str, Any] | None:
    """The ``alpaca`` columns of a prompt that came in them and still reads the same."""
    parts: dict[str, Any] = {key: note[key] for key in COLUMNS[:2] if key in note}
    content = instruction_text(parts.get("instruction", ""), parts.get("input", ""))
    if not parts or not isinstance(messages, list) or messages[-1] != {"role": "user", "content": content}:
        return None
    before = [message["content"] for message in messages[:-1]]
    if [message["role"] for message in messages[:-1]] != ["user", "assistant"] * note.get("history", 0):
        return None
    pairs = [list(pair) for pair in zip(before[::2], before[1::2], strict=True)]
    return {**parts, "history": pairs} if "history" in note else parts


def _system(row: dict[str, Any], check: Checker) -> str:
    """The system column, where it says something."""
    value = row.get("system")
    return check.text(value, "system") if isinstance(value, str) and value.strip() else ""


def _exchange(pair: Any, path: str, check: Checker) -> list[str]:
    texts = check.array(pair, path)
    if len(texts) != 2:
        raise check.fail(path, f"expected a question and an answer, found {len(texts)} texts")
    return [check.text(text, f"{path}[{index}]") for index, text in enumerate(texts)]


def _message(turn: Any, path: str, check: Checker) -> Message:
    check.mapping(turn, path)
    tag = check.text(check.need(turn, "from", path), f"{path}.from")
    content = check.text(check.need(turn, "value", path), f"{path}.value")
    if tag not in (*ROLES, *ALIASES, CALL):
        raise check.fail(f"{path}.from", f"unknown speaker {tag!r} (one of {', '.join([*ROLES, *ALIASES, CALL])})")
    further = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if clash := further.keys() & {"role", "content"}:
        raise check.fail(f"{path}.{min(clash)}", "stands beside 'from' and 'value'")
    if tag == CALL and (calls := _calls(content)):
        return {"role": "assistant", "tool_calls": calls, **further}
    if tag not in ROLES:
        further["from"] = tag
    return {"role": ROLES.get(tag) or ALIASES.get(tag, "assistant"), "content": content, **further}


def _calls(text: str) -> list[dict[str, Any]]:
    """The calls in a ``function_call``: one object or a list of them, each a name with its arguments. What is none of
    those stays the text that it is."""
    found = decoded(text)
    calls = found if isinstance(found, list) else [found]
    if not calls or any(not isinstance(call, dict) or call.keys() != {"name", "arguments"} for call in calls):
        return []
    told = [{"type": "function", "function": call} for call in calls]
    # The very text where writing it again would give another.
    return told if _call_value(told) == text else [{**told[0], "value": text}, *told[1:]]


def _call_value(calls: list[Any]) -> str:
    kept = calls[0].get("value") if isinstance(calls[0], dict) else None
    told = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
    said_again = [{"name": c.get("name"), "arguments": decoded(c.get("arguments"))} for c in map(dict, told)]
    if isinstance(kept, str) and decoded(kept) in (said_again, *said_again[:1]):
        return kept
    return json.dumps(said_again[0] if len(said_again) == 1 else said_again, ensure_ascii=False)


def _read_turn(value: Any, path: str, check: Checker) -> Response:
    message = _message(value, path, check)
    if message["role"] != "assistant":
        raise check.fail(f"{path}.from", f"expected 'gpt', found {value['from']!r}")
    return answered(check, [message], path, policy="output")


def _read_text(value: Any, path: str, check: Checker) -> Response:
    return Response(check.text(value, path), policy="output")


def _turn_of(message: Message) -> dict[str, Any]:
    """A message as a turn. A call of a tool is all that its turn says; text beside it, thoughts and ids have no place
    there and stay under their own names."""
    calls = decoded(message.get("tool_calls"))
    if isinstance(calls, list) and calls:
        further = {k: v for k, v in message.items() if k not in ("role", "tool_calls") and v not in NOTHING}
        further = {"text" if key == "content" else key: value for key, value in further.items()}
        return {"from": CALL, "value": _call_value(calls), **further}
    further = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"from": TAGS[message["role"]], "value": text_of(message), **further}


def _turns(response: Response) -> dict[str, Any]:
    return _turn_of(answer_messages(response)[0])


def _text(response: Response) -> str:
    return response.text


FORMAT = LlamaFactory()
