r"""Summaries: OpenAI's TL;DR data, raw and in the form of the Hugging Face sets that trlX's tutorial uses.

Five shapes: posts with their own summary ``{"id", "subreddit", "title", "post", "summary"}``; comparisons ``{"info",
"summaries": [{"text", "policy"}], "choice"}``; summaries rated by axis ``{"info", "summary": {"text", "policy",
"axes"}}``; ``{"prompt", "label"}``; ``{"prompt", "chosen", "rejected"}``. The prompt of the raw ones is ``SUBREDDIT:
r/...\nTITLE: ...\nPOST: ...\nTL;DR:``. Comparisons of two equal texts, and those with a summary of fewer than five
words, are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import Dropped, RowFormat, prompt_text
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import paired
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Response

MIN_WORDS = 5  # trlX's rule for pairs of summaries
ENDING = "\nTL;DR:"


def write_prompt(info: dict[str, Any]) -> str:
    """The prompt of a post or, where there is no subreddit, of an article."""
    title = f"TITLE: {info.get('title') or ''}\nPOST: "
    lead = f"SUBREDDIT: r/{info['subreddit']}\n{title}" if info.get("subreddit") else title
    return f"{lead}{_body(info)}{ENDING}"


def _body(info: dict[str, Any]) -> str:
    return str(info["post"] if info.get("post") is not None else info.get("article"))


def _drop(check: Checker, texts: list[str]) -> None:
    if len(set(texts)) < len(texts):
        raise Dropped(check.file, check.line, "", "comparisons of equal summaries")
    if any(len(text.split()) < MIN_WORDS for text in texts):
        raise Dropped(check.file, check.line, "", f"comparisons with a summary of fewer than {MIN_WORDS} words")


@dataclass(frozen=True)
class Summarize(RowFormat):
    """A choice is judge ``preference``; rated axes are judges of their names."""

    name = "summarize"
    reads = frozenset({"choice"})

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of any of the shapes."""
        if "summaries" in row:
            return self._read_comparison(row, check)
        rated = row.get("summary")
        if isinstance(rated, dict) and "axes" in rated:
            return self._read_axes(row, check)
        if "post" in row:
            return self._read_post(row, check)
        prompt = check.text(check.need(row, "prompt"), "prompt", empty=False)
        if "chosen" not in row and "rejected" not in row:
            label = check.text(check.need(row, "label"), "label")
            return CandidateSet("", prompt, [_human(label)], keep(self.name, {}, row, ("prompt", "label")))
        texts = [check.text(check.need(row, side), side) for side in ("chosen", "rejected")]
        _drop(check, texts)
        meta = keep(self.name, {}, row, ("prompt", "chosen", "rejected"))
        return CandidateSet("", prompt, paired(Response(texts[0]), Response(texts[1])), meta)

    def _read_post(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        for key in ("subreddit", "title", "post", "summary"):
            check.text(check.need(row, key), key, empty=key != "post")
        note = {"post": {key: row[key] for key in ("subreddit", "title")}}
        meta = keep(self.name, note, row, ("subreddit", "title", "post", "summary"))
        return CandidateSet("", write_prompt(row), [_human(row["summary"])], meta)

    def _info(self, row: dict[str, Any], check: Checker) -> dict[str, Any]:
        info = check.mapping(check.need(row, "info"), "info")
        key = "post" if info.get("post") is not None else "article"
        check.text(check.need(info, key, "info"), f"info.{key}", empty=False)
        return info

    def _read_comparison(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        info = self._info(row, check)
        entries = check.array(row["summaries"], "summaries", at_least=2)
        responses = [_summary(check, entry, f"summaries[{index}]") for index, entry in enumerate(entries)]
        choice = check.need(row, "choice")
        if type(choice) is not int or not 0 <= choice < len(responses):
            raise check.fail("choice", f"expected the index of one of {len(responses)} summaries, found {choice!r}")
        _drop(check, [response.text for response in responses])
        for index, response in enumerate(responses):
            response.scores = {PREFERENCE: float(index == choice)}
        meta = keep(self.name, {"info": info}, row, ("info", "summaries"))
        return CandidateSet("", write_prompt(info), responses, meta)

    def _read_axes(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        info = self._info(row, check)
        response = _summary(check, row["summary"], "summary")
        axes = check.mapping(response.meta[self.name]["axes"], "summary.axes")
        for axis, score in axes.items():
            response.scores[axis] = None if score is None else check.number(score, f"summary.axes.{axis}")
        meta = keep(self.name, {"info": info, "axes": True}, row, ("info", "summary"))
        return CandidateSet("", write_prompt(info), [response], meta)

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The row as it came while it spells the same prompt, else a labelled prompt or the strict pairs."""
        note = note_of(record, self.name) or {}
        row = self._raw(record, note)
        pair = row is None and self.is_pair(record)
        if pair:
            chosen, rejected = record.responses
            row = {"prompt": prompt_text(record.prompt, losses), "chosen": chosen.text, "rejected": rejected.text}
        elif row is None and len(record.responses) == 1:
            row = {"prompt": prompt_text(record.prompt, losses), "label": record.responses[0].text}
        if row is None:
            text = prompt_text(record.prompt, losses)
            yield from self.pair_rows(
                record, losses, lambda c, r, _: {"prompt": text, "chosen": c.text, "rejected": r.text}
            )
            return
        named = pair or "summaries" in row or "axes" in note or [r.policy for r in record.responses] == ["human"]
        axes = record.responses[0].scores if "axes" in note else {}
        lost_details(record.responses, losses, [PREFERENCE, *axes], policy=not named, meta="info" not in row)
        yield complete(row, record, self.name, losses)

    def _raw(self, record: CandidateSet, note: dict[str, Any]) -> dict[str, Any] | None:
        if "post" in note and len(record.responses) == 1 and isinstance(record.prompt, str):
            lead = write_prompt(note["post"] | {"post": ""}).removesuffix(ENDING)
            post = record.prompt.removeprefix(lead).removesuffix(ENDING)
            if record.prompt == write_prompt(note["post"] | {"post": post}):
                return {**note["post"], "post": post, "summary": record.responses[0].text}
        if "info" not in note or record.prompt != write_prompt(note["info"]):
            return None
        entries = [_entry(response) for response in record.responses]
        if "axes" in note:
            return {"info": note["info"], "summary": entries[0]} if len(entries) == 1 else None
        scores = record.scores(PREFERENCE)
        kept = scores.count(1) == 1 and scores.index(1) == record.meta.get("choice") and self.judge in ("", PREFERENCE)
        return {"info": note["info"], "summaries": entries} if kept else None


def _human(text: str) -> Response:
    return Response(text, policy="human")


def _summary(check: Checker, entry: Any, path: str) -> Response:
    check.mapping(entry, path)
    text = check.text(check.need(entry, "text", path), f"{path}.text")
    kept = {key: value for key, value in entry.items() if key != "text"}
    policy = kept.get("policy")
    named = isinstance(policy, str) and bool(policy.strip())
    return Response(text, policy=str(policy) if named else "unknown", meta={"summarize": kept})


def _entry(response: Response) -> dict[str, Any]:
    return {"text": response.text, **response.meta.get("summarize", {"policy": response.policy})}


FORMAT = Summarize()
