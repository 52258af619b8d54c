"""Reward heads without their trunk, for hidden states that something else computes, such as a server.

Read from the reward model's own folder, or from one with its config, its tokenizer and the head's tensors alone; of
shards that hold the trunk only the names are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from rankalign.errors import InputError
from rankalign.models import reward_heads, value_heads, weights
from rankalign.rows import rewards

LINEAR = ("score.weight", "score.bias")
"""The head of transformers' decoders for sequence classification."""


class HeadAlone:
    """A head that computes on the CPU, in float64.

    Attributes:
        hidden: numbers in a state, H.
        names: of its outputs, O of them.
        weights: 64 hex digits over its tensors, see :func:`rankalign.models.weights.fingerprint`.
        config: the folder's, with ``rankalign_pooling`` where the head is not gated.
    """

    def __init__(
        self, module: nn.Module, hidden: int, names: list[str], tensors: dict[str, Tensor], config: Any = None
    ) -> None:
        self._module, self.hidden, self.names, self.config = module.double().eval(), hidden, names, config
        self.weights = weights.fingerprint({n: weights.line(weights.TensorBits(t)) for n, t in tensors.items()})

    @property
    def pooling(self) -> str:
        """Where it reads its one state, one of :data:`rankalign.rows.rewards.POOLINGS`; empty for gates."""
        return "" if isinstance(self._module, reward_heads.GatedHead) else rewards.pooling_of(self.config)

    def places(self, ids: list[int]) -> list[int]:
        """Indices of the P tokens of a text whose states it reads, the last of them first.

        Raises:
            InputError: a gate finds no assistant's turn.
        """
        if isinstance(self._module, reward_heads.GatedHead):
            return self._module.places(ids)
        pad = rewards.pad_of(self.config)
        return [next((i for i in range(len(ids) - 1, 0, -1) if ids[i] != pad), 0)]

    @torch.inference_mode()
    def outputs(self, states: Tensor) -> list[float]:
        """The O outputs of the states (P, H) at :meth:`places`."""
        wide = states.double()[None]
        gated = isinstance(self._module, reward_heads.GatedHead)
        found: list[float] = self._module(wide if gated else wide[:, 0])[0].tolist()
        return found


def read(folder: str, tokenizer: PreTrainedTokenizerBase, outputs: int = 1, pooling: str = "") -> HeadAlone:
    """The head of a folder.

    Args:
        folder: config and weights.
        tokenizer: the folder's.
        outputs: of a gated head, 1 for the reward and 0 for the objectives; others have what they have.
        pooling: where a head without a gate reads, one of :data:`rankalign.rows.rewards.POOLINGS`; empty is what the
            config says.

    Raises:
        InputError: there is no head of a known kind, it is not as published, or takes a mean over tokens.
    """
    if reward_heads.is_gated(folder):
        if pooling:
            raise InputError(f"model {folder}: a gate reads two places of its own, and takes no pooling")
        tensors = _tensors(folder, reward_heads.is_of_head)
        gated = reward_heads.read(folder, tensors, tokenizer, outputs)
        return HeadAlone(gated, gated.regression.shape[1], reward_heads.names_of(folder, gated), tensors)
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    module: nn.Module
    if tensors := _tensors(folder, lambda name: "v_head." in name):
        module = value_heads.head_of(folder, tensors)
        if value_heads.reads_last(config, module):
            config.rankalign_pooling = rewards.LAST
    elif tensors := _tensors(folder, lambda name: name in LINEAR):
        module = _linear(folder, tensors)
    else:
        raise InputError(
            f"model {folder}: holds no head that reads states of tokens: no score.weight of a sequence classifier, no "
            "v_head, and its architecture is none of those with a gate"
        )
    sizes = [layer.weight.shape for layer in module.modules() if isinstance(layer, nn.Linear)]
    config.rankalign_pooling = pooling or rewards.pooling_of(config)
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if rewards.pooling_of(config) == rewards.MEAN:
        raise InputError(f"model {folder}: takes the mean over all tokens, for which kind reward_model has the means")
    if config.num_labels != sizes[-1][0]:
        config.num_labels = sizes[-1][0]
    names = [str(config.id2label[i]) for i in range(sizes[-1][0])]
    return HeadAlone(module, sizes[0][1], names, tensors, config)


def _linear(folder: str, tensors: dict[str, Tensor]) -> nn.Linear:
    weight = tensors.get("score.weight")
    if weight is None or weight.ndim != 2:
        raise InputError(f"model {folder}: its head has no score.weight (outputs, hidden)")
    layer = nn.Linear(weight.shape[1], len(weight), bias="score.bias" in tensors, dtype=weight.dtype)
    try:
        layer.load_state_dict({name.removeprefix("score."): tensor for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise InputError(f"model {folder}: score: {' '.join(str(error).split())[:300]}") from None
    return layer


def _tensors(folder: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of those names; no other is read from safetensors."""
    found: dict[str, Tensor] = {}
    if not any(Path(folder).glob("*.safetensors")):
        for file in value_heads.files(Path(folder)):
            found |= {name: tensor for name, tensor in value_heads.tensors_of(file).items() if wanted(name)}
        return found
    for file in weights.weight_files(folder):
        weights.read_header(file)  # says what is wrong with a damaged one
        with safe_open(file, "pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys() if wanted(name)}  # noqa: SIM118
    return found
