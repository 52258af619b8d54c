"""The record: one prompt with its candidate responses. The only thing that stages exchange, one JSON line each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rankalign.data.check import UNUSED as UNUSED
from rankalign.data.check import Checker as Checker
from rankalign.data.ids import SeenIds
from rankalign.data.messages import (
    MESSAGE_FIELDS,
    SHOWN_COLUMNS,
    UNUSED_COLUMNS,
    UNUSED_FIELDS,
    answer_shown,
    answer_text,
    is_muted,
    no_thoughts,
    said,
    thought_of,
    thoughts_of,
    without_thought,
)
from rankalign.data.messages import ROLES as ROLES
from rankalign.data.messages import Message as Message
from rankalign.data.messages import Prompt as Prompt
from rankalign.errors import InputError, RecordError
from rankalign.storage.jsonl import OnError, give_up, kind, write_rows
from rankalign.storage.sources import rows_of
from rankalign.storage.spreadsheet import check_lines

# The judge of a verdict between two answers that came with the data: 1 for the better, 0 for the worse, a half each.
PREFERENCE = "preference"


@dataclass(slots=True)
class Response:
    """One candidate answer.

    Attributes:
        text: the answer, special tokens removed.
        policy: who wrote it; a model's name, or one such as ``human`` for answers that came with the data.
        finished: False when the token limit cut it; such an answer gets no end-of-sequence token in training.
        count: how often this very text was drawn (identical texts of one policy are merged).
        sampling: how it was drawn (temperature, seed, ...).
        scores: score by judge, higher is better; None where a judge gave none.
        tokens: ``{"tokenizer": fingerprint, "ids": [...]}`` as sampled, so that training sees the same tokens;
            ``"end"`` beside them is the token that ended it, where there is more than one such token.
        meta: anything else, kept as it came.
        messages: the answer in full where a text does not say all of it, as the Chat Completions form has it: the
            assistant's message with its calls of tools or its thoughts, and what tools gave back and the assistant said
            then. None for an answer that is nothing but its text. Here ``text`` is what the contents say, or what a
            model wrote before its calls were read out of it.
    """

    text: str
    policy: str = "unknown"
    finished: bool = True
    count: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float | None] = field(default_factory=dict)
    tokens: dict[str, Any] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] | None = None

    def shown(self, thoughts: bool = False) -> str:
        """All of the answer as people and judges read it: its text, its calls of tools and what they gave back.

        Args:
            thoughts: whether what the model thought is shown as well.
        """
        if self.messages is None:
            return self.text if thoughts else without_thought(self.text)
        return answer_shown(self.messages, thoughts)

    def words(self) -> str:
        """What the answer says in words: no thoughts, no calls of tools and not what they gave back."""
        if self.messages is None:
            return without_thought(self.text)
        return answer_text(no_thoughts(self.messages))

    def thought(self) -> str:
        """What the model thought, marks of thoughts in its text included; empty where it did not."""
        return thought_of(self.text) if self.messages is None else thoughts_of(self.messages)

    def thoughtless(self) -> Response:
        """The answer without its thoughts; itself where there are none."""
        if self.messages is not None:
            bare = no_thoughts(self.messages)
            if all(one is other for one, other in zip(bare, self.messages, strict=True)):
                return self
            single = len(bare) == 1 and not said(bare[0], MESSAGE_FIELDS) and isinstance(bare[0].get("content"), str)
            return replace(self, text=answer_text(bare), messages=None if single else bare, tokens=None)
        text = without_thought(self.text)
        return self if text == self.text else replace(self, text=text, tokens=None)


@dataclass(slots=True)
class CandidateSet:
    """One prompt and its N candidates; ``id`` is unique in a file.

    What a row says to a model beside its prompt waits in ``meta`` under the row's own names: ``tools``, ``documents``
    and ``chat_template_kwargs``, as lists and mappings or as the JSON text that tables keep.

    ``origin`` is file and line where it was read from one: what refuses it later can still name its place.
    """

    id: str
    prompt: Prompt
    responses: list[Response] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    origin: tuple[str, int] | None = field(default=None, compare=False, repr=False)

    def scores(self, judge: str) -> list[float | None]:
        """Scores by ``judge`` in the order of the responses; None where missing."""
        return [response.scores.get(judge) for response in self.responses]


LARGEST_SCORE = 1e100  # a million squares of it still fit in a double, which ends at 1.8e308


ROUND, MIXED = "round", "start_share"
"""Keys of ``Response.sampling``: the round whose weights wrote an answer; the start model's share in it, if any."""


