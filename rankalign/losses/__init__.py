"""Every ranking loss, a pure function ``loss(ranked, **keywords) -> (P,)``: one value a prompt, no cross-prompt terms.

The keywords are the config; ``nll_weight`` and ``nll_reduction`` of :class:`rankalign.losses.core.WithNLL` are every
registered loss's, and :mod:`rankalign.losses.mixtures` adds losses up. A list in which no candidate beats another gives
exactly 0, value and gradient, in every rank term; entries outside the mask have no influence, whatever they hold.
Adding a loss takes the function, its name among those of its kin below, and a case in the parity suite, which refuses a
loss without one.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rankalign.losses.core import Loss, WithNLL
from rankalign.losses.distributions import tdpo1, tdpo2, wpo_aligned
from rankalign.losses.listwise import lambdaloss, listmle, listnet, nca, plackett_luce, pro, raft, sft
from rankalign.losses.offsets import alpha_dpo, chi_po, dpo_shift, dpop, mappo, odpo, r_dpo
from rankalign.losses.policy_gradient import dr_grpo, grpo, gspo, rloo, rloo_clipped, rloo_kl
from rankalign.losses.reference import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco,
    discopop,
    dpo,
    exo,
    hinge,
    ipo,
    kto,
    robust,
    sigmoid_norm,
    sppo,
)
from rankalign.losses.reference_free import alphapo, cpo, orpo, ranknet, rrhf, simper, simpo, slic_hf
from rankalign.losses.reference_listwise import (
    approx_ndcg,
    diff_ndcg,
    exo_list,
    infonca,
    neural_ndcg,
    softmax_dpo,
    swepo,
)
from rankalign.losses.regression import a_star_po, cal_dpo, point_mse, point_sigmoid, rebel, reward_rpo
from rankalign.losses.self_play import nash_md, xpo
from rankalign.losses.targets import gamma_dpo, gamma_simpo
from rankalign.losses.tokens import ld_dpo, sampo
from rankalign.losses.weighted import beta_dpo, dr_dpo, focal_dpo, wpo

_PAIRS = (rrhf, slic_hf, orpo, cpo, simpo, gamma_simpo, alphapo, simper, ranknet)
_LOG_RATIOS = (dpo, sigmoid_norm, ipo, robust, hinge, exo, sppo, apo_zero, apo_down, bco, discopop)
_QUANTILES_AND_BASELINES = (aot, aot_unpaired, kto)
_OFFSETS = (gamma_dpo, odpo, dpop, r_dpo, dpo_shift, mappo, alpha_dpo, chi_po)
_TOKENS = (ld_dpo, sampo)
_WEIGHTED = (focal_dpo, dr_dpo, wpo, beta_dpo)
_REGRESSIONS = (rebel, reward_rpo, cal_dpo, a_star_po, point_mse, point_sigmoid)
_NDCGS = (approx_ndcg, neural_ndcg, diff_ndcg)
_LISTS_OF_LOG_RATIOS = (plackett_luce, softmax_dpo, lambdaloss, *_NDCGS, nca, infonca, swepo, exo_list)
_LISTS = (pro, listnet, listmle)


def _register(functions: tuple[Callable[..., Tensor], ...], reference: bool, **more: bool) -> dict[str, Loss]:
    return {f.__name__: Loss(WithNLL(f), needs_reference=reference, **more) for f in functions}


LOSSES: dict[str, Loss] = {
    **_register(_PAIRS, reference=False),
    **_register(_LOG_RATIOS, reference=True),
    **_register(_QUANTILES_AND_BASELINES, reference=True),
    **_register(_OFFSETS, reference=True),
    **_register(_TOKENS, reference=True, needs_tokens=True),
    **_register((tdpo1, tdpo2), reference=True, needs_kls=True),
    **_register(_WEIGHTED, reference=True),
    **_register((wpo_aligned,), reference=True, needs_squares=True),
    **_register(_REGRESSIONS, reference=True),
    **_register(_LISTS_OF_LOG_RATIOS, reference=True),
    **_register(_LISTS, reference=False),
    **_register((rloo, grpo, dr_grpo), reference=False),
    **_register((rloo_kl, rloo_clipped, gspo), reference=True),
    **_register((xpo, nash_md), reference=True, needs_own=True),
    **_register((raft, sft), reference=False, alone=True),
}

PARTS: dict[str, Callable[..., dict[str, Tensor]]] = {name: loss.parts for name, loss in LOSSES.items()}
"""The terms of each loss before their weights; none where it is one term and ``nll_weight`` is 0."""

__all__ = ["LOSSES", "PARTS", "Loss", *LOSSES]
