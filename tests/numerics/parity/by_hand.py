"""Every loss worked by hand on one list of three."""

from __future__ import annotations

from math import exp, log, log2
from typing import Any

import torch

from rankalign.losses.ranked import Ranked

# Three responses, best first by score: A, C, B.      A     B      C
#   logps                                            -6    -4    -12
#   lengths                                           2     4      3
#   mean log-prob a token, p                         -3    -1     -4
#   reference                                        -8    -4     -9
#   log-ratio, u                                      2     0     -3
#   scores                                            3     1      2
# Strict pairs, winner first: (A, C), (A, B), (C, B).
HAND = Ranked(
    logps=torch.tensor([[-6.0, -4.0, -12.0]], dtype=torch.float64),
    lengths=torch.tensor([[2, 4, 3]]),
    scores=torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64),
    mask=torch.ones(1, 3, dtype=torch.bool),
    ref_logps=torch.tensor([[-8.0, -4.0, -9.0]], dtype=torch.float64),
    prompt_lengths=torch.tensor([6]),
    log_squares=torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64),
    ref_kls=torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64),
    own=torch.tensor([[True, False, True]]),
    # log-ratios of tokens: A 3, -1; B 0, 1, 0, -1; C -2, 1, -2
    token_logps=torch.tensor([[[-2.0, -4, 0, 0], [-1, -1, -1, -1], [-4, -4, -4, 0]]], dtype=torch.float64),
    ref_token_logps=torch.tensor([[[-5.0, -3, 0, 0], [-1, -2, -1, 0], [-2, -5, -2, 0]]], dtype=torch.float64),
)


def sig(x: float) -> float:
    return 1 / (1 + exp(-x))


