"""Control tokens that texts spell: text by default, so that no candidate can forge a turn before a reward model.

Within this package a rendered string may hold *breaks*: a character of no script behind the first character of every
control token that a content spells. What a template writes itself holds none. :func:`encode` takes a broken token for
text and an unbroken one for itself, and leaves no break in what is encoded.
"""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

BREAK = "\U0010fffd"
# Names of control tokens while texts are encoded in which their own names are text.
_ALIAS, _FIRST = "\U0010fffc", 0xF0000  # private use planes: no letter that a text is likely to hold


@dataclass(frozen=True)
class Controls:
    """A tokenizer's control tokens.

    Attributes:
        names: how they are spelt; tokens that were added as plain words (``<think>`` in many families) are text.
        pattern: finds the longest of them first, as tokenizers do; None where there are none.
    """

    names: tuple[str, ...]
    pattern: re.Pattern[str] | None

    def spelt(self, text: str) -> list[str]:
        """The control tokens that stand in a text."""
        return self.pattern.findall(text) if self.pattern else []

    def broken(self, text: str) -> str:
        """``text`` with a break in every control token."""
        text = text.replace(BREAK, "")
        # Tokens can overlap: the rest of a broken one may begin another.
        while self.pattern and self.pattern.search(text):
            text = self.pattern.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)
        return text

    def last(self, text: str) -> int:
        """Where the last control token of a text begins; 0 if there is none."""
        return max((found.start() for found in self.pattern.finditer(text)), default=0) if self.pattern else 0

    def alias(self, name: str) -> str:
        """What stands for a control token while its name is text."""
        return _ALIAS + chr(_FIRST + self.names.index(name))


_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Controls] = weakref.WeakKeyDictionary()
_renamed: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Controls, Tokenizer]] = weakref.WeakKeyDictionary()


def controls(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """The control tokens of a tokenizer: all that it marks as special and that are longer than one character."""
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = tuple(
        sorted((n for n in {*marked, *tokenizer.all_special_tokens} if len(n) > 1), key=lambda n: (-len(n), n))
    )
    found = _known.get(tokenizer)
    if found is None or found.names != names:  # tokens can be added at any time
        pattern = re.compile("|".join(map(re.escape, names))) if names else None
        found = _known[tokenizer] = Controls(names, pattern)
    return found


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text that may hold breaks; what is broken is text, all else as the tokenizer has it."""
    if BREAK not in text:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    known = controls(tokenizer)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        ids = _in_pieces(tokenizer, text, known)
        return tokenizer.build_inputs_with_special_tokens(ids) if add_special_tokens else ids
    aliased = known.pattern.sub(lambda found: known.alias(found[0]), text) if known.pattern else text
    renamed = _with_aliases(tokenizer, known)
    return list(renamed.encode(aliased.replace(BREAK, ""), add_special_tokens=add_special_tokens).ids)


def _with_aliases(tokenizer: PreTrainedTokenizerBase, known: Controls) -> Tokenizer:
    """The tokenizer under which the names of its control tokens are text like any other, their ids unchanged."""
    kept = _renamed.get(tokenizer)
    if kept is None or kept[0] is not known:
        renamed = Tokenizer.from_str(json.dumps(_renaming(json.loads(tokenizer.backend_tokenizer.to_str()), known)))
        kept = _renamed[tokenizer] = (known, renamed)
    return kept[1]


def _renaming(told: dict[str, Any], known: Controls) -> dict[str, Any]:
    """A tokenizer's own description with every control token under its alias."""
    new = {name: known.alias(name) for name in known.names}
    for token in told["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    model, vocab = told["model"], told["model"]["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new.get(word, word): number for word, number in vocab.items()}
    else:  # unigram: pieces with their scores, in the order of their ids
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    if "merges" in model:  # one that spells a control token would bring it back
        model["merges"] = [m for m in model["merges"] if "".join(m.split() if isinstance(m, str) else m) not in new]
    # What a tokenizer is set to do to batches must not touch a text here.
    return {**told, "truncation": None, "padding": None}


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: str, known: Controls) -> list[int]:
    """For tokenizers in Python: each piece with a broken token is encoded with its control tokens split."""
    pieces = re.split(f"({known.pattern.pattern})", text) if known.pattern else [text]
    found: list[int] = []
    for piece in filter(None, pieces):
        split = {"split_special_tokens": True} if BREAK in piece else {}
        found += tokenizer(piece.replace(BREAK, ""), add_special_tokens=False, **split)["input_ids"]
    return found
