"""Lists of real text in the default model's tokens, and their packing into rows."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

from benchmarks.measure import ROOT, Tokens
from rankalign.models import load as models
from rankalign.rows.tree import tree_tokens

DATA = Path(os.environ.get("RANKALIGN_DATA", ROOT.parent / "shared" / "data"))

Lists = list[tuple[Tokens, list[Tokens], list[float]]]  # prompt, responses, scores


def hh_pairs(count: int, longest: int) -> Lists:
    tokenizer = models.load_tokenizer("default")
    lists: Lists = []
    for name in ("harmless", "helpful"):
        with open(DATA / "hh" / f"{name}_pairs.train.jsonl", encoding="utf-8") as file:
            for line in list(file)[: count // 2]:
                pair = json.loads(line)
                prompt, *both = (tokenizer(pair[key])["input_ids"] for key in ("prompt", "chosen", "rejected"))
                prompt = prompt[-longest // 2 :]
                lists.append((prompt, [ids[: longest - len(prompt)] for ids in both], [1.0, 0.0]))
    return lists


def bon_lists(count: int, longest: int) -> Lists:
    """The first six answers of a best-of-n file."""
    tokenizer, lists = models.load_tokenizer("default"), []
    with gzip.open(DATA / "bon" / "tulu2_13b_bon.rrhf.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in list(file)[:count]:
            record = json.loads(line)
            prompt = tokenizer(record["query"])["input_ids"][: longest // 2]
            encoded = [tokenizer(text)["input_ids"][: longest - len(prompt)] for text in record["responses"][:6]]
            lists.append((prompt, encoded, record["scores"][:6]))
    return lists


def packed(lists: Lists, budget: int) -> list[list[int]]:
    """Indices of lists that share a row of at most so many tokens, in order."""
    rows: list[list[int]] = []
    room = 0
    for p, (prompt, responses, _) in enumerate(lists):
        need = tree_tokens(len(prompt), [len(r) for r in responses])
        if need > room:
            rows.append([])
            room = budget
        rows[-1].append(p)
        room -= need
    return rows
