"""Log-probabilities of responses given their prompts, the path every loss, score and perplexity takes.

Prompts and responses go in as token lists; only the positions that predict a response token reach the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.fsdp import FSDPModule

from rankalign.errors import InputError
from rankalign.rows import trunk
from rankalign.rows.experts import balance_of
from rankalign.rows.head import head_layer, head_of
from rankalign.rows.own import replaced_forward, trunk_of
from rankalign.rows.positions import forget_longer, reach
from rankalign.rows.tree import Lists, Rows, Tokens, padded_rows, tree_row
from rankalign.rows.trial import can_be_tried, check_causal, evaluating, try_out
from rankalign.rows.upload import to_device
from rankalign.rows.verdict import verdict_of
from rankalign.rows.whole import NOTHING, Beyond, Reference, label_values
from rankalign.rows.wide import in_float32, rounds_products

LAYOUTS = ("auto", "tree", "padded")

# Largest mean difference of a token's log-prob between two ways to compute it that is rounding and not a mistake.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}

T = TypeVar("T")


Spans = Sequence[Sequence[Sequence[tuple[int, int]]]]
"""For each prompt and each of its responses the spans of tokens, from and up to, that are context and do not count."""


def list_logps(
    model: nn.Module,
    prompts: Sequence[Tokens],
    responses: Lists,
    *,
    layout: str = "auto",
    unlearned: Spans = (),
    tokens: bool = False,
    beyond: Beyond = NOTHING,
) -> Tensor:
    """Sum of the log-probabilities of each response's tokens given its prompt.

    Args:
        model: a causal language model of transformers, bare, inside PEFT or wrapped for distributed training.
        prompts: P prompts as token ids, at least one token each.
        responses: for each prompt its responses as token ids; lists may differ in length.
        layout: how rows are laid out, one of ``LAYOUTS``; ``auto`` is ``tree`` where :func:`supports_tree` says so.
        unlearned: tokens of responses that are read and not counted, see :data:`Spans`; empty counts all.
        tokens: give every counted token's own, and not their sum.
        beyond: what else of each token's distribution is wanted, summed as the log-probabilities are.

    Returns:
        (P, N) in nats, fp32 (fp64 for an fp64 model), 0 where a prompt has fewer than N responses; with ``tokens``
        (P, N, T), 0 where a response has fewer than T counted tokens; with something ``beyond`` one dimension more, the
        log-probabilities first. Differentiable.
    """
    return in_lists(_flat_logps(model, prompts, responses, layout, beyond), responses, unlearned, tokens)


@torch.no_grad()
def reference_at(model: nn.Module, prompts: Sequence[Tokens], responses: Lists, layout: str = "auto") -> Reference:
    """A reference at every response token, in the order of :func:`list_logps`, whose layout must be the same.

    Args:
        model: the reference, in eval mode.
        prompts: as in :func:`list_logps`.
        responses: as in :func:`list_logps`, with a token at least.
        layout: as in :func:`list_logps`.
    """
    lm = causal_lm(model)
    rows = lay_out(lm, prompts, responses, layout)
    assert rows is not None
    return Reference(head_of(lm), inside(model, lambda: label_states(lm, rows)))


def token_logps(
    model: nn.Module, prompts: Sequence[Tokens], responses: Lists, *, layout: str = "auto"
) -> list[list[Tensor]]:
    """Log-probability (nats) of every response token given what stands before it.

    Args:
        model: as in :func:`list_logps`.
        prompts: as in :func:`list_logps`.
        responses: as in :func:`list_logps`.
        layout: as in :func:`list_logps`.

    Returns:
        ``[p][n]`` is a tensor of shape (tokens of response n of prompt p,).
    """
    flat = _flat_logps(model, prompts, responses, layout)
    pieces = iter(torch.split(flat, [len(r) for candidates in responses for r in candidates]))
    return [[next(pieces) for _ in candidates] for candidates in responses]


def in_lists(flat: Tensor, responses: Lists, unlearned: Spans = (), tokens: bool = False) -> Tensor:
    """:func:`sum_responses`, or with ``tokens`` (P, N, T): the values of each response's counted tokens, in order, with
    0 behind them. Several values a token, (all response tokens, C), give (P, N, C) or (P, N, T, C)."""
    if not tokens:
        return sum_responses(flat, responses, unlearned)
    spanned = any(spans for candidates in unlearned for spans in candidates)
    counted = _counted(responses, unlearned) if spanned else torch.ones(len(flat), dtype=torch.bool)
    rows = torch.split(counted, [len(r) for candidates in responses for r in candidates])
    sizes = [int(row.sum()) for row in rows]
    width, longest = max((len(candidates) for candidates in responses), default=0), max(sizes, default=0)
    places = [p * width + n for p, candidates in enumerate(responses) for n in range(len(candidates))]
    slots = [place * longest + k for place, size in zip(places, sizes, strict=True) for k in range(size)]
    slot, at = to_device(flat.device, torch.tensor(slots, dtype=torch.long), counted.nonzero().squeeze(1))
    more = flat.shape[1:]
    spread = flat.new_zeros(len(responses) * width * longest, *more).index_add(0, slot, flat.index_select(0, at))
    return spread.view(len(responses), width, longest, *more)


def sum_responses(flat: Tensor, responses: Lists, unlearned: Spans = ()) -> Tensor:
    """(P, N) sums over the tokens of each response, of (all response tokens,) values list after list; those in the
    spans ``unlearned`` are left out, and so is their gradient."""
    if any(spans for candidates in unlearned for spans in candidates):
        counted = _counted(responses, unlearned).to(flat.device)
        flat = torch.where(counted if flat.dim() == 1 else counted[:, None], flat, flat.new_zeros(()))
    width = max((len(candidates) for candidates in responses), default=0)
    slots = [p * width + n for p, candidates in enumerate(responses) for n, r in enumerate(candidates) for _ in r]
    (slot,) = to_device(flat.device, torch.tensor(slots, dtype=torch.long))
    more = flat.shape[1:]
    sums = flat.new_zeros(len(responses) * width, *more).index_add(0, slot, flat)
    return sums.view(len(responses), width, *more)


def _counted(responses: Lists, unlearned: Spans) -> Tensor:
    """(all response tokens,) whether a token counts. Lists without spans among others that have some count whole."""
    rows = []
    for candidates, spans in zip(responses, unlearned, strict=True):
        for response, holes in zip(candidates, spans or [()] * len(candidates), strict=True):
            row = torch.ones(len(response), dtype=torch.bool)
            for start, end in holes:
                row[start:end] = False
            rows.append(row)
    return torch.cat(rows)


# --- layouts -----------------------------------------------------------------------------------------------------


def supports_tree(model: nn.Module) -> bool:
    """Whether tree rows are proven exact for models of this configuration, see :mod:`rankalign.rows.proof`."""
    return bool(verdict_of(causal_lm(model)).way)


def why_padded(model: nn.Module) -> str:
    """Why a model cannot have tree rows, in words; empty where it can."""
    lm = causal_lm(model)
    verdict = verdict_of(lm)
    return "" if verdict.way else f"no tree rows for this {lm.config.model_type} model: {verdict.reason}"


def choose_layout(model: nn.Module, prompts: Sequence[Tokens], responses: Lists) -> tuple[str, str]:
    """Decide how to lay out rows by computing these lists both ways, without gradients.

    Args:
        model: as in :func:`list_logps`.
        prompts: a first batch.
        responses: its responses.

    Returns:
        ``"tree"`` or ``"padded"``, and the reason in words.

    Raises:
        InputError: the model's own logits give other log-probs than rankalign computes.
    """
    lm = causal_lm(model)
    with torch.no_grad(), evaluating(lm):
        padded = _flat_logps(model, prompts, responses, "padded")
        if not can_be_tried(lm) and not any(isinstance(w, FakeTensor) or w.is_meta for w in lm.parameters()):
            # Weights are spread: all processes come here together, after a run of the whole model. FSDP2 may hold its
            # last norm and its head as one, which then must run as one.
            check_causal(lm, lambda some: lm(input_ids=some, use_cache=False).logits, TOLERANCE[precision(lm)])
        _check_head(lm, prompts, responses)
        if not supports_tree(model):
            return "padded", why_padded(lm)
        tree = _flat_logps(model, prompts, responses, "tree")
        tolerance = TOLERANCE[precision(lm)]
        if precision(lm).itemsize == 2:  # twice what padded rows, which are plain transformers, lose by it themselves
            with in_float32(lm):
                exact = _flat_logps(model, prompts, responses, "padded")
            lost = float((padded - exact).abs().mean()) if len(exact) else 0.0
            tolerance = max(2 * lost, TOLERANCE[torch.float32])
    difference = float((tree - padded).abs().mean()) if len(tree) else 0.0
    verdict = f"the first batch's packed and padded log-probs differ by {difference:.1e} a token"
    if difference <= tolerance:
        return "tree", f"{verdict} (up to {tolerance:.0e} is rounding)"
    return "padded", f"{verdict}, more than the {tolerance:.0e} of rounding"


def _check_head(lm: Any, prompts: Sequence[Tokens], responses: Lists) -> None:
    """Compare with the model's own logits on the shortest response, in case it does to them what we do not know."""
    pairs = [(p, r) for p, candidates in zip(prompts, responses, strict=True) for r in candidates if len(r)]
    if not pairs:
        return
    prompt, response = min(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    with as_exact_as_can_be(lm) as kind:
        ours = _flat_logps(lm, [prompt], [[response]], "padded")
        ids = torch.tensor([[*prompt, *response]], device=ours.device)
        logits = lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].to(ours.dtype)
    theirs = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    if bool(theirs.isfinite().all()) and not float((ours - theirs).abs().mean()) <= TOLERANCE[kind]:
        raise InputError(f"{lm.config.model_type} models change their logits in a way that rankalign does not know")


