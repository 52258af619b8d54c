"""Whether a run fits on a card that is not here: the step on tensors that say they lie on it, with its own kernels."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from rankalign.data.encode import TokenList
from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.training.arguments import TrainConfig
from rankalign.training.inputs import fits_again
from rankalign.training.moving import copies
from rankalign.training.plan.cards import CONTEXT, SPLIT
from rankalign.training.plan.memory import MemoryLedger, build, make_fake, prepare, run_backward
from rankalign.training.plan.pretend import GPU, pretended

SHARDING = ("none", "ddp", "zero2", "fsdp2", "zero3")
DEPTHS = (4, 6)  # deeper stacks of equal layers are foreseen from these two: even, as windows may alternate
STEP = 256  # tokens to which a token budget is rounded


@dataclass(frozen=True)
class Setup:
    """Where a run is to go.

    Attributes:
        room: bytes of one card.
        devices: how many there are.
        sharding: what they share, of ``SHARDING``.
        offload: whether what is sharded waits in the memory of the host.
        vllm: share of each card that vLLM takes beside the training.
    """

    room: int
    devices: int = 1
    sharding: str = "none"
    offload: bool = False
    vllm: float = 0.0

    def __post_init__(self) -> None:
        if self.sharding not in SHARDING:
            said = did_you_mean(self.sharding, SHARDING)
            raise InputError(f"unknown --sharding {self.sharding!r}{said} (one of: {', '.join(SHARDING)})")
        if self.devices < 1 or (self.devices == 1 and self.sharding != "none"):
            raise InputError(f"--sharding {self.sharding} needs --devices of at least 2, found {self.devices}")
        if self.offload and not self.spreads:
            raise InputError("--offload needs --sharding zero2, fsdp2 or zero3")
        if not 0 <= self.vllm < 1:
            raise InputError(f"--vllm_share is a share of the card, from 0 to below 1, found {self.vllm}")

    @property
    def spreads(self) -> bool:
        """Whether weights, or what belongs to them, are spread over the cards."""
        return self.sharding in ("zero2", "fsdp2", "zero3")

    @property
    def gathers(self) -> bool:
        """Whether weights are spread, and come together a layer at a time."""
        return self.sharding in ("fsdp2", "zero3")

    @property
    def shares(self) -> dict[str, float]:
        """Of the bytes of a model traced in bfloat16, with states of that type, what a card holds; where nothing is
        sharded, of what is traced.

        FSDP2 keeps float32 weights, gradients and states; DeepSpeed keeps bfloat16 weights and gradients, and
        float32 weights beside the states.
        """
        part = 1 / self.devices
        kept = 0.0 if self.offload else part
        return {
            "none": {},
            "ddp": {"gradients": 2.0},  # its buckets are a second copy
            "zero2": {"gradients": kept, "optimiser": 3 * kept},
            "fsdp2": {"weights": 2 * kept, "gradients": 2 * kept, "optimiser": 2 * kept},
            "zero3": {"weights": kept, "gradients": kept, "optimiser": 3 * kept},
        }[self.sharding]


# --- the step ----------------------------------------------------------------------------------------------------


def stretches(
    config: TrainConfig, part: Sequence[TokenList], setup: Setup, again: bool = False, two_pass: bool = False
) -> dict[str, Counter[str]]:
    """Bytes of one card by what they are, at the highest point of each stretch of two updates.

    Args:
        config: the run.
        part: lists that run at once, in tree rows.
        setup: where.
        again: whether an update has more parts, whose backward meets the gradients of the first.
        two_pass: whether their backward runs in two passes.
    """
    whole = build(config.model_settings, False, "bfloat16" if config.dtype == "bfloat16" else "float32")
    depth = whole.config.get_text_config().num_hidden_layers
    reference = reference_bytes(config, whole, setup)

    def run(layers: int) -> dict[str, Counter[str]]:
        return _trace(config, part, setup, again, two_pass, layers)

    if depth <= DEPTHS[1]:
        found = run(depth)
    else:
        few, more = map(run, DEPTHS)
        # Of each stretch by itself, since another one may be the highest in a deeper model.
        found = {stretch: _further(few[stretch], more[stretch], depth) for stretch in more}
    for items in found.values():
        items["reference"] = reference
        items.update({"split": int(items.total() * SPLIT), "context": CONTEXT})
    return found


def reference_bytes(config: TrainConfig, model: nn.Module, setup: Setup | None = None) -> int:
    """What the reference takes beside the model that trains: a second copy of the weights, or of one that moves its
    copies of what trains, in float32; arguments as in :func:`has_second_copy`."""
    if moving := copies(config.loss_settings):
        return 4 * moving * sum(p.numel() for p in model.parameters() if p.requires_grad)
    beside = has_second_copy(config, model, setup)
    return sum(p.numel() * p.element_size() for p in model.parameters()) if beside else 0


def has_second_copy(config: TrainConfig, model: nn.Module, setup: Setup | None = None) -> bool:
    """Whether the start model lies beside the one that trains from the second update on, for references.

    Args:
        config: the run.
        model: with all its layers, in the type that trains.
        setup: cards that need not be here; None for this machine.
    """
    if config.method == "rank" and config.loss_entry.needs_kls:  # the reference runs beside the policy in any case
        return not config.use_lora
    if config.method != "rank" or not config.loss_entry.needs_reference or config.references == "before":
        return False
    if config.use_lora or (setup is not None and setup.spreads):
        return False
    return config.references == "ahead" or fits_again(model, setup.room if setup else 0)


def _further(few: Counter[str], more: Counter[str], depth: int) -> Counter[str]:
    """The straight line through two depths, at a third."""
    steps = (depth - DEPTHS[1]) / (DEPTHS[1] - DEPTHS[0])
    return Counter({k: max(int(more[k] + (more[k] - few[k]) * steps), 0) for k in {*few, *more}})


def _trace(
    config: TrainConfig, part: Sequence[TokenList], setup: Setup, again: bool, two_pass: bool, layers: int
) -> dict[str, Counter[str]]:
    """Bytes by what they are at the highest point of each stretch of two updates."""
    settings = config.model_settings
    # As training chooses on a GPU, which need not be here; shards are counted from 16 bits, see Setup.shares.
    light = setup.spreads or config.dtype == "bfloat16" or (settings.use_lora and config.dtype == "auto")
    model = build(settings, config.method == "reward", "bfloat16" if light else "float32", layers)
    if settings.quantised:
        _quantise(model, settings.quantised)
    ledger = MemoryLedger(None, setup.shares)
    whole = _whole_at_once(model) if setup.gathers else {}

    def enter(stretch: str) -> None:
        ledger.stretch = stretch
        ledger.now["gathered"] = whole.get(stretch.split(", ")[-1], 0)
        ledger.look()  # an update in place makes nothing that would be noted

    numbers = copy.copy(config)
    numbers.bf16, numbers.fp16 = not config.fp16, config.fp16
    with FakeTensorMode(allow_non_fake_inputs=True), pretended(), ledger:
        make_fake(model, GPU)
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.note(tensor, "weights")
        _prepare(model, config, ledger, enter)
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(_plain_optimiser(config), model)
        optimiser = kind([p for p in model.parameters() if p.requires_grad], **keywords)
        for update in ("first", "second"):
            for _ in range(2 if again else 1):
                enter(f"{update}, forward")
                run_backward(model, numbers, part, "tree", two_pass, ledger, "cuda")
            ledger.label = "optimiser"
            enter(f"{update}, optimiser")
            optimiser.step()
            optimiser.zero_grad()
    if "8bit" in str(config.optim):  # a byte a state in the place of four, and a float32 a block of 256
        for found in ledger.peaks.values():
            found["optimiser"] = int(found["optimiser"] * (1 + 4 / 256) / 4)
    return ledger.peaks


def _prepare(model: Any, config: TrainConfig, ledger: MemoryLedger, enter: Callable[[str], None]) -> None:
    """As for training; and the ledger is told where in a step it is and which gradients are there."""
    told = copy.copy(config)
    # No random state is kept, for there is none to ask for; it has no bytes to speak of.
    told.gradient_checkpointing_kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    prepare(model, told)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.note(p.grad, "gradients"))
    stack = layers_of(model)

    def on_the_way_back(layer: nn.Module, stretch: str) -> None:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            states = out[0] if isinstance(out, tuple) else out
            if states.requires_grad:
                states.register_hook(lambda _: enter(stretch))

        layer.register_forward_hook(hook)

    # Hooks of a module run in order: the last layer's end begins the head, both ways.
    on_the_way_back(stack[-1], "upper layers back")
    on_the_way_back(stack[len(stack) // 2 - 1], "lower layers back")
    stack[-1].register_forward_hook(lambda *_: enter("head") if not ledger.stretch.endswith("back") else None)


def layers_of(model: Any) -> list[nn.Module]:
    """The stack of equal layers."""
    count = model.config.get_text_config().num_hidden_layers
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count))


def _plain_optimiser(config: TrainConfig) -> TrainConfig:
    """The settings, with torch's AdamW for what needs a library's own kernels; its states are reckoned down after."""
    if "8bit" not in str(config.optim):
        return config
    plain = copy.copy(config)
    plain.optim = "adamw_torch"
    return plain


def _whole_at_once(model: Any) -> dict[str, int]:
    """Bytes in bfloat16 of weights that are whole while a stretch runs, and of gradients before they are shared out.

    FSDP2 keeps embeddings and head whole from forward to backward. Beside them are the layer that runs and the next
    one on its way, each in what was received and in the weights that are made of it; while the head runs one layer; in
    backward three copies, and the gradients of a layer.
    """
    first, *_ = stack = layers_of(model)
    layer = sum(p.numel() for p in first.parameters())
    training = sum(p.numel() for p in first.parameters() if p.requires_grad)
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for m in stack for p in m.parameters())
    back = 2 * (outside + 3 * layer + training)
    found = {"forward": 2 * (outside + 4 * layer), "head": 2 * (outside + layer)}
    return {**found, "upper layers back": back, "lower layers back": back}


# --- 4 and 8 bits ------------------------------------------------------------------------------------------------


class _Packed(nn.Module):
    """A frozen linear layer in few bits, unpacked to 16 while it multiplies, as bitsandbytes does."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        numbers = layer.weight.numel()
        # nf4 has a byte for 64 scales and a float32 for 256 of those; 8 bits have a float32 a row.
        size = numbers // 2 + numbers // 64 + numbers // 4096 if bits == 4 else numbers + 4 * layer.out_features
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b."""
        return _unpacked_product(x, self.weight, self.bias, self.out_features)


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        ctx.packed, ctx.rows, ctx.width, ctx.dtype = packed, rows, x.shape[-1], x.dtype
        weight = packed.new_empty(rows, x.shape[-1], dtype=torch.bfloat16)
        return nn.functional.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.packed.new_empty(ctx.rows, ctx.width, dtype=torch.bfloat16)
        return (grad.to(weight.dtype) @ weight).to(ctx.dtype), None, None, None


_unpacked_product: Callable[..., Tensor] = _UnpackedProduct.apply


def _quantise(model: Any, bits: int) -> None:
    """Pack what the adapters stand on: every linear layer but the head."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            module.base_layer = _Packed(base, bits)


