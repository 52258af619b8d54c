"""Weights spread over processes, read and written so that no process ever holds a whole model.

A model is outlined first: its layers without weights, on the meta device, or under DeepSpeed's ``zero.Init``, which
gives each process its part of a layer as soon as the layer is made. Once FSDP2 has spread an outline, :func:`fill`
reads each process's own rows, or run of numbers, from the safetensors files. :func:`save` gathers tensor by tensor.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rankalign.errors import InputError
from rankalign.models import converted, weights
from rankalign.storage.files import atomic_writer, write_text

FILE = "5GB"  # most bytes of a file that is written
_TYPES = {name: dtype for dtype, name in weights.DTYPES.items()}
_IN_PEFT, _ADAPTED = "base_model.model.", ".base_layer."

# --- an outline --------------------------------------------------------------------------------------------------


def outline(auto: Any, config: Any, dtype: torch.dtype, zero: Any = None) -> Any:
    """A model of a transformers class without weights; what its layers compute for themselves (buffers) is there.

    Args:
        auto: such as ``AutoModelForCausalLM``.
        config: the model's.
        dtype: of its weights.
        zero: DeepSpeed's configuration, where each process is to have its part by ZeRO-3; None puts all weights on the
            meta device.
    """
    from transformers.initialization import no_init_weights

    with contextlib.ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if zero is None:
            from accelerate import init_empty_weights

            # Not torch.device("meta"), for the rotations of positions are in no file and must be computed.
            stack.enter_context(init_empty_weights(include_buffers=False))
        else:
            import deepspeed
            from transformers.integrations.deepspeed import prevent_arange_dtype_change
            from transformers.modeling_utils import set_zero3_state

            stack.enter_context(prevent_arange_dtype_change())
            # Its type is that of the settings: a ``dtype`` given to it is misread (0.19). Its own product of matrices,
            # which it would put in torch's place for good, saves the plain one nothing.
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=zero, mem_efficient_linear=False))
            stack.enter_context(set_zero3_state())
        model = auto.from_config(config, dtype=dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()] if zero is None else ():
        if set(name.split(".")) & set(model._keep_in_fp32_modules_strict or ()):  # as transformers' loading does
            tensor.data = tensor.data.float()
    model.tie_weights()
    model._weight_conversions = converted.transforms_of(model)  # where transformers keeps those of what it loads
    return model


@contextlib.contextmanager
def nothing_to_meta() -> Iterator[None]:
    """Modules made in this context keep their numbers: peft moves each adapter to where the weights beside it lie."""
    move = nn.Module.to

    def to(self: nn.Module, *words: Any, **more: Any) -> nn.Module:
        return self if torch.device("meta") in words else move(self, *words, **more)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


@contextlib.contextmanager
def lengths_from_files(model: Any, folder: Path) -> Iterator[None]:
    """DoRA, put on an outline in this context, starts from the lengths of the weights in the files: of each layer, the
    weights are read for that moment.

    Args:
        model: an outline, bare.
        folder: with its safetensors.
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    stored, base = _stored(model, folder), _prefix(model)
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    plain = DoraLinearLayer.update_layer

    def update_layer(self: Any, *, base_layer: Any, **more: Any) -> None:
        bits = next(stored[name] for name in _spellings(names[id(base_layer)], base) if name in stored)
        whole, stand_in = torch.empty(bits.shape, dtype=base_layer.weight.dtype), nn.Module()
        _read(bits, _part(whole))
        stand_in.weight = nn.Parameter(whole, requires_grad=False)
        plain(self, base_layer=stand_in, **more)

    DoraLinearLayer.update_layer = update_layer  # type: ignore[method-assign]
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = plain  # type: ignore[method-assign]


