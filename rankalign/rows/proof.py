"""The proof that a make of models gives on tree rows what it gives on padded ones, before one of them may have them.

Which layers only look where the trees say is not known by name. It is tried: a small model of the same make (see
:mod:`rankalign.rows.shrink`) runs lists both ways in float64, and hidden states and the gradient of every weight must
be the same. The lists have several prompts, several answers, answers of one token, texts within windows and beyond;
some answers have no gradient; one list runs again with its prompt run before. A convolution along the row, a recurrent
state, positions counted along the row, chunks, a mask or a choice of keys of a layer's own all fail here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, overrides
from torch.utils._python_dispatch import _disable_current_modes

from rankalign.rows.attention import UnknownAttention
from rankalign.rows.shrink import WORDS, TooLarge, build, few_layers, small_configs
from rankalign.rows.tree import Prefix, Rows, branch_row, padded_rows, tree_row
from rankalign.rows.trunk import ATTENTION, MASK, NEITHER, run_trunk
from rankalign.rows.wide import in_float64

# Largest relative difference that is rounding: parts that a model computes in float32 whatever it is given.
ROUNDING = 1e-5
_PROMPTS, _ANSWERS = (9, 1, 4), ((5, 3, 8, 3, 1, 3), (3, 1), (7, 2, 2))
_FLAT = ((0, 1), (2, 2))  # answers without a gradient


@dataclass(frozen=True)
class Verdict:
    """What is known of a make of models.

    Attributes:
        way: how its layers hear of trees, ``trunk.NEITHER`` where they cannot.
        reason: why not, in words.
        keeps_prefix: whether a prompt's keys may be kept for answers that run later.
    """

    way: str
    reason: str = ""
    keeps_prefix: bool = False


def prove(kind: Any, config: Any) -> Verdict:
    """Try tree rows on a small model.

    Args:
        kind: class of the trunk.
        config: what trunks of the model are made of; stays as it is.
    """
    verdict = Verdict(NEITHER, "no small copy of it can be made")
    with _by_itself():
        for small in small_configs(config):
            try:
                model = build(kind, few_layers(kind, small))
                run = _Run(model)
                run.expect()
            except TooLarge as error:
                return Verdict(NEITHER, f"not proven, {error}")
            except Exception as error:  # whatever a configuration of our making runs into
                verdict = Verdict(NEITHER, f"not proven, a small copy fails: {_short(error)}")
                continue
            return run.verdict()
    return verdict


class _Run:
    """A small model, its lists, and what it makes of them on padded rows."""

    def __init__(self, model: Any) -> None:
        draw = torch.Generator().manual_seed(5)
        lengths = [*_PROMPTS, *(n for row in _ANSWERS for n in row)]
        words = min(WORDS, model.config.get_text_config().vocab_size)
        texts = iter([torch.randint(3, words, (n,), generator=draw).tolist() for n in lengths])
        self.model, self.kernel = model, model.config._attn_implementation
        self.prompts = [next(texts) for _ in _PROMPTS]
        self.answers = [[next(texts) for _ in row] for row in _ANSWERS]
        labels = sum(n for row in _ANSWERS for n in row)
        self.slope = torch.randn(labels, model.config.get_text_config().hidden_size, generator=draw).double()
        at = iter(torch.split(self.slope, lengths[len(_PROMPTS) :]))
        for p, row in enumerate(_ANSWERS):
            for n in range(len(row)):
                part = next(at)
                if (p, n) in _FLAT:
                    part.zero_()

    def expect(self) -> None:
        """Run padded rows.

        Raises:
            ValueError: numbers are not finite.
        """
        with torch.no_grad():
            self.states = self._states(padded_rows(self.prompts, self.answers), NEITHER)
        if not bool(self.states.isfinite().all()):
            raise ValueError("its numbers are not finite")

    def verdict(self) -> Verdict:
        """Tree rows, told of in either way, against these: first values alone, as hybrids are slow to go backward."""
        rows = tree_row(self.prompts, self.answers)
        way, reason = ATTENTION, self._compare(lambda: self._states(rows, ATTENTION), self.states)
        if rows.forest is not None and not rows.forest.attended:
            # Layers that do not call the interface may still read which one is in place.
            self.model.config._attn_implementation = self.kernel
            way, reason = MASK, self._compare(lambda: self._states(rows, MASK), self.states)
        if not reason:
            reason = self._compare_gradients(lambda: self._states(rows, way))
        if reason:
            aside = "its attention does not go through the interface of transformers, " if way == MASK else ""
            return Verdict(NEITHER, aside + reason)
        return Verdict(
            way, keeps_prefix=way == ATTENTION and not self._compare_gradients(self._in_branches, first=True)
        )

    def _compare(self, run: Any, expected: Tensor) -> str:
        """Why states are not what is expected, in words; empty where they are."""
        try:
            with torch.no_grad():
                states = run()
        except UnknownAttention as error:
            return str(error)
        except Exception as error:  # a model that is told of trees may fail in any way
            return f"it fails on them: {_short(error)}"
        apart = float((states.detach() - expected).norm() / expected.norm())
        if apart <= ROUNDING:
            return ""
        return f"on a small copy hidden states differ by {apart:.0e} from those of padded rows"

    def _compare_gradients(self, run: Any, first: bool = False) -> str:
        """The same of states and gradients, of all lists or the first."""
        lists = (self.prompts[:1], self.answers[:1]) if first else (self.prompts, self.answers)
        try:
            expected = self._backward(self._states(padded_rows(*lists), NEITHER))
            states = run()
            found = self._backward(states)
        except Exception as error:
            return f"it fails on them: {_short(error)}"
        if first and (reason := self._compare(lambda: states, self.states[: len(states)])):
            return reason
        floor = 1e-3 * max((float(part.norm()) for part in expected.values()), default=0.0)
        for name, gradient in expected.items():
            apart = float((found[name] - gradient).norm() / gradient.norm().clamp(min=floor))
            if not apart <= ROUNDING:
                return f"on a small copy gradients of {name} differ by {apart:.0e} from those of padded rows"
        return ""

    def _states(self, rows: Rows, way: str) -> Tensor:
        """(labels, hidden) states that predict the labels; in backward the rows know which answers have a gradient."""
        states = run_trunk(self.model, self.model, rows, way).flatten(0, 1).index_select(0, rows.predictors)
        if rows.forest is not None and torch.is_grad_enabled():
            rows.forest.note_gradient(self.slope[: len(states)].any(1))
        return states

    def _in_branches(self) -> Tensor:
        """The first list as two passes run it: one answer beside the prompt, the others after it, two and two, and
        tokens looked up before, of which some families want to know more than what was found."""
        prompt, (one, *others) = self.prompts[0], self.answers[0]
        prefix = Prefix()
        rows = tree_row([prompt], [[one]], record=prefix)
        look_up = self.model.get_input_embeddings()
        states = run_trunk(self.model, self.model, rows, ATTENTION, look_up(rows.ids))[0]
        prefix.end = states[len(prompt) - 1 : len(prompt)]
        found = [states.index_select(0, rows.predictors)]
        for i in range(0, len(others), 2):
            branch = branch_row(len(prompt), others[i : i + 2], prefix)
            own = run_trunk(self.model, self.model, branch, ATTENTION, look_up(branch.ids))[0]
            found.append(torch.cat([prefix.end, own]).index_select(0, branch.predictors))
        return torch.cat(found)

    def _backward(self, states: Tensor) -> dict[str, Tensor]:
        """Gradients of all weights from the slope of these states."""
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(states, self.slope[: len(states)].to(states.dtype))
        named = list(self.model.named_parameters())
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def _short(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:100]}".strip()


@contextmanager
def _by_itself() -> Iterator[None]:
    """On a CPU in float64, with gradients, whatever the caller is in the middle of."""
    stack: Any = overrides
    modes = [stack._pop_mode() for _ in range(stack._len_torch_function_stack())]
    try:
        with ExitStack() as contexts:
            contexts.enter_context(_disable_current_modes())
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(torch.enable_grad())
            contexts.enter_context(torch.autocast("cpu", enabled=False))
            contexts.enter_context(in_float64())
            yield
    finally:
        for mode in reversed(modes):
            stack._push_mode(mode)
