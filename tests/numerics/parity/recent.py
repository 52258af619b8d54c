"""Definitions, as in :mod:`.definitions`, of losses with offsets, weights and regressions, and of policy gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace as Keywords

from mpmath import mp, mpf

from .definitions import (
    Definition,
    List,
    best,
    mean_logp,
    nlog_sigmoid,
    over,
    pairwise,
    ratio,
    sigmoid,
    smoothed,
    strict_pairs,
    target,
    win_rate,
)
from .lists import Candidate


def gap(w: Candidate, y: Candidate) -> mpf:
    return mpf(w.score) - y.score


def still(c: Candidate, k: Keywords) -> Candidate:
    """The candidate as it is when its log-prob is moved: nothing that is read from it has a gradient."""
    return next(o for o in k.still if (o.ref, o.score, o.length) == (c.ref, c.score, c.length))


def odpo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    offset = mp.log(gap(w, y)) if k.offset == "log" else gap(w, y)
    return nlog_sigmoid(k.beta * (ratio(w) - ratio(y)) - k.alpha * offset)


def alpha_dpo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    def moved(c: Candidate) -> mpf:
        return k.beta * ratio(still(c, k)) / mpf(c.length) ** k.length_penalty

    margin = k.gamma + k.alpha * (moved(w) - moved(y) - k.center) / mpf(k.spread)
    return nlog_sigmoid(k.beta * (mean_logp(w, k) - mean_logp(y, k)) - margin)


def chi_po_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    difference = k.beta * ((mp.exp(ratio(w)) + ratio(w)) - (mp.exp(ratio(y)) + ratio(y)))
    if k.r_max is not None:
        difference = min(max(difference, -2 * mpf(k.r_max)), 2 * mpf(k.r_max))
    return nlog_sigmoid(difference)


def focal_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    q = sigmoid(k.beta * (ratio(w) - ratio(y)))
    return -(q**k.gamma) * mp.log(q)


def token_ratios(c: Candidate) -> list[mpf]:
    """Of tokens whose shares of the sums are as 1, 2, 3, ..."""
    return [ratio(c) * (t + 1) / mpf(c.length * (c.length + 1) / 2) for t in range(c.length)]


def ld_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    def value(c: Candidate) -> mpf:
        own, common = token_ratios(c), min(w.length, y.length)
        return mp.fsum(own[:common]) + k.alpha * mp.fsum(own[common:])

    return smoothed(k.beta * (value(w) - value(y)), k)


def scattered(number: int) -> int:
    """The last step of murmur3, 32 bits."""
    number %= 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        number = (number ^ (number >> shift)) * factor % 2**32
    return number


def sampo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    def value(c: Candidate) -> mpf:
        tag = scattered(scattered(int(k.draw_seed)) + c.length)
        drawn = sorted(range(c.length), key=lambda t: scattered(tag + t))[: min(w.length, y.length)]
        return mp.fsum(token_ratios(c)[t] for t in drawn)

    return smoothed(k.beta * (value(w) - value(y)), k)


def dr_dpo(candidates: List, k: Keywords) -> mpf:
    chances = [
        sigmoid(k.beta * (ratio(w) - ratio(y))) ** (1 / mpf(k.beta_prime)) for w, y in strict_pairs(candidates, k)
    ]
    return -k.beta_prime * mp.log(mp.fsum(chances) / len(chances)) if chances else mpf(0)


def wpo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    weight = mp.exp(still(w, k).logp / w.length) * mp.exp(still(y, k).logp / y.length)
    return weight * nlog_sigmoid(k.beta * (ratio(w) - ratio(y)))


def wpo_aligned_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    def aligned(c: Candidate) -> mpf:
        return mp.exp((still(c, k).logp - mpf(c.log_squares)) / c.length)

    return aligned(w) * aligned(y) * nlog_sigmoid(k.beta * (ratio(w) - ratio(y)))


def kl(c: Candidate) -> mpf:
    return ratio(c) ** 2 / (10 * c.length)


def tdpo1_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    return nlog_sigmoid(k.beta * (ratio(w) - ratio(y)) - (k.beta * kl(y) - k.beta * kl(w)))


def tdpo2_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    difference = k.beta * kl(y) - k.beta * kl(still(w, k))
    return nlog_sigmoid(k.beta * (ratio(w) - ratio(y)) - k.alpha * difference)


def beta_dpo(candidates: List, k: Keywords) -> mpf:
    pairs = strict_pairs(candidates, k)
    margins = [k.beta * (ratio(still(w, k)) - ratio(still(y, k))) for w, y in pairs]
    mean = mp.fsum(margins) / max(len(margins), 1)
    beta = k.beta * max(1 + k.alpha * (mean - k.baseline), mpf("0.01"))
    return over([nlog_sigmoid(beta * (ratio(w) - ratio(y))) for w, y in pairs], k)


def reward_rpo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    a, b = sigmoid(k.beta * (ratio(w) - ratio(y))), sigmoid(k.eta * gap(w, y))
    return b * mp.log(b / a) + (1 - b) * mp.log((1 - b) / (1 - a))


def cal_dpo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    aim = 1 / (2 * mpf(k.beta))
    return nlog_sigmoid(ratio(w) - ratio(y)) + (ratio(w) - aim) ** 2 + (ratio(y) + aim) ** 2


def ranks(candidates: List) -> bool:
    return len({c.score for c in candidates}) > 1


def a_star_po(candidates: List, k: Keywords) -> mpf:
    mean = mp.fsum(mp.exp(mpf(c.score) / k.beta1) for c in candidates) / len(candidates)
    value = k.beta1 * mp.log(mean)
    return over([(k.beta2 * ratio(c) - (c.score - value)) ** 2 for c in candidates], k) if ranks(candidates) else mpf(0)


def relevance(c: Candidate, candidates: List, k: Keywords) -> mpf:
    return mpf(c.score) if k.gain == "score" else win_rate(c, candidates)


def point_mse(candidates: List, k: Keywords) -> mpf:
    terms = [(relevance(c, candidates, k) - k.beta * ratio(c)) ** 2 for c in candidates]
    return over(terms, k) if ranks(candidates) else mpf(0)


def point_sigmoid(candidates: List, k: Keywords) -> mpf:
    def term(c: Candidate) -> mpf:
        psi, p = relevance(c, candidates, k), sigmoid(k.beta * ratio(c))
        return -psi * mp.log(p) - (1 - psi) * mp.log(1 - p)

    return over([term(c) for c in candidates], k) if ranks(candidates) else mpf(0)


def shares(candidates: List, k: Keywords) -> list[mpf]:
    weights = [mp.exp(k.beta * ratio(c)) for c in candidates]
    return [w / mp.fsum(weights) for w in weights]


def infonca(candidates: List, k: Keywords) -> mpf:
    if not ranks(candidates):
        return mpf(0)
    return -mp.fsum(q * mp.log(p) for q, p in zip(target(candidates, k), shares(candidates, k), strict=True))


def exo_list(candidates: List, k: Keywords) -> mpf:
    if not ranks(candidates):
        return mpf(0)
    return mp.fsum(p * mp.log(p / q) for q, p in zip(target(candidates, k), shares(candidates, k), strict=True))


def target_share(w: Candidate, y: Candidate, k: Keywords, apart: Callable[[Candidate, Candidate], mpf]) -> mpf:
    """The pair's x by Newton on what makes the derivative of each pair's term one and the same number, mu."""
    g, tau = mpf(k.gamma), mpf(k.tau)
    if not hasattr(k, "shares"):
        pairs = strict_pairs(k.still, k)
        gaps = [apart(a, b) for a, b in pairs]

        def at(mu: mpf) -> list[mpf]:
            return [mp.findroot(lambda z, d=d: tau * z + g * sigmoid(g * mp.exp(z) - d) - mu, 0) for d in gaps]

        mu = mp.findroot(lambda m: mp.fsum(map(mp.exp, at(m))) / len(gaps) - 1, (g / 2, g / 2 + mpf("0.1")))
        k.shares = {(a.ref, b.ref): mp.exp(z) for (a, b), z in zip(pairs, at(mu), strict=True)}
    return k.shares[w.ref, y.ref]


def gamma_simpo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    def apart(a: Candidate, b: Candidate) -> mpf:
        return k.beta * (mean_logp(a, k) - mean_logp(b, k))

    return smoothed(apart(w, y) - k.gamma * target_share(w, y, k, apart), k)


def gamma_dpo_term(w: Candidate, y: Candidate, k: Keywords) -> mpf:
    def apart(a: Candidate, b: Candidate) -> mpf:
        return k.beta * (ratio(a) - ratio(b))

    return smoothed(apart(w, y) - k.gamma * (target_share(w, y, k, apart) - 1), k)


def neural_ndcg(candidates: List, k: Keywords) -> mpf:
    if not ranks(candidates):
        return mpf(0)
    worst, n = min(c.score for c in candidates), len(candidates)
    psi = [mpf(c.score) - worst if k.gain == "score" else win_rate(c, candidates) for c in candidates]
    gains, s = [2**x - 1 for x in psi], [k.beta * ratio(c) for c in candidates]
    sort = []
    for place in range(1, n + 1):
        row = [mp.exp(((n + 1 - 2 * place) * a - mp.fsum(abs(a - b) for b in s)) / k.tau) for a in s]
        sort.append([cell / mp.fsum(row) for cell in row])
    for _ in range(50):
        totals = [mp.fsum(row[j] for row in sort) for j in range(n)]
        sort = [[cell / total for cell, total in zip(row, totals, strict=True)] for row in sort]
        sort = [[cell / mp.fsum(row) for cell in row] for row in sort]
    found = [mp.fsum(cell * g for cell, g in zip(row, gains, strict=True)) for row in sort]
    dcg, ideal = (
        mp.fsum(g / mp.log(1 + place, 2) for place, g in enumerate(order, start=1))
        for order in (found, sorted(gains, reverse=True))
    )
    return 1 - dcg / ideal


def diff_ndcg(candidates: List, k: Keywords) -> mpf:
    """By the permutation matrix that the layers multiply up to, on a copy of the list in its right order."""
    if not ranks(candidates):
        return mpf(0)
    order, n = sorted(candidates, key=lambda c: (-c.score, -ratio(c))), len(candidates)
    worst = order[-1].score
    psi = [mpf(c.score) - worst if k.gain == "score" else win_rate(c, candidates) for c in order]
    gains, s = mp.matrix([2**x - 1 for x in psi]), mp.matrix([k.beta * ratio(c) for c in order])
    sort = mp.eye(n)
    for layer in range(n):
        step = mp.eye(n)
        for a in range(layer % 2, n - 1, 2):
            stays = mpf(1) / 2 + mp.atan((s[a] - s[a + 1]) / k.tau) / mp.pi
            step[a, a] = step[a + 1, a + 1] = stays
            step[a, a + 1] = step[a + 1, a] = 1 - stays
        s, sort = step * s, step * sort
    found = sort * gains
    dcg, ideal = (mp.fsum(g / mp.log(2 + at, 2) for at, g in enumerate(list(row))) for row in (found, gains))
    return 1 - dcg / ideal


def softmax_dpo(candidates: List, k: Keywords) -> mpf:
    tops = [c for c in candidates if c.score == best(candidates).score]
    rivals = mp.fsum(mp.exp(k.beta * ratio(c)) for c in candidates if c.score < tops[0].score)
    chances = [mp.exp(k.beta * ratio(c)) for c in tops]
    return -mp.fsum(mp.log(chance / (chance + rivals)) for chance in chances) / len(tops)


def swepo(candidates: List, k: Keywords) -> mpf:
    if not ranks(candidates):
        return mpf(0)
    mean = mp.fsum(c.score for c in candidates) / len(candidates)
    weighed = {id(c): mp.exp(k.alpha * abs(c.score - mean)) * mp.exp(k.beta * ratio(c)) for c in candidates}
    above = mp.fsum(weighed[id(c)] for c in candidates if c.score > mean)
    return -mp.log(above / mp.fsum(weighed.values()))


def approx_ndcg(candidates: List, k: Keywords) -> mpf:
    if not ranks(candidates):
        return mpf(0)
    worst = min(c.score for c in candidates)
    psi = [mpf(c.score) - worst if k.gain == "score" else win_rate(c, candidates) for c in candidates]
    gains = [2**x - 1 for x in psi]
    places = [
        1 + mp.fsum(sigmoid(k.beta * (ratio(o) - ratio(c)) / k.tau) for o in candidates if o is not c)
        for c in candidates
    ]
    ideal = mp.fsum(g / mp.log(1 + place, 2) for place, g in enumerate(sorted(gains, reverse=True), start=1))
    return 1 - mp.fsum(g / mp.log(1 + place, 2) for g, place in zip(gains, places, strict=True)) / ideal


def others_mean(values: list[mpf], i: int) -> mpf:
    rest = values[:i] + values[i + 1 :]
    return mp.fsum(rest) / max(len(rest), 1)


def leave_one_out(values: list[mpf]) -> list[mpf]:
    return [v - others_mean(values, i) for i, v in enumerate(values)] if len(values) > 1 else [mpf(0)]


def standardised(candidates: List, k: Keywords) -> list[mpf]:
    scores = [mpf(c.score) for c in candidates]
    mean = mp.fsum(scores) / len(scores)
    variance = mp.fsum((r - mean) ** 2 for r in scores) / max(len(scores) - 1, 1)
    return [(r - mean) / (mp.sqrt(variance) + k.std_epsilon) for r in scores]


def reinforce(candidates: List, advantages: list[mpf], by_length: bool = False) -> mpf:
    terms = [a * c.logp / (c.length if by_length else 1) for a, c in zip(advantages, candidates, strict=True)]
    return -mp.fsum(terms) / len(terms)


def rloo(candidates: List, _: Keywords) -> mpf:
    return reinforce(candidates, leave_one_out([mpf(c.score) for c in candidates]))


def rloo_kl(candidates: List, k: Keywords) -> mpf:
    return reinforce(candidates, leave_one_out([c.score - k.beta * ratio(c) for c in k.still]))


def dr_grpo(candidates: List, k: Keywords) -> mpf:
    mean = mp.fsum(c.score for c in candidates) / len(candidates)
    return reinforce(candidates, [c.score - mean for c in candidates]) / k.max_tokens


def clipped(ratios: list[mpf], advantages: list[mpf], k: Keywords) -> mpf:
    low, high = 1 - mpf(k.epsilon_low), 1 + mpf(k.epsilon_high)
    terms = [min(c * a, min(max(c, low), high) * a) for c, a in zip(ratios, advantages, strict=True)]
    return -mp.fsum(terms) / len(terms)


def rloo_clipped(candidates: List, k: Keywords) -> mpf:
    advantages = leave_one_out([mpf(c.score) for c in candidates])
    return clipped([mp.exp(ratio(c)) for c in candidates], advantages, k)


def gspo(candidates: List, k: Keywords) -> mpf:
    return clipped([mp.exp(ratio(c) / c.length) for c in candidates], standardised(candidates, k), k)


def xpo(candidates: List, k: Keywords) -> mpf:
    if not ranks(candidates):
        return mpf(0)
    others = [c.logp for c in candidates if not c.own]
    pairs = [nlog_sigmoid(k.beta * (ratio(w) - ratio(y))) for w, y in strict_pairs(candidates, k)]
    return over(pairs, k) + k.alpha * mp.fsum(others) / max(len(others), 1)


def nash_md(candidates: List, k: Keywords) -> mpf:
    own, others = [c for c in candidates if c.own], [c for c in candidates if not c.own]
    if not (ranks(candidates) and own and others):
        return mpf(0)

    def preferred(c: Candidate, o: Candidate) -> mpf:
        if k.preference == "bradley_terry":
            return sigmoid(k.eta * gap(c, o))
        return mpf(1) if c.score > o.score else mpf(0) if c.score < o.score else mpf("0.5")

    terms = []
    for c in own:
        share = mp.fsum(preferred(c, o) for o in others) / len(others)
        terms.append(-(share - mpf("0.5") - k.beta * ratio(still(c, k))) * c.logp)
    return mp.fsum(terms) / len(terms)


DEFINITIONS: dict[str, Definition] = {
    "tdpo1": pairwise(tdpo1_term),
    "tdpo2": pairwise(tdpo2_term),
    "wpo_aligned": pairwise(wpo_aligned_term),
    "xpo": xpo,
    "nash_md": nash_md,
    "simper": pairwise(lambda w, y, k: mp.exp(mean_logp(y, k)) - mp.exp(mean_logp(w, k))),
    "odpo": pairwise(odpo_term),
    "dpop": pairwise(
        lambda w, y, k: nlog_sigmoid(k.beta * (ratio(w) - ratio(y) - k.penalty * max(mpf(0), w.ref - w.logp)))
    ),
    "r_dpo": pairwise(
        lambda w, y, k: nlog_sigmoid(k.beta * ratio(w) - k.beta * ratio(y) + (k.alpha * w.length - k.alpha * y.length))
    ),
    "gamma_simpo": pairwise(gamma_simpo_term),
    "gamma_dpo": pairwise(gamma_dpo_term),
    "neural_ndcg": neural_ndcg,
    "diff_ndcg": diff_ndcg,
    "dpo_shift": pairwise(lambda w, y, k: nlog_sigmoid(k.beta * ratio(w) - k.shift * k.beta * ratio(y))),
    "mappo": pairwise(lambda w, y, k: nlog_sigmoid(k.beta * ratio(w) - gap(w, y) * k.beta * ratio(y))),
    "alpha_dpo": pairwise(alpha_dpo_term),
    "chi_po": pairwise(chi_po_term),
    "ld_dpo": pairwise(ld_term),
    "sampo": pairwise(sampo_term),
    "focal_dpo": pairwise(focal_term),
    "dr_dpo": dr_dpo,
    "wpo": pairwise(wpo_term),
    "beta_dpo": beta_dpo,
    "rebel": pairwise(lambda w, y, k: ((ratio(w) - ratio(y)) / k.eta - gap(w, y)) ** 2),
    "reward_rpo": pairwise(reward_rpo_term),
    "cal_dpo": pairwise(cal_dpo_term),
    "a_star_po": a_star_po,
    "point_mse": point_mse,
    "point_sigmoid": point_sigmoid,
    "softmax_dpo": softmax_dpo,
    "approx_ndcg": approx_ndcg,
    "infonca": infonca,
    "swepo": swepo,
    "exo_list": exo_list,
    "rloo": rloo,
    "grpo": lambda cs, k: reinforce(cs, standardised(cs, k), by_length=True),
    "dr_grpo": dr_grpo,
    "rloo_kl": rloo_kl,
    "rloo_clipped": rloo_clipped,
    "gspo": gspo,
}
