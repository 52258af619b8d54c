"""Texts alone in tokens, as they would stand in a line."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rankalign.data import special

# Behind the first of these that does not become one token with a text, the text is encoded as it stands in a line.
ANCHORS = ("\n", "|", "0")


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, allow_special: bool = False, guarded: bool = False
) -> list[int]:
    """Token ids of an answer alone: no special tokens added, and no blank in front that was not there.

    SentencePiece tokenizers put a blank before a text that begins a word. Behind a line feed they do not, so for them
    the text is encoded behind one, which is taken off again.

    Args:
        tokenizer: whose ids.
        text: what to encode.
        allow_special: control tokens that the text spells are control tokens, not text.
        guarded: the text holds breaks already.
    """
    if not allow_special and not guarded:
        text = special.controls(tokenizer).broken(text)
    if not _adds_blank(tokenizer):
        return special.encode(tokenizer, text)
    for anchor in ANCHORS:
        before, both = special.encode(tokenizer, anchor), special.encode(tokenizer, anchor + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return special.encode(tokenizer, text)


def _adds_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    return " a" in str(tokenizer.decode(special.encode(tokenizer, "\n") + special.encode(tokenizer, "a")))


def begin_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