def set_aside(model: nn.Module) -> dict[str, Tensor]:
    """Take what an outline has in numbers, its adapters, out of it by name, and leave the meta device in its place."""
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if not parameter.is_meta:
                found[name] = parameter.detach()
                fresh = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                setattr(module, name.rpartition(".")[2], fresh)
    return found


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What a process holds of a tensor: a run of its numbers in row-major order.

    Attributes:
        shape: of the whole tensor.
        start: where the run begins.
        numbers: one-dimensional, in memory.
    """

    shape: tuple[int, ...]
    start: int
    numbers: Tensor


def _shape(tensor: Any) -> tuple[int, ...]:
    """Of the whole tensor."""
    return tuple(tensor.ds_shape if hasattr(tensor, "ds_shape") else tensor.shape)


def _part(tensor: Any) -> _Part:
    shape = _shape(tensor)
    if hasattr(tensor, "ds_tensor"):
        shard = tensor.ds_tensor.data
        start = shard.numel() * torch.distributed.get_rank(tensor.ds_process_group)
        size = max(0, min(shard.numel(), tensor.ds_numel - start))  # the last is filled up with zeros
        return _Part(shape, start, shard.view(-1)[:size])
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
        first, *others = offset
        if any(others):
            raise InputError("weights are spread by columns, which cannot be read shard by shard")
        local: Any = tensor.detach()
        return _Part(shape, first * math.prod(shape[1:]), local.to_local().view(-1))
    return _Part(shape, 0, tensor.detach().view(-1))


def sources(model: Any, where: str, folder: Path, head: Mapping[str, Tensor] | None = None) -> dict[str, weights.Bits]:
    """Where each weight of an outline, and each buffer that is saved, lies in a folder's files.

    Args:
        model: an outline, bare or inside PEFT, whose adapters have numbers already.
        where: its name, for messages.
        folder: with its safetensors.
        head: by name in a bare model, what a head is that the files may lack.

    Raises:
        InputError: a weight is in none of the files, or of another shape.
    """
    stored, found, missing = _stored(model, folder), dict[str, weights.Bits](), list[str]()
    kept = set(model.state_dict())
    named: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if name in kept and (tensor.is_meta or hasattr(tensor, "ds_tensor") or not isinstance(tensor, nn.Parameter)):
            named.setdefault(id(tensor), []).append(name)
    base = _prefix(model)
    for names in named.values():  # tied weights have several, of which a file has one
        spellings = [spelling for name in names for spelling in _spellings(name, base)]
        own = next((spelling for spelling in spellings if spelling in stored), None)
        if own is not None:
            found[names[0]] = stored[own]
        elif spellings[0] not in (head or {}):
            missing.append(spellings[0])
    if missing:
        raise InputError(f"model {where}: is no whole language model, it lacks {', '.join(sorted(missing)[:3])}")
    for name, bits in found.items():
        wanted = _shape(_tensor(model, name))
        if wanted != bits.shape:
            shapes = f"{name} has shape {list(bits.shape)}, and {list(wanted)} is needed"
            raise InputError(f"model {where}: {shapes}")
    return found


def new_head(model: Any, head: Mapping[str, Tensor], found: Mapping[str, weights.Bits]) -> dict[str, Tensor]:
    """The numbers of a ``head``, by name in a bare model, that no file has, by name in an outline, for :func:`fill`."""
    own = {name: _spellings(name, _prefix(model))[0] for name, _ in model.named_parameters()}
    return {name: head[bare] for name, bare in own.items() if bare in head and name not in found}


def _stored(model: Any, folder: Path) -> Mapping[str, weights.Bits]:
    """What lies in a folder, by the names that the family has in memory."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    files = weights.folder_tensors(folder)
    return converted.from_files(inner, inner._weight_conversions, files) if inner._weight_conversions else files


def _prefix(model: Any) -> str:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return f"{inner.base_model_prefix}."


def _spellings(name: str, base: str) -> list[str]:
    """The names under which a weight may be stored: some folders are of the model without its head, and peft keeps a
    head twice, as it was and as it trains."""
    own = name.removeprefix(_IN_PEFT).replace(_ADAPTED, ".")
    own = own.replace(".original_module.", ".").replace(".modules_to_save.default.", ".")
    return [own, own.removeprefix(base)]


def _tensor(model: nn.Module, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)


@torch.no_grad()
def fill(
    model: Any, found: Mapping[str, weights.Bits], aside: Mapping[str, Tensor], device: torch.device | None = None
) -> None:
    """Give a spread outline its numbers: of each tensor a process reads what it holds, 16 MB at a time.

    Args:
        model: spread by FSDP2, on the meta device still, or by ZeRO-3.
        found: of :func:`sources`.
        aside: of :func:`set_aside`.
        device: where FSDP2's shards are to lie; None where they lie there already.
    """
    if device is not None:
        buffers = [(module, name, value) for module in model.modules() for name, value in module._buffers.items()]
        model.to_empty(device=device)
        for module, name, value in buffers:  # which to_empty has emptied as well
            module._buffers[name] = value.to(device) if value is not None else None
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.tie_weights()
    for name, bits in found.items():
        _read(bits, _part(_tensor(model, name)))
    for name, whole in aside.items():
        part = _part(_tensor(model, name))
        part.numbers.copy_(whole.view(-1)[part.start : part.start + part.numbers.numel()])


def _read(bits: weights.Bits, part: _Part) -> None:
    dtype = _TYPES[bits.dtype]
    begin, end = (part.start + at for at in (0, part.numbers.numel()))
    step = weights.BLOCK // dtype.itemsize
    for at in range(begin, end, step):
        count = min(step, end - at)
        block = torch.frombuffer(bytearray(bits.read(at * dtype.itemsize, count * dtype.itemsize)), dtype=dtype)
        part.numbers[at - begin : at - begin + count].copy_(block)