def nls(x: float) -> float:
    return log(1 + exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


Case = tuple[dict[str, Any], float]

CASES: dict[str, list[Case]] = {
    "rrhf": [
        ({}, (0 + 2 + 3) + 6),  # p_C < p_A: fine; p_B exceeds p_A by 2 and p_C by 3; the best has NLL 6
        ({"rrhf_weight": 10.0, "sft_reduction": "mean"}, 10 * 5 + 3),
        ({"length_penalty": 0.0}, (0 + 2 + 8) + 6),
        ({"compat": "release"}, (0 + 2 + 8) / (6 + 4) + 6 / (6 + 4)),  # all over prompt 6 + longest 4
    ],
    "slic_hf": [
        ({}, (0 + (1 + 2) + (1 + 8)) / 3 + 0.5 * 6),
        ({"pairs": "best-worst", "sft_weight": 0.0}, 1 + 2),
        ({"length_penalty": 1.0, "reduction": "sum", "sft_reduction": "mean"}, (0 + (1 + 2) + (1 + 3)) + 0.5 * 3),
    ],
    "orpo": [
        (
            {"pairs": "best-worst", "beta": 0.5},
            3 + 0.5 * nls(log(odds(exp(-3)) / odds(exp(-1)))),
        ),
    ],
    "tdpo1": [({}, (nls(0.1 * (3 - -1)) + nls(0.1 * (3 - 0)) + nls(0.1 * (-1 - 0))) / 3)],  # u + K: 3, 0, -1
    "tdpo2": [({}, (nls(0.1 * (5 - 0.5)) + nls(0.1 * (2 + 0.5)) + nls(0.1 * (-3 + 1))) / 3)],
    "wpo_aligned": [({}, (exp(-2.5 - 3) * nls(0.5) + exp(-2.5 - 0.5) * nls(0.2) + exp(-3 - 0.5) * nls(-0.3)) / 3)],
    "xpo": [({"alpha": 0.5}, (nls(0.5) + nls(0.2) + nls(-0.3)) / 3 + 0.5 * -4)],  # B is the reference's
    "nash_md": [({}, ((0.5 - 0.1 * 2) * 6 + (0.5 + 0.1 * 3) * 12) / 2)],  # A and C both beat B
    "cpo": [({}, (nls(0.6) + nls(-0.2) + nls(-0.8)) / 3 + 3)],
    "simpo": [({"beta": 2.0, "gamma": 0.5}, (nls(2 * 1 - 0.5) + nls(2 * -2 - 0.5) + nls(2 * -3 - 0.5)) / 3)],
    "alphapo": [
        (
            {"alpha": 0.5, "beta": 1.0, "gamma": 0.25, "pairs": "best-worst"},
            nls(((1 - exp(1.5)) - (1 - exp(0.5))) / 0.5 - 0.25),
        ),
    ],
    "ranknet": [({"reduction": "sum"}, nls(1) + nls(-2) + nls(-3))],
    "dpo": [
        ({}, (nls(0.5) + nls(0.2) + nls(-0.3)) / 3),
        ({"label_smoothing": 0.1, "pairs": "best-worst"}, 0.9 * nls(0.2) + 0.1 * nls(-0.2)),
        ({"f_divergence_type": "forward_kl", "pairs": "best-worst"}, nls(0.1 * ((1 - exp(-2)) - (1 - exp(0))))),
        (
            {"f_divergence_type": "js_divergence", "pairs": "best-worst"},
            nls(0.1 * (log(2 * exp(2) / (exp(2) + 1)) - log(2 * 1 / (1 + 1)))),
        ),
        (
            {"f_divergence_type": "alpha_divergence", "alpha": 0.5, "pairs": "best-worst"},
            nls(0.1 * ((1 - exp(-1)) / 0.5 - 0)),
        ),
    ],
    "sigmoid_norm": [({"beta": 5.0}, (nls(5 * (1 + 1)) + nls(5 * (1 - 0)) + nls(5 * (-1 - 0))) / 3)],
    "ipo": [
        ({"beta": 0.25}, ((2 - 2) ** 2 + (1 - 2) ** 2 + (-1 - 2) ** 2) / 3),
        ({"beta": 0.25, "length_penalty": 0.0}, ((5 - 2) ** 2 + (2 - 2) ** 2 + (-3 - 2) ** 2) / 3),
    ],
    "robust": [({"label_smoothing": 0.1, "pairs": "best-worst"}, (0.9 * nls(0.2) - 0.1 * nls(-0.2)) / 0.8)],
    "hinge": [({"beta": 0.25}, (0 + (1 - 0.5) + (1 + 0.75)) / 3)],
    "exo": [
        (
            {"label_smoothing": 0.1, "pairs": "best-worst"},
            sig(0.2) * log(sig(0.2) / 0.9) + sig(-0.2) * log(sig(-0.2) / 0.1),
        ),
    ],
    "sppo": [({"beta": 0.5}, (((2 - 1) ** 2 + (-3 + 1) ** 2) + ((2 - 1) ** 2 + 1) + ((-3 - 1) ** 2 + 1)) / 3)],
    "apo_zero": [({"beta": 1.0, "pairs": "best-worst"}, (1 - sig(2)) + sig(0))],
    "apo_down": [({"beta": 1.0}, (sig(2) + 1 - sig(5) + sig(2) + 1 - sig(2) + sig(-3) + 1 - sig(-3)) / 3)],
    "bco": [
        ({"beta": 1.0, "delta": 0.5, "pairs": "best-worst"}, nls(2 - 0.5) + nls(-(0 - 0.5))),
        ({"beta": 1.0, "threshold": 1.5}, (nls(2) + nls(-3) + nls(0)) / 3),  # A, C good, B not
    ],
    "discopop": [
        (
            {"beta": 0.5, "tau": 0.5, "pairs": "best-worst"},
            (1 - sig(2)) * nls(1) + sig(2) * exp(-1),  # margin 0.5 * 2, over tau 2
        ),
    ],
    # policy margins A-C 6, A-B -2, C-B -8; reference's 1, -4, -5: sorted -8 -2 6 against -5 -4 1
    "aot": [({}, (nls(0.1 * (-8 + 5)) + nls(0.1 * (-2 + 4)) + nls(0.1 * (6 - 1))) / 3)],
    # winners' u 2, 2, -3, losers' -3, 0, 0: sorted -3 2 2 against -3 0 0
    "aot_unpaired": [({}, (nls(0) + nls(0.2) + nls(0.2)) / 3)],
    "kto": [
        ({"beta": 1.0, "kl": 1.0, "undesirable_weight": 2.0, "pairs": "best-worst"}, (sig(1 - 2) + 2 * sig(0 - 1)) / 2),
        ({"beta": 1.0, "threshold": 1.5}, (sig(-2) + sig(3) + sig(0)) / 3),  # A, C desirable, B not
    ],
    "plackett_luce": [
        ({}, -log(exp(0.2) / (exp(0.2) + exp(-0.3) + exp(0.0))) - log(exp(-0.3) / (exp(-0.3) + exp(0.0)))),
    ],
    # ranked by u: A 1st, B 2nd, C 3rd; wins A 1, C 1/2, B 0
    "lambdaloss": [
        (
            {"beta": 1.0, "gain_function": "linear", "discount": "reciprocal"},
            1 * (1 - 1 / 2) * nls(2) + 0.5 * (1 - 1 / 3) * nls(5) + 0.5 * (1 / 2 - 1 / 3) * nls(-3),
        ),
        ({"beta": 1.0, "gain_function": "linear", "discount": "none"}, 1 * nls(2) + 0.5 * nls(5) + 0.5 * nls(-3)),
        (
            {"beta": 1.0},
            (2 - 2**0.5) * (1 / log2(2) - 1 / log2(4)) * nls(5)
            + (2 - 1) * (1 / log2(2) - 1 / log2(3)) * nls(2)
            + (2**0.5 - 1) * (1 / log2(3) - 1 / log2(4)) * nls(-3),
        ),
    ],
    "nca": [
        ({"beta": 1.0}, nls(2) + (nls(-2) + nls(0) + nls(3)) / 3),
        (
            {"beta": 1.0, "temperature": 1.0},
            (exp(3) * nls(2) + exp(1) * nls(0) + exp(2) * nls(-3)) / (exp(3) + exp(1) + exp(2))
            + (nls(-2) + nls(0) + nls(3)) / 3,
        ),
    ],
    # A: gaps 2 to B, 1 to C, so p_A at 2; C: gap 1 to B
    "pro": [
        (
            {},
            -log(exp(-3 * 2) / (exp(-3 * 2) + exp(-1 * 2) + exp(-4 * 1)))
            - log(exp(-4 * 1) / (exp(-4 * 1) + exp(-1 * 1)))
            + 0.05 * 2**2 * 6,
        ),
    ],
    "listnet": [
        (
            {},
            log(exp(-3) + exp(-1) + exp(-4)) + (3 * exp(3) + 1 * exp(1) + 4 * exp(2)) / (exp(3) + exp(1) + exp(2)),
        ),
    ],
    "listmle": [
        ({}, -log(exp(-3) / (exp(-3) + exp(-4) + exp(-1))) - log(exp(-4) / (exp(-4) + exp(-1)))),
    ],
    "simper": [({}, (2 * exp(-1) - 2 * exp(-3)) / 3)],  # C is loser once and winner once
    # gaps in score 1, 2, 1; in u 5, 2, -3; in length -1, -2, -1
    "odpo": [
        ({}, (nls(0.5 - 0) + nls(0.2 - log(2)) + nls(-0.3 - 0)) / 3),
        ({"offset": "linear", "alpha": 0.1}, (nls(0.5 - 0.1) + nls(0.2 - 0.2) + nls(-0.3 - 0.1)) / 3),
    ],
    "dpop": [({"beta": 0.1, "penalty": 2.0}, (nls(0.5) + nls(0.2) + nls(0.1 * (-3 - 2 * 3))) / 3)],
    "r_dpo": [({"alpha": 0.1}, (nls(0.5 - 0.1) + nls(0.2 - 0.2) + nls(-0.3 - 0.1)) / 3)],
    "dpo_shift": [({"shift": 0.5}, (nls(0.1 * (2 + 1.5)) + nls(0.2) + nls(-0.3)) / 3)],
    "mappo": [({}, (nls(0.1 * (2 + 1 * 3)) + nls(0.1 * (2 - 2 * 0)) + nls(0.1 * (-3 - 1 * 0))) / 3)],
    # u a token 1, 0, -1: margins 2, 1, -1, of which 1 is usual and 2 the spread
    "alpha_dpo": [
        (
            {"beta": 1.0, "gamma": 0.5, "alpha": 0.2, "center": 1.0, "spread": 2.0},
            (nls(1 - 0.6) + nls(-2 - 0.5) + nls(-3 - 0.3)) / 3,
        ),
    ],
    "chi_po": [
        ({"pairs": "best-worst"}, nls(0.1 * ((exp(2) + 2) - (exp(0) + 0)))),
        ({"pairs": "best-worst", "r_max": 0.25}, nls(0.5)),
    ],
    # one pair has the whole of the margin; margins that are held equal are SimPO's 0.5
    "gamma_simpo": [
        ({"beta": 2.0, "gamma": 0.5, "tau": 1.0, "pairs": "best-worst"}, nls(2 * -2 - 0.5)),
        ({"beta": 2.0, "gamma": 0.5, "tau": 1e14}, (nls(2 * 1 - 0.5) + nls(2 * -2 - 0.5) + nls(2 * -3 - 0.5)) / 3),
    ],
    "gamma_dpo": [({"pairs": "best-worst"}, nls(0.2)), ({"tau": 1e14}, (nls(0.5) + nls(0.2) + nls(-0.3)) / 3)],
    # all places alike to all, and sorted A, B, C to e^-100; gains 1, 0 and sqrt 2 - 1
    "neural_ndcg": [
        ({"beta": 0.0}, 1 - (2**0.5 / 3) * (1 + 1 / log2(3) + 1 / 2) / (1 + (2**0.5 - 1) / log2(3))),
        ({"beta": 1.0, "tau": 0.01}, 1 - (1 + (2**0.5 - 1) / 2) / (1 + (2**0.5 - 1) / log2(3))),
    ],
    # the network of three begins with A, C, B: halves change places three times, or none but C and B
    "diff_ndcg": [
        ({"beta": 0.0}, 1 - 2**0.5 * (3 / 8 + 3 / 8 / log2(3) + 1 / 4 / 2) / (1 + (2**0.5 - 1) / log2(3))),
        ({"beta": 1.0, "tau": 1e-14}, 1 - (1 + (2**0.5 - 1) / 2) / (1 + (2**0.5 - 1) / log2(3))),
    ],
    # against A two tokens of each: B 1 and -1 beyond, C -1 and -2 beyond; against C three of B: 1 and -1 beyond
    "ld_dpo": [
        ({}, (nls(0.1 * (2 + 1 + 1)) + nls(0.1 * (2 - 1 + 0.5)) + nls(0.1 * (-3 - 1 + 0.5))) / 3),
        ({"alpha": 0.0, "pairs": "best-worst"}, nls(0.1 * (2 - 1))),
        ({"alpha": 1.0}, (nls(0.5) + nls(0.2) + nls(-0.3)) / 3),  # DPO
    ],
    # the numbers draw B's tokens in the order 3, 4, 2 and C's in 3, 2: sums -1 (of two) and 0 (of three), and -1
    "sampo": [({}, (nls(0.1 * (2 + 1)) + nls(0.1 * (2 + 1)) + nls(0.1 * (-3 - 0))) / 3)],
    "focal_dpo": [({"gamma": 1.0, "pairs": "best-worst"}, sig(0.2) * nls(0.2))],
    "dr_dpo": [({}, -log((sig(0.5) + sig(0.2) + sig(-0.3)) / 3))],
    "wpo": [({}, (exp(-7) * nls(0.5) + exp(-4) * nls(0.2) + exp(-5) * nls(-0.3)) / 3)],
    # margins 0.5, 0.2, -0.3: mean 0.4 / 3
    "beta_dpo": [
        ({"alpha": 1.5}, (nls(0.5 * 1.2) + nls(0.2 * 1.2) + nls(-0.3 * 1.2)) / 3),
        ({"alpha": 1.0, "baseline": 9.0}, (nls(0.005) + nls(0.002) + nls(-0.003)) / 3),  # at the floor
    ],
    "rebel": [({"eta": 2.0}, ((2.5 - 1) ** 2 + (1 - 2) ** 2 + (-1.5 - 1) ** 2) / 3)],
    "reward_rpo": [
        ({"pairs": "best-worst"}, sig(2) * log(sig(2) / sig(0.2)) + sig(-2) * log(sig(-2) / sig(-0.2))),
    ],
    "cal_dpo": [({"beta": 0.25}, (nls(5) + 0 + 1 + nls(2) + 0 + 4 + nls(-3) + 25 + 4) / 3)],  # aims at 2 and -2
    "a_star_po": [
        (
            {"beta1": 1.0, "beta2": 0.1},
            sum((0.1 * u - r + log((exp(3) + exp(1) + exp(2)) / 3)) ** 2 for u, r in ((2, 3), (0, 1), (-3, 2))) / 3,
        ),
    ],
    "point_mse": [({}, ((1 - 0.2) ** 2 + (0 - 0) ** 2 + (0.5 + 0.3) ** 2) / 3)],
    "point_sigmoid": [({}, (nls(0.2) + nls(0) + 0.5 * nls(-0.3) + 0.5 * nls(0.3)) / 3)],
    "softmax_dpo": [({}, log(1 + exp(-5) + exp(-2)))],
    "approx_ndcg": [
        (
            {},
            1
            - (1 / log2(2 + sig(-0.5) + sig(-0.2)) + (2**0.5 - 1) / log2(2 + sig(0.5) + sig(0.3)))
            / (1 / log2(2) + (2**0.5 - 1) / log2(3)),
        ),
    ],
    "infonca": [
        ({"beta": 1.0}, log(1 + exp(-5) + exp(-2))),
        (
            {"beta": 1.0, "temperature": 1.0},
            log(exp(2) + exp(0) + exp(-3)) - (2 * exp(3) + 0 * exp(1) - 3 * exp(2)) / (exp(3) + exp(1) + exp(2)),
        ),
    ],
    # mean score 2: A is above it, C at it, B below
    "swepo": [({"beta": 1.0, "alpha": 0.5}, log(1 + (exp(0 - 3) + exp(0.5 + 0)) / exp(0.5 + 2)))],
    "exo_list": [
        (
            {"beta": 1.0},
            (exp(2) * (2 - 3) + exp(0) * (0 - 1) + exp(-3) * (-3 - 2)) / (exp(2) + exp(0) + exp(-3))
            - log(exp(2) + exp(0) + exp(-3))
            + log(exp(3) + exp(1) + exp(2)),
        ),
    ],
    "rloo": [({}, -(1.5 * -6 - 1.5 * -4 + 0 * -12) / 3)],  # 3 - 1.5, 1 - 2.5, 2 - 2
    "grpo": [({"std_epsilon": 1.0}, -(1 * -3 - 1 * -1 + 0 * -4) / 2 / 3)],  # deviation 1
    "dr_grpo": [({}, -(1 * -6 - 1 * -4 + 0 * -12) / 3), ({"max_tokens": 4.0}, (6 - 4) / 3 / 4)],
    # scores less u / 2: 2, 1, 3.5; less the mean of the others: -0.25, -1.75, 2
    "rloo_kl": [({"beta": 0.5}, -(-0.25 * -6 - 1.75 * -4 + 2 * -12) / 3)],
    "rloo_clipped": [({}, -(1.2 * 1.5 - 1 * 1.5 + 0) / 3)],  # ratios e^2, 1, e^-3
    "gspo": [({"epsilon_high": 0.2, "std_epsilon": 0.0}, -(1.2 * 1 - 1 * 1 + 0) / 3)],  # ratios e, 1, 1 / e
    "raft": [({}, 3), ({"sft_reduction": "sum"}, 6)],
    "sft": [({}, 3), ({"sft_reduction": "sum"}, 6)],
}
