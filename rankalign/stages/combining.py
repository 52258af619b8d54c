"""``rankalign score --combine``: two passes over records that several judges have scored."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankalign.data.convert import Intake
from rankalign.data.load import load
from rankalign.data.records import CandidateSet
from rankalign.data.spool import Spool
from rankalign.errors import InputError
from rankalign.scorers.combine import Combination, Spread, combined, facts, spreads
from rankalign.stages.stage import Stage
from rankalign.storage.sources import sha256_of


def combine(
    source: str, output: str, how: Combination, overwrite: bool = False, intake: Intake | None = None
) -> dict[str, Any]:
    """Add one score made of others; the others stay.

    Means and deviations are those of the whole input, so a shard would get a scale of its own and is refused.

    Args:
        source: records with scores.
        output: where they go with the combined score.
        how: judges, weights and rule.
        overwrite: replace a finished output.
        intake: takes rows that cannot be read.

    Returns:
        ``{"output", "already_finished", "prompts", "scale", "lacking", ...}``; ``lacking`` has, by judge, the responses
        that it did not score.

    Raises:
        InputError: the input is a shard, lacks a judge, or cannot be read.
    """
    if re.search(r"\.shard-\d+-of-\d+$", source):
        raise InputError(f"{source} is a shard: its means are not those of the whole; `rankalign merge` first")
    if Path(source).resolve() == Path(output).resolve():
        raise InputError(f"input and output are the same file, {source}; name another output")
    taken = intake or Intake(False, "")
    sets = functools.cache(lambda: Spool(load(source, "auto", taken)))
    known = functools.cache(lambda: spreads(sets(), how))
    lacking = Counter[str]()
    settings = {"input": sha256_of(source), **dataclasses.asdict(how)}
    stage = Stage("combine", Path(source), Path(output), settings, overwrite=overwrite)
    done = stage.run(
        lambda ledger: _tell(known()),
        lambda find: _with_scores(sets(), how, known(), lacking),
        lambda: {"scale": facts(known()), **({"skipped_invalid": len(taken.errors)} if taken.errors else {})},
        sets,
    )
    return done if done["already_finished"] else {**done, "lacking": {judge: lacking[judge] for judge in known()}}


def _tell(known: dict[str, Spread]) -> None:
    for judge, spread in known.items():
        if not spread.deviation:
            print(f"judge {judge!r}: all its scores are {spread.mean:g}, so it decides nothing", file=sys.stderr)


def _with_scores(
    sets: Sequence[CandidateSet], how: Combination, known: dict[str, Spread], lacking: Counter[str]
) -> Iterator[CandidateSet]:
    for record in sets:
        scores = combined(record, how, known)
        for response, score in zip(record.responses, scores, strict=True):
            lacking.update(judge for judge in known if response.scores.get(judge) is None)
            response.scores[how.name] = score
        yield record
