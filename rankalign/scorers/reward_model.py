"""Scores by a reward model: any sequence classifier with one output, or with several of which one is chosen."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankalign.data import encode, templates
from rankalign.data.records import CandidateSet, Response, read
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models.devices import is_over_devices
from rankalign.models.identity import config_of, tokenizer_hash
from rankalign.rows import rewards
from rankalign.rows.logps import supports_tree
from rankalign.scorers.outputs import weighed_outputs
from rankalign.storage.sources import sha256_of

TEXTS = 8  # a forward pass on a CPU, which gains nothing by more
TOKENS = 16384  # a forward pass on a GPU: half a gigabyte of activations of an 8B model, and products of full speed


class RewardModelScorer:
    """Grades whole conversations: what the model's chat template makes of all messages. Without one, and under a
    template of ours, template(prompt) + response, and an end-of-sequence (or separator) token behind a finished one.

    The model reads it with its own tokenizer and template, whatever wrote the response. Texts are sorted by length, and
    where they share a prompt a decoder reads it once (:func:`rankalign.rows.rewards.list_rewards`); else they are
    padded on the right, behind a mask. So a score depends on its own text alone (but for rounding).

    A decoder's reward is read where its config says: ``rankalign_pooling: last`` is the last token of the text.
    ``last_non_pad``, or no such key, is the rule of transformers, the last token that is not the padding id: the token
    before the end where a model pads with its end-of-sequence token. ``first_eos`` is the first end of the answer, its
    last token where it has none; ``mean`` the mean over all tokens. Encoders pool as their class does.

    Args:
        name: key of the scores.
        model: folder, hub id, or a name that :func:`rankalign.models.load.resolve` knows.
        template: how the prompt is written; see :func:`rankalign.data.encode.encode_prompt`.
        system: system message put before each prompt.
        batch_size: texts a forward pass; has no bearing on the scores. 0 is 8 on a CPU, and on a GPU as many as make
            16,384 tokens.
        max_length: most tokens of a text; 0 is what the model can take. A longer one is cut as in training, see
            :func:`rankalign.data.encode.fit`.
        dtype: weights' type.
        reference: a policy. Its response (the first, if it gave several) is the reference of the prompt, whose reward
            is taken off all others: r - r_ref, as summarisation is often scored. It scores 0 itself.
        reference_file: records that hold the references, found by id; empty takes each record's own response.
        allow_special_in_text: control tokens that texts spell are control tokens: a candidate can then forge a turn.
        thoughts: ``drop`` grades answers without what the model thought, ``keep`` with it.
        pooling: where a decoder's reward is read, for checkpoints of other tools whose config does not say it: one of
            :data:`rankalign.rows.rewards.POOLINGS`.
        axis: of a model with several outputs, which one grades: its name in the config's ``id2label``, its index, or
            ``mean``, the mean of all; or several with weights, ``helpfulness:0.65,correctness:0.8``, added up.
        device_map: how a model that one GPU does not hold is laid over several, one of
            :data:`rankalign.models.devices.DEVICE_MAPS`; texts then run padded, each with its prompt.

    Attributes:
        counts: ``prompt_truncated`` and ``response_truncated``: how many texts were cut so far (the first is told on
            stderr).
    """

    def __init__(
        self,
        name: str,
        model: str,
        template: str = "auto",
        system: str = "",
        batch_size: int = 0,
        max_length: int = 0,
        dtype: str = "auto",
        reference: str = "",
        reference_file: str = "",
        allow_special_in_text: bool = False,
        pooling: str = "",
        axis: str | int = "",
        thoughts: str = "drop",
        device_map: str = "",
    ) -> None:
        self.name, self.path, self.template, self.system = name, model, templates.check_name(template), system
        self.allow_special_in_text = allow_special_in_text
        if thoughts not in ("drop", "keep"):
            raise InputError(f"scorer {name!r}: thoughts: {thoughts!r} is neither drop nor keep")
        self.thoughts = thoughts
        self.batch_size, self._max_length, self.dtype = batch_size, max_length, dtype
        self.reference, self.reference_file = reference, reference_file
        self.pooling, self.axis = pooling, str(axis)
        self.device_map = device_map
        models.check_device_map(device_map, f"scorer {name!r}")
        self.counts: Counter[str] = Counter()
        self._told = set[str]()
        if reference_file and not reference:
            raise InputError(f"scorer {name!r}: reference_file needs reference, the policy whose responses it holds")
        if not isinstance(axis, str | int) or isinstance(axis, bool):
            raise InputError(f"scorer {name!r}: axis: expected a name, an index or mean, found {axis!r}")
        if batch_size < 0 or max_length < 0:
            raise InputError(f"scorer {name!r}: batch_size and max_length must be 0 or more")

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """One score a response.

        Raises:
            InputError: a record lacks its reference.
        """
        lists = [[self._encode(record, response) for response in record.responses] for record in sets]
        self._say()
        if not self.reference:
            return [list(row) for row in self._all_rewards(lists)]
        references = [self._encode(record, self._reference(record)) for record in sets]
        # A reference among the responses is not read twice, so it scores 0 and not a rounding error.
        lists = [row if ref in row else [*row, ref] for row, ref in zip(lists, references, strict=True)]
        rewards = self._all_rewards(lists)
        bases = [row[texts.index(ref)] for row, texts, ref in zip(rewards, lists, references, strict=True)]
        return [
            [reward - base for reward in row[: len(record.responses)]]
            for record, row, base in zip(sets, rewards, bases, strict=True)
        ]

    def _all_rewards(self, lists: Sequence[list[list[int]]]) -> list[list[float]]:
        # Kernels for trees keep what they know of a row on one device.
        read_by_us = isinstance(getattr(self.model, "score", None), torch.nn.Module)  # gates read two places of a text
        trees = read_by_us and supports_tree(self.model) and not is_over_devices(self.model)
        found = iter(self._in_trees(lists) if trees else self._padded(list(chain(*lists))))
        return [[next(found) for _ in texts] for texts in lists]

    def _reference(self, record: CandidateSet) -> Response:
        holder = self._references.get(record.id) if self.reference_file else record
        where = self.reference_file or "the record"
        found = [r for r in holder.responses if r.policy == self.reference] if holder else []
        if not holder or not found:
            raise InputError(
                f"scorer {self.name!r}: {where} has no response of policy {self.reference!r} to {record.id!r}"
            )
        if templates.as_messages(holder.prompt) != templates.as_messages(record.prompt):
            raise InputError(f"scorer {self.name!r}: {where} has another prompt under the id {record.id!r}")
        return found[0]

    @functools.cached_property
    def _references(self) -> dict[str, CandidateSet]:
        return {record.id: record for record in read(self.reference_file)}

    def _in_trees(self, lists: Sequence[list[list[int]]]) -> Iterator[float]:
        """Scores of all texts in order; what the texts of a list have in common at their beginning is read once."""
        batch: list[list[list[int]]] = []
        for texts in lists:
            for chunk in self._batches(texts):
                if batch and not self._fits([text for some in (*batch, chunk) for text in some]):
                    yield from self._tree_rewards(batch)
                    batch = []
                batch.append(chunk)
        if batch:
            yield from self._tree_rewards(batch)

    def _batches(self, texts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """The texts, in order, in groups that run at once; one at least."""
        batch: list[list[int]] = []
        for text in texts:
            if batch and not self._fits([*batch, text]):
                yield batch
                batch = []
            batch.append(text)
        if batch:
            yield batch

    def _fits(self, texts: Sequence[list[int]]) -> bool:
        """Whether these run at once, counted as if padded, which no layout exceeds."""
        if self.batch_size or self.model.device.type == "cpu":
            return len(texts) <= (self.batch_size or TEXTS)
        return len(texts) * max(map(len, texts)) <= TOKENS

    @torch.inference_mode()
    def _tree_rewards(self, batch: Sequence[list[list[int]]]) -> list[float]:
        prompts = [_common_beginning(texts) for texts in batch]
        if not all(prompts):  # some lost their beginnings to max_length, and with it what they shared
            return self._rewards(list(chain(*batch)))
        responses = [[text[len(prompt) :] for text in texts] for prompt, texts in zip(prompts, batch, strict=True)]
        found = self._chosen(rewards.list_rewards(self.model, prompts, responses, layout="tree")).double().tolist()
        return [score for row, texts in zip(found, batch, strict=True) for score in row[: len(texts)]]

    def _padded(self, texts: Sequence[list[int]]) -> list[float]:
        """Scores of all texts in order, computed by length."""
        scores = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found = chain.from_iterable(map(self._rewards, self._batches([texts[i] for i in order])))
        for index, score in zip(order, found, strict=True):
            scores[index] = score
        return scores

    def fingerprint(self) -> dict[str, Any]:
        """Model, settings that matter, and hashes of weights and tokenizer; a folder is hashed, not loaded."""
        return {
            "kind": "reward_model",
            "model": self.path,
            "template": self.template,
            "system": self.system,
            "allow_special_in_text": self.allow_special_in_text,
            "max_length": self._max_length,
            "dtype": self.dtype,
            "reference": self.reference,
            "reference_file_sha256": sha256_of(self.reference_file) if self.reference_file else "",
            "weights": self._weights(),
            "config": config_of(self.path),
            "tokenizer": tokenizer_hash(self.path),
            # Outputs of before these options stay finished.
            **({"pooling": self.pooling} if self.pooling else {}),
            **({"axis": self.axis} if self.axis else {}),
            **({"thoughts": self.thoughts} if self.thoughts != "drop" else {}),
        }

    def _weights(self) -> str:
        """Hash of the files: in memory an adapter's base has a random head beside the trained one."""
        where, adapter = models.base_and_adapter(self.path, "")
        return "+".join(models.weights_fingerprint(models.local_folder(part)) for part in (where, adapter) if part)

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        how: dict[str, Any] = {"dtype": self.dtype, "new_head": False, "device_map": self.device_map}
        model, tokenizer = models.load_reward_model(self.path, outputs=0 if self.axis else 1, **how)
        if self.pooling:
            if not isinstance(getattr(model, "score", None), torch.nn.Module):
                raise InputError(f"scorer {self.name!r}: {model.config.model_type} models pool in a way of their own")
            model.config.rankalign_pooling = self.pooling
            rewards.pooling_of(model.config)  # says which rules there are
            if self.pooling == rewards.MEAN and isinstance(model.score, torch.nn.Sequential):
                raise InputError(f"scorer {self.name!r}: pooling mean takes a linear head, and this one has layers")
        return model, tokenizer

    @functools.cached_property
    def _output(self) -> int | None:
        """The index of the output that grades; None for the mean of all.

        Raises:
            InputError: there is none of that name or number.
        """
        config: Any = self.model.config
        count = int(config.num_labels)
        names = [str(config.id2label[i]) for i in range(count)]
        if self.axis in names:
            return names.index(self.axis)
        if self.axis == "mean":
            return None
        if self.axis.isdigit() and int(self.axis) < count:
            return int(self.axis)
        known = ", ".join(names)
        raise InputError(f"scorer {self.name!r}: {self.path} has no output {self.axis!r}; it has {known}, and mean")

    @functools.cached_property
    def _weights_of_outputs(self) -> dict[int, float]:
        config: Any = self.model.config
        try:
            return weighed_outputs(self.axis, [str(config.id2label[i]) for i in range(int(config.num_labels))])
        except InputError as error:
            raise InputError(f"scorer {self.name!r}: {error}") from None

    def _chosen(self, values: Tensor) -> Tensor:
        """Of values (..., A) those that grade; a model with one output has values without a last axis."""
        if not self.axis:
            return values
        if weights := self._weights_of_outputs:
            many = values if int(self.model.config.num_labels or 1) > 1 else values[..., None]
            factors = torch.tensor(list(weights.values()), dtype=torch.float64, device=many.device)
            return many[..., list(weights)].double() @ factors
        wanted = self._output  # also of a model with one, which may not have what is asked for
        if self.model.config.num_labels == 1:
            return values
        return values.mean(-1) if wanted is None else values[..., wanted]

    @property
    def model(self) -> PreTrainedModel:
        """The reward model, loaded on first use."""
        return self._loaded[0]

    @property
    def rounding(self) -> torch.dtype | None:
        """The 16-bit type in which the model's layers compute, whatever its head does; None for wider ones."""
        kind = models.pick_dtype(self.dtype)
        return kind if kind.itemsize == 2 else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._loaded[1]

    @functools.cached_property
    def max_length(self) -> int:
        """Most tokens of a text: the option, or what the model has positions for (or its tokenizer says)."""
        config: Any = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        return min(self._max_length or positions, positions, self.tokenizer.model_max_length)

    def _encode(self, record: CandidateSet, response: Response) -> list[int]:
        """Tokens of one text, cut to ``max_length``."""
        prompt, [answer] = self._encoder.tokens(dataclasses.replace(record, responses=[response]))
        # What stands behind the first end is not read.
        if answer and rewards.pooling_of(self.model.config) == rewards.FIRST_EOS:
            answer = rewards.cut_behind_end(answer, self.model.config)
        if len(prompt) + len(answer) <= self.max_length:
            return prompt + answer
        if not self.counts:
            print(f"scorer {self.name!r}: texts above {self.max_length} tokens are cut", file=sys.stderr)
        shortened = self._encoder.rendering.shortened
        short, [cut] = encode.fit(
            prompt, [answer], self.max_length, lambda ids, room: shortened(ids, room, record.prompt, record.meta)
        )
        self.counts["prompt_truncated"] += len(short) < len(prompt)
        self.counts["response_truncated"] += len(cut) < len(answer)
        return short + cut

    def _say(self) -> None:
        """What is to be said of how texts were read, each once."""
        counts = {name: n for name, n in self._encoder.counts.items() if name not in self._told}
        self._told.update(counts)
        for sentence in encode.said(counts):
            print(f"scorer {self.name!r}: {sentence}", file=sys.stderr)

    @functools.cached_property
    def _encoder(self) -> encode.Encoder:
        options = encode.EncodeOptions(
            template=self.template,
            system=self.system,
            allow_special_in_text=self.allow_special_in_text,
            whole=True,
            thoughts=self.thoughts,
        )
        return encode.Encoder(self.tokenizer, options)

    @torch.inference_mode()
    def _rewards(self, texts: Sequence[list[int]]) -> list[float]:
        """Scores of one batch."""
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        values = _values(self.model, ids, mask)
        return self._chosen(values if values.shape[1] > 1 else values[:, 0]).double().tolist()


