"""Reward models: the rank trainer with rewards in the place of log-probabilities, from any policy or classifier.

A reward is read where plain transformers reads it, at the last token that is not the padding id. So that this is the
end of sequence, a tokenizer that pads with it is given another special token of its vocabulary to pad with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankalign.data.encode import TokenList
from rankalign.data.spool import View
from rankalign.errors import InputError
from rankalign.losses.reward import axis_errors, axis_regression, per_token
from rankalign.models import load as models
from rankalign.rows import rewards
from rankalign.rows.logps import causal_lm
from rankalign.rows.upload import to_device
from rankalign.training.examples import Example, pad, to_ranked, token_ids
from rankalign.training.meter import Meter
from rankalign.training.rank import RankTrainer

# --- the model ---------------------------------------------------------------------------------------------------


def load(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    pooling: str = "",
    dtype: str = "float32",
    axes: Sequence[str] = (),
) -> PreTrainedModel:
    """A decoder with a score head, a new one (see :func:`start_at_zero`) unless the model has one already.

    Args:
        model: as in :func:`rankalign.models.load.load_reward_model`.
        tokenizer: its tokenizer, to be saved with it; its padding token may change.
        pooling: where a new head reads, one of :data:`rankalign.rows.rewards.POOLINGS`; empty is transformers' rule.
        dtype: of the decoder; the head is float32.
        axes: names of the head's outputs, where it has several; they go into the config as its labels.

    Raises:
        InputError: an adapter, a model that reads its score in a way of its own, one trained by another rule, or on
            other axes.
    """
    reward, _ = models.load_reward_model(model, dtype=dtype, outputs=max(len(axes), 1))
    if hasattr(reward, "get_base_model"):
        raise InputError(f"model {model}: is an adapter, which does not train on; name its base")
    return made_ready(reward, model, tokenizer, pooling, axes)


def made_ready(
    reward: PreTrainedModel, model: str, tokenizer: PreTrainedTokenizerBase, pooling: str, axes: Sequence[str]
) -> PreTrainedModel:
    """A sequence classifier, which may be without weights, that knows where it reads and what its outputs are called;
    other arguments as of :func:`load`."""
    lm = rewards.reward_lm(reward)
    graded_before = any(name.endswith("ForSequenceClassification") for name in lm.config.architectures or [])
    lm.new_head = not graded_before
    if not graded_before:
        pad_apart_from_end(tokenizer)
    if axes:
        _call_outputs(lm, axes, model)
    lm.config.pad_token_id = tokenizer.pad_token_id
    if pooling:
        _pool_by(lm, pooling, model)
    elif rewards.pad_of(lm.config) is not None:
        lm.config.rankalign_pooling = rewards.LAST_NON_PAD
    lm.get_input_embeddings().padding_idx = None  # the padding token may stand in texts too, and is to learn there
    return reward


def _call_outputs(lm: Any, axes: Sequence[str], model: str) -> None:
    """Name the outputs of the head as plain transformers does, whose pipelines then give sigmoids by name."""
    held = [lm.config.id2label[i] for i in range(len(axes))]
    if not lm.new_head and held != list(axes):
        raise InputError(
            f"--axes {','.join(axes)}: the head of {model} says {', '.join(held)}; give those, in this order"
        )
    lm.config.id2label = dict(enumerate(axes))
    lm.config.label2id = {axis: i for i, axis in enumerate(axes)}
    lm.config.problem_type = "multi_label_classification"


def _pool_by(lm: Any, pooling: str, model: str) -> None:
    """Write the rule into the config, with which it is saved."""
    if not lm.new_head and pooling != rewards.pooling_of(lm.config):
        held = rewards.pooling_of(lm.config)
        raise InputError(f"--pooling {pooling}: the head of {model} was trained to be read by {held!r}; leave it out")
    lm.config.rankalign_pooling = pooling
    rewards.pooling_of(lm.config)  # says which rules there are


@torch.no_grad()
def start_at_zero(model: nn.Module) -> None:
    """Zero a new head: a random one ranks at random, which small learning rates hardly outgrow.

    To be called once the layout is chosen, for a head of zeros agrees with everything.
    """
    if rewards.reward_lm(model).new_head:
        for name, parameter in model.named_parameters():
            if "score" in name.split("."):
                parameter.zero_()


def pad_apart_from_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with a special token of the vocabulary that is not the end of sequence, where there is one."""
    end = tokenizer.eos_token
    if tokenizer.pad_token != end:
        return
    known = tokenizer.get_vocab()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [t for t in (*models.PAD_NAMES, tokenizer.unk_token, *special) if t in known and t != end]
    if free:
        tokenizer.pad_token = free[0]
        print(f"padding: {free[0]!r} in the place of the end of sequence, where rewards are read", file=sys.stderr)
    else:
        print(f"padding: {end!r}, for want of another; rewards are read at the token before it", file=sys.stderr)


