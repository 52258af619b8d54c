"""A reference that follows the policy: TR-DPO's hard and soft updates, exponential means, and BEMA.

Every so many updates it becomes ``alpha * policy + (1 - alpha) * reference`` (Gorbatovski et al. 2024, Learn Your
Reference Model, arXiv:2404.09656: hard with alpha 1, soft below). With a small alpha at every update it is an
exponential mean. BEMA (Block and Zhang 2025, arXiv:2508.00180) takes the bias out of such a mean:
``reference = (rho + t)^-eta * (policy - start) + mean``, where the mean moves by (rho + t)^-kappa.

What is kept is a copy of the weights that train, all of them or the adapter's, and never a second model: the reference
is the model itself with those weights for a while. An adapter's two factors are mixed each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import TrainerCallback

from rankalign.errors import InputError
from rankalign.storage.files import atomic_writer
from rankalign.training.settings import LossSettings

FILE = "reference.safetensors"
LAG, EMA_POWER, BIAS_POWER = 10, 0.5, 0.2  # BEMA's rho, kappa and eta, as its authors and TRL have them


class MovingReference(TrainerCallback):
    """The reference of a run whose reference moves; see :class:`rankalign.training.ahead.Beside`.

    Args:
        settings: ``ref_model_mixup_alpha``, ``ref_model_sync_steps`` and ``ref_model_bema`` are read.

    Attributes:
        resume_from: the checkpoint that the run goes on from.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.alpha, self.every = settings.ref_model_mixup_alpha, settings.ref_model_sync_steps
        self.bema = settings.ref_model_bema
        self.resume_from: str | None = None
        self.weights: dict[str, Tensor] = {}  # in float32 or wider: a mean in 16 bits would not move
        self.start: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}

    @contextmanager
    def beside(self, model: Any, untouched: bool = False) -> Iterator[Any]:
        """The reference, in eval mode, for as long as the context lasts: ``model`` with other weights."""
        training, own = model.training, {name: weight.data for name, weight in _trained(model).items()}
        try:
            model.eval()
            if not untouched:
                for name, weight in _trained(model).items():
                    weight.data = self.weights[name].to(weight.dtype) if self.weights else weight.data
            yield model
        finally:
            for name, weight in _trained(model).items():
                weight.data = own[name]
            model.train(training)

    def forget(self) -> None:
        """Nothing: what it holds is nowhere else."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The start weights, or what the checkpoint holds.

        Raises:
            InputError: it holds none.
        """
        self.weights = {name: _wide(weight) for name, weight in _trained(model).items()}
        if self.bema:
            self.start, self.mean = ({n: w.clone() for n, w in self.weights.items()} for _ in range(2))
        if state.global_step:
            self._load(Path(str(self.resume_from)) / FILE)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Move, where it is time."""
        if state.global_step % self.every:
            return
        for name, weight in _trained(model).items():
            policy = weight.data.to(self.weights[name].dtype)
            if self.bema:
                age = LAG + state.global_step
                self.mean[name].lerp_(policy, age**-EMA_POWER)
                self.weights[name] = self.mean[name] + age**-BIAS_POWER * (policy - self.start[name])
            else:
                self.weights[name].lerp_(policy, self.alpha)

    def save(self, folder: Path) -> None:
        """Put it into a checkpoint, with what it moves by."""
        held = {"weights": self.weights, "start": self.start, "mean": self.mean}
        flat = {f"{kind}.{name}": t.contiguous() for kind, tensors in held.items() for name, t in tensors.items()}
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_writer(folder / FILE) as out:
            out.write(to_bytes(flat))

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path} is gone, without which the reference of this run is not known; --overwrite")
        found = load_file(path)
        for kind, tensors in (("weights", self.weights), ("start", self.start), ("mean", self.mean)):
            for name in tensors:
                tensors[name] = found[f"{kind}.{name}"].to(tensors[name])


def copies(settings: LossSettings) -> int:
    """How many copies of the weights that train, in float32, a moving reference holds; 0 for one that stays."""
    return (3 if settings.ref_model_bema else 1) if settings.sync_ref_model else 0


def _trained(model: Any) -> dict[str, Any]:
    """The weights that train, by name, inside a wrapper for several processes or not."""
    inner = model.module if hasattr(model, "module") else model
    return {name: weight for name, weight in inner.named_parameters() if weight.requires_grad}


def _wide(weight: Tensor) -> Tensor:
    """A copy in float32 or wider."""
    return weight.data.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
