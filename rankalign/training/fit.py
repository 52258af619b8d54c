"""Whether model, tokenizer and lists go together, checked before the first update: an id without a row, a text beyond
the model's positions or answers without an end would come up in the middle of a run, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankalign.data.encode import TokenList
from rankalign.data.token_table import Joined, TokenTable
from rankalign.errors import InputError


def check_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without an end-of-sequence token: no answer could be taught to end.

    Raises:
        InputError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model {tokenizer.name_or_path}: its tokenizer names no end-of-sequence token, so no answer could learn "
            "to end; set eos_token in its tokenizer_config.json to a token of the vocabulary"
        )


def check_fit(model: Any, lists: Sequence[TokenList], more: int = 0) -> None:
    """Refuse lists that the model cannot read, and say where they go beyond what it was made for.

    Args:
        model: a causal language model or a reward model, bare or inside PEFT.
        lists: in tokens.
        more: tokens that will be written behind them.

    Raises:
        InputError: an id beyond the embedding, or a text beyond learned positions, naming the prompt.
    """
    rows = model.get_input_embeddings().num_embeddings
    config = model.config.get_text_config()
    most, learned = getattr(config, "max_position_embeddings", None), _has_learned_positions(model)
    beyond = 0
    for longest, largest, name in _extents(lists):
        if largest >= rows:
            raise InputError(
                f"prompt {name()!r} holds token id {largest}, and the model has {rows} embeddings: its tokenizer "
                "is longer than its embedding; resize the model, or take the tokenizer that belongs to it"
            )
        if most and longest + more > most:
            beyond += 1
            if learned:
                raise InputError(
                    f"prompt {name()!r} takes {longest + more} tokens, and {config.model_type} has {most} positions: "
                    f"--max_length {most} or less"
                )
    if beyond:
        print(f"{beyond} prompts go beyond the {most} positions that the model was trained for", file=sys.stderr)


def _extents(lists: Sequence[TokenList]) -> Iterator[tuple[int, int, Callable[[], str]]]:
    """Of each list its longest text, its largest id and what tells its name. A table knows them without its tokens."""
    for part in lists.parts if isinstance(lists, Joined) else [lists]:
        if isinstance(part, TokenTable):
            pairs = zip(part.longest.tolist(), part.largest.tolist(), strict=True)
            for index, (longest, largest) in enumerate(pairs):
                yield longest, largest, lambda i=index, table=part: table[i].id  # type: ignore[misc]
            continue
        for tokens in part:
            longest = len(tokens.prompt) + max(map(len, tokens.responses), default=0)
            ids = chain(tokens.prompt, *tokens.responses)
            yield longest, max(ids, default=0), lambda tokens=tokens: tokens.id  # type: ignore[misc]


def _has_learned_positions(model: Any) -> bool:
    """Whether positions are rows of a table, as in GPT-2 and OPT; rotary ones are computed and have no last."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    # OPT keeps two rows before the first position.
    return any(most is not None and most <= table.num_embeddings <= most + 2 for table in tables)
