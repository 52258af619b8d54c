"""Actor and critic in one module: a policy, and values by a head on its trunk or by a network of their own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import sharded
from rankalign.models.whole import Whole
from rankalign.rows import rewards
from rankalign.rows.head import Head, OwnHead, head_layer, head_of, label_logps
from rankalign.rows.logps import as_forward, causal_lm, label_states, lay_out
from rankalign.rows.tree import Tokens

HEAD_FILE = "value_head.safetensors"
NET_FOLDER = "value_model"


class ValueHead(nn.Module):
    """Linear n -> 2n, ReLU, linear 2n -> 1: the shape that trlX gives its value heads, in float32.

    The last layer begins at zero, so every value does: the first advantages come from rewards alone.

    Args:
        width: n, of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(positions,) values of (positions, n) hidden states."""
        values: Tensor = self.down(torch.relu(self.up(hidden.to(self.up.weight.dtype))))
        return values.squeeze(1)


class ActorCritic(nn.Module):
    """Log-probabilities and values of responses, token by token.

    Args:
        policy: a causal language model, bare or inside PEFT.
        value_net: a decoder with a ``score`` head to take values from; None puts a :class:`ValueHead` on the policy.
        layout: of rows, see :func:`rankalign.rows.logps.list_logps`.
        temperature: logits are divided by it, as sampling does.
    """

    def __init__(
        self, policy: nn.Module, value_net: nn.Module | None = None, layout: str = "auto", temperature: float = 1.0
    ) -> None:
        super().__init__()
        lm = causal_lm(policy)
        self.policy, self.value_net, self.layout, self.temperature = policy, value_net, layout, temperature
        self.value_head = None if value_net else ValueHead(lm.config.get_text_config().hidden_size).to(lm.device)

    def forward(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """What policy and critic say of B responses.

        Args:
            prompts: token ids, at least one each.
            responses: token ids, at least one each.

        Returns:
            Log-probability of each token, and value of the text before it: (all tokens,) each, response after response.
        """
        states, labels = predicting_states(self.policy, prompts, responses, self.layout)
        lm = causal_lm(self.policy)

        def compute(some: Tensor) -> Tensor:
            return label_logps(tempered(head_of(lm), self.temperature), some, labels)

        return as_forward(head_layer(lm), compute, states), self._values(states, prompts, responses)

    def _values(self, states: Tensor, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> Tensor:
        if self.value_head is not None:
            values: Tensor = self.value_head(states)
        else:
            critic: Any = self.value_net
            states, _ = predicting_states(critic, prompts, responses, self.layout)
            values = critic.score(states.to(next(critic.score.parameters()).dtype)).squeeze(1)
        # No view, behind which FSDP2 fears for its hooks.
        return values.to(torch.promote_types(values.dtype, torch.float32)).clone()

    @property
    def config(self) -> Any:
        """The policy's, which DeepSpeed reads."""
        return causal_lm(self.policy).config

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers of both, which FSDP2 gathers one by one."""
        nets = [net for net in (self.policy, self.value_net) if net is not None]
        return sorted({name for net in nets for name in getattr(causal_lm(net), "_no_split_modules", None) or ()})

    def save(self, folder: Path, first: bool = True) -> None:
        """The policy as plain transformers (or peft) weights, and the critic beside it.

        Args:
            folder: where to.
            first: whether this process writes; where the weights are spread all come here.
        """
        _save(self.policy, folder, first)
        if self.value_net is not None:
            _save(self.value_net, folder / NET_FOLDER, first)
        elif self.value_head is not None:
            # Gathered like the rest, or from DeepSpeed's float32 copy.
            head = {name: sharded.collected(p, first) for name, p in self.value_head.named_parameters()}
            if first:
                save_file({name: p for name, p in head.items() if p is not None}, folder / HEAD_FILE)


def _save(model: Any, folder: Path, first: bool) -> None:
    if sharded.is_spread(model) or sharded.has_masters(model):
        sharded.save(model, folder, first)
    elif first:
        model.save_pretrained(str(folder))


def predicting_states(
    model: nn.Module, prompts: Sequence[Tokens], responses: Sequence[Tokens], layout: str
) -> tuple[Tensor, Tensor]:
    """(tokens, hidden) states that stand before each token of the responses, and (tokens,) those tokens.

    The rows are not told which responses the head's gradient reaches, as :func:`rankalign.rows.logps.list_logps` tells
    them: values have gradients of their own, which would be lost.
    """
    lm = causal_lm(model)
    rows = lay_out(lm, prompts, [[r] for r in responses], layout)
    if rows is None:
        raise ValueError("every response needs at least one token")
    states = label_states(lm, rows)
    return states, rows.labels.to(states.device)


def tempered(head: Head | OwnHead, temperature: float) -> Head | OwnHead:
    """The head whose logits are divided by ``temperature``, a soft-cap included."""
    cooled = replace(head, scale=head.scale / temperature)
    if isinstance(cooled, Head) and cooled.cap is not None:
        return replace(cooled, cap=cooled.cap / temperature)
    return cooled


class Reference:
    """The policy as it was at the start: its own base where it trains an adapter, else a frozen copy.

    Args:
        actor: before any training.
        spread: its weights are going to be shared out among processes. Each keeps its share of the start model's, too.
    """

    def __init__(self, actor: ActorCritic, spread: bool = False) -> None:
        self._actor = actor
        self.shared = hasattr(actor.policy, "disable_adapter")
        self._whole = Whole(actor.policy) if spread else None
        self._policy: Any = actor.policy
        if not (self.shared or spread):
            self._policy = copy.deepcopy(actor.policy).requires_grad_(False).eval()

    def wrapped(self, dtype: torch.dtype | None) -> None:
        """The actor is in its launcher's hands now, and not trained yet.

        Args:
            dtype: see :func:`rankalign.training.processes.layers_in`.
        """
        if self._whole is not None:
            self._whole.dtype = dtype
            if not self.shared:
                self._whole.keep(self._actor.policy, self._actor)
        elif dtype is not None and not self.shared:
            for weight in self._policy.parameters():
                weight.data = weight.data.to(dtype)

    @torch.no_grad()
    def logps(self, policy: Any, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> Tensor:
        """(all tokens,) log-probabilities under what :meth:`policy` gives, as :meth:`ActorCritic.forward` lays them
        out."""
        actor = self._actor
        states, labels = predicting_states(policy, prompts, responses, actor.layout)
        return label_logps(tempered(head_of(causal_lm(policy)), actor.temperature), states, labels)

    @contextlib.contextmanager
    def policy(self) -> Iterator[Any]:
        """The start model, for as long as the block lasts."""
        if self.shared:
            with self.trained() as policy, policy.disable_adapter():
                yield policy
        elif self._whole is not None:
            with self._whole.kept() as policy:
                yield policy
        else:
            yield self._policy

    @contextlib.contextmanager
    def trained(self) -> Iterator[Any]:
        """The policy as it is now, with all its weights, for as long as the block lasts."""
        policy: Any = self._actor.policy
        if self._whole is None:
            yield policy
            return
        with self._whole.now(policy, self._actor) as whole:
            yield whole


def load_value_net(model: str, tokenizer_of: str) -> nn.Module:
    """A float32 decoder with a ``score`` head, new and random unless the model is a reward model.

    Args:
        model: as in :func:`rankalign.models.load.load_reward_model`.
        tokenizer_of: the policy's name; both must read the same token ids.

    Raises:
        InputError: other tokens, an adapter, or a model without a head over every token.
    """
    net, tokenizer = models.load_reward_model(model, dtype="float32")
    if models.tokenizer_fingerprint(tokenizer) != models.tokenizer_fingerprint(models.load_tokenizer(tokenizer_of)):
        raise InputError(f"value model {model}: its tokenizer is not that of the policy {tokenizer_of}")
    if hasattr(net, "get_base_model"):
        raise InputError(f"value model {model}: is an adapter, which does not train on; name its base")
    rewards.reward_lm(net)
    return net
