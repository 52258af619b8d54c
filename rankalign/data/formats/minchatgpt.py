"""minChatGPT: the answers of each policy to a prompt, and preferences between two of them that name no prompt.

Every column of text beside ``prompt`` is the answer of a policy of that name. A preference, ``{"winner": "sft", "sft":
"...", "vanilla": "..."}``, belongs to the prompt to which both answers were given. It becomes 1 for the winner and 0
for the other by judge ``preference_sft_vanilla``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.answers import AnswerFormat, Table, find
from rankalign.data.formats.common import Dropped, prompt_text
from rankalign.data.formats.kept import lost_details, note_of
from rankalign.data.records import CandidateSet, Checker, Response
from rankalign.errors import on_line

JUDGE = "preference_{}_{}"
RESERVED = ("prompt", "winner")


@dataclass(frozen=True)
class MinChatGPT(AnswerFormat):
    """Policies are called as the columns."""

    name = "minchatgpt"

    def stage(self, row: dict[str, Any], check: Checker) -> int:
        """Answers first, then preferences."""
        if "winner" in row:
            return 2
        check.need(row, "prompt")
        return 1

    def take(self, row: dict[str, Any], check: Checker, table: Table) -> None:
        """A prompt with its answers, or a preference between two of them."""
        texts = {key: check.text(row[key], key) for key in row if key not in RESERVED and isinstance(row[key], str)}
        if "winner" in row:
            self._take_preference(row["winner"], texts, check, table)
            return
        asked = check.text(row["prompt"], "prompt", empty=False)
        if asked in table.sets:
            raise check.fail("prompt", f"stands already {on_line(table.first[asked].line)}")
        if not texts:
            raise check.fail("", "holds no answer: a column of text beside 'prompt'")
        kept = {key: value for key, value in row.items() if key != "prompt" and key not in texts}
        record = table.at(asked, check)
        record.prompt, record.meta = [{"role": "user", "content": asked}], {self.name: kept}
        record.responses = [Response(text, policy=policy) for policy, text in texts.items()]

    def _take_preference(self, winner: Any, texts: dict[str, str], check: Checker, table: Table) -> None:
        if len(texts) != 2 or winner not in texts:
            raise check.fail("winner", f"expected one of two answers, found {winner!r} of {', '.join(texts)}")
        both = set(texts.items())
        for record in table.sets.values():
            if both <= {(response.policy, response.text) for response in record.responses}:
                for policy in texts:
                    find(record, policy, check).scores[JUDGE.format(*texts)] = float(policy == winner)
                return
        raise Dropped(check.file, check.line, "", "preferences between answers that are not here")

    def rows_of(self, record: CandidateSet, losses: Losses) -> Iterator[tuple[str, dict[str, Any]]]:
        """All answers in one row, then the preferences."""
        texts = {response.policy: response.text for response in record.responses if response.policy not in RESERVED}
        if others := len(record.responses) - len(texts):
            losses.add("responses of a policy that has another", others)
        if not texts:
            losses.add("prompts without a response")
            return
        # Either order: the judge's name tells in which the columns stood.
        note, judges = note_of(record, self.name), {JUDGE.format(*pair): pair for pair in permutations(texts, 2)}
        lost_details(record.responses, losses, judges, policy=False)
        asked = prompt_text(record.prompt, losses if note is None else Losses())
        yield "answers", {**(note or {}), **texts, "prompt": asked}
        for judge, pair in judges.items():
            scores = {r.policy: score for r in record.responses if (score := r.scores.get(judge)) is not None}
            if len(scores) == 2 and len(set(scores.values())) == 1:
                losses.add("ties")
            elif len(scores) == 2:
                yield "preferences", {"winner": max(scores, key=scores.__getitem__), **{p: texts[p] for p in pair}}


FORMAT = MinChatGPT()
