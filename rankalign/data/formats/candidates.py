"""A prompt with a list of answers: best-of-n samples, Nectar, distilabel's generations, OpenHermesPreferences.

The list holds texts, messages or objects; scores stand in the objects or in lists beside it, under the names of
:mod:`rankalign.data.formats.aliases`. Lists of scores and models stay in ``meta`` as they came. Ranks (1 is best) are
judge ``rank``, turned round; ``null`` is a missing score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.aliases import (
    ENTRY_MODELS,
    ENTRY_SCORES,
    LISTS,
    MODELS,
    PROMPTS,
    SCORE_LISTS,
    first,
    prompt_of,
    respelt,
    response_of,
    score_by,
    spelling,
)
from rankalign.data.formats.answered import answer_messages, spelt
from rankalign.data.formats.common import RowFormat
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import scored_responses
from rankalign.data.formats.unread import unread
from rankalign.data.records import CandidateSet, Checker, Response


@dataclass(frozen=True)
class Candidates(RowFormat):
    """Prompts that are text become one user message."""

    name = "best-of-n"
    reads = frozenset({*SCORE_LISTS, *MODELS})

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        asked, listed = first(row, PROMPTS), first(row, LISTS)
        if not asked or not listed:
            missing = f"no column holds the prompt ({', '.join(PROMPTS)})" if not asked else ""
            raise check.fail("", missing or f"no column holds the answers ({', '.join(LISTS)})")
        if listed == "completions" and isinstance(row.get("labels"), list):
            raise check.fail(
                "labels", "labels of the steps of one answer are not read: completions are no candidates here"
            )
        prompt = prompt_of(row[asked], asked, check)
        entries = check.array(row[listed], listed, at_least=1)
        read = [response_of(entry, f"{listed}[{index}]", check) for index, entry in enumerate(entries)]
        responses = [response for response, _ in read]
        self._add_lists(row, responses, check)
        note = {
            "prompt": [asked, spelling(row[asked], prompt)],
            "list": listed,
            "keys": [key for _, key in read],
        }
        return CandidateSet("", prompt, responses, keep(self.name, note, row, (asked, listed)))

    def _add_lists(self, row: dict[str, Any], responses: list[Response], check: Checker) -> None:
        """Scores and models that stand in lists beside that of the answers."""
        for column in [*SCORE_LISTS, *MODELS]:
            if column not in row:
                continue
            values = check.array(row[column], column)
            if len(values) != len(responses):
                raise check.fail(column, f"{len(values)} entries for {len(responses)} answers")
            for index, (response, value) in enumerate(zip(responses, values, strict=True)):
                path = f"{column}[{index}]"
                if column in SCORE_LISTS:
                    response.scores |= score_by(SCORE_LISTS[column], value, path, check)
                elif value is not None:
                    response.policy = check.text(value, path, empty=False)

    def unread(self, record: CandidateSet) -> list[str]:
        """The columns that nothing was made of, and the keys of the list's objects."""
        entries: dict[str, Any] = {}
        for response in record.responses:
            entries |= response.meta.get("entry", {})
        inner = unread(entries, {*ENTRY_SCORES, *ENTRY_MODELS})
        listed = (note_of(record, self.name) or {}).get("list", "")
        return [*super().unread(record), *(f"{listed}[].{key}" for key in inner)]

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The row as it came, or ``prompt``, ``responses`` and ``rewards`` of the responses that have a score."""
        note = note_of(record, self.name)
        if note is not None and len(note["keys"]) == len(record.responses) and not self.judge:
            known = {name for response in record.responses for name in response.scores}
            lost_details(
                record.responses,
                losses,
                known & {*SCORE_LISTS.values(), "overall_score"},
                policy=False,
                meta=False,
                messages=False,
            )
            column, text = note["prompt"]
            entries = [_entry(response, key) for response, key in zip(record.responses, note["keys"], strict=True)]
            yield complete({column: respelt(record, text), note["list"]: entries}, record, self.name, losses)
            return
        judge, scored = scored_responses(record, self.judge, losses, at_least=1)
        if scored:
            lost_details(scored, losses, [judge], messages=False)
            rewards = [response.scores[judge] for response in scored]
            row = {"prompt": record.prompt, "responses": [spelt(response) for response in scored], "rewards": rewards}
            yield complete(row, record, self.name, losses)


def _entry(response: Response, key: str) -> Any:
    if key in ("message", "messages") and "entry" not in response.meta:
        messages = answer_messages(response)
        return messages[0] if key == "message" and len(messages) == 1 else messages
    return {**response.meta["entry"], key: spelt(response)} if key else spelt(response)


@dataclass(frozen=True)
class Nectar(Candidates):
    """``berkeley-nest/Nectar``: seven answers ranked by GPT-4, the prompt in HH form."""

    name = "nectar"
    reads = Candidates.reads | {"turns", "num_responses", "good_natured"}


@dataclass(frozen=True)
class Distilabel(Candidates):
    """distilabel's steps: ``instruction``, ``generations``, ``generation_models``, ``ratings``, ``rationales``."""

    name = "distilabel"
    reads = Candidates.reads | {"rationales", "rationale", "raw_generation_responses", "raw_labelling_response"}


@dataclass(frozen=True)
class OpenHermes(Candidates):
    """OpenHermesPreferences: three completions with PairRM's ranks; the pair made of them is told by the ranks."""

    name = "openhermes-preferences"
    reads = Candidates.reads | {"rank_str", "chosen", "rejected", "chosen_policy", "rejected_policy"}


BEST_OF_N, NECTAR, DISTILABEL, OPENHERMES = Candidates(), Nectar(), Distilabel(), OpenHermes()
