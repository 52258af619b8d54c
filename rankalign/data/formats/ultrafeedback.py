"""UltraFeedback: four completions an instruction with GPT-4's ratings, and its binarised form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import prompt_text
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import pick_judge
from rankalign.data.formats.trl import Trl
from rankalign.data.records import CandidateSet, Checker, Response

OVERALL = ("overall_score", "fine-grained_score")


@dataclass(frozen=True)
class UltraFeedback(Trl):
    """Judges are ``overall_score``, ``fine-grained_score`` and the rated aspects; ``N/A`` is a missing score.

    Rows with ``chosen`` and ``rejected`` are TRL pairs; ``score_chosen`` and ``score_rejected`` are judge ``score``.
    """

    name = "ultrafeedback"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of either form."""
        if "completions" not in row:
            return super().record(row, check)
        asked = check.text(check.need(row, "instruction"), "instruction", empty=False)
        entries = check.array(row["completions"], "completions")
        responses = [_completion(check, entry, f"completions[{index}]") for index, entry in enumerate(entries)]
        note = {"models": check.array(row["models"], "models") if "models" in row else None}
        meta = keep(self.name, note, row, ("instruction", "completions", "models"))
        return CandidateSet("", [{"role": "user", "content": asked}], responses, meta)

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """Binarised rows as TRL's; any other list with all its completions."""
        note = note_of(record, self.name)
        if note is not None and "models" not in note:
            yield from super().rows(record, losses)
            return
        judge = pick_judge(record, self.judge) if note is None or self.judge else None
        for response in record.responses:
            kept = response.meta.get(self.name)
            held = [judge or ""] if kept is None else [*OVERALL, *kept.get("annotations", {})]
            lost_details([response], losses, held, policy=False, meta=kept is None)
        models = [response.policy for response in record.responses] if note is None else note["models"]
        row = {
            "instruction": prompt_text(record.prompt, losses if note is None else Losses()),
            **({} if models is None else {"models": models}),
            "completions": [_entry(response, judge) for response in record.responses],
        }
        yield complete(row, record, self.name, losses)


def _completion(check: Checker, entry: Any, path: str) -> Response:
    check.mapping(entry, path)
    text = check.text(check.need(entry, "response", path), f"{path}.response")
    policy = check.text(check.need(entry, "model", path), f"{path}.model", empty=False)
    kept = {key: value for key, value in entry.items() if key not in ("response", "model")}
    scores = {key: _rating(check, entry[key], f"{path}.{key}") for key in OVERALL if key in entry}
    aspects = check.mapping(entry.get("annotations", {}), f"{path}.annotations")
    for aspect, rated in aspects.items():
        at = f"{path}.annotations.{aspect}"
        if isinstance(rated, dict) and "Rating" in rated:
            scores[aspect] = _rating(check, rated["Rating"], f"{at}.Rating")
    return Response(text, policy=policy, scores=scores, meta={"ultrafeedback": kept})


def _rating(check: Checker, value: Any, path: str) -> float | None:
    """Ratings are numbers written as text, ``N/A`` where the judge gave none."""
    if value is None or value == "N/A":
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise check.fail(path, f"expected a rating, found {value!r}") from None
    return check.number(value, path)


def _entry(response: Response, judge: str | None) -> dict[str, Any]:
    kept = response.meta.get("ultrafeedback")
    if kept is None:
        score = response.scores.get(judge) if judge else None
        kept = {} if score is None else {"overall_score": score}
    return {"model": response.policy, "response": response.text, **kept}


FORMAT = UltraFeedback()
