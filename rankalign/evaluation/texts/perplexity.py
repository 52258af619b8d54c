"""Perplexity of texts under a language model: what is averaged over what is always stated."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rankalign.data.records import CandidateSet, Response, by_id
from rankalign.errors import InputError
from rankalign.evaluation import EvalResult, Row, drawn
from rankalign.evaluation.statistics import ratio_interval

if TYPE_CHECKING:
    from rankalign.data.encode import Encoder

Piece = tuple[list[int], list[int]]  # tokens read, tokens predicted
Tokens = tuple[int, ...]

TOKENS_A_PASS = 4096
RRHF_TOKENS = 19  # its metric cuts at 20 (GPT-2's `max_length` of then), the beginning of sequence included
MODES = ("", "rrhf")


def evaluate_perplexity(
    model: Any,
    tokenizer: Any,
    data: Sequence[str] | Sequence[CandidateSet],
    given_prompt: bool = True,
    template: str = "auto",
    compat: str = "",
    seed: int = 0,
    allow_special: bool = False,
) -> EvalResult:
    """Perplexity of texts, or of the responses in records, under a causal language model.

    A text alone is read behind one beginning-of-sequence token (the end-of-sequence token for tokenizers that have no
    other), which is not predicted itself, so each of its tokens counts; no end-of-sequence token is predicted. Texts
    longer than the model's context are scored in windows that read half a context of what stands before.

    Metrics:
        ``perplexity``: exp(nats / tokens) over all tokens of all texts, with an interval bootstrapped over prompts.
        ``mean_perplexity``, ``median_perplexity``: mean and median over texts of each text's own.
        ``bits_per_byte``: bits / UTF-8 bytes, which compares models with different tokenizers.
        ``tokens``, ``empty``: tokens scored; texts without tokens, which are in no average.

    ``compat="rrhf"`` gives one metric instead, ``mean_perplexity`` as RRHF's tables have it: line feeds made blanks,
    an empty text made one blank, the first 19 tokens of each text alone, 2 (sic) to the power of its mean nats, mean
    over texts. It is no perplexity; it is there to compare with those tables.

    Args:
        model: a causal language model of transformers in evaluation mode.
        tokenizer: its tokenizer.
        data: texts, or records of which every draw is a text.
        given_prompt: records only: score each response behind its prompt in the model's format, not alone.
        template: prompt format of ``given_prompt``.
        compat: "" or "rrhf".
        seed: seed of the bootstrap.
        allow_special: control tokens that texts spell are control tokens, not text.

    Raises:
        InputError: nothing to score, an unknown ``compat``, or a tokenizer without any token to begin with.
    """
    if compat not in MODES:
        raise InputError(f"unknown compat {compat!r} (known: rrhf)")
    if compat == "rrhf":
        return _rrhf(model, tokenizer, _texts(data))
    # None: positions are computed and never end.
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    rows = _rows(tokenizer, data, template, given_prompt, limit, allow_special)
    nats = text_nats(model, [windows(row.pop("read"), row.pop("ids"), limit) for row in rows])
    for row, values in zip(rows, nats, strict=True):
        row |= {"tokens": len(values), "nats": math.fsum(values)}
    return _summary(rows, seed)


def _texts(data: Sequence[str] | Sequence[CandidateSet]) -> list[str]:
    return [text for item in data for text in ([item] if isinstance(item, str) else [r.text for r in drawn(item)])]


def _rows(
    tokenizer: Any, data: Sequence[Any], template: str, given_prompt: bool, limit: int, allow_special: bool
) -> list[Row]:
    """One row a text: unit of the bootstrap, tokens read before it, its own tokens, its bytes."""
    from rankalign.data.encode import EncodeOptions, Encoder, encode_text, said

    by_id(item for item in data if not isinstance(item, str))  # the texts of an id are one unit of the bootstrap
    encoder = Encoder(tokenizer, EncodeOptions(template=template, allow_special_in_text=allow_special))
    rows: list[Row] = []
    for number, item in enumerate(data):
        texts = _texts([item])
        if isinstance(item, str) or not given_prompt:
            found = [([start_token(tokenizer)], encode_text(tokenizer, text, allow_special)) for text in texts]
        else:
            found = _behind_prompt(encoder, item, texts, limit)
        ident = str(number) if isinstance(item, str) else item.id
        for text, (read, ids) in zip(texts, found, strict=True):
            rows.append({"id": ident, "read": read, "ids": ids, "bytes": len(text.encode())})
    for sentence in said(encoder.counts):
        print(f"perplexity: {sentence}", file=sys.stderr)
    calling = sum(r.messages is not None for item in data if not isinstance(item, str) for r in drawn(item))
    if calling:
        print(f"perplexity: {calling} answers call tools or think; their words alone are read", file=sys.stderr)
    return rows


def _behind_prompt(encoder: Encoder, record: CandidateSet, texts: Sequence[str], limit: int) -> list[Piece]:
    """Texts behind the record's prompt, which is cut to half of ``limit`` where both do not fit."""
    answers = [Response(text, finished=False) for text in texts]
    prompt, rows = encoder.tokens(replace(record, responses=answers))
    half = encoder.rendering.shortened(prompt, max(limit // 2, 1), record.prompt, record.meta)
    return [(prompt if len(prompt) + len(ids) <= limit else half, ids) for ids in rows]


def start_token(tokenizer: Any) -> int:
    """The token a text alone is read behind: beginning of sequence, or else end of sequence.

    Raises:
        InputError: the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError("perplexity needs a tokenizer with a beginning- or end-of-sequence token")
    return int(start)


def windows(read: list[int], ids: list[int], limit: int) -> list[Piece]:
    """``ids`` cut into pieces that fit ``limit`` tokens with what they read.

    The first reads ``read`` (its last ``limit / 2`` tokens where it is longer), each other one the ``limit / 2`` tokens
    before it, so every token is predicted once.
    """
    half = limit // 2
    if len(read) + len(ids) > limit:
        read = read[-half:]
    pieces, start = [], 0
    while start < len(ids):
        context = read if start == 0 else (read + ids)[: len(read) + start][-half:]
        piece = ids[start : start + limit - len(context)]
        pieces.append((context, piece))
        start += len(piece)
    return pieces


def text_nats(model: Any, texts: Sequence[Sequence[Piece]]) -> list[list[float]]:
    """Negative log-probability (nats) of every token of every text, in order.

    Pieces that read the same tokens share them, and one that occurs twice is read once. They go through the model
    sorted by length, about 4,096 tokens a pass; the values do not depend on it.
    """
    from rankalign.rows.logps import token_logps

    places: dict[Tokens, dict[Tokens, list[tuple[int, int]]]] = {}
    for t, pieces in enumerate(texts):
        for p, (read, ids) in enumerate(pieces):
            places.setdefault(tuple(read), {}).setdefault(tuple(ids), []).append((t, p))
    found: dict[tuple[int, int], list[float]] = {}
    for batch in _batches({read: list(own) for read, own in places.items()}):
        with torch.no_grad():
            logps = token_logps(model, [shared for shared, _ in batch], [own for _, own in batch])
        for (shared, own), values in zip(batch, logps, strict=True):
            for piece, each in zip(own, values, strict=True):
                found |= dict.fromkeys(places[shared][piece], (-each.double()).tolist())
    return [[v for p in range(len(pieces)) for v in found[t, p]] for t, pieces in enumerate(texts)]


def _batches(lists: dict[Tokens, list[Tokens]]) -> Iterator[list[tuple[Tokens, list[Tokens]]]]:
    """Lists of about one length together, as many as hold :data:`TOKENS_A_PASS` tokens where they have to be padded."""
    widths = {read: len(read) + max(map(len, own)) for read, own in lists.items()}
    batch: list[tuple[Tokens, Tokens]] = []
    for read in sorted(lists, key=widths.__getitem__):
        for ids in lists[read]:
            if batch and (len(batch) + 1) * widths[read] > TOKENS_A_PASS:
                yield _joined(batch)
                batch = []
            batch.append((read, ids))
    if batch:
        yield _joined(batch)


def _joined(batch: list[tuple[Tokens, Tokens]]) -> list[tuple[Tokens, list[Tokens]]]:
    """Neighbours that read the same tokens as one list."""
    return [(read, [ids for _, ids in own]) for read, own in groupby(batch, key=itemgetter(0))]


def _summary(rows: list[Row], seed: int) -> EvalResult:
    full = [row for row in rows if row["tokens"]]
    if not full:
        raise InputError("there is no text to measure the perplexity of")
    for row in full:
        row["perplexity"] = math.exp(row["nats"] / row["tokens"])
    units: dict[str, list[float]] = {}
    for row in full:
        total = units.setdefault(row["id"], [0.0, 0.0, 0.0])
        for k, key in enumerate(("nats", "tokens", "bytes")):
            total[k] += row[key]
    nats, tokens, size = np.array(list(units.values())).T
    a_token, a_byte = ratio_interval(nats, tokens, seed=seed), ratio_interval(nats, size, seed=seed)
    own = [row["perplexity"] for row in full]
    metrics = {
        "perplexity": math.exp(a_token.value),
        "mean_perplexity": math.fsum(own) / len(own),
        "median_perplexity": float(np.median(own)),
        "bits_per_byte": a_byte.value / math.log(2),
        "tokens": float(tokens.sum()),
        "texts": float(len(full)),
        "empty": float(len(rows) - len(full)),
    }
    ci = {
        "perplexity": (math.exp(a_token.interval.low), math.exp(a_token.interval.high)),
        "bits_per_byte": (a_byte.interval.low / math.log(2), a_byte.interval.high / math.log(2)),
    }
    return EvalResult(metrics, len(units), ci, rows)


def _rrhf(model: Any, tokenizer: Any, texts: list[str]) -> EvalResult:
    if not texts:
        raise InputError("there is no text to measure the perplexity of")
    clean = [text.replace("\n", " ") or " " for text in texts]
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"])[:RRHF_TOKENS] for text in clean]
    nats = text_nats(model, [[([start_token(tokenizer)], tokens)] for tokens in ids if tokens])
    own = [2 ** (math.fsum(values) / len(values)) for values in nats]  # that metric takes exp2 of nats
    metrics = {"mean_perplexity": math.fsum(own) / len(own), "empty": float(len(texts) - len(own))}
    return EvalResult(metrics, len(own), {}, [{"id": str(i), "perplexity": value} for i, value in enumerate(own)])