def is_own(response: Response) -> bool:
    """Whether the model that a round trains wrote the response, by itself."""
    return ROUND in response.sampling and MIXED not in response.sampling


def score_of(record: CandidateSet, response: Response, judge: str) -> float | None:
    """The score to calculate with, None where missing; ranking alone takes any finite score.

    Raises:
        InputError: naming record and judge: sums and squares of so large a score would overflow.
    """
    score = response.scores.get(judge)
    if score is not None and abs(score) > LARGEST_SCORE:
        raise InputError(
            f"record {record.id!r}: the score {score:g} by judge {judge!r} is beyond {LARGEST_SCORE:g}, where sums and "
            "squares overflow; rescale this judge's scores or take the record out"
        )
    return score


def judges(sets: Iterable[CandidateSet]) -> list[str]:
    """Names of all judges that scored at least one response, in order of first sight."""
    return list(dict.fromkeys(name for s in sets for r in s.responses for name, v in r.scores.items() if v is not None))


def refusal(record: CandidateSet, path: str, reason: str) -> RecordError:
    """The error for field ``path`` of a record that is read already; names its file and line where they are known."""
    file, line = record.origin or ("<memory>", 0)
    return RecordError(file, line, path, f"record {record.id!r}: {reason}")


def unused(record: CandidateSet) -> list[str]:
    """Paths of all that the record says to a model and that no stage passes on yet.

    Pictures and sound, calls of functions in the form of before 2024, and answers of one message that nobody should
    learn; null and empty values say nothing.
    """
    found = [f"meta.{key}" for key in said(record.meta, UNUSED_COLUMNS)]
    if not isinstance(record.prompt, str):
        for index, message in enumerate(record.prompt):
            found += [f"prompt[{index}].{key}" for key in said(message, UNUSED_FIELDS)]
    for index, response in enumerate(record.responses):
        if response.messages is None:
            found += [f"responses[{index}].{key}" for key in is_muted(response.meta.get("message"))]
            continue
        for message in response.messages:
            found += [f"responses[{index}].{key}" for key in said(message, UNUSED_FIELDS)]
        if all(is_muted(message) for message in response.messages if message["role"] == "assistant"):
            found += [f"responses[{index}].{is_muted(response.messages[0])[0]}"]
    return found


def by_id(sets: Iterable[CandidateSet]) -> dict[str, CandidateSet]:
    """Records by id, in order: files cannot hold an id twice, sets that were put together in memory can.

    Raises:
        InputError: two records share an id; one of them would be lost.
    """
    found: dict[str, CandidateSet] = {}
    for record in sets:
        if record.id in found:
            raise InputError(f"two records have the id {record.id!r}; give each an id of its own")
        found[record.id] = record
    return found


def choose_judge(sets: Iterable[CandidateSet], judge: str = "") -> str:
    """The judge to rank by: the one that is named, else the verdict that the data came with, else the only one.

    Raises:
        InputError: nobody scored, several did and none is named, or the named one did not.
    """
    return choose_among(judges(sets), judge)


def choose_among(names: Sequence[str], judge: str = "") -> str:
    """As :func:`choose_judge`, of the names of all judges in the data."""
    if judge and judge not in names:
        refuse_weights(judge, names)
        raise InputError(
            f"no response has a score by judge {judge!r} (judges in the data: {', '.join(names) or 'none'})"
        )
    if not judge and PREFERENCE in names:
        return PREFERENCE
    if not judge and len(names) != 1:
        what = f"several judges scored: {', '.join(names)}" if names else "no response has a score"
        raise InputError(f"{what}; name one with --judge" if names else f"{what}; run `rankalign score` first")
    return judge or names[0]


