"""What two texts do not have in common, word by word, to be marked where they stand side by side."""

from __future__ import annotations

from difflib import SequenceMatcher

import regex

from rankalign.data.words import UNSPACED

Parts = list[tuple[str, bool]]
"""A text in pieces, in order; True where the other text lacks the piece."""
MOST_TOKENS = 600
"""Of a side that is compared word by word; the longest match takes time with the product of both."""
LEAST_SHARED = 0.2
"""Share of words in common below which marks would cover everything and say nothing."""
# A word with the blanks behind it, so that blanks alone never count as something in common. Scripts without blanks
# between words go by the sign.
_TOKEN = regex.compile(rf"(?V1)(?=[{UNSPACED}])\X\s*|[\w'’\p{{M}}--[{UNSPACED}]]+\s*|[^\w\s]\s*|\s+")


def marked(a: str, b: str) -> tuple[Parts, Parts] | None:
    """Both texts with what differs between them marked.

    Args:
        a: the text on the left.
        b: the text on the right.

    Returns:
        The parts of each, which join to the text; None where they are too unlike for marks to help.
    """
    left, right = ([str(token) for token in _TOKEN.findall(text)] for text in (a, b))
    if "".join(left) != a or "".join(right) != b:  # a sign that is none of these; never seen
        return None
    same = _same(left, right)
    if same[0].count(True) * 2 < LEAST_SHARED * (len(left) + len(right)):
        return None
    return _joined(left, same[0]), _joined(right, same[1])


def _same(left: list[str], right: list[str]) -> tuple[list[bool], list[bool]]:
    """Which tokens of each side the other has at the same place of a longest common order."""
    keys = [[token.strip() for token in side] for side in (left, right)]
    found = ([False] * len(left), [False] * len(right))
    begin, end = _ends(*keys)
    inner = [side[begin : len(side) - end] for side in keys]
    blocks = [(0, 0, begin), (len(left) - end, len(right) - end, end)]
    if max(map(len, inner)) <= MOST_TOKENS:  # beyond that all between the common ends counts as different
        matcher = SequenceMatcher(None, inner[0], inner[1], autojunk=False)
        blocks += [(begin + i, begin + j, size) for i, j, size in matcher.get_matching_blocks()]
    for i, j, size in blocks:
        found[0][i : i + size] = found[1][j : j + size] = [True] * size
    return found


def _ends(left: list[str], right: list[str]) -> tuple[int, int]:
    """How many tokens both begin with, and how many both end with behind those."""
    most = min(len(left), len(right))
    begin = next((n for n in range(most) if left[n] != right[n]), most)
    rest = most - begin
    return begin, next((n for n in range(rest) if left[-1 - n] != right[-1 - n]), rest)


def _joined(tokens: list[str], same: list[bool]) -> Parts:
    """Neighbours of one kind as one part."""
    parts: Parts = []
    for token, shared in zip(tokens, same, strict=True):
        if parts and parts[-1][1] == (not shared):
            parts[-1] = (parts[-1][0] + token, not shared)
        else:
            parts.append((token, not shared))
    return parts
