"""How much memory a training step takes, by running it on tensors that have shapes and no numbers.

The step is the trainer's own code (tree rows, chunked head, two passes, checkpointing, optimiser), run under torch's
``FakeTensorMode``. What lives when is therefore read off the program, tensor by tensor, and not put into formulas.

On a CPU the process holds more than its tensors: glibc keeps freed blocks, and asks for more than a block of the same
size when it aligns a new one, so holes stay empty. :class:`Heap` follows its rules as training sets them
(:mod:`rankalign.training.heap`), which hands holes back once they have grown by so much.
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from rankalign.data.encode import TokenList
from rankalign.errors import InputError
from rankalign.models import adapters
from rankalign.models import load as models
from rankalign.rows.head import head_of, label_logps
from rankalign.rows.logps import causal_lm, label_states, lay_out
from rankalign.rows.rewards import list_rewards
from rankalign.rows.two_pass import backward_two_pass
from rankalign.training import heap
from rankalign.training.arguments import TrainConfig
from rankalign.training.inputs import disable_dropout
from rankalign.training.plan.cards import shape
from rankalign.training.plan.pretend import asked_by_torch
from rankalign.training.reward import freeze_lower
from rankalign.training.settings import ModelSettings

ALIGN = 64  # bytes, of torch's tensors on a CPU
BY_PAGES = 2 << 20  # bytes from which on they are aligned to pages, see rankalign.training.heap
PAGE = 4096
SPARE = 32  # what glibc asks for beyond an aligned block, and what aligning takes
CPU = torch.device("cpu")
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Heap:
    """The bytes that glibc's malloc takes: best fit with coalescing, large blocks mapped apart.

    Attributes:
        mapped: bytes of blocks that are mapped on their own, and returned when freed.
        top: end of the heap; what lies below was touched once.
        used: bytes of the blocks below it that are in use.
    """

    def __init__(self) -> None:
        self.mapped, self.top, self.used = 0, 0, 0
        self._free: list[tuple[int, int]] = []  # (size, start), sorted
        self._starts: dict[int, int] = {}  # start -> size of a free block
        self._ends: dict[int, int] = {}  # end -> start of a free block

    @property
    def resident(self) -> int:
        """Bytes that the process holds: what is used, and of the holes no more than are left before they go back."""
        alive = self.mapped + self.used
        return alive + min(self.top - self.used, heap.growth(alive))

    def take(self, size: int) -> tuple[int, int]:
        """Allocate ``size`` bytes; returns the block, ``(-1, size)`` for a mapped one."""
        spare = SPARE + (PAGE if size >= BY_PAGES else ALIGN)
        size = -(-size // 16) * 16 + 16  # chunks are multiples of 16 bytes, with a header
        if size >= heap.MAPPED:
            self.mapped += size
            return -1, size
        self.used += size
        at = bisect_left(self._free, (size + spare, -1))
        if at == len(self._free):
            start = self._ends.get(self.top)
            if start is None:
                start = self.top
            else:
                self._forget(start)
            self.top = max(self.top, start + size)
            return start, size
        found, start = self._free[at]
        self._forget(start)
        self._keep(start + size, found - size)
        return start, size

    def give(self, block: tuple[int, int]) -> None:
        """Free a block; the heap shrinks where enough of its end is free."""
        start, size = block
        if start < 0:
            self.mapped -= size
            return
        self.used -= size
        end = start + size
        if end in self._starts:
            end += self._forget(end)
        if start in self._ends:
            before = self._ends[start]
            self._forget(before)
            start = before
        if end == self.top and end - start > heap.TOP:
            self.top = start
        else:
            self._keep(start, end - start)

    def _keep(self, start: int, size: int) -> None:
        insort(self._free, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _forget(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._free[bisect_left(self._free, (size, start))]
        return size


class MemoryLedger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes when each tensor's storage comes and goes, and what was there at the peak.

    Args:
        within: the heap that holds the tensors; None where nothing is lost between them.
        shares: by label, what this device holds of the bytes that are traced; all of them by default.
    """

    def __init__(self, within: Heap | None, shares: Mapping[str, float] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heap, self.label, self.shares = within, "activations", shares or {}
        self.now: Counter[str] = Counter()  # bytes by label
        self.labels: dict[int, str] = {}
        self.apart = self.peak = 0  # bytes outside the heap; most bytes held so far
        self.at_peak: Counter[str] = Counter()
        self.stretch = ""  # which part of a step runs
        self.peaks: dict[str, Counter[str]] = {}  # what this device held at the highest point of each
        self._sizes: dict[int, int] = {}
        self._blocks: dict[int, tuple[int, int]] = {}
        self._keys: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked, kwargs = asked_by_torch(func, args, kwargs or {})
        if asked:  # before every operation, and makes nothing
            return CPU
        out = _worst(func, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        if self.heap is not None and func in _PRODUCTS:
            self._copies(args[-2:])
        return out

    def _copies(self, operands: Sequence[Any]) -> None:
        """oneDNN copies what it multiplies by into blocks, beside the result, for as long as the product takes."""
        assert self.heap is not None
        for block in [self.heap.take(t.numel() * t.element_size()) for t in operands[1:]]:
            self.heap.give(block)
        self.look()

    def note(self, tensor: Tensor, label: str = "") -> None:
        """Take in a tensor's storage, or give a known one another label. Weights are mapped from their file."""
        storage = tensor.untyped_storage()
        if storage in self._keys:
            if label:
                self._relabel(self._keys[storage], label)
            return
        key = self._keys[storage] = len(self.labels)
        self._sizes[key], self.labels[key] = storage.nbytes(), label or self.label
        self.now[self.labels[key]] += storage.nbytes()
        if self.heap is None or label == "weights":
            self.apart += storage.nbytes()
        else:
            self._blocks[key] = self.heap.take(storage.nbytes())
        weakref.finalize(storage, self._drop, key).atexit = False  # when the process ends nobody asks any more
        self.look()

    def _relabel(self, key: int, label: str) -> None:
        self.now[self.labels[key]] -= self._sizes[key]
        self.now[label] += self._sizes[key]
        self.labels[key] = label

    def look(self) -> None:
        """Whether what is held now is more than ever before."""
        shared = self._shared(self.now) if self.shares or self.stretch else self.now
        held = shared.total() if self.heap is None else self.apart + self.heap.resident
        if self.stretch and held > self.peaks.get(self.stretch, Counter()).total():
            self.peaks[self.stretch] = +shared
        if held > self.peak:
            self.peak, self.at_peak = held, self.now.copy()

    def _shared(self, found: Counter[str]) -> Counter[str]:
        """What of these bytes this device holds."""
        return Counter({label: int(size * self.shares.get(label, 1)) for label, size in found.items()})

    def _drop(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.now[self.labels[key]] -= size
        if self.heap is not None and key in self._blocks:
            self.heap.give(self._blocks.pop(key))
        else:
            self.apart -= size

    def items(self) -> dict[str, int]:
        """Bytes at the peak by label; ``allocator`` is what is held in holes."""
        found = self._shared(+self.at_peak)
        return {**found, "allocator": self.peak - found.total()}


def _worst(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation; where its result depends on numbers that are not there, as if all of them counted."""
    if func is torch.ops.aten._local_scalar_dense.default:
        return True
    if func is torch.ops.aten.nonzero.default:
        return torch.zeros((len(args[0]), args[0].dim()), dtype=torch.long, device=args[0].device)
    return func(*args, **kwargs)


# --- the model ---------------------------------------------------------------------------------------------------


def build(settings: ModelSettings, reward: bool = False, dtype: str = "float32", layers: int = 0) -> Any:
    """The model that training would load, on the meta device: shapes alone, no weights read.

    Args:
        settings: what is trained; ``model`` may be the name of a shape, too.
        reward: with a head that grades.
        dtype: of its weights.
        layers: how many, in the place of all.

    Raises:
        InputError: no configuration of a model is there.
    """
    kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    shapes = shape(settings.model) or _written(settings.model)
    if reward:
        shapes.num_labels = 1
    if layers:
        text = shapes.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    if settings.pooling:
        shapes.rankalign_pooling = settings.pooling
    with torch.device("meta"):
        model = kind.from_config(shapes, dtype=models.DTYPES[dtype])
        if settings.disable_dropout:
            disable_dropout(model)
        if settings.use_lora:
            rank, scale, dropout = settings.lora_r, settings.lora_alpha, settings.lora_dropout
            what = settings.lora_targets, settings.use_dora, settings.lora_parameters
            model = adapters.add_lora(model, rank, scale, dropout, *what)
    if settings.freeze_layers:
        freeze_lower(model, settings.freeze_layers)
    return model


def _written(model: str) -> Any:
    """The configuration in a model's folder."""
    where = models.local_folder(model)
    if not (where / "config.json").is_file():
        raise InputError(f"model {model}: plan needs its config.json, and {where} has none")
    return AutoConfig.from_pretrained(where)


def make_fake(model: nn.Module, device: torch.device = CPU) -> None:
    """Put tensors that claim to lie on a device in the place of those on the meta device; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        tables: Any = (module._parameters, module._buffers)
        for table in tables:
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]


# --- the step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of training.

    Attributes:
        items: by what they are: ``weights``, ``gradients``, ``optimiser``, ``activations``, ``head``, ``allocator``.
    """

    items: dict[str, int]

    @property
    def peak(self) -> int:
        """All of them."""
        return sum(self.items.values())


def trace(config: TrainConfig, part: Sequence[TokenList], layout: str, two_pass: bool, again: bool) -> Footprint:
    """The peak of two updates, the second with the optimiser's states there from its start.

    Args:
        config: the run.
        part: lists that run at once.
        layout: ``tree`` or ``padded``.
        two_pass: whether their backward runs in two passes.
        again: whether an update has more parts, whose backward meets the gradients of the first.
    """
    model = build(config.model_settings, config.method == "reward", config.weights_dtype)
    on_cpu = config.use_cpu or models.device().type == "cpu"
    ledger = MemoryLedger(Heap() if on_cpu and sys.platform == "linux" else None)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        make_fake(model)
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.note(tensor, "weights")
        prepare(model, config)
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(config, model)
        optimiser = kind([p for p in model.parameters() if p.requires_grad], **keywords)
        for _ in range(2):
            for _ in range(2 if again else 1):
                run_backward(model, config, part, layout, two_pass, ledger)
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        ledger.note(parameter.grad, "gradients")
            ledger.label = "optimiser"
            optimiser.step()
            optimiser.zero_grad()
    return Footprint(ledger.items())


def prepare(model: Any, config: TrainConfig) -> None:
    """Training mode, with checkpointing where asked for."""
    model.train()
    if config.gradient_checkpointing:
        kwargs = config.gradient_checkpointing_kwargs or {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def run_backward(
    model: Any,
    config: TrainConfig,
    part: Sequence[TokenList],
    layout: str,
    two_pass: bool,
    ledger: MemoryLedger,
    device: str = "cpu",
) -> None:
    """Forward and backward of a part on a kind of device; arguments as of :func:`trace`."""
    prompts, responses = [t.prompt for t in part], [t.responses for t in part]
    ledger.label = "activations"
    kind = torch.bfloat16 if config.bf16 else torch.float16
    with torch.autocast(device, dtype=kind) if config.bf16 or config.fp16 else nullcontext():
        if two_pass:
            backward_two_pass(model, prompts, responses, Tensor.sum, config.token_budget, layout=layout)
            return
        values = list_rewards if config.method == "reward" else _label_logps(ledger)
        out = values(model, prompts, responses, layout=layout)
    out.sum().backward()  # type: ignore[no-untyped-call]


def _label_logps(ledger: MemoryLedger) -> Callable[..., Tensor]:
    """:func:`rankalign.rows.logps.list_logps`; what its head makes, both ways, stands under the head's name."""

    def values(model: Any, prompts: Any, responses: Any, layout: str) -> Tensor:
        lm = causal_lm(model)
        rows = lay_out(lm, prompts, responses, layout)
        assert rows is not None  # lists without a token take no memory and are never the largest
        states = label_states(lm, rows)
        states.register_hook(lambda _: setattr(ledger, "label", "activations"))  # type: ignore[no-untyped-call]
        ledger.label = "head"
        return label_logps(
            head_of(lm), states, rows.labels.to(lm.device), rows.forest.note_gradient if rows.forest else None
        )

    return values