def refuse_weights(judge: str, names: Sequence[str]) -> None:
    """Say what to do where several judges are named with weights, as training takes them.

    Raises:
        InputError: ``judge`` is such as ``rm:0.7,vader:0.3``, of judges in ``names``.
    """
    weighed = [part.strip().rpartition(":") for part in judge.split(",")]
    if all(sign and name in names for name, sign, _ in weighed):
        parts = ",".join(f"{name}={weight}" for name, _, weight in weighed)
        raise InputError(
            f"--judge {judge}: only `rankalign train` weighs judges itself; here make one score of theirs first: "
            f"rankalign score --combine mean --judges {parts} --name both --input F --output G, then --judge both"
        )


# --- reading ----------------------------------------------------------------------------------------------------------

_SET_KEYS = {"id", "prompt", "responses", "meta", *SHOWN_COLUMNS}
_RESPONSE_KEYS = {"text", "messages", "policy", "finished", "count", "sampling", "scores", "tokens", "meta"}


def parse(row: dict[str, Any], file: str | os.PathLike[str] = "<memory>", line: int = 1) -> CandidateSet:
    """One JSON object as a :class:`CandidateSet`.

    Raises:
        RecordError: naming the field; unknown keys are errors, because a misspelt one would be lost in silence.
    """
    check = Checker(file, line)
    _known(check, row, _SET_KEYS, "")
    ident = check.text(check.need(row, "id"), "id", empty=False)
    prompt = check.prompt(check.need(row, "prompt"))
    entries = check.array(_given(row, "responses", []), "responses")
    responses = [parse_response(check, entry, f"responses[{index}]") for index, entry in enumerate(entries)]
    meta = check.mapping(_given(row, "meta", {}), "meta")
    for key in SHOWN_COLUMNS:
        if row.get(key) is not None:
            if key in meta:
                raise check.fail(key, f"stands beside meta.{key}, which means the same")
            meta = {**meta, key: row[key]}
    return CandidateSet(ident, prompt, responses, meta, (str(file), line))


def made(row: dict[str, Any] | CandidateSet, file: str | os.PathLike[str], line: int) -> CandidateSet:
    """The record of a row, or the row itself where its line was made a record of already, told where it stood."""
    if isinstance(row, CandidateSet):
        row.origin = (str(file), line)
        return row
    return parse(row, file, line)


def _given(row: dict[str, Any], key: str, default: Any) -> Any:
    """A key's value; null, which tables and other languages write for a missing value, is none."""
    value = row.get(key)
    return default if value is None else value


def _known(check: Checker, row: dict[str, Any], keys: set[str], path: str) -> None:
    for key in row:
        if key not in keys:
            raise check.fail(
                path + key, f"unknown key (known: {', '.join(sorted(keys))}; anything else goes into meta)"
            )


