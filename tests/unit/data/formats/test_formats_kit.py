"""Real files into records and back: every row as it was, every row that is refused named, published counts met."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data.convert import convert
from rankalign.data.formats.detect import detect
from rankalign.data.records import read
from rankalign.errors import InputError
from rankalign.storage.jsonl import read_rows

WHOLE = [
    ("bon/tulu2_13b_bon.rrhf.jsonl.gz", "rrhf", 260),
    ("hh/harmless_pairs.train.jsonl", "trl", 1278),
    ("hh/harmless_pairs.test.jsonl", "hh", 327),
    ("hh/harmless_pairs.test.jsonl", "trl", 327),
    ("hh/helpful_pairs.train.jsonl", "hh", 1286),
    ("hh/helpful_pairs.train.jsonl", "trl", 1286),
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
    ("minchatgpt/responses.jsonl", "minchatgpt", 153),
    ("alpaca_eval/prompts.jsonl", "alpaca", 539),
    ("tldr/oai1b_judged.jsonl.gz", "columns", 1163),
]

# Rows that mean something only beside other files, and the format that takes them together.
BESIDE = {
    "alpaca_eval/preferences_v1.jsonl.gz": "alpaca-eval",
    "alpaca_eval/preferences_v2.jsonl.gz": "alpaca-eval",
    "minchatgpt/preferences.jsonl": "minchatgpt",
    **{
        f"vicuna/{name}": "fastchat"
        for name in (
            "answers.jsonl",
            "questions.jsonl",
            "reviews.jsonl",
            "qlora_answers.jsonl.gz",
            "qlora_pairwise.jsonl.gz",
            "qlora_relative.jsonl.gz",
        )
    },
}
# Files with a test of their own below.
APART = {
    "alpaca_eval/candidates.jsonl.gz": "alpaca-eval",
    "hh/harmless_raw_irregular.jsonl": "hh",
    "judge_agreement/pandalm_human.jsonl": "columns",
    "sentiment/movie_snippets.jsonl": "text-score",
}
# Tables of published figures, judge prompts and a lexicon: no candidates, pairs or scores of answers.
NO_RECORDS = {
    "alpaca_eval/leaderboard_published.jsonl",
    "bon/published.jsonl",
    "gpt4llm/cmp_data_scores.json",
    "gpt4llm/published_vicuna_pairs.jsonl",
    "judge_agreement/llmbar_published.jsonl",
    "sentiment/vader_lexicon.jsonl",
    "vicuna/judge_prompts.jsonl",
    "vicuna/llmzoo_published.jsonl",
    "vicuna/published_totals.jsonl",
}


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


# --- every file --------------------------------------------------------------------------------------------------


def test_every_file_of_the_kit_is_looked_at(data_kit: Path) -> None:
    files = {row["path"] for row in rows_of(data_kit / "MANIFEST.jsonl")}
    assert files == {file for file, _, _ in WHOLE} | BESIDE.keys() | APART.keys() | NO_RECORDS


@pytest.mark.parametrize("file", sorted({file for file, _, _ in WHOLE} | BESIDE.keys() | APART.keys()))
def test_the_format_is_told_and_lint_ends_with_a_table(
    data_kit: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    name = detect(data_kit / file)
    assert name == {**BESIDE, **APART}.get(file, name)
    assert name in [form for known, form, _ in WHOLE if known == file] or file in BESIDE or file in APART
    assert main(["lint", str(data_kit / file), "--skip-invalid"]) == 0
    assert re.search(r"\d+ records, \d+ bad lines left out", " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize("file", sorted(NO_RECORDS))
def test_what_holds_no_records_is_told_in_one_sentence(data_kit: Path, file: str) -> None:
    with pytest.raises(InputError, match=r"cannot tell the format from the keys|not valid JSON"):
        detect(data_kit / file)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("hh/helpful_pairs.test.jsonl", "trl"),
        ("hh/dpo_conversations.jsonl", "llama-factory"),
        ("judge_agreement/llmbar.jsonl", "columns"),
        ("alpaca_eval/raw_annotations_v2_sample.json", "alpaca-eval"),
    ],
)
@pytest.mark.parametrize("target", ["records.parquet", "records"])
def test_real_records_come_back_from_tables(data_kit: Path, tmp_path: Path, file: str, name: str, target: str) -> None:
    convert(data_kit / file, tmp_path / "records.jsonl", name)
    convert(tmp_path / "records.jsonl", tmp_path / target)
    convert(tmp_path / target, tmp_path / "again.jsonl")
    assert rows_of(tmp_path / "again.jsonl") == rows_of(tmp_path / "records.jsonl")


def test_preferences_find_the_prompt_of_their_answers(data_kit: Path, tmp_path: Path) -> None:
    source, verdicts = data_kit / "minchatgpt/responses.jsonl", data_kit / "minchatgpt/preferences.jsonl"
    report, back = there_and_back(source, "minchatgpt", tmp_path, extra=[verdicts])
    assert (report["read"], report["written"], report["lost"]) == (153 + 458, 153, {})
    assert sorted(map(str, back)) == sorted(map(str, rows_of(source) + rows_of(verdicts)))
    # The published counts: PPO is preferred to SFT in 136 of 153, to vanilla in 147 of 153.
    sets = list(read(tmp_path / "records.jsonl"))
    wins = {
        other: sum(
            r.scores.get(f"preference_ppo_{other}") == 1
            for record in sets
            for r in record.responses
            if r.policy == "ppo"
        )
        for other in ("sft", "vanilla")
    }
    assert wins == {"sft": 136, "vanilla": 147}


def test_snippets_open_with_four_words(data_kit: Path, tmp_path: Path) -> None:
    source = data_kit / "sentiment/movie_snippets.jsonl"
    report, back = there_and_back(source, "text-score", tmp_path)
    longer = [row for row in rows_of(source) if len(row["text"].split()) > 1]
    assert back == longer
    assert report["lost"] == {"texts of a single word": 4714 - len(longer)} == {"texts of a single word": 6}
    for record in read(tmp_path / "records.jsonl"):
        words = len((str(record.prompt) + record.responses[0].text).split())
        assert len(str(record.prompt).split()) == min(4, words - 1)


def test_soft_verdicts_are_win_probabilities(data_kit: Path, tmp_path: Path) -> None:
    source, verdicts = (data_kit / "alpaca_eval" / name for name in ("candidates.jsonl.gz", "preferences_v2.jsonl.gz"))
    report = convert([source, verdicts], tmp_path / "records.jsonl")
    scores = [
        score
        for record in read(tmp_path / "records.jsonl")
        for response in record.responses
        for score in response.scores.values()
        if score is not None
    ]
    taken = len([row for row in rows_of(verdicts) if row["preference"] is not None])
    assert (report["written"], all(0 <= score <= 1 for score in scores)) == (539, True)
    assert 0 < len(scores) <= taken
