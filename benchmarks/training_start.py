"""From the start of ``rankalign train`` to the end of its first update on ``tiny``, for :mod:`benchmarks.scale`.

What grows with the data is reading and tokenising it, once; a later run finds the tokens. CPU seconds are those of the
process and its workers, the peak is that of the largest of them. The tokenizer of ``tiny`` knows characters, so most
answers are cut at 512 tokens.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.stage import Stage, rankalign


def train(folder: Path, *words: str) -> list[str]:
    """One update, its tokens kept beside the data."""
    files = ("--data", str(folder / "run" / "candidates.jsonl"), "--output_dir", str(folder / "trained"))
    kept = ("--token_cache", str(folder / "tokens"))
    return rankalign(
        "train", *files, *kept, "--model", "tiny", "--max_steps", "1", "--save_strategy", "no", "--overwrite", *words
    )


STAGES = {
    "train": Stage("train, RRHF on `tiny`, to step 1", train, stale=("tokens",), note="tokens made"),
    "train-found": Stage(
        "train, RRHF on `tiny`, to step 1, again",
        train,
        lambda folder: [train(folder)],
        note="tokens found",
    ),
    "train-dpo": Stage(
        "train, DPO on `tiny`, to step 1, again",
        lambda folder: train(folder, "--loss", "dpo"),
        lambda folder: [train(folder)],
        note="tokens found, the references of one update computed",
    ),
}