def precision(model: nn.Module) -> torch.dtype:
    """The type the model computes in: autocast's where it is on, else that of its weights; float16 stands for TF32."""
    lm = causal_lm(model)
    device = lm.device.type
    kind: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm.dtype
    return torch.float16 if kind == torch.float32 and rounds_products(lm.device) else kind


@contextmanager
def as_exact_as_can_be(lm: Any) -> Iterator[torch.dtype]:
    """The type a model computes in here: float32 where training runs in 16 bits, whose rounding would hide a mistake.

    Kernels for 4 and 8 bits know no float32; such models stay as they are.
    """
    kind = precision(lm)
    if kind.itemsize > 2 or getattr(lm, "is_quantized", False):
        yield kind
        return
    with in_float32(lm):
        yield torch.float32


# --- the forward pass --------------------------------------------------------------------------------------------


def causal_lm(model: Any) -> Any:
    """The transformers model inside wrappers for distributed training and PEFT.

    Raises:
        InputError: a PEFT method that adds virtual tokens, which the rows do not carry.
    """
    model = _unwrapped(model)
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise InputError("prompt and prefix tuning are not supported; use LoRA or another method that changes weights")
    return model.get_base_model()


def _flat_logps(
    model: nn.Module, prompts: Sequence[Tokens], responses: Lists, layout: str, beyond: Beyond = NOTHING
) -> Tensor:
    """(all response tokens,) log-probs, list after list; with something ``beyond`` (all response tokens, C)."""
    lm = causal_lm(model)
    own = reach(lm)
    if own is not None and _longest(prompts, responses) > own and sum(map(len, responses)) > 1:
        pairs = [(p, r) for p, candidates in zip(prompts, responses, strict=True) for r in candidates]
        if beyond.reference is not None:
            raise InputError(f"beyond {own} tokens this {lm.config.model_type} model runs answers alone, without KLs")
        return torch.cat([_flat_logps(model, [p], [[r]], "padded", beyond) for p, r in pairs])
    rows = lay_out(lm, prompts, responses, layout)
    # The balance of experts is a matter of all tokens, of answers without a gradient of their own too.
    note = rows.forest.note_gradient if rows and rows.forest and not balance_of(lm) else None

    def compute() -> Tensor:
        layer = head_layer(lm)
        if rows is None:
            shape = (0, beyond.columns) if beyond else (0,)
            return torch.zeros(shape, dtype=torch.promote_types(layer.weight.dtype, torch.float32), device=lm.device)
        there = on_device(lm, rows)
        states = label_states(lm, there)
        return as_forward(layer, lambda some: label_values(head_of(lm), some, there.labels, beyond, note), states)

    return inside(model, compute)