def freeze_lower(model: nn.Module, share: float) -> list[str]:
    """Freeze the embeddings and the lower layers, adapters included, and say so on stderr; with a share of 1, all but
    the head.

    Args:
        model: a reward model, bare or inside PEFT.
        share: of the layers; all but ``int((1 - share) * layers)`` of them freeze.

    Returns:
        Names of the frozen modules.
    """
    lm = causal_lm(model)
    count, base = lm.config.num_hidden_layers, lm.base_model
    frozen = count - int((1 - share) * count + 1e-9)  # (1 - 0.9) * 10 is an ulp short of 1
    stacks = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise InputError(f"--freeze_layers: {lm.config.model_type} models have no plain stack of layers")
    lower = {*stacks[0][:frozen], *(m for m in base.modules() if isinstance(m, nn.Embedding))}
    names = [name for name, module in lm.named_modules() if module in lower]
    for module in [base] if share == 1 else lower:
        module.requires_grad_(False)
    print(f"frozen: {', '.join(names)}", file=sys.stderr)
    return names


Key = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""The token ids of a prompt and of its responses."""

# --- the trainer -------------------------------------------------------------------------------------------------


class RewardTrainer(RankTrainer):
    """Trains a reward model on lists of candidates with a loss of :data:`rankalign.losses.reward.REWARD_LOSSES`.

    Responses of a prompt that read the same share the mean of their scores, so that they are tied and not compared.

    Args:
        model: a reward model of :func:`load`.
        config: settings.
        train: examples to train on.
        evaluation: examples to measure while training.
        layout: how rows are laid out, see :func:`rankalign.rows.rewards.list_rewards`.
        **more: passed to transformers' Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        train: Sequence[Example],
        evaluation: Sequence[Example] = (),
        layout: str = "auto",
        **more: Any,
    ) -> None:
        lm = rewards.reward_lm(model)
        self.lm_config, self._states = lm.config, dict[Key, Tensor]()
        if config.loss == "per_token" and rewards.pooling_of(lm.config) == rewards.MEAN:
            raise InputError("loss 'per_token' grades token by token and has no use for a head that pools by mean")
        self._fixed_states = config.disable_dropout and not any(p.requires_grad for p in lm.base_model.parameters())
        super().__init__(model, config, self._prepared(train), self._prepared(evaluation), layout, **more)

    def _prepared(self, examples: Sequence[Example]) -> Sequence[Example]:
        fair = View(examples, range(len(examples)), partial(_fair, self.lm_config))
        changed = sum(e.tokens.scores != fair[i].tokens.scores for i, e in enumerate(examples))
        if changed:
            print(f"reward: in {changed} prompts, equal responses share the mean of their scores", file=sys.stderr)
        return fair

    def values(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """(P, N) rewards of the candidates. Where the head alone learns, its input is computed once for each list."""
        if self._fixed_states and not self.sharded:
            return rewards.rewards_of(model, [self._states_of(model, example) for example in examples])
        return rewards.list_rewards(model, *token_ids(examples), layout=self.layout)

    @torch.no_grad()
    def _states_of(self, model: nn.Module, example: Example) -> Tensor:
        """(N, H), computed for the list alone: the same bits whichever lists stood beside it when it first came."""
        key = tuple(example.tokens.prompt), tuple(map(tuple, example.tokens.responses))
        if key not in self._states:
            self._states[key] = rewards.end_states(model, *token_ids([example]), layout=self.layout)[0]
        return self._states[key]

    def losses(self, model: nn.Module, examples: Sequence[Example], meter: Meter) -> Tensor:
        """(P,) loss of each prompt, metered by reward."""
        if self.config.axes:
            return self._losses_by_axis(model, examples, meter)
        if self.config.loss == "per_token":
            pieces = rewards.token_rewards(model, *token_ids(examples), layout=self.layout)
            traces, first, stop = compare(examples, pieces, self.lm_config)
            ranked = to_ranked(examples, traces[:, :, -1])
            losses = per_token(ranked, traces, first, stop, **self.keywords)
        else:
            ranked = to_ranked(examples, self.values(model, examples))
            losses = self.config.loss_entry.function(ranked, **self.keywords)
        mean = (ranked.logps * ranked.mask).sum(1) / ranked.mask.sum(1)
        meter.add(ranked, losses, {"mean_reward": mean}, ranked.logps, [e.tokens.id for e in examples])
        return losses

    def _losses_by_axis(self, model: nn.Module, examples: Sequence[Example], meter: Meter) -> Tensor:
        """(P,) loss over several axes; accuracy and margin go by the mean of the outputs, and each axis has its L1."""
        values = self.values(model, examples)
        ranked = to_ranked(examples, values.mean(2))
        scores = torch.stack([pad(list(zip(*e.tokens.axes, strict=True)), values.shape[1]).T for e in examples]).to(
            values.device
        )
        losses = axis_regression(values, scores, ranked.mask, **self.keywords)
        errors = axis_errors(values.detach(), scores, ranked.mask, **self.keywords).unbind(1)
        parts = {f"l1_{axis}": error for axis, error in zip(self.config.data_settings.axis_names, errors, strict=True)}
        meter.add(ranked, losses, parts, ranked.logps, [e.tokens.id for e in examples])
        return losses


def _fair(config: Any, example: Example) -> Example:
    return replace(example, tokens=one_score_a_text(example.tokens, config))


def one_score_a_text(tokens: TokenList, config: Any) -> TokenList:
    """The list with the scores of responses that read the same replaced by their mean, also axis by axis."""
    read = rewards.read_part(tokens.prompt, tokens.responses, config)[1]

    def shared(scores: Sequence[float]) -> list[float]:
        return [_mean([s for other, s in zip(read, scores, strict=True) if other == r]) for r in read]

    columns = [shared(column) for column in zip(*tokens.axes, strict=True)]
    return replace(tokens, scores=shared(tokens.scores), axes=[list(row) for row in zip(*columns, strict=True)])


def _mean(scores: list[float]) -> float:
    """Their mean; the sum of two of 1e308 has no double, the mean has."""
    total = sum(scores)
    return total / len(scores) if math.isfinite(total) else sum(score / len(scores) for score in scores)


def compare(
    examples: Sequence[Example], pieces: Sequence[Sequence[Tensor]], config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`rankalign.losses.reward.per_token` reads.

    Args:
        examples: P lists.
        pieces: of :func:`rankalign.rows.rewards.token_rewards`.
        config: the model's.

    Returns:
        ``traces`` (P, N, T): the value at each token of a response, its reward behind its end (trlX reads there what
        the model says of padding); ``first`` and ``stop`` (P, N, N): the first token in which two responses differ, and
        the length of the longer.
    """
    read = [rewards.read_part(e.tokens.prompt, e.tokens.responses, config)[1] for e in examples]
    width, longest = max(map(len, read)), max(1, *(len(r) for lists in read for r in lists))
    rows = [torch.stack([_held(values, longest) for values in row]) for row in pieces]
    traces = torch.stack([nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in rows])
    first = torch.stack([_square(lists, width, _first_difference) for lists in read])
    stop = torch.stack([_square(lists, width, lambda a, b: max(len(a), len(b))) for lists in read])
    first, stop = to_device(traces.device, first, stop)
    return traces, first, stop


def _held(values: Tensor, length: int) -> Tensor:
    """(length,) values at the tokens of a response, without that of its prompt, the last one repeated to the end."""
    return torch.cat([values[1:], values[-1:].expand(length + 1 - len(values))])


def _square(lists: list[list[int]], width: int, measure: Callable[[list[int], list[int]], int]) -> Tensor:
    """(width, width) ``measure`` of each pair of responses, 0 where there is none."""
    return pad([[measure(a, b) for b in lists] for a in lists] + [[]] * (width - len(lists)), width).long()


def _first_difference(a: list[int], b: list[int]) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