# --- running and writing -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_by_layers(model: nn.Module) -> Iterator[None]:
    """Let a spread model run before there is a trainer: each layer has its weights while it runs.

    FSDP2's layers have them by themselves, and some keep them; ZeRO-3's have them once DeepSpeed's engine holds the
    model. All processes must run it equally often.
    """
    open_ones: dict[nn.Module, Any] = {}
    handles = []

    def before(module: nn.Module, _: Any) -> None:
        import deepspeed

        open_ones[module] = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        open_ones[module].__enter__()

    def after(module: nn.Module, *_: Any) -> None:
        open_ones.pop(module).__exit__(None, None, None)

    for module in model.modules():
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an optimiser would else be given whole weights, which are nobody's soon


def is_spread(model: nn.Module) -> bool:
    """Whether a process holds a part of the weights alone."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def has_masters(model: nn.Module) -> bool:
    """Whether DeepSpeed trains float32 copies, of which the weights are 16-bit shadows."""
    return any(_has_master(p) for p in model.parameters())


def _has_master(tensor: Any) -> bool:
    # ZeRO-3 names the optimiser that holds the copy; ZeRO-1 and 2 put on every weight how to find it.
    low = tensor.dtype in (torch.bfloat16, torch.float16)
    return low and (hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"))


@torch.no_grad()
def save(model: Any, folder: Path, first: bool) -> None:
    """Write a spread model, or its adapter, as transformers or peft does, with one whole tensor in memory at a time.

    Where DeepSpeed trains float32 copies of 16-bit weights, those are written: the shadows lack the digits that small
    updates have moved.

    All processes come here: they gather one tensor after the other, and the first writes it.

    Args:
        model: a transformers model, bare or inside PEFT, without a wrapper of its own.
        folder: is made where it is not there.
        first: whether this process writes.
    """
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "get_base_model"):
        _save_adapter(model, folder, first)
    else:
        _save_whole(model, folder, first)


def _save_adapter(model: Any, folder: Path, first: bool) -> None:
    from peft import get_peft_model_state_dict

    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = {id(t) for t in get_peft_model_state_dict(model, state_dict=state).values()}
    whole = {name: full for name, p in state.items() if id(p) in chosen and (full := collected(p, first)) is not None}
    if first:
        model.save_pretrained(folder, state_dict=whole)


def _save_whole(model: Any, folder: Path, first: bool) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    state, seen = dict[str, Any](), set[int]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # tied weights are saved once, under their first name
            seen.add(id(tensor))
            state[name.replace("_checkpoint_wrapped_module.", "")] = tensor
    outlines = {name: _outline(t) for name, t in state.items()}
    transforms = getattr(model, "_weight_conversions", None) or ()
    # The others gather with the first, and convert what is nothing to them.
    files = converted.Conversion(model, transforms, outlines, lambda name: _gathered(state[name], first), back=True)
    plan: Any = split_torch_state_dict_into_shards(files.outlines, max_shard_size=FILE)
    for file, names in plan.filename_to_tensors.items():
        with atomic_writer(folder / file) if first else contextlib.nullcontext() as out:
            if out is not None:
                out.write(_header({name: files.outlines[name] for name in names}))
            for name in names:
                whole = files.tensor(name)
                if out is not None:
                    out.writelines(weights.blocks(weights.TensorBits(whole)))
    if first:
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        _save_config(model, folder)


def _outline(tensor: Any) -> Tensor:
    dtype = torch.float32 if _has_master(tensor) else tensor.dtype
    return torch.empty(_shape(tensor), dtype=dtype, device="meta")


def _gathered(tensor: Any, first: bool) -> Tensor:
    """The whole tensor in the first process, its outline in the others; all take part."""
    whole = collected(tensor, first)
    return _outline(tensor) if whole is None else whole


def _header(outlines: Mapping[str, Tensor]) -> bytes:
    """The head of a safetensors file, so long that the first tensor stands at a multiple of 8 bytes."""
    told = {
        name: (weights.DTYPES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for name, t in outlines.items()
    }
    return weights.header(told, room=-(-len(weights.header(told)) // 8) * 8)


def _save_config(model: Any, folder: Path) -> None:
    # FSDP2 puts a class of its own on top, under a name that nobody could load.
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if has_masters(model):
        model.config.dtype = torch.float32  # which whoever loads the folder reads its weights as
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def collected(tensor: Any, first: bool) -> Tensor | None:
    """The whole tensor in the first process's memory, with all the digits that training has of it; all take part."""
    if _has_master(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(tensor)
        return master.detach().cpu().clone() if first else None
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone() if first else None
    full = tensor.detach()
    full = full.full_tensor() if isinstance(full, DTensor) else full
    return full.cpu().contiguous() if first else None
