"""Every ranking loss, a pure function ``loss(ranked, **keywords) -> (P,)``: one value a prompt, no cross-prompt terms.

The keywords are the config. A list in which no candidate beats another gives exactly 0, value and gradient, in every
rank term; entries outside the mask have no influence, whatever they hold. Adding a loss takes the function, a line in
:data:`LOSSES`, and a case in the parity suite, which refuses a loss without one.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rankalign.losses.core import Loss, Summed
from rankalign.losses.listwise import lambdaloss, listmle, listnet, nca, plackett_luce, pro, raft, sft
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
from rankalign.losses.reference_free import alphapo, cpo, orpo, ranknet, rrhf, simpo, slic_hf

LOSSES: dict[str, Loss] = {
    "rrhf": Loss(rrhf),
    "slic_hf": Loss(slic_hf),
    "orpo": Loss(orpo),
    "cpo": Loss(cpo),
    "simpo": Loss(simpo),
    "alphapo": Loss(alphapo),
    "ranknet": Loss(ranknet),
    "dpo": Loss(dpo, needs_reference=True),
    "sigmoid_norm": Loss(sigmoid_norm, needs_reference=True),
    "ipo": Loss(ipo, needs_reference=True),
    "robust": Loss(robust, needs_reference=True),
    "hinge": Loss(hinge, needs_reference=True),
    "exo": Loss(exo, needs_reference=True),
    "sppo": Loss(sppo, needs_reference=True),
    "apo_zero": Loss(apo_zero, needs_reference=True),
    "apo_down": Loss(apo_down, needs_reference=True),
    "bco": Loss(bco, needs_reference=True),
    "discopop": Loss(discopop, needs_reference=True),
    "aot": Loss(aot, needs_reference=True),
    "aot_unpaired": Loss(aot_unpaired, needs_reference=True),
    "kto": Loss(kto, needs_reference=True),
    "plackett_luce": Loss(plackett_luce, needs_reference=True),
    "lambdaloss": Loss(lambdaloss, needs_reference=True),
    "nca": Loss(nca, needs_reference=True),
    "pro": Loss(pro),
    "listnet": Loss(listnet),
    "listmle": Loss(listmle),
    "raft": Loss(raft, alone=True),
    "sft": Loss(sft, alone=True),
}

PARTS: dict[str, Callable[..., dict[str, Tensor]]] = {
    name: loss.function.parts for name, loss in LOSSES.items() if isinstance(loss.function, Summed)
}

__all__ = ["LOSSES", "PARTS", "Loss", *LOSSES]
