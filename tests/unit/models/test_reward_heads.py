"""ArmoRM-, QRM- and GRM-style heads made in code: rewards are those of plain transformers and the published formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models.reward_heads import OBJECTIVES
from rankalign.scorers.reward_model import RewardModelScorer
from tests.unit.models.made_heads import CASES, SETS, gate_head, gated_by_hand, grm_by_hand, save, save_gated, save_grm

KINDS = (torch.float32, torch.float64)  # of plain transformers' states: the same type as ours; and the truth


def flat(scorer: RewardModelScorer) -> list[float | None]:
    return [score for row in scorer.score(SETS) for score in row]


@pytest.mark.parametrize("size", [1, 5.6])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_gated_reward_is_the_published_formula(tmp_path: Path, case: str, batch: int, size: float) -> None:
    folder = tmp_path / "rm"
    save_gated(folder, case, size=size)
    one = RewardModelScorer("rm", str(folder), axis=3, dtype="float32", batch_size=batch)
    scorer = RewardModelScorer("rm", str(folder), batch_size=batch, dtype="float32")
    wide = 1e-6 if size > 1 else 0  # float32 has steps of 2e-6 at a reward of 18: there 1e-6 of it
    for kind in KINDS:
        expected, each = gated_by_hand(folder, case, kind)
        assert flat(scorer) == pytest.approx(expected, abs=1e-6, rel=wide)
        assert flat(one) == pytest.approx([float(r[3]) for r in each], abs=1e-6, rel=wide)
    for made in (scorer, one):
        made.model.double()
    assert flat(scorer) == pytest.approx(expected, abs=1e-9, rel=1e-9)
    assert flat(one) == pytest.approx([float(r[3]) for r in each], abs=1e-9, rel=1e-9)
    assert len({round(score, 4) for score in expected}) == 4
    if case == "ArmoRM":
        named = RewardModelScorer("rm", str(folder), axis="helpsteer-complexity", dtype="float32", batch_size=batch)
        named.model.double()
        assert named.score(SETS) == one.score(SETS)
        assert len(set(OBJECTIVES)) == 19


@pytest.mark.parametrize("layers", [1, 3])
def test_a_head_of_several_layers_is_grm(tmp_path: Path, layers: int) -> None:
    folder = tmp_path / "rm"
    save_grm(folder, layers)
    scorer = RewardModelScorer("rm", str(folder), dtype="float32")
    for kind in KINDS:
        expected = grm_by_hand(folder, layers, kind)
        assert flat(scorer) == pytest.approx(expected, abs=1e-6)
    scorer.model.double()
    assert flat(scorer) == pytest.approx(expected, abs=1e-9, rel=1e-9)
    assert scorer.model.config.rankalign_pooling == "last"
    with pytest.raises(InputError, match="several layers scores, and is not trained on"):
        models.load_reward_model(str(folder))
    with pytest.raises(InputError, match="pooling mean takes a linear head"):
        RewardModelScorer("rm", str(folder), pooling="mean").score(SETS)


def test_what_is_not_as_published_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rm"
    save(folder, "LlamaForRewardModelWithGating", gate_head(4, 1, False))
    whole = load_file(folder / "model.safetensors")
    for name, tensor, message in (
        ("model.norm.weight", None, "norm.weight"),
        ("reward_transform_matrix", None, "reward_transform_matrix"),
        ("reward_transform_matrix", torch.eye(3), "no row for each of 3 objectives"),
        ("score.weight", torch.zeros(1, 32), "score.weight belongs neither"),
    ):
        state = {n: t for n, t in whole.items() if n != name} | ({} if tensor is None else {name: tensor})
        save_file(state, folder / "model.safetensors")
        with pytest.raises(InputError, match=message):
            models.load_reward_model(str(folder), new_head=False)
    save_file(whole, folder / "model.safetensors")
    with pytest.raises(InputError, match="scores, and is not trained on"):
        models.load_reward_model(str(folder))
    with pytest.raises(InputError, match="assistant's turn begins"):
        RewardModelScorer("rm", str(folder), template="raw").score(SETS)
    with pytest.raises(InputError, match="has no output 'safe'; it has LABEL_0"):
        RewardModelScorer("rm", str(folder), axis="safe").score(SETS)
