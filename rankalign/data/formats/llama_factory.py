"""LLaMA-Factory: preference, KTO and supervised rows in its ``alpaca`` and ``sharegpt`` forms.

``alpaca``: ``instruction``, ``input``, ``chosen``/``rejected`` or ``output`` (with ``kto_tag``), ``system``,
``history``. ``sharegpt``: ``conversations`` of ``{"from", "value"}``, ``chosen``/``rejected`` of the same kind,
``kto_tag``, ``system``. The older ranking rows, ``output: [better, worse]``, are format ``gpt4-compare``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankalign.data.formats.alpaca import read_instruction
from rankalign.data.formats.common import (
    PairFormat,
    instruction_text,
    keep,
    label_column,
    note_of,
    paired,
    wanted,
)
from rankalign.data.records import CandidateSet, Checker, Message, Prompt, Response
from rankalign.data.templates import as_messages

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
# Other spellings; a message keeps its own under "from".
ALIASES = {"user": "user", "assistant": "assistant", "function_call": "assistant", "tool": "tool"}
TAGS = {role: tag for tag, role in ROLES.items()}
TURNS = ("conversations", "chosen", "rejected", "kto_tag", "system")
COLUMNS = ("instruction", "input", "output", "chosen", "rejected", "kto_tag", "system", "history")


@dataclass(frozen=True)
class LlamaFactory(PairFormat):
    """Pairs are judge ``preference``, ``kto_tag`` is judge ``label``."""

    name = "llama-factory"
    own_system = ("system",)
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
            last = messages[-1]["role"] == "assistant" and len(messages) > 1
            responses = [_answer(messages.pop())] if last else []
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

    def pair_row(self, record: CandidateSet, chosen: Response, rejected: Response) -> dict[str, Any]:
        """The form it came in; ``sharegpt`` for what comes from elsewhere."""
        row = self._prompt(record)
        spell = _turn if "conversations" in row else _text
        return {**row, "chosen": spell(chosen), "rejected": spell(rejected)}

    def single_row(self, record: CandidateSet) -> dict[str, Any]:
        """In the same forms, with ``kto_tag`` for a label."""
        row = self._prompt(record)
        for response in record.responses:
            if "conversations" in row:
                row["conversations"].append(_turn(response))
            else:
                row["output"] = response.text
            row |= label_column(response, "kto_tag")
        return row

    def _prompt(self, record: CandidateSet) -> dict[str, Any]:
        note, messages = note_of(record, self.name) or {}, as_messages(record.prompt)
        row: dict[str, Any] = {}
        if note.get("system") and messages[0]["role"] == "system":
            row["system"] = messages.pop(0)["content"]
        if parts := _parts(messages, note):
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
    if tag not in ROLES and tag not in ALIASES:
        raise check.fail(f"{path}.from", f"unknown speaker {tag!r} (one of {', '.join([*ROLES, *ALIASES])})")
    further = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if clash := further.keys() & {"role", "content"}:
        raise check.fail(f"{path}.{min(clash)}", "stands beside 'from' and 'value'")
    if tag in ALIASES:
        further["from"] = tag
    return {"role": ROLES.get(tag) or ALIASES[tag], "content": content, **further}


def _answer(message: Message) -> Response:
    further = {key: value for key, value in message.items() if key not in ("role", "content")}
    return Response(message["content"], policy="output", meta={"message": further} if further else {})


def _read_turn(value: Any, path: str, check: Checker) -> Response:
    message = _message(value, path, check)
    if message["role"] != "assistant":
        raise check.fail(f"{path}.from", f"expected 'gpt', found {value['from']!r}")
    return _answer(message)


def _read_text(value: Any, path: str, check: Checker) -> Response:
    return Response(check.text(value, path), policy="output")


def _turn_of(message: Message) -> dict[str, Any]:
    further = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"from": TAGS[message["role"]], "value": message["content"], **further}


def _turn(response: Response) -> dict[str, Any]:
    return {"from": "gpt", "value": response.text, **response.meta.get("message", {})}


def _text(response: Response) -> str:
    return response.text


FORMAT = LlamaFactory()
