"""ILQL: losses on a small decision process worked by hand, and the random walks that PPO is tried on as well."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch

from rankalign.data.encode import TokenList
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.training.ilql import math as m
from rankalign.training.ilql.trainer import ILQLModel, ILQLSettings, load_ilql, records_of, settings_of, train_ilql
from tests.numerics.test_ppo_random_walks import END, GOAL, LIMIT, NODES, Walks, build_tokenizer, fitted

# Three states in a row, two actions in each. Two responses: one acts in all three states, one in the last alone.
#   state      0           1           2      |  2
#   Q(s, .)   [1, 2]      [0, 4]      [3, -1] | [3, -1]
#   action     1           0           0      |  1
#   V(s)       1.5         1           2      |  2
#   reward     0           0           5      | -2
Q = torch.tensor([[1.0, 2.0], [0.0, 4.0], [3.0, -1.0], [3.0, -1.0]], dtype=torch.float64)
ACTIONS = torch.tensor([1, 0, 0, 1])
V = torch.tensor([1.5, 1.0, 2.0, 2.0], dtype=torch.float64)
ENDS = torch.tensor([False, False, True, True])
REWARDS = torch.tensor([0.0, 0.0, 5.0, -2.0], dtype=torch.float64)
GAMMA, TAU = 0.5, 0.8


def test_values_that_follow_and_values_that_were_taken() -> None:
    assert m.next_values(V, ENDS).tolist() == [1.0, 2.0, 0.0, 0.0]
    assert m.taken(Q, ACTIONS).tolist() == [2.0, 0.0, 3.0, -1.0]
    assert m.rewards_at_ends(torch.tensor([5.0, -2.0], dtype=torch.float64), ENDS).equal(REWARDS)
    assert m.least([Q, Q + torch.tensor([1.0, -1.0])]).tolist() == [[1.0, 1.0], [0.0, 3.0], [3.0, -2.0], [3.0, -2.0]]


def test_q_loss_by_hand() -> None:
    # targets 0 + .5 * 1, 0 + .5 * 2, 5, -2; differences 1.5, -1, -2, 1
    by_hand = (1.5**2 + 1 + 4 + 1) / 4
    following = m.next_values(V, ENDS)
    assert m.q_loss([Q], ACTIONS, REWARDS, following, GAMMA).item() == pytest.approx(by_hand, abs=1e-12)
    # a second head, higher by one everywhere: differences 2.5, 0, -1, 2
    both = by_hand + (2.5**2 + 0 + 1 + 4) / 4
    assert m.q_loss([Q, Q + 1], ACTIONS, REWARDS, following, GAMMA).item() == pytest.approx(both, abs=1e-12)


def test_no_gradient_reaches_the_targets() -> None:
    q, v = Q.clone().requires_grad_(), V.clone().requires_grad_()
    m.q_loss([q], ACTIONS, REWARDS, m.next_values(v, ENDS), GAMMA).backward()  # type: ignore[no-untyped-call]
    assert v.grad is None
    m.expectile_loss(v, m.taken(q, ACTIONS), TAU).backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None
    assert q.grad.count_nonzero() == 4  # those of the Q-loss alone
    before = q.grad.clone()
    m.awac_loss(torch.zeros(4, dtype=torch.float64, requires_grad=True), q[:, 0] - v, 1.0).backward()  # type: ignore[no-untyped-call]
    assert q.grad.equal(before)


def test_expectile_loss_by_hand() -> None:
    # Q - V: .5, -1, 1, -3, so the weights are .8, .2, .8, .2
    by_hand = (0.8 * 0.25 + 0.2 * 1 + 0.8 * 1 + 0.2 * 9) / 4
    assert m.expectile_loss(V, m.taken(Q, ACTIONS), TAU).item() == pytest.approx(by_hand, abs=1e-12)


def test_the_minimiser_is_the_expectile() -> None:
    # Of 0 and 1 the tau-expectile is tau: tau (1 - v) = (1 - tau) v.
    v = torch.tensor([TAU, TAU], dtype=torch.float64, requires_grad=True)
    m.expectile_loss(v, torch.tensor([0.0, 1.0], dtype=torch.float64), TAU).backward()  # type: ignore[no-untyped-call]
    assert v.grad is not None
    assert v.grad.sum().item() == pytest.approx(0, abs=1e-12)


def test_conservative_and_likelihood_terms_by_hand() -> None:
    gaps = [1.0, -4.0, 4.0, -4.0]  # Q of the action taken less Q of the other
    by_hand = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 4
    assert m.cql_loss([Q], ACTIONS).item() == pytest.approx(by_hand, abs=1e-12)
    assert m.cql_loss([Q, Q], ACTIONS).item() == pytest.approx(2 * by_hand, abs=1e-12)
    logps, advantages = torch.tensor([-1.0, -2.0, -3.0, -4.0]).double(), torch.tensor([0.5, -1.0, 1.0, -3.0]).double()
    weights = [math.exp(2 * a) for a in (0.5, -1.0, 1.0, -3.0)]
    wanted = sum(w * -p for w, p in zip(weights, logps.tolist(), strict=True)) / 4
    assert m.awac_loss(logps, advantages, 2.0).item() == pytest.approx(wanted, abs=1e-12)
    assert m.awac_loss(logps, advantages, 0.0).item() == pytest.approx(2.5, abs=1e-12)


def test_steered_logits_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]]).double()
    q, v = torch.tensor([[0.0, 3.0, 1.0]]).double(), torch.tensor([0.5]).double()
    chances = m.steered_logits(logits, q, v, 2.0).softmax(-1)[0].tolist()
    raw = [math.exp(2.0 + 0), math.exp(1.0 + 6), math.exp(0.0 + 2)]
    assert chances == pytest.approx([x / sum(raw) for x in raw], abs=1e-12)
    assert m.steered_logits(logits, q, v, 2.0, top_k=1)[0].isinf().tolist() == [True, False, True]
    assert m.steered_logits(logits, q, v, 0.0, top_k=0).softmax(-1).allclose(logits.softmax(-1))


def test_polyak_and_standardised() -> None:
    target, source = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    m.polyak([target], [source], 0.25)
    assert target.tolist() == [1.5, 1.5]
    found = m.standardised(torch.tensor([1.0, 2.0, 6.0]).double())
    assert found.tolist() == pytest.approx([x / math.sqrt(7) for x in (-2.0, -1.0, 3.0)])
    assert (
        m.standardised(torch.tensor([4.0])).tolist() == m.standardised(torch.tensor([4.0, 4.0]))[:1].tolist() == [0.0]
    )


# --- the model ---------------------------------------------------------------------------------------------------

LISTS = [TokenList("a", [1, 70, 71], [[72, 73, 2]], [1.0]), TokenList("b", [1, 80], [[81, 2]], [-1.0])]


def test_losses_of_a_batch_against_its_texts_one_by_one() -> None:
    torch.manual_seed(0)
    model = ILQLModel(tiny.build_model())
    torch.nn.init.normal_(model.value_head.down.weight)
    for head in model.target_heads:
        torch.nn.init.normal_(head[2].weight, std=0.3)  # type: ignore[index]
    settings = ILQLSettings(tau=TAU, gamma=GAMMA, awac_beta=0.3)
    found = model.losses(LISTS, torch.tensor([1.0, -1.0]), settings)
    wanted = dict.fromkeys(("q_loss", "value_loss", "cql_loss", "awac_loss"), 0.0)
    for tokens, reward in zip(LISTS, (1.0, -1.0), strict=True):
        answer = tokens.responses[0]
        with torch.no_grad():
            out = model.policy(torch.tensor([[*tokens.prompt, *answer]]), output_hidden_states=True)
            hidden = out.hidden_states[-1][0, len(tokens.prompt) - 1 : -1]
            v, logps = model.value_head(hidden), out.logits[0].log_softmax(-1)
            qs, targets = ([head(hidden) for head in heads] for heads in (model.q_heads, model.target_heads))
        for t, token in enumerate(answer):
            last = t == len(answer) - 1
            wish = reward if last else GAMMA * v[t + 1].item()
            target = min(head[t, token].item() for head in targets)
            gap = target - v[t].item()
            wanted["q_loss"] += sum((q[t, token].item() - wish) ** 2 for q in qs) / 5
            wanted["value_loss"] += (TAU if gap >= 0 else 1 - TAU) * gap**2 / 5
            wanted["cql_loss"] += sum(-q[t].log_softmax(-1)[token].item() for q in qs) / 5
            wanted["awac_loss"] += -math.exp(0.3 * gap) * logps[len(tokens.prompt) - 1 + t, token].item() / 5
    assert {name: found[name].item() for name in wanted} == pytest.approx(wanted, rel=1e-4)
    total = wanted["q_loss"] + wanted["value_loss"] + 0.1 * wanted["cql_loss"] + wanted["awac_loss"]
    assert found["loss"].item() == pytest.approx(total, rel=1e-4)


def test_generation_follows_the_heads() -> None:
    model = ILQLModel(tiny.build_model()).eval()
    for head in model.target_heads:  # all tokens alike but one, which is worth much
        torch.nn.init.zeros_(head[2].weight)  # type: ignore[index]
        torch.nn.init.zeros_(head[2].bias)  # type: ignore[index]
        head[2].bias.data[99] = 50.0  # type: ignore[index]
    assert model.generate([[1, 70]], {2}, 3, beta=1.0) == [[99, 99, 99]]
    free = model.generate([[1, 70], [1, 71, 72]], {2}, 4, beta=0.0, temperature=0.0)
    for prompt, answer in zip([[1, 70], [1, 71, 72]], free, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + len(answer):
            ids.append(int(model.policy(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]
    assert model.generate([[1, 70]], {99}, 3, beta=1.0) == [[99]]


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    samples = [("say " + "x" * i, "y" * (i + 1)) for i in range(4)]
    found = []
    for size in (4, 1):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        more = {"model": "tiny", "output_dir": str(tmp_path / f"{size}"), "max_steps": 2, **sizes}
        found.append(train_ilql(samples, [0.0, 1.0, 5.0, 2.0], settings_of(more))["metrics"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_run_leaves_a_model_that_loads(tmp_path: Path) -> None:
    settings = settings_of({"model": "tiny", "output_dir": str(tmp_path / "run"), "max_steps": 6, "alpha": 0.5})
    result = train_ilql(["dolphins", "geese"], [1.0, 100.0], settings)
    assert (result["steps"], result["counts"]["prompts"]) == (6, 2)
    model = load_ilql(result["output"])
    assert not model.target_heads[0][2].weight.equal(model.q_heads[0][2].weight)  # type: ignore[index]
    assert models.weights_fingerprint(model.policy) != models.weights_fingerprint(tiny.build_model())
    assert len(model.generate([[1]], {2}, 5)[0]) <= 5
    assert train_ilql(["dolphins", "geese"], [1.0, 100.0], settings)["already_finished"]


@pytest.mark.parametrize(
    ("samples", "returns", "message"),
    [
        (["a"], [1.0, 2.0], "1 samples but 2 rewards"),
        ([], [], "0 samples"),
        (["a", "b"], [1.0, math.nan], "sample 1 is nan: not finite"),
        ([["a", "b", "c"]], [1.0], "sample 0: give a text"),
    ],
)
def test_bad_samples_are_named(samples: list[Any], returns: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        records_of(samples, returns)


# --- random walks ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ilql_walks_better_than_the_walks_it_saw(tmp_path: Path) -> None:
    walks, tokenizer = Walks(1002), build_tokenizer()
    model = fitted(walks, seed=0)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(str(tmp_path / "start"))
    seen = [walks.walk() for _ in range(1000)]
    samples = [[string.ascii_lowercase[w[0]], "".join(string.ascii_lowercase[n] for n in w[1:])] for w in seen]
    quality = [walks.optimality(walk) for walk in seen]
    settings = {"model": str(tmp_path / "start"), "output_dir": str(tmp_path / "run"), "num_train_epochs": 20}
    settings |= {"per_device_train_batch_size": 100, "learning_rate": 1e-3, "tau": 0.8, "alpha": 0.1}
    learnt = load_ilql(train_ilql(samples, quality, settings_of(settings))["output"])
    starts = [[n] for n in range(1, NODES) if walks.shortest[n] < LIMIT] * 5

    def mean(beta: float) -> float:
        answers = learnt.generate(starts, {END}, LIMIT - 1, beta=beta, top_k=10)
        full = [[*start, *(n for n in answer if n < NODES)] for start, answer in zip(starts, answers, strict=True)]
        return sum(map(walks.optimality, full)) / len(full)

    data = sum(quality) / len(quality)
    print(f"optimality: data {data:.3f}, policy {mean(0):.3f}, steered {mean(1):.3f}, {mean(10):.3f}, {mean(100):.3f}")
    assert GOAL == 0
    assert mean(10) > data + 0.2


def test_target_heads_reach_their_heads_within_a_short_run() -> None:
    """After 300 updates, targets that began 1 away have (1 - alpha)^(300 / sync_steps) of it left."""
    settings = ILQLSettings()
    target = torch.tensor([0.0])
    for _ in range(300 // settings.sync_steps):
        m.polyak([target], [torch.tensor([1.0])], settings.alpha)
    assert 1 - target.item() == pytest.approx((1 - settings.alpha) ** (300 / settings.sync_steps), rel=1e-4)
    assert target.item() > 0.99
