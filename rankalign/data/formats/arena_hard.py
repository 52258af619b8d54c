"""Arena-Hard: questions ``{"uid", "prompt"}`` and model answers ``{"uid", "ans_id", "model", "messages"}``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.answers import LoneAnswers, Table, key_of
from rankalign.data.records import CandidateSet, Checker, Response
from rankalign.data.templates import as_messages


@dataclass(frozen=True)
class ArenaHard(LoneAnswers):
    """The answer is the last message; its content is text or an object with ``answer``."""

    name = "arena-hard"
    reads = frozenset({"message"})

    def stage(self, row: dict[str, Any], check: Checker) -> int:
        """Questions, then answers."""
        key_of(row, "uid", check)
        return 1 if "messages" in row else 0

    def take(self, row: dict[str, Any], check: Checker, table: Table) -> None:
        """A question or an answer."""
        record = table.at(key_of(row, "uid", check), check)
        if "messages" in row:
            self._take_answer(row, check, record)
            return
        record.prompt = check.prompt([{"role": "user", "content": check.need(row, "prompt")}])
        record.meta.update({key: value for key, value in row.items() if key not in ("prompt", "uid")})

    def _take_answer(self, row: dict[str, Any], check: Checker, record: CandidateSet) -> None:
        messages = check.array(row["messages"], "messages", at_least=2)
        prompt = check.prompt(messages[:-1], "messages")
        if record.prompt and record.prompt != prompt:
            raise check.fail("messages", f"ask something else than other rows of {record.id!r}")
        at = f"messages[{len(messages) - 1}]"
        last = check.mapping(messages[-1], at)
        if (role := check.need(last, "role", at)) != "assistant":
            raise check.fail(f"{at}.role", f"expected 'assistant', found {role!r}")
        content, further = check.need(last, "content", at), {}
        if isinstance(content, dict):
            further = {"content": {key: value for key, value in content.items() if key != "answer"}}
            content = check.need(content, "answer", f"{at}.content")
        text = check.text(content, f"{at}.content")
        policy = check.text(check.need(row, "model"), "model", empty=False)
        kept = {key: value for key, value in row.items() if key not in ("messages", "model")} | {"message": further}
        record.prompt = prompt
        record.responses.append(Response(text, policy=policy, meta={self.name: kept}))

    def row(self, record: CandidateSet, response: Response, losses: Losses) -> dict[str, Any]:
        """A row of answers."""
        kept = dict(response.meta.get(self.name, {"uid": record.id, "message": {"content": {}}}))
        message = kept.pop("message", {})
        content: Any = {"answer": response.text, **message["content"]} if "content" in message else response.text
        messages = [*as_messages(record.prompt), {"role": "assistant", "content": content}]
        return {**kept, "model": response.policy, "messages": messages}


FORMAT = ArenaHard()
