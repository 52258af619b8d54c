"""For each loss its paper, and the configurations in which it is compared with its definition."""

from __future__ import annotations

from typing import Any

PAPERS = {
    "rrhf": ("Yuan et al. 2023, arXiv:2304.05302", "section 3.1: p_i, L_rank + L_ft"),
    "slic_hf": ("Zhao et al. 2023, arXiv:2305.10425", "section 2: rank calibration loss"),
    "orpo": ("Hong et al. 2024, arXiv:2403.07691", "eqs. 4, 6, 7"),
    "cpo": ("Xu et al. 2024, arXiv:2401.08417", "section 3: L_prefer + L_NLL"),
    "simpo": ("Meng et al. 2024, arXiv:2405.14734", "eq. 6"),
    "alphapo": ("Gupta et al. 2025, arXiv:2501.03884", "the objective"),
    "ranknet": ("Burges et al. 2005, ICML", "eq. 3"),
    "dpo": ("Rafailov et al. 2023, arXiv:2305.18290", "eq. 7; f-DPO arXiv:2309.16240"),
    "sigmoid_norm": ("Lambert et al. 2024, arXiv:2411.15124", "section 5: length-normalised DPO"),
    "ipo": ("Azar et al. 2023, arXiv:2310.12036", "eq. 17"),
    "robust": ("Chowdhury et al. 2024, arXiv:2403.00409", "section 3.1"),
    "hinge": ("Liu et al. 2023, arXiv:2309.06657", "hinge-norm"),
    "exo": ("Ji et al. 2024, arXiv:2402.00856", "eq. 16"),
    "sppo": ("Wu et al. 2024, arXiv:2405.00675", "eq. 4.7"),
    "apo_zero": ("D'Oosterlinck et al. 2024, arXiv:2408.06266", "eq. 7"),
    "apo_down": ("D'Oosterlinck et al. 2024, arXiv:2408.06266", "eq. 8"),
    "bco": ("Jung et al. 2024, arXiv:2404.04656", "section 4"),
    "discopop": ("Lu et al. 2024, arXiv:2406.08414", "eq. 5"),
    "aot": ("Melnyk et al. 2024, arXiv:2406.05882", "section 3, paired"),
    "aot_unpaired": ("Melnyk et al. 2024, arXiv:2406.05882", "section 3, unpaired"),
    "kto": ("Ethayarajh et al. 2024, arXiv:2402.01306", "section 4: L_KTO"),
    "plackett_luce": ("Rafailov et al. 2023, arXiv:2305.18290", "appendix A.3"),
    "lambdaloss": ("Liu et al. 2024, arXiv:2402.01878", "LiPO-lambda"),
    "nca": ("Chen et al. 2024, arXiv:2402.05369", "L_NCA"),
    "pro": ("Song et al. 2023, arXiv:2306.17492", "L_PRO, dynamic temperature, + L_SFT"),
    "listnet": ("Cao et al. 2007, ICML", "top-one cross-entropy"),
    "listmle": ("Xia et al. 2008, ICML", "likelihood loss"),
    "raft": ("Dong et al. 2023, arXiv:2304.06767", "algorithm 1, best of n"),
    "sft": ("maximum likelihood", "-"),
}

MIXTURES = {
    "sft+dpo": ("Pang et al. 2024, arXiv:2404.19733", "eq. 1: iterative RPO"),
    "0.8*dpo+0.2*bco+sft": ("Wang et al. 2024, arXiv:2411.10442", "MPO"),
}

PAIR_KEYWORDS: tuple[dict[str, Any], ...] = ({}, {"pairs": "best-worst"}, {"reduction": "sum"})
SMOOTH: dict[str, Any] = {"label_smoothing": 0.2}
UNNORMALISED: dict[str, Any] = {"length_penalty": 0.0}

VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "rrhf": ({}, {"rrhf_weight": 3.0, "length_penalty": 0.7, "sft_reduction": "mean"}, {"compat": "release"}),
    "slic_hf": (*PAIR_KEYWORDS, {"delta": 0.3, "length_penalty": 1.0, "sft_reduction": "mean"}),
    "orpo": (*PAIR_KEYWORDS, {"beta": 0.7, "sft_reduction": "sum"}),
    "cpo": (*PAIR_KEYWORDS, SMOOTH, {"length_penalty": 1.0, "sft_reduction": "sum", "sft_weight": 0.3}),
    "simpo": (*PAIR_KEYWORDS, SMOOTH, UNNORMALISED),
    "alphapo": (*PAIR_KEYWORDS, SMOOTH, {"alpha": -0.5}, {"alpha": 0.0}, {"length_penalty": 0.5}),
    "ranknet": (*PAIR_KEYWORDS, SMOOTH, UNNORMALISED),
    "dpo": (
        *PAIR_KEYWORDS,
        SMOOTH,
        {"length_penalty": 1.0, "beta": 2.0},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence", "length_penalty": 1.0},
        {"f_divergence_type": "alpha_divergence", "alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "alpha": 0.0},
    ),
    "sigmoid_norm": (*PAIR_KEYWORDS, SMOOTH),
    "ipo": (*PAIR_KEYWORDS, UNNORMALISED),
    "robust": (*PAIR_KEYWORDS, SMOOTH),
    "hinge": (*PAIR_KEYWORDS, {"beta": 0.6}),
    "exo": (*PAIR_KEYWORDS, SMOOTH),
    "sppo": (*PAIR_KEYWORDS, {"beta": 0.2}),
    "apo_zero": PAIR_KEYWORDS,
    "apo_down": PAIR_KEYWORDS,
    "bco": (*PAIR_KEYWORDS, {"beta": 0.5, "delta": 0.4}, {"threshold": 0.1, "delta": 0.4}),
    "discopop": (*PAIR_KEYWORDS, {"beta": 0.5, "tau": 0.7}),
    "aot": (*PAIR_KEYWORDS, SMOOTH),
    "aot_unpaired": (*PAIR_KEYWORDS, SMOOTH),
    "kto": (
        {},
        {"pairs": "best-worst"},
        {"kl": 0.8, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"kl": -1.0},
        {"threshold": 0.1, "kl": 0.8, "desirable_weight": 1.5},
    ),
    "plackett_luce": ({}, {"beta": 0.9}),
    "lambdaloss": ({}, {"beta": 0.9}, {"gain": "score"}),
    "nca": ({}, {"temperature": 0.5, "beta": 0.5}),
    "pro": ({}, {"sft_weight": 0.5, "length_penalty": 0.3, "sft_reduction": "mean"}),
    "listnet": ({}, {"beta": 2.0, "temperature": 0.4, "length_penalty": 0.5}, {"temperature": 0.0}),
    "listmle": ({}, {"beta": 2.0, "length_penalty": 0.5}),
    "raft": ({}, {"sft_reduction": "sum"}),
    "sft": ({}, {"sft_reduction": "sum"}),
}
