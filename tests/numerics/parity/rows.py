"""The comparisons: for each loss its oracles, in the configurations in which it meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankalign.losses import LOSSES, PARTS, Loss
from rankalign.losses.mixtures import mixture, parse
from rankalign.losses.ranked import Ranked

from . import definitions, recent, release
from .cases import VARIANTS
from .lists import Candidate, lists, padded, random_list, value_and_gradient, with_tokens

EXACT, CLOSE = 1e-9, 1e-6
DEFINITIONS = {**definitions.DEFINITIONS, **recent.DEFINITIONS}


@dataclass(frozen=True)
class Row:
    """One comparison: a loss in one configuration against one oracle, and the largest errors over all lists."""

    loss: str
    oracle: str
    keywords: dict[str, Any]
    value_error: float
    gradient_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.value_error <= self.tolerance and self.gradient_error <= self.tolerance


@dataclass
class Errors:
    """Running maxima over lists."""

    value: float = 0.0
    gradient: float = 0.0
    size: float = 0.0  # largest gradient seen: comparing zeros with zeros proves nothing

    def add(self, ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
        """Compare two scalars that were computed from the same leaf, and their gradients there."""
        (value, gradient), (other, other_gradient) = value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf)
        self.value = max(self.value, (value - other).abs().max().item())
        self.gradient = max(self.gradient, (gradient - other_gradient).abs().max().item())
        self.size = max(self.size, gradient.abs().max().item())

    def row(self, loss: str, oracle: str, keywords: dict[str, Any], tolerance: float) -> Row:
        assert self.size, f"{loss}: nothing was compared with {oracle}"
        return Row(loss, oracle, keywords, self.value, self.gradient, tolerance)


def definition_row(name: str, keywords: dict[str, Any]) -> Row:
    """All lists at once, padded with garbage, against the 50-digit definition of each list alone."""
    everything = lists()
    ranked = padded(everything)
    values, gradients = value_and_gradient(LOSSES[name].function(ranked, **keywords), ranked.logps)
    complete = {**LOSSES[name].defaults, **keywords}
    value_error = gradient_error = 0.0
    for row, candidates in enumerate(everything):
        extra = {"prompt_length": int(ranked.prompt_lengths[row])} if name == "rrhf" else {}
        value, slopes = definitions.value_and_gradient(DEFINITIONS[name], candidates, **complete, **extra)
        slopes += [0.0] * (ranked.logps.shape[1] - len(slopes))
        value_error = max(value_error, abs(values[row].item() - value))
        gradient_error = max(
            gradient_error, (gradients[row] - torch.tensor(slopes, dtype=torch.float64)).abs().max().item()
        )
    return Row(name, "definition, 50 digits", keywords, value_error, gradient_error, EXACT)


def definition_rows() -> Iterator[Row]:
    """Every loss in every variant; a loss without variants is an error."""
    for name in LOSSES:
        for keywords in VARIANTS[name]:
            yield definition_row(name, keywords)


def from_leaf(leaf: Tensor, candidates: list[Candidate]) -> Ranked:
    """One list whose log-probs are ``leaf`` (N,)."""
    ranked = padded([candidates], leaf.dtype)
    return with_tokens(replace(ranked, logps=leaf.unsqueeze(0)))


def tensors(candidates: list[Candidate], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf log-probs, references, lengths (N,), and indices (2M,) of all winners, then all losers."""
    logps = torch.tensor([c.logp for c in candidates], dtype=dtype, requires_grad=True)
    refs = torch.tensor([c.ref for c in candidates], dtype=dtype)
    lengths = torch.tensor([c.length for c in candidates])
    order = range(len(candidates))
    pairs = [(i, j) for i in order for j in order if candidates[i].score > candidates[j].score]
    return logps, refs, lengths, torch.tensor([i for i, _ in pairs] + [j for _, j in pairs], dtype=torch.long)


