"""What each loss is, written from the papers as loops over one list, in mpmath: no tensors, no masks, no autograd.

Every function takes the candidates of one prompt and the loss's whole configuration, and returns a number. Gradients
come from differences in 50-digit arithmetic, so they are exact to far more digits than doubles hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace as Keywords

from mpmath import mp, mpf

from .lists import Candidate

List = list[Candidate]
Definition = Callable[[List, Keywords], mpf]
DIGITS = 50


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mp.exp(-x))


def nlog_sigmoid(x: mpf) -> mpf:
    return mp.log(1 + mp.exp(-x))


def ratio(c: Candidate) -> mpf:
    return c.logp - c.ref


def best(candidates: List) -> Candidate:
    return max(candidates, key=lambda c: c.score)


def nll(c: Candidate, reduction: str) -> mpf:
    return -c.logp / (c.length if reduction == "mean" else 1)


def strict_pairs(candidates: List, k: Keywords) -> list[tuple[Candidate, Candidate]]:
    """(winner, loser) of every strict pair, or of the extremes alone."""
    ordered = sorted(candidates, key=lambda c: c.score)
    if getattr(k, "pairs", "all") == "best-worst":
        ordered = [min(reversed(candidates), key=lambda c: c.score), best(candidates)]  # last and first of equals
    return [(w, y) for y, w in itertools.combinations(ordered, 2) if w.score > y.score]


def over(terms: list[mpf], k: Keywords) -> mpf:
    """Sum or mean of the terms, 0 of none."""
    total = mp.fsum(terms)
    return total / max(len(terms), 1) if getattr(k, "reduction", "mean") == "mean" else total


def pairwise(term: Callable[[Candidate, Candidate, Keywords], mpf]) -> Definition:
    """A loss that is defined on (winner, loser)."""
    return lambda candidates, k: over([term(w, y, k) for w, y in strict_pairs(candidates, k)], k)


def smoothed(x: mpf, k: Keywords) -> mpf:
    return (1 - k.label_smoothing) * nlog_sigmoid(x) + k.label_smoothing * nlog_sigmoid(-x)


def mean_logp(c: Candidate, k: Keywords) -> mpf:
    return c.logp / mpf(c.length) ** k.length_penalty


def divergence(t: mpf, k: Keywords) -> mpf:
    """The convex f of an f-divergence, with f(1) = f'(1) = 0 (a multiple of t - 1 changes no divergence)."""
    if k.f_divergence_type == "forward_kl":
        return -mp.log(t) + t - 1
    if k.f_divergence_type == "js_divergence":
        return t * mp.log(t) - (t + 1) * mp.log((t + 1) / 2)
    if k.f_divergence_type == "alpha_divergence" and k.alpha:
        a = mpf(k.alpha)
        return (t ** (1 - a) - (1 - a) * t - a) / (a * (a - 1))
    return t * mp.log(t) - t + 1


def dpo_score(c: Candidate, k: Keywords) -> mpf:
    """f'(policy / reference), by differentiating f."""
    return mp.diff(lambda t: divergence(t, k), mp.exp(ratio(c))) / mpf(c.length) ** k.length_penalty


def exo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    scores = [mp.exp(k.beta * ratio(c)) for c in (w, y)]
    policy = [s / sum(scores) for s in scores]
    label = [1 - mpf(k.label_smoothing), mpf(k.label_smoothing)]
    return mp.fsum(q * mp.log(q / p) for q, p in zip(policy, label, strict=True))


def discopop_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    margin = k.beta * (ratio(w) - ratio(y))
    mixed = sigmoid(margin / k.tau)
    return (1 - mixed) * nlog_sigmoid(margin) + mixed * mp.exp(-margin)


def robust_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    margin, eps = k.beta * (ratio(w) - ratio(y)), mpf(k.label_smoothing)
    return ((1 - eps) * nlog_sigmoid(margin) - eps * nlog_sigmoid(-margin)) / (1 - 2 * eps)


