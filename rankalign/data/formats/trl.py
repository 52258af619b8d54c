"""TRL's dataset types, standard (strings) and conversational (messages).

Read and written: preference with explicit or implicit prompt, unpaired preference, prompt-completion, prompt-only and
``messages``. Other columns (``margin``, ``tools``, ``images``, ...) are kept.

A preference row without ``prompt`` hides it in the shared beginning of ``chosen`` and ``rejected``. TRL takes the
longest common run of characters, which moves a shared opening of the two answers ("I think ...") into the prompt, where
it is never trained. Here the prompt of two strings ends behind the last mark of an assistant's turn in that run, else
behind its last line break, else before its last space, and never inside a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rankalign.data.formats import Losses
from rankalign.data.formats.answered import answer_messages, answered, spelt, talk
from rankalign.data.formats.common import RowFormat
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import label_column, paired, wanted
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Prompt, Response
from rankalign.storage.jsonl import kind

ASSISTANT_MARKS = (
    "\n\nAssistant:",
    "\n\n### Response:",
    "\n## Assistant:",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|assistant|>",
    "<start_of_turn>model\n",
    "[/INST]",
    " ASSISTANT:",
    "\nTL;DR:",
)


# A pair's prompt under another name, as Intel's and argilla's sets have it.
QUESTIONS = ("question", "instruction", "input", "query", "problem")
CONVERSATIONS = ("messages", "conversation")
# Columns that say how good the two answers of a pair are, and the judge that they become.
SIDES = {
    ("score_chosen", "score_rejected"): "score",
    ("chosen_score", "rejected_score"): "score",
    ("rating_chosen", "rating_rejected"): "rating",
    ("chosen_rating", "rejected_rating"): "rating",
    ("reward_chosen", "reward_rejected"): "reward",
    ("chosen_reward", "rejected_reward"): "reward",
}


def split_shared(chosen: str, rejected: str) -> int:
    """Length of the prompt that two full texts share, or 0 where none can be told apart."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = chosen[: next((i for i, (c, r) in pairs if c != r), min(len(chosen), len(rejected)))]
    marks = [shared.rfind(mark) + len(mark) for mark in ASSISTANT_MARKS if mark in shared]
    cuts = [max(marks, default=0), shared.rfind("\n") + 1, max(shared.rfind(" "), 0)]
    return next((cut for cut in cuts if shared[:cut].strip()), 0)


def _shared_prompt(check: Checker, chosen: Any, rejected: Any) -> tuple[Prompt, Any, Any]:
    """Prompt, chosen and rejected of a pair whose prompt is implicit."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = split_shared(chosen, rejected)
        if not cut:
            raise check.fail("prompt", "is missing, and chosen and rejected share no beginning that could be it")
        return check.text(chosen[:cut], "chosen"), chosen[cut:], rejected[cut:]
    for path, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, list):
            raise check.fail(path, f"expected what the other side has, found {kind(value)}")
        check.array(value, path, at_least=2)
        for index, message in enumerate(value):
            if not isinstance(message, dict):
                raise check.fail(f"{path}[{index}]", f"expected a message, found {kind(message)}: one answer a column")
    shared = next((i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r), None)
    shared = min(len(chosen), len(rejected)) - 1 if shared is None else shared
    # Two answers can part within a chain of calls; what both begin with is the prompt, as in TRL.
    if not shared or any(side[shared].get("role") != "assistant" for side in (chosen, rejected)):
        raise check.fail("rejected", "differs from chosen before the assistant's turn, so that their prompts differ")
    return check.prompt(chosen[:shared], "chosen"), chosen[shared:], rejected[shared:]


def _add_scores(responses: list[Response], row: dict[str, Any], check: Checker) -> None:
    """The scores of a pair's two answers, where both have one."""
    for columns, judge in SIDES.items():
        if all(row.get(column) is not None for column in columns):
            for response, column in zip(responses, columns, strict=True):
                response.scores[judge] = check.number(row[column], column)


def _label(row: dict[str, Any], check: Checker) -> dict[str, float | None]:
    """Judge ``label`` of an answer that people wanted or did not want."""
    if "label" not in row:
        return {}
    return {"label": wanted(check, row["label"], "label")}


