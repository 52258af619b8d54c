"""The language-model head without logits: log p(label) per position, with an online log-sum-exp over vocabulary tiles.

log p(y | h) = z_y - log sum_v exp z_v, where z = scale * (W h + b), or cap * tanh(scale * (W h + b) / cap) with a
soft-cap. Only a (positions, vocabulary) block of z lives at a time; backward computes it again from the stored
largest logit and sum, with dz_v = g * (1[v = y] - softmax(z)_v). Sums run in fp32, or fp64 for fp64 weights.

Whether that is what a model computes is tried on a few states, once a model. Where it is not, the model's own forward
makes the logits of a chunk of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rankalign.errors import InputError
from rankalign.rows import gemm, head_liger, head_wide
from rankalign.rows.own import own_logits

TILE = 4096  # vocabulary entries of a block
CHUNK = 1024  # positions of a block
_KNOWN = "_rankalign_head_is_whole"
_LARGE = 60.0  # logits at which the soft-caps of published models (15 to 30) bend them by half


@dataclass(frozen=True)
class Head:
    """What stands between the last hidden state and the logits.

    Attributes:
        weight: (vocabulary, hidden).
        bias: (vocabulary,) or None.
        scale: factor on the logits.
        cap: soft-cap on the scaled logits, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary with their weights in the given type."""
        for start in range(0, len(self.weight), TILE):
            at = slice(start, min(start + TILE, len(self.weight)))
            yield at, self.weight[at].to(dtype)

    def logits(self, hidden: Tensor, tile: Tensor, at: slice) -> Tensor:
        """(positions, tile) logits, fp32 or wider."""
        logits = gemm.product(hidden, tile.t())
        if self.bias is not None:
            logits += self.bias[at]
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def pull_back(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of W h + b given that of the logits, in place."""
        if self.cap is not None:
            grad *= 1 - (logits / self.cap).square_()
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


@dataclass(frozen=True)
class OwnHead:
    """The way of a model that does something else to its hidden states, or more to its logits.

    Attributes:
        model: the causal language model.
        weight: (vocabulary, ...) of its output layer.
        scale: factor on its logits.
    """

    model: Any
    weight: Tensor
    scale: float = 1.0
    cap: None = None

    def label_logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(positions,) log-probabilities of labels, fp32 or wider."""
        logits = own_logits(self.model, hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        logps = (logits.to(wide) * self.scale).log_softmax(-1)
        return logps.gather(1, labels[:, None]).squeeze(1)


def head_of(model: Any) -> Head | OwnHead:
    """The head of a causal language model.

    Raises:
        InputError: the head is no plain linear layer, for example because it has LoRA weights.
    """
    layer = head_layer(model)
    head = Head(layer.weight, layer.bias, *_scale_and_cap(model.config.get_text_config()))
    return head if _is_whole(model, head) else OwnHead(model, layer.weight)


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    """Factor and soft-cap on the logits, under the names that families give them."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return scale, next((cap for cap in caps if cap), None)


def _is_whole(model: Any, head: Head) -> bool:
    """Whether the head is all that the model does to its last hidden states; tried once and kept with the model."""
    known: bool | None = vars(model).get(_KNOWN)
    if known is not None:
        return known
    sharded = (
        type(head.weight) not in (Tensor, nn.Parameter) or hasattr(head.weight, "ds_id") or not head.weight.numel()
    )
    if sharded or head.weight.device.type == "meta":  # tried before it was sharded, or there is nothing to try
        return True
    known = _agrees(model, head)
    setattr(model, _KNOWN, known)
    return known


@torch.no_grad()
def _agrees(model: Any, head: Head) -> bool:
    """Compare on states so large that a soft-cap of any size shows."""
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    states = torch.randn(3, head.weight.shape[1], generator=torch.Generator().manual_seed(1), dtype=wide)
    states = states.to(head.weight.device)
    with torch.autocast(states.device.type, enabled=False):
        bare = states @ head.weight.to(wide).t()
        states = (states * (_LARGE / bare.abs().max())).to(head.weight.dtype)
        ours = head.logits(states.to(wide), head.weight.to(wide), slice(None))
        try:
            theirs = own_logits(model, states).to(wide)
        except (RuntimeError, IndexError):  # what it does first needs states of another width
            return False
    if ours.shape != theirs.shape:
        return False
    rounding = 1e-3 if head.weight.element_size() > 2 else 3e-2
    return bool((ours - theirs).abs().max() <= rounding * ours.abs().max())


def head_layer(model: Any) -> nn.Linear:
    """The layer that :func:`head_of` reads; raises as it does."""
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # PEFT trains a copy of the whole head
        on = not layer.disable_adapters and layer.active_adapters
        layer = layer.modules_to_save[layer.active_adapters[0]] if on else layer.original_module
    if hasattr(layer, "base_layer"):
        raise InputError(
            "the language-model head carries an adapter, which the chunked head cannot apply; "
            "leave it out of target_modules, or train it whole with modules_to_save"
        )
    if not isinstance(layer, nn.Linear):
        raise InputError(f"the language-model head is a {type(layer).__name__}; only linear heads are supported")
    return layer