def within_rounding(scores: Sequence[float | None], kind: torch.dtype) -> int:
    """Pairs of different scores that are one number in a narrower type: their order is in digits that the layers of
    the model do not have."""
    known = torch.tensor([score for score in scores if score is not None], dtype=torch.float64)
    narrow = known.to(kind)
    pairs = (known[:, None] != known) & (narrow[:, None] == narrow)
    return int(pairs.sum()) // 2


def _common_beginning(texts: Sequence[list[int]]) -> list[int]:
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
    return [tokens[0] for tokens in same]


def _values(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, A) outputs for right-padded (B, T) texts."""
    if isinstance(getattr(model, "score", None), torch.nn.Module):
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        # Where the layers lie on several devices, the states come from the last.
        ids, mask = ids.to(hidden.device), mask.to(hidden.device)
        if rewards.pooling_of(model.config) == rewards.MEAN:
            counted = mask.to(hidden.dtype).unsqueeze(2)
            means: Tensor = model.score((hidden * counted).sum(1) / counted.sum(1))
            return means
        rows = torch.arange(len(ids), device=ids.device)
        found: Tensor = model.score(hidden[rows, _last(ids, mask, model.config)])
    else:
        found = model(input_ids=ids, attention_mask=mask).logits
    return found


def _last(ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    """(B,) where each text's reward is read."""
    pad = rewards.pad_of(config)
    counted = mask.bool() if pad is None else mask.bool() & (ids != pad)
    return (torch.arange(ids.shape[1], device=ids.device) * counted).argmax(dim=-1)