def check_request(lm: Any, prompts: Sequence[Tokens], layout: str) -> None:
    """Refuse what no rows can be made of.

    Raises:
        InputError: an unknown layout, or tree rows for a model that cannot.
        ValueError: an empty prompt.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r} (one of: {', '.join(LAYOUTS)})")
    if layout == "tree" and not supports_tree(lm):
        raise InputError(f"{why_padded(lm)}; use layout 'padded'")
    if not all(len(p) for p in prompts):
        raise ValueError("every prompt needs at least one token to predict the first token of a response")


def lay_out(lm: Any, prompts: Sequence[Tokens], responses: Lists, layout: str) -> Rows | None:
    """Rows of one of ``LAYOUTS``, or None where no response has a token."""
    check_request(lm, prompts, layout)
    try_out(lm, TOLERANCE[precision(lm)])
    if not any(len(r) for candidates in responses for r in candidates):
        return None
    own = reach(lm)
    if own is not None:
        forget_longer(lm)
        if _longest(prompts, responses) > own:
            return _alone(lm, prompts, responses, own)
    tree = layout == "tree" or (layout == "auto" and supports_tree(lm))
    if not tree:
        return padded_rows(prompts, responses)
    # A GPU's ragged kernels want all prompts in front; on a CPU lists stay together, as its caches like them.
    return tree_row(prompts, responses, prompts_first=lm.device.type == "cuda")


def _alone(lm: Any, prompts: Sequence[Tokens], responses: Lists, own: int) -> Rows:
    """The row of one response, its last token included, since the positions turn by the length of the whole text.

    Raises:
        InputError: there is more than one.
    """
    if sum(map(len, responses)) > 1:
        raise InputError(
            f"beyond {own} tokens this {lm.config.model_type} model turns its positions by the longest text of a "
            f"batch: no two may run together here, so keep to --max_length {own}"
        )
    whole = [token for text in (*prompts, *(r for rs in responses for r in rs)) for token in text]
    return replace(padded_rows(prompts, responses), ids=torch.tensor([whole]), positions=torch.arange(len(whole))[None])


def _longest(prompts: Sequence[Tokens], responses: Lists) -> int:
    """Tokens of the longest prompt with a response."""
    return max((len(p) + len(r) for p, rs in zip(prompts, responses, strict=True) for r in rs), default=0)


def on_device(lm: Any, rows: Rows) -> Rows:
    """The rows where the model lies, with all that its layers will ask of them, in one copy."""
    return trunk.on_device(lm, rows, verdict_of(lm).way)


def label_states(lm: Any, rows: Rows, embeddings: Tensor | None = None) -> Tensor:
    """(labels, hidden) last hidden states that predict the rows' labels; arguments as in :func:`hidden_states`."""
    rows = on_device(lm, rows)
    prefix = rows.forest.prefix if rows.forest else None
    states = [prefix.end] if prefix and prefix.end is not None else []
    if rows.ids.numel():  # responses of one token add nothing to their prompt
        states.append(hidden_states(lm, rows, embeddings).flatten(0, 1))
    return torch.cat(states).index_select(0, rows.predictors)