# --- does it fit -------------------------------------------------------------------------------------------------


def fit_on_card(
    config: TrainConfig,
    part: Sequence[TokenList],
    setup: Setup,
    again: bool,
    two_pass: bool,
    size: Callable[[Any], int],
) -> dict[str, Any]:
    """Peak, whether it fits, and the largest token budget that does.

    Args:
        config: the run.
        part: the lists that run at once.
        setup: where.
        again: as in :func:`stretches`.
        two_pass: as in :func:`stretches`.
        size: tokens of lists.
    """
    found, twice = (stretches(config, some, setup, again, two_pass) for some in (part, [*part, *part]))
    items = max(found.values(), key=Counter.total)
    peak, room, tokens = items.total(), int(setup.room * (1 - setup.vllm)), size(part)
    # Each stretch grows by its own number of bytes a token, and the first to be full decides.
    growth = {name: (twice[name].total() - found[name].total()) / tokens for name in found}
    most = [tokens + (room - found[name].total()) / each for name, each in growth.items() if each > 0]
    fixed = max((found[name].total() for name, each in growth.items() if each <= 0), default=0)
    largest = int(min(most, default=tokens)) // STEP * STEP if fixed <= room else 0
    return {
        "peak_memory_bytes": peak,
        "memory": dict(+items),
        "room_bytes": room,
        "fits": peak <= room,
        "tokens_at_once": tokens,
        "largest_token_budget": max(largest, 0),
    }


def made_up(prompt: int, response: int, candidates: int, prompts: int) -> list[TokenList]:
    """Lists of these many tokens, where there is no data."""
    return [
        TokenList(
            f"list-{i}",
            [0] * prompt,
            [[0] * response for _ in range(candidates)],
            [float(n) for n in range(candidates)],
        )
        for i in range(prompts)
    ]
