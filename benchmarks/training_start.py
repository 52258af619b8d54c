"""From the start of ``rankalign train`` to the end of its first update on ``tiny``, for :mod:`benchmarks.scale`.

What grows with the data is reading and tokenising it, once; a later run finds the tokens. CPU seconds are those of the
process and its workers, the peak is that of the largest of them. The tokenizer of ``tiny`` knows characters, so most
answers are cut at 512 tokens.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.stage import Stage, python, rankalign


def train(folder: Path, *words: str, data: str = "run/candidates.jsonl") -> list[str]:
    """One update, its tokens kept beside the data."""
    name = Path(data).stem
    files = ("--data", str(folder / data), "--output_dir", str(folder / f"trained-{name}"))
    kept = ("--token_cache", str(folder / f"tokens-{name}"))
    return rankalign(
        "train", *files, *kept, "--model", "tiny", "--max_steps", "1", "--save_strategy", "no", "--overwrite", *words
    )


def _shards(folder: Path, name: str) -> list[list[str]]:
    """The records as four Parquet files in a folder, or as a folder of `datasets`."""
    return [rankalign("convert", str(folder / "run" / "candidates.jsonl"), str(folder / name), "--output_shards", "4")]


def _saved(folder: Path) -> list[list[str]]:
    code = "import sys, datasets; datasets.Dataset.from_parquet(sys.argv[1] + '/*.parquet').save_to_disk(sys.argv[2])"
    return [*_shards(folder, "rows.parquet"), python("-c", code, str(folder / "rows.parquet"), str(folder / "saved"))]


STAGES = {
    "train": Stage("train, RRHF on `tiny`, to step 1", train, stale=("tokens-candidates",), note="tokens made"),
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
    "train-parquet": Stage(
        "train, RRHF on `tiny`, to step 1, from four Parquet files in a folder",
        lambda folder: train(folder, data="rows.parquet"),
        lambda folder: _shards(folder, "rows.parquet"),
        stale=("tokens-rows", "rows.parquet"),
        note="tokens made",
    ),
    "train-saved": Stage(
        "train, RRHF on `tiny`, to step 1, from a folder of `datasets`",
        lambda folder: train(folder, data="saved"),
        _saved,
        stale=("tokens-saved", "rows.parquet", "saved"),
        note="tokens made",
    ),
}
