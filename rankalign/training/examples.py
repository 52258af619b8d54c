"""What a trainer's batches hold, one prompt's candidates each, and how a batch becomes what a loss reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankalign.data.encode import Spans, TokenList
from rankalign.data.token_table import TokenTable
from rankalign.errors import InputError
from rankalign.losses.ranked import Ranked
from rankalign.rows.upload import to_device


@dataclass(frozen=True)
class Example:
    """One prompt's candidates with their reference log-probabilities, (N,) or of tokens (N, T), as the loss needs them.

    One that does not count keeps a process busy while the others run the last, short micro-batch of an epoch.
    """

    tokens: TokenList
    ref_logps: Tensor | None = None
    counts: bool = True


class Examples(Sequence[Example]):
    """Examples that are put together when they are asked for, so that lists may stay in a table on disk.

    Args:
        lists: one a prompt.
        references: (N,) or (N, T) of each, or None for all.
    """

    def __init__(self, lists: Sequence[TokenList], references: Sequence[Tensor | None] | None) -> None:
        self.lists, self.references = lists, references

    def __len__(self) -> int:
        return len(self.lists)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Example(self.lists[index], None if self.references is None else self.references[index])


class ExampleSet(Dataset[Example]):
    """Examples as a data set of torch."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def collate(examples: list[Example]) -> dict[str, list[Example]]:
    """A batch is the list of its examples: ragged lists stay ragged until their log-probabilities are known."""
    return {"examples": examples}


def token_ids(examples: Sequence[Example]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts, and the responses of each."""
    return [e.tokens.prompt for e in examples], [e.tokens.responses for e in examples]


def unlearned(lists: Sequence[TokenList]) -> list[list[Spans]]:
    """For each list, by response, the spans of tokens that get no loss; a list where none has any is empty."""
    return [tokens.unlearned for tokens in lists]


def pad(rows: Sequence[Sequence[float] | Tensor], width: int, fill: float = 0.0) -> Tensor:
    """(P, width) float64 of ragged rows."""
    out = torch.full((len(rows), width), fill, dtype=torch.float64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.as_tensor(values, dtype=torch.float64)
    return out


def to_ranked(examples: Sequence[Example], logps: Tensor, beyond: Sequence[str] = ()) -> Ranked:
    """What a loss reads, from a batch and the policy's log-probabilities, (P, N) or by token (P, N, T).

    Args:
        examples: the batch.
        logps: the log-probabilities; with something ``beyond`` in a last dimension behind them.
        beyond: the fields of :class:`Ranked` that are sums over tokens of what stands there.
    """
    if beyond:
        logps, *others = logps.unbind(-1)
        sums = [each.sum(2) if each.dim() == 3 else each for each in others]
        return replace(to_ranked(examples, logps), **dict(zip(beyond, sums, strict=True)))
    if logps.dim() == 3:
        return _by_token(to_ranked([replace(e, ref_logps=None) for e in examples], logps.sum(2)), examples, logps)
    width, lists = logps.shape[1], [e.tokens for e in examples]
    refs = [e.ref_logps for e in examples if e.ref_logps is not None]
    told = [
        pad([t.lengths for t in lists], width).long(),
        pad([t.scores for t in lists], width),
        torch.arange(width) < torch.tensor([len(t.responses) for t in lists]).unsqueeze(1),
        torch.tensor([len(t.prompt) for t in lists]),
        *([pad(refs, width).to(logps.dtype)] if refs else []),
    ]
    if any(t.own for t in lists):
        told.append(pad([t.own for t in lists], width).bool())
    lengths, scores, mask, prompt_lengths, *more = to_device(logps.device, *told)
    ref_logps = more.pop(0) if refs else None
    return Ranked(logps, lengths, scores, mask, ref_logps, prompt_lengths, own=more[0] if more else None)


def _by_token(ranked: Ranked, examples: Sequence[Example], logps: Tensor) -> Ranked:
    """The same with what tokens have, the policy's (P, N, T), and a number that is the prompt's own wherever it is."""
    seeds = torch.tensor([crc32(e.tokens.id.encode(errors="backslashreplace")) for e in examples])
    refs = torch.zeros(logps.shape, dtype=torch.float64)
    known = [e.ref_logps for e in examples if e.ref_logps is not None]
    for block, row in zip(refs, known, strict=False):
        block[: row.shape[0], : row.shape[1]] = row
    seeds, refs = to_device(logps.device, seeds, refs.to(logps.dtype))
    ranked = replace(ranked, token_logps=logps, seeds=seeds)
    return replace(ranked, ref_token_logps=refs, ref_logps=refs.sum(2)) if known else ranked


def check_ids(examples: Sequence[Example]) -> None:
    """Refuse two lists of one id: ledger and messages know lists by their ids. Held-out lists have ids of their own.

    Raises:
        InputError: naming the id.
    """
    if isinstance(examples, Examples) and isinstance(examples.lists, TokenTable):
        ident, count = examples.lists.repeated() or ("", 0)
    else:
        ident, count = Counter(example.tokens.id for example in examples).most_common(1)[0] if examples else ("", 0)
    if count > 1:
        raise InputError(f"{count} training lists have the id {ident!r}; give each an id of its own")