def alphapo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    def reward(c: Candidate) -> mpf:
        return (1 - mp.exp(mean_logp(c, k)) ** -k.alpha) / k.alpha if k.alpha else mean_logp(c, k)

    return smoothed(k.beta * (reward(w) - reward(y)) - k.gamma, k)


def log_odds(c: Candidate) -> mpf:
    p = mp.exp(c.logp / c.length)
    return mp.log(p / (1 - p))


def aot(candidates: List, k: Keywords) -> mpf:
    pairs = strict_pairs(candidates, k)
    policy = sorted(w.logp - y.logp for w, y in pairs)
    reference = sorted(mpf(w.ref) - y.ref for w, y in pairs)
    return over([smoothed(k.beta * (a - b), k) for a, b in zip(policy, reference, strict=True)], k)


def aot_unpaired(candidates: List, k: Keywords) -> mpf:
    pairs = strict_pairs(candidates, k)
    chosen, rejected = sorted(ratio(w) for w, _ in pairs), sorted(ratio(y) for _, y in pairs)
    return over([smoothed(k.beta * (a - b), k) for a, b in zip(chosen, rejected, strict=True)], k)


def kto(candidates: List, k: Keywords) -> mpf:
    if k.threshold is None:
        examples = [e for w, y in strict_pairs(candidates, k) for e in ((w, True), (y, False))]
    else:
        examples = [(c, c.score > k.threshold) for c in candidates]
    z = max(mpf(k.kl), mpf(0))

    def loss(c: Candidate, desirable: bool) -> mpf:
        if desirable:
            return k.desirable_weight * (1 - sigmoid(k.beta * (ratio(c) - z)))
        return k.undesirable_weight * (1 - sigmoid(k.beta * (z - ratio(c))))

    return mp.fsum(loss(*e) for e in examples) / max(len(examples), 1)


def bco(candidates: List, k: Keywords) -> mpf:
    def good(c: Candidate) -> mpf:
        return nlog_sigmoid(k.beta * ratio(c) - k.delta)

    def bad(c: Candidate) -> mpf:
        return nlog_sigmoid(k.delta - k.beta * ratio(c))

    if k.threshold is None:
        return over([good(w) + bad(y) for w, y in strict_pairs(candidates, k)], k)
    return over([good(c) if c.score > k.threshold else bad(c) for c in candidates], k)


def rrhf(candidates: List, k: Keywords) -> mpf:
    if k.compat == "release":  # divides by the padded length; lists() stand behind prompts of k.prompt_length tokens
        padded = mpf(k.prompt_length + max(c.length for c in candidates))
        p = {id(c): c.logp / padded**k.length_penalty for c in candidates}
        sft = -best(candidates).logp / padded
    else:
        p = {id(c): mean_logp(c, k) for c in candidates}
        sft = nll(best(candidates), k.sft_reduction)
    rank = mp.fsum(max(mpf(0), p[id(y)] - p[id(w)]) for w, y in strict_pairs(candidates, k))
    return k.rrhf_weight * rank + sft


def slic_hf(candidates: List, k: Keywords) -> mpf:
    rank = pairwise(lambda w, y, k: max(mpf(0), k.delta - mean_logp(w, k) + mean_logp(y, k)))(candidates, k)
    return rank + k.sft_weight * nll(best(candidates), k.sft_reduction)


def orpo(candidates: List, k: Keywords) -> mpf:
    rank = pairwise(lambda w, y, _: nlog_sigmoid(log_odds(w) - log_odds(y)))(candidates, k)
    return k.beta * rank + nll(best(candidates), k.sft_reduction)


def cpo(candidates: List, k: Keywords) -> mpf:
    rank = pairwise(lambda w, y, k: smoothed(k.beta * (mean_logp(w, k) - mean_logp(y, k)), k))(candidates, k)
    return rank + k.sft_weight * nll(best(candidates), k.sft_reduction)


