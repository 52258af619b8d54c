"""A few tokens through a model, to see that it is one whose log-probabilities rows can give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from rankalign.errors import InputError
from rankalign.rows.head import head_of, label_logps
from rankalign.rows.own import trunk_of

_TRIED = "_rankalign_tried"


@torch.no_grad()
def try_out(lm: Any, tolerance: float) -> None:
    """Run a few tokens, once a model, to see that it is one whose log-probs rows can give, whatever their layout.

    Args:
        lm: the transformers model.
        tolerance: mean difference of a log-probability, or of a state's size, that is rounding.

    Raises:
        InputError: its logits depend on later tokens, or are made of something else than its last hidden states.
    """
    if vars(lm).get(_TRIED) or not can_be_tried(lm):
        return
    with evaluating(lm):
        ids, states = check_causal(
            lm, lambda some: trunk_of(lm)(input_ids=some, use_cache=False).last_hidden_state, tolerance
        )
        # Damaged weights say nothing of how a model is made; a loss that is not finite is named with its prompt.
        if not bool(states.isfinite().all()):
            return
        if not _is_head_known(lm, states[0, :-1], ids, tolerance):
            raise InputError(f"{lm.config.model_type} models change their logits in a way that rankalign does not know")
    setattr(lm, _TRIED, True)


def check_causal(lm: Any, run: Callable[[Tensor], Tensor], tolerance: float) -> tuple[Tensor, Tensor]:
    """Run five tokens: their ids (1, T), and what ``run`` makes of them (1, T, ...).

    Raises:
        InputError: what is made of a token depends on later ones.
    """
    vocabulary, kind = lm.config.get_text_config().vocab_size, lm.config.model_type
    ids = torch.tensor([[1 + (vocabulary - 2) * i // 4 for i in range(5)]], device=lm.device)
    states, early = (run(some) for some in (ids, ids[:, :3]))
    apart = float((states[:, :3] - early).abs().mean() / early.abs().mean())
    if bool(states.isfinite().all()) and not apart <= tolerance:
        raise InputError(
            f"the tokens of this {kind} model see what follows them, so it has no log-probs of answers: load a "
            "causal model (of an encoder: is_decoder in its config.json)"
        )
    return ids, states


def _is_head_known(lm: Any, states: Tensor, ids: Tensor, tolerance: float) -> bool:
    """Whether log-probs of ``ids`` (1, T) from the (T - 1, hidden) states before them are those of its logits."""
    head = lm.get_output_embeddings()
    if head is None or hasattr(head, "base_layer"):  # a classifier, or an adapter that head_of refuses by name
        return True
    try:
        ours = label_logps(head_of(lm), states, ids[0, 1:])
    except (RuntimeError, IndexError):  # the model takes more from its trunk than the last hidden states
        return False
    logits = lm(input_ids=ids, use_cache=False).logits[0, :-1].to(ours.dtype)
    theirs = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    damaged = not bool(theirs.isfinite().all())
    return damaged or float((ours - theirs).abs().mean()) <= tolerance


def can_be_tried(lm: Any) -> bool:
    """Whether its weights are here: those of sharded models were before they were sharded, a plan's never are."""
    elsewhere = (DTensor, FakeTensor)
    return not any(isinstance(w, elsewhere) or hasattr(w, "ds_id") or w.is_meta for w in lm.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode in this context, module by module as it was after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
