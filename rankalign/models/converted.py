"""Weights that transformers joins, splits or renames between a model's files and the model, such as experts.

A file has a tensor an expert, the model one for all of a layer. :class:`Conversion` does with transformers' own
transforms what its loading and saving do, but one group of tensors at a time and none before it is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankalign.models import weights

_TYPES = {name: dtype for dtype, name in weights.DTYPES.items()}


def transforms_of(model: Any) -> list[Any]:
    """What transformers does to the weights of a family's files; nothing for most families. To be asked before FSDP2
    has given the model a class of its own."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, add_legacy=False))


@dataclass
class _Group:
    """Tensors that become others together.

    Attributes:
        name: the first of those that they become.
        transform: how.
        parts: pattern and name of each, in order.
    """

    name: str
    transform: Any
    parts: list[tuple[str, str]] = field(default_factory=list)


class Conversion:
    """From a set of tensors to those that they become, a group at a time.

    Args:
        model: bare, whose family's transforms they are.
        transforms: of :func:`transforms_of`.
        outlines: what there is, on the meta device.
        read: gives a tensor by its name.
        back: from the model to its files.

    Attributes:
        outlines: what it becomes, on the meta device.
    """

    def __init__(
        self,
        model: Any,
        transforms: Iterable[Any],
        outlines: Mapping[str, Tensor],
        read: Callable[[str], Tensor],
        back: bool = False,
    ) -> None:
        self._model, self._read, self._back = model, read, back
        self._held: tuple[str, dict[str, Tensor]] = ("", {})  # what was converted last
        self._order(list(transforms))
        self.outlines, self._groups = dict[str, Tensor](), dict[str, _Group]()
        for group in self._grouped(outlines):
            for name, tensor in self._converted(group, outlines.__getitem__).items():
                self.outlines[name], self._groups[name] = tensor, group

    def _order(self, transforms: list[Any]) -> None:
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        if self._back:  # a prefix is left out or put on by how a folder was written, which the model does not know
            kept = [t for t in transforms[::-1] if not isinstance(t, PrefixChange)]
            transforms = [t.reverse_transform() for t in kept]
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if not isinstance(t, WeightRenaming)]

    def _grouped(self, names: Iterable[str]) -> Iterable[_Group]:
        from transformers.core_model_loading import (
            WeightRenaming,
            apply_converters,
            apply_renamings,
            dot_natural_key,
        )

        groups = dict[str, _Group]()
        for name in sorted(names, key=dot_natural_key):  # experts in the order of their numbers
            known = name if self._back else apply_renamings(name, self._renamings)
            new, pattern = apply_converters(known, self._converters)
            if pattern is None:
                new = apply_renamings(name, self._renamings)
                groups[new] = _Group(new, WeightRenaming(name, new), [(name, name)])
                continue
            transform = next(t for t in self._converters if pattern in t.source_patterns)
            groups.setdefault(new, _Group(new, transform)).parts.append((pattern, name))
        return groups.values()

    def _converted(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import apply_renamings

        transform = copy.deepcopy(group.transform)
        for pattern, name in group.parts:
            transform.add_tensor(group.name, name, pattern, read(name))
        made = transform.convert(group.name, model=self._model, config=self._model.config)
        whole = {name: (t[0] if isinstance(t, list) else t).contiguous() for name, t in made.items()}
        if not self._back or group.transform not in self._converters:
            return whole
        return {apply_renamings(name, self._renamings): tensor for name, tensor in whole.items()}

    def sources(self, name: str) -> list[str]:
        """The names of what a tensor is made of."""
        return [part for _, part in self._groups[name].parts]

    def tensor(self, name: str) -> Tensor:
        """One of the tensors; those that come with it are kept until another group is asked for."""
        group = self._groups[name]
        if self._held[0] != group.name:
            self._held = ("", {})  # before the next is made
            self._held = (group.name, self._converted(group, self._read))
        return self._held[1][name]

    def forget(self) -> None:
        """Let go of what was converted last."""
        self._held = ("", {})


class ConvertedBits:
    """One tensor of a :class:`Conversion`, made when it is read; see :class:`rankalign.models.weights.Bits`."""

    def __init__(self, conversion: Conversion, name: str) -> None:
        outline = conversion.outlines[name]
        self.conversion, self.name = conversion, name
        self.dtype, self.shape = weights.DTYPES[outline.dtype], tuple(outline.shape)
        self.size = outline.numel() * outline.element_size()

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``; fewer at the end."""
        return weights.TensorBits(self.conversion.tensor(self.name)).read(offset, count)


def from_files(
    model: Any, transforms: Iterable[Any], stored: Mapping[str, weights.FileBits]
) -> dict[str, weights.Bits]:
    """The tensors of a folder as a model has them: by its names, joined and split.

    Args:
        model: bare.
        transforms: of :func:`transforms_of`.
        stored: what lies in the files.
    """
    outlines = {name: torch.empty(bits.shape, dtype=_TYPES[bits.dtype], device="meta") for name, bits in stored.items()}

    def read(name: str) -> Tensor:
        bits = stored[name]
        whole = torch.empty(bits.shape, dtype=_TYPES[bits.dtype])
        flat = whole.view(-1).view(torch.uint8)
        for at in range(0, bits.size, weights.BLOCK):
            block = bits.read(at, weights.BLOCK)
            flat[at : at + len(block)] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        return whole

    conversion = Conversion(model, transforms, outlines, read)
    return {
        name: stored[conversion.sources(name)[0]] if _as_it_is(conversion, name) else ConvertedBits(conversion, name)
        for name in conversion.outlines
    }


def _as_it_is(conversion: Conversion, name: str) -> bool:
    from transformers.core_model_loading import WeightRenaming

    return isinstance(conversion._groups[name].transform, WeightRenaming)