def draw_probability(order: tuple[mpf, ...]) -> mpf:
    """Plackett-Luce: the chance to draw weights in this order without replacement."""
    left, chance = mp.fsum(order), mpf(1)
    for weight in order:
        chance, left = chance * weight / left, left - weight
    return chance


def drawn_first(weight: mpf, rivals: list[mpf]) -> mpf:
    """Chance of drawing ``weight`` before all rivals: the sum over all orders that begin with it."""
    return mp.fsum(draw_probability((weight, *rest)) for rest in itertools.permutations(rivals))


def plackett_luce(candidates: List, weights: list[mpf]) -> mpf:
    """-log of the product over candidates of being drawn before all strictly below, by enumeration."""
    loss = mpf(0)
    for first, weight in zip(candidates, weights, strict=True):
        rivals = [v for c, v in zip(candidates, weights, strict=True) if c.score < first.score]
        loss -= mp.log(drawn_first(weight, rivals))
    return loss


def listnet(candidates: List, k: Keywords) -> mpf:
    if not strict_pairs(candidates, k):
        return mpf(0)
    weights = [mp.exp(k.beta * mean_logp(c, k)) for c in candidates]
    policy = [drawn_first(w, weights[:i] + weights[i + 1 :]) for i, w in enumerate(weights)]
    return -mp.fsum(q * mp.log(p) for q, p in zip(target(candidates, k), policy, strict=True))


def target(candidates: List, k: Keywords) -> list[mpf]:
    """softmax(scores / temperature), or its limit at 0."""
    top = best(candidates).score
    if k.temperature:
        weights = [mp.exp((mpf(c.score) - top) / k.temperature) for c in candidates]
    else:
        weights = [mpf(c.score == top) for c in candidates]
    return [w / mp.fsum(weights) for w in weights]


def nca(candidates: List, k: Keywords) -> mpf:
    if not strict_pairs(candidates, k):
        return mpf(0)
    rewards, n = [k.beta * ratio(c) for c in candidates], len(candidates)
    raised = mp.fsum(q * nlog_sigmoid(r) for q, r in zip(target(candidates, k), rewards, strict=True))
    return raised + mp.fsum(nlog_sigmoid(-r) for r in rewards) / n


def pro(candidates: List, k: Keywords) -> mpf:
    loss = k.sft_weight * (len(candidates) - 1) ** 2 * nll(best(candidates), k.sft_reduction)
    for first in candidates:
        below = [c for c in candidates if c.score < first.score]
        if below:
            sharpest = max(mpf(first.score) - c.score for c in below)
            own = mp.exp(mean_logp(first, k) * sharpest)
            rivals = mp.fsum(mp.exp(mean_logp(c, k) * (mpf(first.score) - c.score)) for c in below)
            loss -= mp.log(own / (own + rivals))
    return loss


def lambdaloss(candidates: List, k: Keywords) -> mpf:
    """Weights by brute force: put two candidates in each other's place and see what the DCG of the list does."""
    s = [k.beta * ratio(c) for c in candidates]
    psi = [mpf(c.score) if k.gain == "score" else win_rate(c, candidates) for c in candidates]
    gains = [2**x - 1 if k.gain_function == "exponential" else x for x in psi]
    order = sorted(range(len(s)), key=lambda i: (-s[i], -candidates[i].score))

    def dcg(order: list[int]) -> mpf:
        return mp.fsum(gains[i] / discount(place) for place, i in enumerate(order, start=1))

    def discount(place: int) -> mpf:
        return mpf(place) if k.discount == "reciprocal" else mp.log(1 + place, 2)

    def change(i: int, j: int) -> mpf:
        if k.discount == "none":
            return abs(gains[i] - gains[j])
        return abs(dcg(order) - dcg([{i: j, j: i}.get(m, m) for m in order]))

    loss = mpf(0)
    for i, j in itertools.permutations(range(len(s)), 2):
        if candidates[i].score > candidates[j].score:
            loss += change(i, j) * mp.log(1 + mp.exp(s[j] - s[i]))
    return loss