def _is_implicit(row: dict[str, Any]) -> bool:
    """Some data sets add the prompt as a string although the messages repeat it."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    return prompt is None or (isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1)


@dataclass(frozen=True)
class Trl(RowFormat):
    """``chosen`` and ``rejected`` are responses of policies so named, scored 1 and 0 by judge ``preference``."""

    name = "trl"
    held: ClassVar[tuple[str, ...]] = (PREFERENCE, *dict.fromkeys(SIDES.values()))
    full = True
    # `messages` beside a pair repeats its better side.
    reads: ClassVar[frozenset[str]] = frozenset({"messages", *(column for pair in SIDES for column in pair)})

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of any of the types."""
        if "chosen" in row or "rejected" in row:
            return self._read_pair(row, check)
        if talk := next((column for column in CONVERSATIONS if column in row), ""):
            return self._read_messages(row, talk, check)
        if "completion" in row:
            return self._read_completion(row, check)
        if "prompt" not in row:
            raise check.fail("", f"no TRL type has only the columns {', '.join(row) or '(none)'}")
        return CandidateSet("", check.prompt(row["prompt"]), [], keep(self.name, {}, row, ("prompt",)))

    def _read_pair(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        chosen, rejected = check.need(row, "chosen"), check.need(row, "rejected")
        note: dict[str, Any] = {}
        asked = next((column for column in QUESTIONS if column in row), "")
        if asked and "prompt" not in row and isinstance(chosen, str):
            prompt, note = check.prompt(row[asked], asked), {"question": asked}
        elif _is_implicit(row):
            prompt, chosen, rejected = _shared_prompt(check, chosen, rejected)
            note = {"implicit": True} | ({"prompt": row["prompt"]} if "prompt" in row else {})
        else:
            prompt = check.prompt(row["prompt"])
        responses = paired(answered(check, chosen, "chosen"), answered(check, rejected, "rejected"))
        _add_scores(responses, row, check)
        if type(chosen) is not type(rejected):
            raise check.fail("rejected", f"is {kind(rejected)} where chosen is {kind(chosen)}")
        note |= _odd_form(prompt, chosen)
        used = ("prompt", note.get("question", "prompt"), "chosen", "rejected")
        return CandidateSet("", prompt, responses, keep(self.name, note, row, used))

    def _read_messages(self, row: dict[str, Any], column: str, check: Checker) -> CandidateSet:
        note = {"messages": True if column == "messages" else column}
        prompt, responses = talk(check, row[column], column, policy="completion", scores=_label(row, check))
        used = (column, "label") if responses and responses[0].scores else (column,)
        return CandidateSet("", prompt, responses, keep(self.name, note, row, used))

    def _read_completion(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        prompt = check.prompt(check.need(row, "prompt"))
        note = _odd_form(prompt, row["completion"])
        scores = _label(row, check)
        response = answered(check, row["completion"], "completion", policy="completion", scores=scores)
        return CandidateSet("", prompt, [response], keep(self.name, note, row, ("prompt", "completion", "label")))

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The row as it came, while the record still is what it was; else its strict pairs, completion or prompt."""
        if self.is_pair(record):
            yield self._pair_row(record, losses)
        elif len(record.responses) > 1:
            yield from self.pair_rows(record, losses, lambda *pair: self._ranked_row(record, *pair), sizes=True)
        else:
            yield self._single_row(record, losses)

    def _pair_row(self, record: CandidateSet, losses: Losses) -> dict[str, Any]:
        lost_details(record.responses, losses, self.held, policy=False, meta=False, messages=False)
        note = note_of(record, self.name) or {}
        chosen, rejected = (self._form(record, response) for response in record.responses)
        if not note.get("implicit"):
            row = {note.get("question", "prompt"): record.prompt, "chosen": chosen, "rejected": rejected}
        else:
            row = {"chosen": record.prompt + chosen, "rejected": record.prompt + rejected}
            if "prompt" in note:
                row["prompt"] = note["prompt"]
        return complete(row, record, self.name, losses)

    def _ranked_row(self, record: CandidateSet, chosen: Response, rejected: Response, judge: str) -> dict[str, Any]:
        return {
            "prompt": record.prompt,
            "chosen": self._form(record, chosen),
            "rejected": self._form(record, rejected),
            "score_chosen": chosen.scores[judge],
            "score_rejected": rejected.scores[judge],
        }

    def _single_row(self, record: CandidateSet, losses: Losses) -> dict[str, Any]:
        lost_details(record.responses, losses, ["label"], policy=False, meta=False, messages=False)
        row: dict[str, Any] = {"prompt": record.prompt}
        note = note_of(record, self.name) or {}
        if (talk := note.get("messages")) and isinstance(record.prompt, list):
            column = talk if isinstance(talk, str) else "messages"
            row = {column: record.prompt + [m for response in record.responses for m in answer_messages(response)]}
        elif record.responses:
            row["completion"] = self._form(record, record.responses[0])
        for response in record.responses:
            row |= label_column(response)
        return complete(row, record, self.name, losses)

    def _form(self, record: CandidateSet, response: Response) -> Any:
        """A completion in the form of the prompt, or in the other where the row had it so."""
        odd = bool((note_of(record, self.name) or {}).get("odd"))
        return spelt(response, text=isinstance(record.prompt, list) == odd)


def _odd_form(prompt: Prompt, completion: Any) -> dict[str, Any]:
    """The note on completions whose form differs from the prompt's: strings beside messages or the reverse."""
    return {"odd": True} if isinstance(prompt, list) != isinstance(completion, list) else {}


FORMAT = Trl()