def parse_response(check: Checker, row: Any, path: str) -> Response:
    """One JSON object as a :class:`Response`; ``path`` names it in errors."""
    check.mapping(row, path)
    _known(check, row, _RESPONSE_KEYS, path + ".")
    messages = _messages(check, row, path)
    if "text" not in row and messages is None:
        raise check.fail(f"{path}.text", "is missing")
    finished, count = _given(row, "finished", True), _given(row, "count", 1)
    if not isinstance(finished, bool):
        raise check.fail(f"{path}.finished", f"expected a boolean, found {kind(finished)}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise check.fail(f"{path}.count", "expected a whole number of at least 1")
    scores = check.mapping(_given(row, "scores", {}), f"{path}.scores")
    return Response(
        text=answer_text(messages) if "text" not in row and messages else check.text(row["text"], f"{path}.text"),
        policy=check.text(_given(row, "policy", "unknown"), f"{path}.policy", empty=False),
        finished=finished,
        count=count,
        sampling=check.mapping(_given(row, "sampling", {}), f"{path}.sampling"),
        scores={judge: None if v is None else check.number(v, f"{path}.scores.{judge}") for judge, v in scores.items()},
        tokens=parse_tokens(check, row.get("tokens"), f"{path}.tokens"),
        meta=_meta(check, row, path, messages),
        messages=messages,
    )


def _meta(check: Checker, row: dict[str, Any], path: str, messages: list[Message] | None) -> dict[str, Any]:
    meta = check.mapping(_given(row, "meta", {}), f"{path}.meta")
    if messages is not None and "messages" not in row and "message" in meta:
        return {key: value for key, value in meta.items() if key != "message"}
    return meta


def _messages(check: Checker, row: dict[str, Any], path: str) -> list[Message] | None:
    """A response in full; up to 0.1 what its message said beside its content waited in ``meta.message``."""
    if row.get("messages") is not None:
        return check.answer(row["messages"], f"{path}.messages")
    meta = row.get("meta")
    further = meta.get("message") if isinstance(meta, dict) else None
    if not said(further, MESSAGE_FIELDS):
        return None
    return check.answer([{"role": "assistant", "content": row.get("text"), **(further or {})}], f"{path}.messages")


def parse_tokens(check: Checker, value: Any, path: str) -> dict[str, Any] | None:
    """The tokens of a response as they came, see :class:`Response`; None for null."""
    if value is None:
        return None
    check.text(check.mapping(value, path).get("tokenizer"), f"{path}.tokenizer", empty=False)
    for index, token in enumerate(check.array(value.get("ids"), f"{path}.ids")):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise check.fail(f"{path}.ids[{index}]", "expected a token id")
    if (end := value.get("end")) is not None and (type(end) is not int or end < 0):
        raise check.fail(f"{path}.end", "expected a token id")
    return dict(value)


def read(path: str | os.PathLike[str], on_error: OnError | None = None) -> Iterator[CandidateSet]:
    """Yield the records of a file, checked at the door.

    Args:
        path: JSON Lines or one JSON list (gzip, BOM and CRLF are fine), Parquet, a folder: see
            :mod:`rankalign.storage.sources`.
        on_error: takes each bad record, which is then left out; without it the first one raises.

    Raises:
        RecordError: a record is wrong, an id stands twice, or something would go unused (see :func:`unused`).
    """
    report, seen = on_error or give_up, SeenIds()
    for number, row in rows_of(path, on_error):
        try:
            record = parse(row, path, number)
            if earlier := seen.earlier(record.id):
                raise RecordError(str(path), number, "id", f"{record.id!r} stands already {earlier}")
            Checker(path, number).columns(record.meta)
            if fields := unused(record):
                raise refusal(record, fields[0], UNUSED)
        except RecordError as error:
            report(error)
        else:
            seen.add(record.id, number)
            yield record


# --- writing -----------------------------------------------------------------------------------------------------


def to_dict(record: CandidateSet) -> dict[str, Any]:
    """The JSON object of a record; empty optional fields are left out."""
    row: dict[str, Any] = {"id": record.id, "prompt": record.prompt}
    meta = record.meta
    if meta:
        row |= {key: meta[key] for key in SHOWN_COLUMNS if meta.get(key) is not None}
    row["responses"] = [response_to_dict(response) for response in record.responses]
    if meta and (rest := {key: value for key, value in meta.items() if key not in row or key not in SHOWN_COLUMNS}):
        row["meta"] = rest
    return row


def response_to_dict(response: Response) -> dict[str, Any]:
    """The JSON object of one response; ``count`` 1 and empty fields are left out."""
    row: dict[str, Any] = {"text": response.text}
    if response.messages is not None:
        row["messages"] = response.messages
    row["policy"], row["finished"] = response.policy, response.finished
    if response.count != 1:
        row["count"] = response.count
    if response.sampling:
        row["sampling"] = response.sampling
    if response.scores:
        row["scores"] = response.scores
    if response.tokens:
        row["tokens"] = response.tokens
    if response.meta:
        row["meta"] = response.meta
    return row


def write(path: str | os.PathLike[str], records: Iterable[CandidateSet]) -> int:
    """Write records as JSON Lines, atomically; return how many.

    Raises:
        InputError: the name is that of a table.
    """
    check_lines(path)
    return write_rows(path, (to_dict(record) for record in records))
