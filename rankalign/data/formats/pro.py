"""PRO ranked lists: ``{"prefix": [turns of each candidate], "suffix": [texts], "reward": [numbers], "sft_index"}``.

A prefix is a list of turns marked ``<|prompter|>`` and ``<|assistant|>`` (dialogues) or one string (summaries); the
prefixes of a row are the same for all its candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import RowFormat
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import scored_responses
from rankalign.data.records import CandidateSet, Checker, Message, Prompt, Response

TAGS = {"<|prompter|>": "user", "<|assistant|>": "assistant"}
ENDING = "<|assistant|>"


@dataclass(frozen=True)
class Pro(RowFormat):
    """Scores are those of judge ``reward``."""

    name = "pro"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row; as many prefixes and rewards as suffixes."""
        texts = check.array(check.need(row, "suffix"), "suffix", at_least=1)
        prefixes = check.array(check.need(row, "prefix"), "prefix")
        rewards = check.array(check.need(row, "reward"), "reward")
        for path, values in (("prefix", prefixes), ("reward", rewards)):
            if len(values) != len(texts):
                raise check.fail(path, f"{len(values)} entries for {len(texts)} in suffix")
        for index, prefix in enumerate(prefixes):
            if prefix != prefixes[0]:
                raise check.fail(f"prefix[{index}]", "differs from prefix[0]; a record has one prompt")
        responses = [
            Response(check.text(text, f"suffix[{i}]"), scores={"reward": check.number(reward, f"reward[{i}]")})
            for i, (text, reward) in enumerate(zip(texts, rewards, strict=True))
        ]
        return CandidateSet("", _prompt(check, prefixes[0]), responses, self._meta(row))

    def _meta(self, row: dict[str, Any]) -> dict[str, Any]:
        note = {"sft_index": row["sft_index"]} if "sft_index" in row else {}
        return keep(self.name, note, row, ("prefix", "suffix", "reward", "sft_index"))

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """One row with the responses that have a score, best first unless they came in PRO's own order."""
        judge, scored = scored_responses(record, self.judge, losses, at_least=1)
        if not scored:
            return
        lost_details(scored, losses, [judge])
        note = note_of(record, self.name)
        if note is None or judge != "reward":
            scored.sort(key=lambda response: -(response.scores[judge] or 0))
            note = {"sft_index": 0}
        row = {
            "prefix": [_prefix(record.prompt)] * len(scored),
            "suffix": [response.text for response in scored],
            "reward": [response.scores[judge] for response in scored],
            **{key: note[key] for key in ("sft_index",) if key in note},
        }
        yield complete(row, record, self.name, losses)


def _prompt(check: Checker, prefix: Any) -> Prompt:
    if isinstance(prefix, str):
        return check.text(prefix, "prefix[0]", empty=False)
    turns = check.array(prefix, "prefix[0]", at_least=2)
    if turns[-1] != ENDING:
        raise check.fail(f"prefix[0][{len(turns) - 1}]", f"expected {ENDING!r} at the end")
    messages = [_turn(check.text(turn, f"prefix[0][{i}]")) for i, turn in enumerate(turns[:-1])]
    return check.prompt(messages, "prefix[0]")


def _turn(text: str) -> Message:
    for tag, role in TAGS.items():
        if text.startswith(tag):
            return {"role": role, "content": text.removeprefix(tag)}
    return {"role": "system", "content": text}


def _prefix(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return prompt
    tags = {role: tag for tag, role in TAGS.items()}
    return [tags.get(message["role"], "") + message["content"] for message in prompt] + [ENDING]


FORMAT = Pro()