def win_rate(c: Candidate, candidates: List) -> mpf:
    """Share of the others that ``c`` beats, ties half."""
    others = [o for o in candidates if o is not c]
    return mp.fsum((c.score > o.score) + mpf(c.score == o.score) / 2 for o in others) / max(len(others), 1)


def raft(candidates: List, k: Keywords) -> mpf:
    top = [nll(c, k.sft_reduction) for c in candidates if c.score == best(candidates).score]
    return mp.fsum(top) / len(top)


DEFINITIONS: dict[str, Definition] = {
    "rrhf": rrhf,
    "slic_hf": slic_hf,
    "orpo": orpo,
    "cpo": cpo,
    "simpo": pairwise(lambda w, y, k: smoothed(k.beta * (mean_logp(w, k) - mean_logp(y, k)) - k.gamma, k)),
    "alphapo": pairwise(alphapo_term),
    "ranknet": pairwise(lambda w, y, k: smoothed(k.beta * (mean_logp(w, k) - mean_logp(y, k)), k)),
    "dpo": pairwise(lambda w, y, k: smoothed(k.beta * (dpo_score(w, k) - dpo_score(y, k)), k)),
    "sigmoid_norm": pairwise(lambda w, y, k: smoothed(k.beta * (ratio(w) / w.length - ratio(y) / y.length), k)),
    "ipo": pairwise(
        lambda w, y, k: (
            (
                ratio(w) / mpf(w.length) ** k.length_penalty
                - ratio(y) / mpf(y.length) ** k.length_penalty
                - 1 / (2 * mpf(k.beta))
            )
            ** 2
        )
    ),
    "robust": pairwise(robust_term),
    "hinge": pairwise(lambda w, y, k: max(mpf(0), 1 - k.beta * (ratio(w) - ratio(y)))),
    "exo": pairwise(exo_term),
    "sppo": pairwise(lambda w, y, k: (ratio(w) - 1 / (2 * mpf(k.beta))) ** 2 + (ratio(y) + 1 / (2 * mpf(k.beta))) ** 2),
    "apo_zero": pairwise(lambda w, y, k: 1 - sigmoid(k.beta * ratio(w)) + sigmoid(k.beta * ratio(y))),
    "apo_down": pairwise(lambda w, y, k: sigmoid(k.beta * ratio(w)) + 1 - sigmoid(k.beta * (ratio(w) - ratio(y)))),
    "bco": bco,
    "discopop": pairwise(discopop_term),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "kto": kto,
    "plackett_luce": lambda cs, k: plackett_luce(cs, [mp.exp(k.beta * ratio(c)) for c in cs]),
    "lambdaloss": lambdaloss,
    "nca": nca,
    "pro": pro,
    "listnet": listnet,
    "listmle": lambda cs, k: plackett_luce(cs, [mp.exp(k.beta * mean_logp(c, k)) for c in cs]),
    "raft": raft,
    "sft": lambda cs, k: nll(best(cs), k.sft_reduction),
}


def value_and_gradient(definition: Definition, candidates: List, **keywords: object) -> tuple[float, list[float]]:
    """Value of a definition and its derivative with respect to each candidate's log-prob.

    ``k.still`` holds the candidates as they are when one is moved: what a definition takes from there gets no gradient.
    """
    still = [Candidate(mpf(c.logp), c.ref, c.length, c.score) for c in candidates]
    k = Keywords(**keywords, still=still)
    step = mpf(10) ** -20

    def value(moved: int = -1, by: mpf = step) -> mpf:
        exact = [Candidate(mpf(c.logp) + by * (i == moved), c.ref, c.length, c.score) for i, c in enumerate(candidates)]
        return definition(exact, k)

    with mp.workdps(DIGITS):
        slopes = [float((value(i) - value(i, -step)) / (2 * step)) for i in range(len(candidates))]
        return float(value()), slopes