def hidden_states(lm: Any, rows: Rows, embeddings: Tensor | None = None) -> Tensor:
    """(rows, tokens, hidden) last hidden states of a transformers model.

    Args:
        lm: the model.
        rows: its input.
        embeddings: (rows, tokens, hidden) of the input tokens, where they have been looked up before.
    """
    listener, rows = balance_of(lm), on_device(lm, rows)
    with listener.listen(rows) if listener else nullcontext():
        return trunk.run_trunk(lm, trunk_of(lm), rows, verdict_of(lm).way, embeddings)


def _unwrapped(model: Any) -> Any:
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def inside(model: nn.Module, compute: Callable[[], T]) -> T:
    """Run ``compute`` as if it were the model's forward, so that wrappers synchronise gradients and gather weights."""
    inner = _unwrapped(model)
    if inner is model and not isinstance(model, FSDPModule):
        return compute()
    with replaced_forward(inner, lambda *_, **__: compute()):
        # Not without an argument: where DDP knows its device, as on GPUs, it moves inputs there and takes the first.
        result: T = model(None)
    return result


def as_forward(layer: Any, compute: Callable[[Tensor], T], states: Tensor) -> T:
    """Run ``compute(states)`` as the forward of one layer, whose weights are then whole wherever they are sharded."""
    with replaced_forward(layer, compute):
        result: T = layer(states)
    return result
