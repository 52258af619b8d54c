"""Reward models with a gate, ArmoRM and QRM: read from safetensors into classes of ours, no code of theirs runs.

Of h, the last token's state, and p, the state where the last assistant's turn begins (Wang et al. 2024,
arXiv:2406.12845, and its ``modeling_custom.py``; QRM, Dorka 2024, arXiv:2409.10164, and its own):

* objectives r = ``regression_layer`` h; of QRM, the mean over each objective's quantiles (rows o Q to o Q + Q - 1);
* weights g = ``logit_scale`` softmax(``gating``(p) / temperature), ReLU between its layers, in QRM batch norms too;
* reward = sum over o of g_o (r M)_o, with ``reward_transform_matrix`` M.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase

from rankalign.errors import InputError
from rankalign.models.weights import weight_files

GATED = {
    "LlamaForRewardModelWithGating": "ArmoRM",
    "LlamaForRewardModelWithGating3": "QRM on Llama 3",
    "LlamaForRewardModelWithGating31": "QRM on Llama 3.1",
}
"""What is read here, by the first of a config's ``architectures``."""
TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
"""The gate reads the state at the first token of its last occurrence: the end of the user's turn."""
TEMPERATURE = 10.0
HEAD = ("regression_layer.weight", "reward_transform_matrix", "gating.logit_scale")
"""The head's tensors, beside those of ``gating.layers``."""
# ArmoRM's objectives in the order of its outputs, as they are published with it.
OBJECTIVES = (
    *(f"helpsteer-{name}" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")),
    *(
        f"ultrafeedback-{n}"
        for n in ("overall_score", "instruction_following", "truthfulness", "honesty", "helpfulness")
    ),
    *("beavertails-is_safe", "prometheus-score", "argilla-overall_quality", "argilla-judge_lm"),
    *(f"code-{name}" for name in ("complexity", "style", "explanation", "instruction-following", "readability")),
)


class GatedHead(nn.Module):
    """Objectives and gate, in float64 whatever the type of the states: a reward is a sum whose terms may cancel, and in
    float32 that alone moved one of -0.002 under objectives of 8 by 7e-7.

    Args:
        head: tensors ``regression_layer.weight`` (O Q, H), ``reward_transform_matrix`` (O, O), ``gating.*``.
        turn: token ids of :data:`TURN`.
        objectives: outputs are the O objectives, ArmoRM's as the head gives them and QRM's times the matrix, as theirs
            are; else the one reward.
        temperature: of the gate's softmax.
    """

    regression: Tensor
    matrix: Tensor
    scale: Tensor

    def __init__(self, head: dict[str, Tensor], turn: list[int], objectives: bool, temperature: float) -> None:
        super().__init__()
        self.turn, self.objectives, self.temperature = turn, objectives, temperature
        wide = {n: t if n.endswith("num_batches_tracked") else t.double() for n, t in head.items()}
        self.gating = _gate({n.removeprefix("gating.layers."): t for n, t in wide.items() if "gating.layers." in n})
        self.register_buffer("regression", wide["regression_layer.weight"])
        self.register_buffer("matrix", wide["reward_transform_matrix"])
        self.register_buffer("scale", wide["gating.logit_scale"])

    def places(self, ids: list[int]) -> list[int]:
        """Which tokens of a text it reads the states of: its end, and where the last assistant's turn begins.

        Raises:
            InputError: the text has no assistant's turn.
        """
        return [len(ids) - 1] if self.objectives else [len(ids) - 1, self._turn_of(ids)]

    def forward(self, states: Tensor) -> Tensor:
        """Outputs (B, 1) or (B, O) in float64 of the states (B, P, H) at :meth:`places`."""
        wide = states.to(self.regression.dtype)
        count = len(self.matrix)
        found = (wide[:, 0] @ self.regression.T).view(len(states), count, -1)
        rewards = found.mean(2)
        adjusted = rewards @ self.matrix
        if self.objectives:
            return rewards if found.shape[2] == 1 else adjusted
        weights = torch.softmax(self.gating(wide[:, 1]) / self.temperature, dim=1) * self.scale
        return (weights * adjusted).sum(1, keepdim=True)

    def _turn_of(self, ids: list[int]) -> int:
        size = len(self.turn)
        for start in range(len(ids) - size, -1, -1):
            if ids[start : start + size] == self.turn:
                return start
        raise InputError(
            f"the reward model reads its weights where an assistant's turn begins ({TURN!r}), and a text has none: "
            "use its own chat template, and a max_length that does not cut the prompt"
        )


class GatedRewardModel(nn.Module):
    """A decoder without a head of its own, and a gated one on it."""

    def __init__(self, trunk: Any, head: GatedHead) -> None:
        super().__init__()
        self.trunk, self.head, self.config = trunk, head, trunk.config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        place: torch.device = self.trunk.device
        return place

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """``logits`` (B, 1) or (B, O), in float64, of right-padded ids (B, T).

        Raises:
            InputError: a text has no assistant's turn.
        """
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        texts = [row[:n] for row, n in zip(input_ids.tolist(), attention_mask.sum(1).tolist(), strict=True)]
        places = torch.tensor([self.head.places(text) for text in texts], device=states.device)
        rows = torch.arange(len(texts), device=states.device)
        return SimpleNamespace(logits=self.head(states[rows[:, None], places]))


def _gate(tensors: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers with ReLU behind all but the last; vectors with a running mean are batch norms, as in QRM."""
    numbers = sorted({int(name.split(".")[0]) for name in tensors})
    layers: list[nn.Module] = []
    for number in numbers:
        own = {n.split(".", 1)[1]: t for n, t in tensors.items() if n.split(".")[0] == str(number)}
        weight = own["weight"]
        if weight.ndim == 1:
            layer: nn.Module = nn.BatchNorm1d(len(weight), dtype=weight.dtype)
        else:
            layer = nn.Linear(weight.shape[1], len(weight), bias="bias" in own, dtype=weight.dtype)
        layer.load_state_dict(own)
        layers += [layer, nn.ReLU()] if weight.ndim == 2 and number != numbers[-1] else [layer]
    return nn.Sequential(*layers)


def is_gated(folder: str) -> bool:
    """Whether a folder's config names a reward model of :data:`GATED`."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return False
    names = json.loads(file.read_text(encoding="utf-8")).get("architectures") or [""]
    return names[0] in GATED


def is_of_head(name: str) -> bool:
    """Whether a tensor of such a folder belongs to its head, by name."""
    return name in HEAD or name.startswith("gating.layers.")


def read(folder: str, head: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, outputs: int) -> GatedHead:
    """The head of a folder.

    Args:
        folder: its config, and the name for messages.
        head: its tensors, see :func:`is_of_head`.
        tokenizer: the folder's.
        outputs: 1 for the reward, 0 for the objectives.

    Raises:
        InputError: a weight is missing, or of another shape.
    """
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    turn = list(tokenizer.encode(TURN, add_special_tokens=False))
    try:
        made = GatedHead(head, turn, outputs == 0, float(getattr(config, "gating_temperature", TEMPERATURE)))
        count = len(made.matrix)
        if len(made.regression) % count:
            raise InputError(f"model {folder}: its regression_layer has no row for each of {count} objectives")
        made.eval()(torch.zeros(1, 2, made.regression.shape[1]))
    except InputError:
        raise
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        raise _unlike(folder, config, error) from None
    return made


def names_of(folder: str, head: GatedHead) -> list[str]:
    """What the outputs of a head are called: ArmoRM's objectives as published, others as the config says."""
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    count = len(head.matrix) if head.objectives else 1
    if head.objectives and config.architectures[0] == next(iter(GATED)) and count == len(OBJECTIVES):
        return list(OBJECTIVES)
    config.num_labels = count
    return [str(config.id2label[i]) for i in range(count)]


def load(folder: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, outputs: int) -> Any:
    """The reward model of a folder; its head computes in float64 whatever the type of the trunk.

    Args:
        folder: config, tokenizer and safetensors.
        dtype: the trunk's.
        tokenizer: the folder's.
        outputs: 1 for the reward, 0 for the objectives.

    Raises:
        InputError: a weight is missing, of another shape, or has no place here.
    """
    from safetensors.torch import load_file

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    auto: Any = AutoModel
    trunk = auto.from_config(config, dtype=dtype)
    own = {n.removeprefix("model."): tensors.pop(n) for n in list(tensors) if n.startswith("model.")}
    try:
        trunk.load_state_dict(own)
    except RuntimeError as error:
        raise _unlike(folder, config, error) from None
    if extra := [name for name in tensors if not is_of_head(name)]:
        raise InputError(f"model {folder}: {extra[0]} belongs neither to its trunk nor to its gate")
    head = read(folder, tensors, tokenizer, outputs)
    names = names_of(folder, head)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.pad_token_id = tokenizer.pad_token_id
    trunk.config = config
    return GatedRewardModel(trunk, head)


def _unlike(folder: str, config: Any, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(f"model {folder}: is no {GATED[config.architectures[0]]} as published: {reason}")