def label_logps(
    head: Head | OwnHead, hidden: Tensor, labels: Tensor, on_grad: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Log-probability of each label, without ever holding the logits of all positions.

    Args:
        head: the language-model head.
        hidden: (positions, hidden) last hidden states.
        labels: (positions,) int64.
        on_grad: called with the (positions,) gradient when backward reaches it, before anything below runs.

    Returns:
        (positions,) in nats, fp32 or wider.
    """
    if isinstance(head, Head):
        if hidden.device.type == "cuda":
            kernel = head_liger if head_liger.chosen else head_wide
            return kernel.label_logps(head, hidden, labels, on_grad)
        return _label_logps(hidden, head.weight, head.bias, labels, head, on_grad)
    run = partial(checkpoint, head.label_logps, use_reentrant=False, preserve_rng_state=False)
    logps = torch.cat([run(h, y) for h, y in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True)])
    if on_grad is not None and logps.requires_grad:
        logps.register_hook(on_grad)  # type: ignore[no-untyped-call]
    return logps


class _LabelLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head, on_grad: Any
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            pieces = zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True)
            chunks = zip(*(_forward_chunk(head, h, y) for h, y in pieces), strict=True)
            own, top, total = (torch.cat(part) for part in chunks)
        ctx.save_for_backward(hidden, weight, bias, labels, top, total)
        ctx.scale, ctx.cap, ctx.on_grad = head.scale, head.cap, on_grad
        return (own - top) - total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, top, total = ctx.saved_tensors
        if ctx.on_grad is not None:
            ctx.on_grad(grad)
        rows = grad.nonzero().squeeze(1)  # positions with a zero gradient cost nothing
        head = Head(weight, bias, ctx.scale, ctx.cap)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Grads(hidden[rows], head, grad[rows], total[rows], ctx.needs_input_grad)
            grads.run(head, labels[rows], top[rows])
        grad_hidden = torch.zeros_like(hidden)
        if grads.hidden is not None:
            grad_hidden[rows] = grads.hidden.to(hidden.dtype)
        return grad_hidden, grads.weight, grads.bias, None, None, None


_label_logps: Callable[..., Tensor] = _LabelLogps.apply


def _forward_chunk(head: Head, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(positions,) logit of the label, largest logit, and sum of exp(logit - largest) over the vocabulary."""
    narrow, wide = operand_types(hidden, head.weight)
    hidden = hidden.to(narrow)
    top = torch.full(labels.shape, -torch.inf, dtype=wide, device=hidden.device)
    own, total = torch.empty_like(top), torch.zeros_like(top)
    for at, tile in head.tiles(narrow):
        logits = head.logits(hidden, tile, at)
        rows, columns = _labels_in(labels, at)
        own[rows] = logits[rows, columns]
        last, top = top, torch.maximum(top, logits.amax(1))
        total = total * (last - top).exp_() + logits.sub_(top[:, None]).exp_().sum(1)
    return own, top, total


class _Grads:
    """Gradients of hidden states, weight and bias, those that are needed.

    With s = exp(z - top) - total * 1[label], pulled back through soft-cap and scale, and f = -g / total, they are
    f * (s W), s^T (f * h) and s^T f. In half precision, whose range s may leave, s is divided by total and f is -g.
    """

    def __init__(self, hidden: Tensor, head: Head, grad: Tensor, total: Tensor, needed: tuple[bool, ...]) -> None:
        self.narrow, self.wide = operand_types(hidden, head.weight)
        self.x, self.total, self.half = hidden.to(self.narrow), total[:, None], self.narrow != self.wide
        self.factor = -grad[:, None] if self.half else -grad[:, None] / self.total
        self.hidden = torch.zeros_like(hidden, dtype=self.wide) if needed[0] else None
        self.weight = torch.empty_like(head.weight) if needed[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=self.wide) if needed[2] and head.bias is not None else None

    def run(self, head: Head, labels: Tensor, top: Tensor) -> None:
        """Go over the vocabulary once; a tile's weight gradient is summed in the wide type before it is stored."""
        scaled = (self.x * self.factor).to(self.narrow)
        parts = [slice(start, start + CHUNK) for start in range(0, len(labels), CHUNK)]
        for at, tile in head.tiles(self.narrow):
            total: Tensor | None = None
            for part in parts:
                surplus = self._surplus(head, tile, at, part, labels[part], top[part])
                if self.bias is not None:
                    self.bias[at] += (surplus.t() @ self.factor[part]).squeeze(1)
                surplus = surplus.to(self.narrow)
                if self.weight is not None:
                    product = gemm.product(surplus.t(), scaled[part])
                    total = product if total is None else total.add_(product)
                if self.hidden is not None:
                    self.hidden[part] += gemm.product(surplus, tile)
            if self.weight is not None:
                self.weight[at] = 0 if total is None else total
        if self.hidden is not None:
            self.hidden *= self.factor

    def _surplus(self, head: Head, tile: Tensor, at: slice, part: slice, labels: Tensor, top: Tensor) -> Tensor:
        """(positions, tile) unnormalised probability less that of the label, pulled back to W h + b."""
        logits = head.logits(self.x[part], tile, at)
        surplus = logits.sub_(top[:, None]) if head.cap is None else logits - top[:, None]
        surplus.exp_()
        rows, columns = _labels_in(labels, at)
        surplus[rows, columns] -= self.total[part][rows].squeeze(1)
        return head.pull_back(surplus.div_(self.total[part]) if self.half else surplus, logits)


def _labels_in(labels: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """Rows whose label lies in the tile, and its column there."""
    rows = ((labels >= at.start) & (labels < at.stop)).nonzero().squeeze(1)
    return rows, labels[rows] - at.start


def operand_types(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The type of a product's operands and of its sums. Half-precision units are used where they sum in fp32."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    half = next((t.dtype for t in (hidden, weight) if t.is_cuda and t.element_size() == 2), wide)
    return half, wide
