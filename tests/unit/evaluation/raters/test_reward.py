"""Rewards, best-of-n, agreement and pairwise comparison against values worked by hand."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.evaluation import by_policy
from rankalign.evaluation.pairwise.scores import compare_by_score, match, summarise
from rankalign.evaluation.raters.accuracy import evaluate_agreement
from rankalign.evaluation.raters.reward import evaluate_best_of_n, evaluate_reward, expected_best


def record(ident: str, scores: Sequence[float | None], prompt: str = "q", policy: str = "m") -> CandidateSet:
    return CandidateSet(ident, prompt, [Response(f"t{i}", policy, scores={"rm": s}) for i, s in enumerate(scores)])


class Counting:
    """A scorer that gives the number of characters it is shown."""

    name = "length"

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        return [[float(len(r.text)) for r in s.responses] for s in sets]

    def fingerprint(self) -> dict[str, str]:
        return {"kind": "length"}


def test_reward_columns_by_hand() -> None:
    result = evaluate_reward([record("a", [1.0, 3.0]), record("b", [5.0, None]), record("c", [None])], "rm")
    assert result.metrics == {
        "mean": 3.5, "std": 0.5, "max": 4.0, "candidates": 1.5, "unscored": 2.0, "unscored_prompts": 1.0,
    }  # fmt: skip
    assert result.n == 2
    assert result.ci95["mean"] == (2.0, 5.0)
    assert result.rows[1] == {"id": "b", "n": 1, "unscored": 1, "mean": 5.0, "std": 0.0, "max": 5.0}


def test_identical_draws_weigh_by_their_count() -> None:
    one = CandidateSet(
        "a", "q", [Response("x", "m", count=3, scores={"rm": 1.0}), Response("y", "m", scores={"rm": 5.0})]
    )
    assert evaluate_reward([one], "rm").metrics["mean"] == 2.0
    assert evaluate_best_of_n([one], "rm", [2]).metrics["best_of_2"] == pytest.approx((3 * 1 + 3 * 5) / 6)


def test_a_scorer_sees_the_text_before_the_stop_string_only() -> None:
    sets = [CandidateSet("a", "q", [Response("Yes. \n\nHuman: praise me", "m"), Response("No", "m")])]
    result = evaluate_reward(sets, Counting(), ("\n\nHuman:",))
    assert result.metrics["mean"] == (4 + 2) / 2
    assert sets[0].responses[0].text.endswith("praise me")  # the records themselves are untouched
    assert sets[0].responses[0].scores == {}


def test_stored_scores_of_uncut_texts_are_refused() -> None:
    sets = [CandidateSet("a", "q", [Response("Yes.\n\nHuman: more", "m", scores={"rm": 1.0})])]
    assert evaluate_reward(sets, "rm").metrics["mean"] == 1.0
    with pytest.raises(InputError, match="first: 'a'"):
        evaluate_reward(sets, "rm", ("\n\nHuman:",))


def test_reward_without_scores_is_an_error() -> None:
    with pytest.raises(InputError, match="no response has a score by judge 'other'"):
        evaluate_reward([record("a", [1.0])], "other")


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_expected_best_is_the_mean_over_all_subsets(n: int) -> None:
    scores = [0.3, -1.0, 4.0, 4.0, 2.5]
    subsets = [max(subset) for subset in itertools.combinations(scores, n)]
    assert expected_best(scores, n) == pytest.approx(math.fsum(subsets) / len(subsets), rel=1e-14)


def test_best_of_n_sizes() -> None:
    sets = [record("a", [1.0, 2.0, 3.0, 4.0, 5.0]), record("b", [1.0, 1.0, 1.0])]
    result = evaluate_best_of_n(sets, "rm")
    assert [name for name in result.metrics if name.startswith("best")] == ["best_of_1", "best_of_2", "best_of_3"]
    assert result.metrics["best_of_1"] == 2.0
    with pytest.raises(InputError, match="record 'b' has 3"):
        evaluate_best_of_n(sets, "rm", [4])
    with pytest.raises(InputError, match="no response"):
        evaluate_best_of_n(sets, "nobody")


def test_best_of_n_of_the_published_samples(data_kit: Path) -> None:
    with gzip.open(data_kit / "bon" / "tulu2_13b_bon.rrhf.jsonl.gz", "rt", encoding="utf-8") as lines:
        sets = [record(str(row["prompt_id"]), row["scores"]) for row in map(json.loads, lines)]
    metrics = evaluate_best_of_n(sets, "rm", [1, 2, 4, 8, 11]).metrics
    found = [round(100 * metrics[f"best_of_{n}"], 3) for n in (1, 2, 4, 8, 11)]
    assert found == [30.251, 38.973, 47.299, 54.628, 57.561]


def test_by_policy_splits_records() -> None:
    mixed = CandidateSet("a", "q", [Response("1", "x"), Response("2", "y"), Response("3", "x")])
    split = by_policy([mixed])
    assert {name: [r.text for r in sets[0].responses] for name, sets in split.items()} == {"x": ["1", "3"], "y": ["2"]}


# --- agreement ---------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    def both(ident: str, truth: list[float | None], judge: list[float | None]) -> CandidateSet:
        pairs = zip(truth, judge, strict=True)
        return CandidateSet(ident, "q", [Response("t", "m", scores={"truth": t, "judge": j}) for t, j in pairs])

    sets = [
        both("a", [1, 0], [0.2, 0.1]),  # right
        both("b", [1, 0], [0.1, 0.2]),  # wrong
        both("c", [1, 0], [0.3, 0.3]),  # judge ties: not right
        both("d", [1, 1], [0.3, 0.4]),  # truth ties: no pair
        both("e", [3, 2, 1], [3.0, 1.0, 2.0]),  # 2 of 3
        both("f", [1, 0], [0.1, None]),  # unscored: no pair
    ]
    result = evaluate_agreement(sets, "judge", "truth")
    assert result.metrics == {"accuracy": 3 / 6, "ties": 1 / 6, "pairs": 6.0, "prompts_without_pairs": 2.0}
    assert result.n == 4
    low, high = result.ci95["accuracy"]
    assert 0 <= low < 0.5 < high <= 1
    with pytest.raises(InputError, match="no pair"):
        evaluate_agreement(sets[3:4], "judge", "truth")


# --- pairwise ----------------------------------------------------------------------------------------------------


def test_comparison_by_hand() -> None:
    a = [record("1", [2.0], policy="new"), record("2", [1.0], policy="new"), record("3", [0.5], policy="new")]
    b = [record("3", [0.5], policy="old"), record("1", [1.0], policy="old"), record("2", [3.0], policy="old")]
    out = compare_by_score(a, b, "rm").as_dict()
    (system,) = out["systems"]
    assert {key: system[key] for key in ("a", "b", "sum_a", "sum_b", "n", "unparsed", "win", "tie", "loss")} == {
        "a": "new", "b": "old", "sum_a": 3.5, "sum_b": 4.5, "n": 3, "unparsed": 0, "win": 1, "tie": 1, "loss": 1,
    }  # fmt: skip
    assert system["difference"] == pytest.approx(-1 / 3)
    assert system["ci95"] == pytest.approx([-2.0, 1.0])  # one prompt three times over: 1 in 27 resamples
    assert (system["win_rate"], system["p_sign"]) == (0.5, 1.0)
    assert (out["parser"], out["order_consistency"], out["tie_delta"]) == ("score", None, 0.0)
    assert json.loads(json.dumps(out, allow_nan=False)) == out


def test_comparison_as_a_table() -> None:
    table = compare_by_score([record("1", [2.0])], [record("1", [1.0])], "rm", names=("x", "y")).table()
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert (cells["a"], cells["sum b"], cells["a − b"], cells["95 % interval"]) == ("x", 1.0, 1.0, "[1, 1]")
    assert "one order" in table.note


def test_swapping_the_systems_mirrors_everything() -> None:
    rng = np.random.default_rng(1)
    pairs = [(float(x), float(y)) for x, y in rng.integers(0, 5, size=(50, 2))]
    there, back = summarise("a", "b", pairs), summarise("b", "a", [(y, x) for x, y in pairs])
    assert (there.win, there.tie, there.loss) == (back.loss, back.tie, back.win)
    assert there.difference == pytest.approx(-back.difference)
    assert there.ci95 == pytest.approx((-back.ci95.high, -back.ci95.low))
    assert there.win_rate == pytest.approx(1 - back.win_rate)
    assert there.p_sign == back.p_sign


def test_a_missing_score_is_unparsed_and_in_no_sum() -> None:
    a = [record("1", [2.0]), record("2", [None]), record("3", [1.0, None]), record("4", [])]
    b = [record("1", [1.0]), record("2", [9.0]), record("3", [9.0]), record("4", [9.0])]
    (system,) = compare_by_score(a, b, "rm").systems
    assert (system.n, system.unparsed, system.sum_a, system.sum_b) == (1, 3, 2.0, 1.0)
    with pytest.raises(InputError, match="no prompt has a score for both"):
        compare_by_score(a[1:], b[1:], "rm")


def test_tie_rule() -> None:
    a, b = [record("1", [1.0]), record("2", [1.0])], [record("1", [1.1]), record("2", [1.3])]
    (system,) = compare_by_score(a, b, "rm", tie_delta=0.2).systems
    assert (system.win, system.tie, system.loss) == (0, 1, 1)


def test_prompts_must_match() -> None:
    left, right = [record(str(i), [0.0]) for i in range(9)], [record(str(i), [0.0]) for i in range(2)]
    with pytest.raises(InputError, match=r"7 prompts stand in the first file only: '2', '3', '4', '5', '6', \.\.\."):
        match(left, right)
    with pytest.raises(InputError, match="second file only"):
        match(right, left)
    with pytest.raises(InputError, match="1 ids stand for different prompts in the two files: '0'"):
        match([record("0", [0.0], prompt="p")], [record("0", [0.0], prompt="q")])
