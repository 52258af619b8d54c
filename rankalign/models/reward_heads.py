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


class GatedRewardModel(nn.Module):
    """Trunk, objectives and gate.

    Args:
        trunk: the decoder without a head.
        head: tensors ``regression_layer.weight`` (O Q, H), ``reward_transform_matrix`` (O, O), ``gating.*``.
        turn: token ids of :data:`TURN`.
        objectives: outputs are the O objectives, ArmoRM's as the head gives them and QRM's times the matrix, as theirs
            are; else the one reward.
    """

    regression: Tensor
    matrix: Tensor
    scale: Tensor

    def __init__(self, trunk: Any, head: dict[str, Tensor], turn: list[int], objectives: bool) -> None:
        super().__init__()
        self.trunk, self.config, self.turn, self.objectives = trunk, trunk.config, turn, objectives
        self.temperature = float(getattr(self.config, "gating_temperature", TEMPERATURE))
        self.gating = _gate({n.removeprefix("gating.layers."): t for n, t in head.items() if "gating.layers." in n})
        self.register_buffer("regression", head["regression_layer.weight"])
        self.register_buffer("matrix", head["reward_transform_matrix"])
        self.register_buffer("scale", head["gating.logit_scale"])

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        place: torch.device = self.trunk.device
        return place

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """``logits`` (B, 1) or (B, O), in float32 or wider, of right-padded ids (B, T).

        Raises:
            InputError: a text has no assistant's turn.
        """
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows, count = torch.arange(len(states), device=states.device), len(self.matrix)
        ends = attention_mask.sum(1) - 1
        wide = self.regression.dtype
        found = (states[rows, ends].to(wide) @ self.regression.T).view(len(states), count, -1)
        rewards = found.mean(2)
        adjusted = rewards @ self.matrix
        if self.objectives:
            return SimpleNamespace(logits=rewards if found.shape[2] == 1 else adjusted)
        begins = [self._turn_of(row[: int(end) + 1].tolist()) for row, end in zip(input_ids, ends, strict=True)]
        gate = self.gating(states[rows, torch.tensor(begins, device=states.device)].to(wide))
        weights = torch.softmax(gate / self.temperature, dim=1) * self.scale
        return SimpleNamespace(logits=(weights * adjusted).sum(1, keepdim=True))

    def _turn_of(self, ids: list[int]) -> int:
        size = len(self.turn)
        for start in range(len(ids) - size, -1, -1):
            if ids[start : start + size] == self.turn:
                return start
        raise InputError(
            f"the reward model reads its weights where an assistant's turn begins ({TURN!r}), and a text has none: "
            "use its own chat template, and a max_length that does not cut the prompt"
        )


def _gate(tensors: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers with ReLU behind all but the last; vectors with a running mean are batch norms, as in QRM."""
    numbers = sorted({int(name.split(".")[0]) for name in tensors})
    layers: list[nn.Module] = []
    for number in numbers:
        own = {n.split(".", 1)[1]: t for n, t in tensors.items() if n.split(".")[0] == str(number)}
        weight = own["weight"]
        if weight.ndim == 1:
            layer: nn.Module = nn.BatchNorm1d(len(weight))
        else:
            layer = nn.Linear(weight.shape[1], len(weight), bias="bias" in own)
        layer.load_state_dict(own)
        layers += [layer.to(weight.dtype), nn.ReLU()] if weight.ndim == 2 and number != numbers[-1] else [layer]
    return nn.Sequential(*layers)


def is_gated(folder: str) -> bool:
    """Whether a folder's config names a reward model of :data:`GATED`."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return False
    names = json.loads(file.read_text(encoding="utf-8")).get("architectures") or [""]
    return names[0] in GATED


def load(folder: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, outputs: int) -> Any:
    """The reward model of a folder; its head computes in float32 whatever the type of the trunk.

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
    wide = torch.promote_types(dtype, torch.float32)
    auto: Any = AutoModel
    trunk = auto.from_config(config, dtype=dtype)
    own = {n.removeprefix("model."): tensors.pop(n) for n in list(tensors) if n.startswith("model.")}
    head = {n: t if n.endswith("num_batches_tracked") else t.to(wide) for n, t in tensors.items()}
    try:
        trunk.load_state_dict(own)
        count = len(head["reward_transform_matrix"])
        if outputs == 0:
            config.num_labels = count
            names = OBJECTIVES if config.architectures[0] in list(GATED)[:1] and count == len(OBJECTIVES) else ()
            config.id2label = dict(enumerate(names)) or config.id2label
        else:
            config.num_labels = 1
        config.pad_token_id = tokenizer.pad_token_id
        trunk.config = config
        turn = list(tokenizer.encode(TURN, add_special_tokens=False))
        model = GatedRewardModel(trunk, head, turn, outputs == 0)
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model {folder}: is no {GATED[config.architectures[0]]} as published: {reason}") from None
    known = ("regression_layer.weight", "reward_transform_matrix", "gating.logit_scale")
    if extra := [name for name in head if name not in known and not name.startswith("gating.layers.")]:
        raise InputError(f"model {folder}: {extra[0]} belongs neither to its trunk nor to its gate")
    if len(head["regression_layer.weight"]) % count:
        raise InputError(f"model {folder}: its regression_layer has no row for each of {count} objectives")
    return model
