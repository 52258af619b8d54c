"""Control tokens of published families, as texts spell them; a tokenizer's own can be named beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What no pattern below finds. Names that are ordinary words or tags in other texts (``<think>``, ``<s>`` alone aside)
# are left to the tokenizer that is asked.
KNOWN = (
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<PAD>",
    "<UNK>",
    "<CLS>",
    "<SEP>",
    "<BOS_TOKEN>",
    "<EOS_TOKEN>",
    "<MASK_TOKEN>",
    "<turn|>",
    "<|turn>",
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "]~b]",  # MiniMax
    "]~!b[",
    "[e~[",
)
# <|im_start|>, <|start_header_id|>, <|reserved_special_token_0|>, and those with full-width bars.
_FORMS = r"<\|[A-Za-z][\w\-]{1,40}\|>|<\uff5c[^\uff5c<>\n]{2,40}\uff5c>"
_PUBLISHED = re.compile("|".join([_FORMS, *map(re.escape, KNOWN)]))


def found_in(text: str, names: Sequence[str] = ()) -> list[str]:
    """The control tokens that a text spells, each once: published ones, and those of ``names``."""
    own = [name for name in names if name in text]
    return sorted({*_PUBLISHED.findall(text), *own})
