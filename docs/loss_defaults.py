"""Writes ``docs/loss-defaults.md``: every keyword of every loss with its default here and its paper's own value.

python -m docs.loss_defaults
"""

from __future__ import annotations

from pathlib import Path

from rankalign.losses import LOSSES

PAGE = Path(__file__).with_name("loss-defaults.md")
HEAD = """# Defaults of the losses, and their papers' own

Written by `python -m docs.loss_defaults` from the functions themselves; a test holds it to them. Each value of a paper
names where it was read; where none stands, it was not looked up, and ours is what its formula or common code suggests.
`pairs`, `reduction`, `label_smoothing` (0 unless named), `nll_weight` and `nll_reduction` are ours and left out.

| loss | keyword | here | the paper's | read in |
|---|---|---|---|---|
"""
OURS = ("pairs", "reduction", "nll_weight", "nll_reduction", "sft_reduction", "compat", "threshold", "draw_seed")

SOURCES = {
    "index": "[TRL's paper index](https://huggingface.co/docs/trl/paper_index), which names the paper's section",
    "trl": "TRL 1.16's default for the method, not compared with the paper",
    "simpo": "[its release](https://github.com/princeton-nlp/SimPO), `mistral-7b-base-simpo.yaml`",
    "tdpo": "[its release](https://github.com/Vance0124/Token-level-Direct-Preference-Optimization), `tdpo.yaml`",
    "abstract": "the paper's definition: the formula has no such weight",
}

# loss: keyword: (the paper's value, where it was read)
PUBLISHED: dict[str, dict[str, tuple[str, str]]] = {
    "rrhf": {"rrhf_weight": ("1", "abstract"), "length_penalty": ("1", "abstract")},
    "dpo": {"beta": ("0.1", "index"), "f_divergence_type": ("reverse_kl", "abstract")},
    "robust": {"beta": ("0.01", "index"), "label_smoothing": ("0.1", "index")},
    "exo": {"beta": ("0.1", "index"), "label_smoothing": ("0.001", "trl")},
    "nca": {"beta": ("0.01", "index")},
    "infonca": {"beta": ("0.01", "index")},
    "bco": {"beta": ("0.01", "index")},
    "discopop": {"beta": ("0.05", "index"), "tau": ("0.05", "index")},
    "apo_zero": {"beta": ("0.1", "index")},
    "apo_down": {"beta": ("0.1", "index")},
    "kto": {"beta": ("0.1", "index"), "desirable_weight": ("1", "index"), "undesirable_weight": ("1", "index")},
    "alphapo": {"alpha": ("0.25", "index"), "beta": ("2.5", "index"), "gamma": ("0.1", "index")},
    "simpo": {"beta": ("2", "simpo"), "gamma": ("1.6 for Mistral-7B base", "simpo")},
    "tdpo1": {"beta": ("0.1", "tdpo")},
    "tdpo2": {"beta": ("0.1", "tdpo"), "alpha": ("0.5", "tdpo")},
    "orpo": {"beta": ("0.1", "trl")},
    "cpo": {"beta": ("0.1", "trl")},
    "a_star_po": {"beta1": ("0.5", "trl"), "beta2": ("0.001", "trl")},
    "rloo_kl": {"beta": ("0.03", "index")},
    "gspo": {"epsilon_low": ("0.0003", "index"), "epsilon_high": ("0.0004", "index")},
}


def rows() -> list[tuple[str, str, str, str, str]]:
    """One a keyword that a paper could name, and one for a loss without any."""
    found = []
    for name, loss in LOSSES.items():
        known = PUBLISHED.get(name, {})
        keywords = {k: v for k, v in loss.defaults.items() if k not in OURS and (k != "label_smoothing" or k in known)}
        for keyword, default in keywords.items():
            value, source = known.get(keyword, ("", ""))
            found.append((f"`{name}`", f"`{keyword}`", str(default), value, SOURCES.get(source, "")))
        if not keywords:
            found.append((f"`{name}`", "", "", "", "nothing to set"))
    return found


def page() -> str:
    """The whole page."""
    return HEAD + "".join("| " + " | ".join(row) + " |\n" for row in rows())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