def release_row() -> Row:
    """RRHF's released arithmetic from logits, against ours from the log-probs of the same logits."""
    errors = Errors()
    keywords = {"compat": "release", "rrhf_weight": 2.0, "length_penalty": 0.8}
    for seed, (prompt, lengths) in enumerate([(3, [2, 5, 3]), (1, [4, 4]), (6, [1, 7, 3, 3, 2])]):
        generator = torch.Generator().manual_seed(seed)
        size, width = len(lengths), prompt + max(lengths)
        logits = torch.randn(size, width, 11, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
        tokens = torch.randint(0, 11, (size, max(lengths)), generator=generator)
        scores = torch.randn(size, generator=generator, dtype=torch.float64)
        labels = release.shifted_labels(prompt, lengths, tokens)
        theirs = release.released_loss(logits, labels, scores, rrhf_weight=2.0, length_penalty=0.8)
        ranked = Ranked(
            torch.stack([_response_logp(logits[i], tokens[i], prompt, lengths[i]) for i in range(size)]).unsqueeze(0),
            torch.tensor([lengths]),
            scores.unsqueeze(0),
            torch.ones(1, size, dtype=torch.bool),
            prompt_lengths=torch.tensor([prompt]),
        )
        errors.add(LOSSES["rrhf"].function(ranked, **keywords).squeeze(0), theirs, logits)
    return errors.row("rrhf", "RRHF's released arithmetic, from logits", keywords, EXACT)


def _response_logp(logits: Tensor, tokens: Tensor, prompt: int, length: int) -> Tensor:
    """Scalar log-prob of ``length`` tokens after a prompt of ``prompt``; logits (S, V)."""
    places = slice(prompt - 1, prompt - 1 + length)
    return logits[places].log_softmax(-1).gather(-1, tokens[:length].unsqueeze(-1)).sum()


Spec = tuple[str, dict[str, Any], str, dict[str, Any]]

# loss, keywords, TRL's loss_type, TRL's configuration; on lists, TRL gets all strict pairs of one list as its batch
DPO_LISTS: tuple[Spec, ...] = (
    ("dpo", {}, "sigmoid", {"beta": 0.1}),
    ("dpo", {"f_divergence_type": "forward_kl"}, "sigmoid", {"beta": 0.1, "f_divergence_type": "forward_kl"}),
    ("dpo", {"f_divergence_type": "js_divergence"}, "sigmoid", {"beta": 0.1, "f_divergence_type": "js_divergence"}),
    (
        "dpo",
        {"f_divergence_type": "alpha_divergence", "alpha": 0.3},
        "sigmoid",
        {"beta": 0.1, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    (
        "dpo",
        {"f_divergence_type": "js_divergence", "length_penalty": 1.0},
        "sigmoid_norm",
        {"beta": 0.1, "f_divergence_type": "js_divergence"},
    ),
    ("sigmoid_norm", {}, "sigmoid_norm", {"beta": 0.1}),
    ("ipo", {}, "ipo", {"beta": 0.1}),
    ("robust", {}, "robust", {"beta": 0.1, "label_smoothing": 0.1}),
    ("hinge", {"beta": 0.6}, "hinge", {"beta": 0.6}),
    ("exo", {}, "exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}),
    ("sppo", {}, "sppo_hard", {"beta": 0.001}),
    ("apo_zero", {}, "apo_zero", {"beta": 0.1}),
    ("apo_down", {}, "apo_down", {"beta": 0.1}),
    ("bco", {}, "bco_pair", {"beta": 0.01}),
    ("discopop", {}, "discopop", {"beta": 0.05, "tau": 0.05}),
    ("aot", {"label_smoothing": 0.2}, "aot", {"beta": 0.1, "label_smoothing": 0.2}),
    ("wpo", {}, "sigmoid", {"beta": 0.1, "use_weighting": True}),  # its model says nothing that would align weights
    ("wpo_aligned", {}, "sigmoid", {"beta": 0.1, "use_weighting": True}),
    ("aot_unpaired", {"label_smoothing": 0.2}, "aot_unpaired", {"beta": 0.1, "label_smoothing": 0.2}),
)
DPO_PAIRS: tuple[Spec, ...] = (
    ("dpo", {"label_smoothing": 0.2}, "aot", {"beta": 0.1, "label_smoothing": 0.2}),  # cDPO; sigmoid ignores it in TRL
    ("nca", {}, "nca_pair", {"beta": 0.01}),
    ("plackett_luce", {}, "sigmoid", {"beta": 0.1}),
    ("sft", {}, "sft", {"beta": 0.1}),
    ("raft", {}, "sft", {"beta": 0.1}),
    ("softmax_dpo", {"beta": 0.1}, "sigmoid", {"beta": 0.1}),
    ("infonca", {"beta": 0.1}, "sigmoid", {"beta": 0.1}),
    ("dpo_shift", {"shift": 1.0}, "sigmoid", {"beta": 0.1}),
    ("dr_dpo", {}, "sigmoid", {"beta": 0.1}),
    ("dpo", {"nll_weight": 1.0}, "sigmoid sft", {"beta": 0.1}),
    ("dpo", {"nll_weight": 0.3}, "sigmoid sft", {"beta": 0.1, "loss_weights": [1.0, 0.3]}),
    ("sft+dpo", {}, "sft sigmoid", {"beta": 0.1}),  # RPO
    ("0.8*dpo+0.2*bco+sft", {"beta": 0.1}, "sigmoid bco_pair sft", {"beta": 0.1, "loss_weights": [0.8, 0.2, 1.0]}),
)


Lists = list[list[Candidate]]


def named(name: str) -> Loss:
    """A registered loss, or a mixture of them."""
    return mixture(parse(name), LOSSES)


def dpo_row(name: str, keywords: dict[str, Any], loss_type: str, config: dict[str, Any], data: Lists) -> Row:
    """Against DPOTrainer; TRL's alpha divergence knows no double precision, so that row runs in single."""
    from . import trl_oracle

    single = config.get("f_divergence_type") == "alpha_divergence"
    errors = Errors()
    for candidates in data:
        leaf, refs, lengths, pairs = tensors(candidates, torch.float32 if single else torch.float64)
        if len(pairs):
            ranked = from_leaf(leaf, candidates)
            more = {"log_squares": ranked.log_squares[0][pairs]} if name == "wpo_aligned" else {}
            theirs = trl_oracle.dpo(leaf[pairs], refs[pairs], lengths[pairs], loss_type, **config, **more)
            errors.add(named(name).function(ranked, **keywords).squeeze(0), theirs, leaf)
    label = (
        f"TRL DPOTrainer `{loss_type}`" + (", WPO" if "use_weighting" in config else "") + (", fp32" if single else "")
    )
    return errors.row(name, label, keywords, CLOSE)


# our keywords, TRL's loss_type
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
KTO: tuple[tuple[dict[str, Any], str], ...] = (
    (WEIGHTS, "kto"),
    ({**WEIGHTS, "threshold": 0.1}, "kto"),
    ({}, "apo_zero_unpaired"),
)


def kto_row(keywords: dict[str, Any], loss_type: str) -> Row:
    """Against KTOTrainer, whose own estimate of the KL goes into ours."""
    from . import trl_oracle

    errors, weights = Errors(), {k: v for k, v in keywords.items() if k != "threshold"}
    for candidates in lists():
        leaf, refs, lengths, examples = tensors(candidates)
        if "threshold" in keywords:
            examples = torch.arange(len(candidates))
            desirable = torch.tensor([c.score > keywords["threshold"] for c in candidates])
        else:
            desirable = torch.arange(len(examples)) < len(examples) // 2
        if len(examples):
            inputs = leaf[examples], refs[examples], lengths[examples], desirable
            theirs, kl = trl_oracle.kto(*inputs, loss_type=loss_type, **weights)
            ours = LOSSES["kto"].function(from_leaf(leaf, candidates), kl=kl, **keywords)
            errors.add(ours.squeeze(0), theirs, leaf)
    return errors.row("kto", f"TRL KTOTrainer `{loss_type}`", keywords, CLOSE)


Oracle = Callable[[Tensor, Tensor], Tensor]


def _cpo(loss_type: str, mean: bool, **config: float) -> Oracle:
    """CPOTrainer's loss of all strict pairs, on sums or means of token log-probs."""

    def oracle(logps: Tensor, lengths: Tensor) -> Tensor:
        from . import trl_oracle

        return trl_oracle.cpo(logps / lengths if mean else logps, loss_type, **config)

    return oracle


def _odds_ratio(logps: Tensor, lengths: Tensor) -> Tensor:
    from . import trl_oracle

    return trl_oracle.odds_ratio(logps / lengths)


# loss, keywords, label, oracle on the log-probs and lengths of all strict pairs; only the rank term is compared
LOGPS: tuple[tuple[str, dict[str, Any], str, Oracle], ...] = (
    ("cpo", {"label_smoothing": 0.2}, "TRL CPOTrainer `sigmoid`", _cpo("sigmoid", False, beta=0.1, eps=0.2)),
    ("slic_hf", {}, "TRL CPOTrainer `hinge`", _cpo("hinge", False, beta=1.0)),
    ("simpo", {"label_smoothing": 0.2}, "TRL CPOTrainer `simpo`", _cpo("simpo", True, beta=2.0, gamma=0.5, eps=0.2)),
    ("alphapo", {}, "TRL CPOTrainer `alphapo`", _cpo("simpo", True, beta=2.5, gamma=0.1, alpha=0.25)),
    ("ranknet", {}, "TRL CPOTrainer `simpo`, gamma 0", _cpo("simpo", True, beta=1.0)),
    ("orpo", {}, "TRL ORPOTrainer", _odds_ratio),
)


def logps_row(name: str, keywords: dict[str, Any], label: str, oracle: Oracle) -> Row:
    """Rank term over the strict pairs of lists."""
    errors = Errors()
    for candidates in lists():
        leaf, _, lengths, pairs = tensors(candidates)
        if len(pairs):
            ranked = from_leaf(leaf, candidates)
            parts = PARTS[name](ranked, **keywords)
            ours = parts["rank_loss"] if parts else LOSSES[name].function(ranked, **keywords)
            errors.add(ours.squeeze(0), oracle(leaf[pairs], lengths[pairs]), leaf)
    return errors.row(name, f"{label}, rank term", keywords, CLOSE)


CPO_DEFAULTS = {"beta": 0.1, "cpo_alpha": 0.0, "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.0}
# loss, keywords, label, TRL's trainer and its configuration; whole losses of one pair, likelihood terms included
LOGITS: tuple[tuple[str, dict[str, Any], str, str, dict[str, Any]], ...] = (
    ("cpo", {}, "`sigmoid`", "CPOTrainer", {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    (
        "slic_hf",
        {"sft_reduction": "mean"},
        "`hinge`",
        "CPOTrainer",
        {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.5},
    ),
    ("simpo", {}, "`simpo`", "CPOTrainer", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
    (
        "alphapo",
        {},
        "`alphapo`",
        "CPOTrainer",
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25},
    ),
    ("listmle", {}, "`simpo`, gamma 0", "CPOTrainer", {"loss_type": "simpo", "beta": 1.0}),
    (
        "pro",
        {"sft_reduction": "mean"},
        "`simpo`, gamma 0, + NLL",
        "CPOTrainer",
        {"loss_type": "simpo", "beta": 1.5, "cpo_alpha": 0.05},
    ),
    ("orpo", {}, "", "ORPOTrainer", {"beta": 0.1}),
)


def logits_row(name: str, keywords: dict[str, Any], label: str, trainer: str, config: dict[str, Any]) -> Row:
    """Whole loss of pairs, gradients with respect to logits; the scores are 1.5 apart, PRO's temperature."""
    from . import trl_oracle

    errors = Errors()
    if trainer == "CPOTrainer":
        config = CPO_DEFAULTS | config
    for seed, lengths in enumerate([[3, 5], [6, 2], [4, 4]]):
        generator = torch.Generator().manual_seed(seed)
        width = 1 + max(lengths)
        logits = torch.randn(2, width, 11, generator=generator, dtype=torch.float64).requires_grad_()
        tokens = torch.randint(0, 11, (2, width), generator=generator)
        arguments = logits, tokens, torch.tensor(lengths), getattr(trl_oracle, trainer)
        theirs = trl_oracle.from_logits(*arguments, **config)
        logps = torch.stack([_response_logp(logits[i], tokens[i, 1:], 1, lengths[i]) for i in range(2)])
        scores, mask = torch.tensor([[2.0, 0.5]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
        ranked = Ranked(logps.unsqueeze(0), torch.tensor([lengths]), scores, mask)
        errors.add(LOSSES[name].function(ranked, **keywords).squeeze(0), theirs, logits)
    return errors.row(name, f"TRL {trainer} {label}".rstrip() + ", from logits", keywords, CLOSE)


def ld_row(name: str, setting: str, alpha: float, data: Lists) -> Row:
    """LD-DPO over all strict pairs of lists, gradients with respect to tokens, by TRL's own sums over tokens."""
    from . import trl_oracle

    errors = Errors()
    for seed, candidates in enumerate(data):
        _, _, lengths, pairs = tensors(candidates)
        if len(pairs):
            generator = torch.Generator().manual_seed(seed)
            shape = 2, len(candidates), int(lengths.max())
            policy, reference = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
            real = torch.arange(shape[2]) < lengths[:, None]
            leaf, reference = (policy * real).requires_grad_(), reference * real
            # TRL counts padding among the common tokens, and relies on its log-probs being 0.
            theirs = trl_oracle.ld_dpo((leaf * real)[pairs], reference[pairs], lengths[pairs], alpha)
            plain = padded([candidates])
            ranked = Ranked(leaf.sum(1)[None], plain.lengths, plain.scores, plain.mask, reference.sum(1)[None])
            ranked = replace(ranked, token_logps=leaf[None], ref_token_logps=reference[None])
            errors.add(LOSSES[name].function(ranked, alpha=alpha).squeeze(0), theirs, leaf)
    return errors.row(name, f"TRL DPOTrainer `{setting}`, from tokens", {"alpha": alpha}, CLOSE)


def trl_comparisons() -> list[partial[Row]]:
    """Everything that TRL implements, each to be handed to :func:`run_trl`; listing them does not import TRL."""
    from .online import ONLINE, online_row

    several, pairs = [c for c in lists() if len(c) > 1], [random_list(2, seed) for seed in range(4)]
    return [
        *(partial(dpo_row, *spec, several) for spec in DPO_LISTS),
        *(partial(dpo_row, *spec, pairs) for spec in DPO_PAIRS),
        *(partial(ld_row, "ld_dpo", "ld_alpha", alpha, several) for alpha in (0.3, 0.0, 1.0)),
        *(partial(kto_row, *spec) for spec in KTO),
        *(partial(logps_row, *spec) for spec in LOGPS),
        *(partial(logits_row, *spec) for spec in LOGITS),
        *(partial(online_row, *spec, several) for spec in ONLINE),
    ]


def run_trl(comparison: partial[Row]) -> Row:
    """One comparison with TRL's own casts and constants kept in double precision."""
    from . import trl_oracle

    with trl_oracle.double_precision():
        return comparison()
