"""Records of sound lines in a third of the time: decoded, checked and made in one go by msgspec.

Whatever is wrong with a line, or only rare, is left to :func:`rankalign.data.records.parse`, which finds the words for
it: what comes from here is what comes from there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rankalign.data.check import Checker
from rankalign.data.records import CandidateSet, Response, parse_tokens
from rankalign.errors import RecordError
from rankalign.storage.strict import quotes, strings

_ABSENT = msgspec.UNSET
_Mapping = dict[str, Any] | msgspec.UnsetType
_LARGEST = 2**53  # whole numbers up to it are doubles, too


# What is not given stays unset, so that it is known how many keys a line has. Objects of JSON hold no cycles: without
# gc they cost the collector nothing.
class _Response(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    text: str
    policy: str | msgspec.UnsetType = _ABSENT
    finished: bool | msgspec.UnsetType = _ABSENT
    count: Any = _ABSENT  # msgspec would take 1.0 for a whole number
    sampling: _Mapping = _ABSENT
    scores: _Mapping = _ABSENT
    tokens: _Mapping = _ABSENT
    meta: _Mapping = _ABSENT


class _Record(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    id: str
    prompt: str | list[Any]
    responses: list[_Response] | msgspec.UnsetType = _ABSENT
    meta: _Mapping = _ABSENT


_decode = msgspec.json.Decoder(_Record).decode


class _Slowly(Exception):
    """The line needs a closer look."""


def quick_record(line: bytes) -> CandidateSet | None:
    """The record of a line of JSON, without its place; None where the line has to be read with all checks."""
    try:
        return _made(line)
    except (msgspec.MsgspecError, ValueError, RecursionError, RecordError, _Slowly):
        return None


def _made(line: bytes) -> CandidateSet:
    row = _decode(line)
    if not row.id.strip():
        raise _Slowly
    found = 3  # the value of `id`, its key and that of `prompt`
    if isinstance(row.prompt, list):
        Checker("", 0).prompt(row.prompt)
        found += strings(row.prompt)
    else:
        if not row.prompt.strip():
            raise _Slowly
        found += 1
    responses: list[Response] = []
    if row.responses is not _ABSENT:
        found += 1
        for entry in row.responses:
            found += _add(entry, responses)
    meta: dict[str, Any] = {}
    if row.meta is not _ABSENT:
        meta = row.meta
        found += 1 + strings(meta)
    if quotes(line) != 2 * found:  # a key stood twice
        raise _Slowly
    return CandidateSet(row.id, row.prompt, responses, meta)


def _add(entry: _Response, responses: list[Response]) -> int:
    """Append a response; how many keys and texts its object holds."""
    found, policy, finished, count = 2, "unknown", True, 1
    sampling, scores, tokens, meta = {}, {}, None, {}
    if entry.policy is not _ABSENT:
        policy = entry.policy
        if not policy.strip():
            raise _Slowly
        found += 2
    if entry.finished is not _ABSENT:
        finished = entry.finished
        found += 1
    if entry.count is not _ABSENT:
        count = entry.count
        if type(count) is not int or count < 1:
            raise _Slowly
        found += 1
    if entry.sampling is not _ABSENT:
        sampling = entry.sampling
        found += 1 + strings(sampling)
    if entry.scores is not _ABSENT:
        scores = entry.scores
        for score in scores.values():
            if type(score) is float or score is None:
                continue
            if type(score) is not int or not -_LARGEST <= score <= _LARGEST:
                raise _Slowly
        found += 1 + len(scores)
    if entry.tokens is not _ABSENT:
        tokens = parse_tokens(Checker("", 0), entry.tokens, "")
        found += 1 + strings(entry.tokens)
    if entry.meta is not _ABSENT:
        meta = entry.meta
        if "message" in meta:
            raise _Slowly
        found += 1 + strings(meta)
    responses.append(Response(entry.text, policy, finished, count, sampling, scores, tokens, meta))
    return found
