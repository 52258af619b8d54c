"""Real files into records and back: every row as it was, every row that is refused named, published counts met."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rankalign.convert import convert
from rankalign.records import read, read_rows

WHOLE = [
    ("bon/tulu2_13b_bon.rrhf.jsonl.gz", "rrhf", 260),
    ("hh/harmless_pairs.train.jsonl", "trl", 1278),
    ("hh/harmless_pairs.test.jsonl", "hh", 327),
    ("hh/helpful_pairs.train.jsonl", "hh", 1286),
    ("hh/helpful_pairs.test.jsonl", "trl", 325),
    ("hh/harmless_raw.test.jsonl", "hh", 327),
    ("hh/harmless_raw.test.jsonl", "trl", 327),
    ("hh/helpful_textscore.test.jsonl", "text-score", 325),
    ("hh/webgpt_textscore.jsonl", "text-score", 552),
    ("hh/dpo_conversations.jsonl", "llama-factory", 190),
    ("instructions/alpaca_format.jsonl", "alpaca", 1846),
    ("instructions/alpaca_format.jsonl", "llama-factory", 1846),
    ("candidates/dsp_domain_responses.jsonl", "columns", 361),
    ("candidates/user_oriented_8models.jsonl", "columns", 151),
    ("alpaca_eval/raw_model_outputs_sample.json", "alpaca-eval", 60),
    ("alpaca_eval/raw_annotations_v2_sample.json", "alpaca-eval", 30),
    ("vicuna/llmzoo_rank_reviews.jsonl", "fastchat", 70),
    ("judge_agreement/llmbar.jsonl", "columns", 234),
    ("gpt4llm/comparisons.jsonl", "gpt4-compare", 688),
    ("gpt4llm/comparisons_userinput.jsonl", "gpt4-compare", 120),
    ("minchatgpt/responses.jsonl", "columns", 153),
    ("tldr/oai1b_judged.jsonl.gz", "columns", 1163),
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


def there_and_back(
    source: Path, name: str, folder: Path, **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    report = convert(source, folder / "records.jsonl", name, "rankalign", **options)
    assert len(list(read(folder / "records.jsonl"))) == report["written"]
    convert(folder / "records.jsonl", folder / "back.jsonl", "rankalign", name)
    return report, rows_of(folder / "back.jsonl")


@pytest.mark.parametrize(("file", "name", "count"), WHOLE)
def test_every_row_comes_back(data_kit: Path, tmp_path: Path, file: str, name: str, count: int) -> None:
    report, back = there_and_back(data_kit / file, name, tmp_path)
    assert back == rows_of(data_kit / file)
    assert (report["read"], report["written"], report["errors"], report["lost"]) == (count, count, [], {})


@pytest.mark.parametrize("file", ["vicuna/answers.jsonl", "vicuna/qlora_answers.jsonl.gz"])
def test_answers_come_back_from_beside_their_questions(data_kit: Path, tmp_path: Path, file: str) -> None:
    extra = [data_kit / "vicuna/questions.jsonl"]
    report, back = there_and_back(data_kit / file, "fastchat", tmp_path, extra=extra)
    assert (report["written"], report["errors"]) == (80, [])
    assert back == rows_of(data_kit / file)


def test_irregular_dialogues_are_all_named(data_kit: Path, tmp_path: Path) -> None:
    source = data_kit / "hh/harmless_raw_irregular.jsonl"
    report = convert(source, tmp_path / "out.jsonl", "hh", "rankalign", skip_invalid=True)
    assert [error["line"] for error in report["errors"]] == [1, 2, 3, 4, 5]
    assert report["written"] == 0


def test_booleans_among_the_answers_are_named(data_kit: Path, tmp_path: Path) -> None:
    source = data_kit / "judge_agreement/pandalm_human.jsonl"
    report, back = there_and_back(source, "columns", tmp_path, skip_invalid=True)
    sound = [row for row in rows_of(source) if isinstance(row["response1"], str) and isinstance(row["response2"], str)]
    assert back == sound
    assert (len(sound), report["skipped"]) == (668, 6)
    assert {error["reason"] for error in report["errors"]} == {"expected a string, found a boolean"}


def test_alpaca_eval_outputs_and_verdicts_make_one_set(data_kit: Path, tmp_path: Path) -> None:
    source, verdicts = (data_kit / "alpaca_eval" / name for name in ("candidates.jsonl.gz", "preferences_v1.jsonl.gz"))
    report, back = there_and_back(source, "alpaca-eval", tmp_path, extra=[verdicts])
    assert back == rows_of(source)
    sets = list(read(tmp_path / "records.jsonl"))
    assert (report["written"], {len(record.responses) for record in sets}) == (539, {11})
    # 266 of the 805 prompts are not in the kit, and ten models were judged on each.
    assert report["lost"] == {"verdicts of a prompt that has no answer here": 2660}
    strict = [
        sum(
            x != y
            for x, y in itertools.combinations([s for s in record.scores("alpaca_eval_gpt4") if s is not None], 2)
        )
        for record in sets
    ]
    assert (sum(count > 0 for count in strict), sum(strict)) == (513, 10_369)
    converted = convert(tmp_path / "records.jsonl", tmp_path / "pairs.jsonl", "rankalign", "trl")
    assert converted["written"] == 10_369
    assert converted["lost"]["prompts without a strict pair"] == 539 - 513


def test_every_review_finds_its_answers(data_kit: Path, tmp_path: Path) -> None:
    folder = data_kit / "vicuna"
    files = [
        "questions.jsonl",
        "reviews.jsonl",
        "qlora_answers.jsonl.gz",
        "qlora_pairwise.jsonl.gz",
        "qlora_relative.jsonl.gz",
    ]
    extra = [folder / name for name in files]
    report = convert(folder / "answers.jsonl", tmp_path / "out.jsonl", "fastchat", "rankalign", extra=extra)
    assert (report["written"], report["errors"], report["lost"]) == (80, [], {})
    sets = list(read(tmp_path / "out.jsonl"))
    # The published sums of the Vicuna table, from the scores that stand in the records.
    for row in rows_of(folder / "published_totals.jsonl")[:4]:
        judge = f"review_{row['model_1']}_{row['model_2']}"
        totals = [
            sum(r.scores.get(judge) or 0 for record in sets for r in record.responses if r.policy == row[model])
            for model in ("model_1", "model_2")
        ]
        assert totals == [row["total_1"], row["total_2"]]


def test_a_ranked_file_gives_every_strict_pair(data_kit: Path, tmp_path: Path) -> None:
    source = data_kit / "bon/tulu2_13b_bon.rrhf.jsonl.gz"
    pairs = [pair for row in rows_of(source) for pair in itertools.combinations(row["scores"], 2)]
    ties = sum(a == b for a, b in pairs)
    report = convert(source, tmp_path / "pairs.jsonl", "rrhf", "trl")
    assert (report["written"] + ties, report["lost"].get("ties", 0)) == (260 * 55, ties)
    best = convert(source, tmp_path / "best.json", "rrhf", "trl", pairs="best-worst")
    unequal = sum(len(set(row["scores"])) > 1 for row in rows_of(source))
    assert best["written"] == len(json.loads((tmp_path / "best.json").read_text())) == unequal
