"""Process rewards by a token classifier in this process: a score for each token of an answer, and one made of them.

The list is kept with the response; which tokens end a step, and what to do with steps, is left to whoever reads it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from rankalign.data import encode, templates
from rankalign.data.records import CandidateSet, Response, refusal
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models.identity import config_of, tokenizer_hash
from rankalign.registry import did_you_mean
from rankalign.scorers import Explanation

TOKENS = ("last", "mean", "min", "sum")


class TokenRewardScorer:
    """Reads prompt and answer with a token classifier, and takes what it says at each token of the answer.

    The tokens are those that training would see: the prompt under the template, the answer, and behind a finished one
    its end. A text is read alone, without padding.

    Args:
        name: key of the scores.
        model: folder or hub id of a ``*ForTokenClassification`` model with safetensors.
        tokens: how one score is made of those of the tokens: ``last``, ``mean``, ``min`` or ``sum``.
        axis: which output is the score: its name in the config's ``id2label``, its index, or ``mean``; a model with one
            output needs none.
        template: how the prompt is written; see :func:`rankalign.data.encode.encode_prompt`.
        system: system message put before each prompt.
        max_length: most tokens of prompt and answer; 0 is what the model can take. A longer text is refused: its end
            would have no scores.
        dtype: weights' type.
        thoughts: ``drop`` grades answers without what the model thought, ``keep`` with it.

    Raises:
        InputError: an option is wrong; the message names it.
    """

    def __init__(
        self,
        name: str,
        model: str,
        tokens: str = "min",
        axis: str | int = "",
        template: str = "auto",
        system: str = "",
        max_length: int = 0,
        dtype: str = "auto",
        thoughts: str = "drop",
    ) -> None:
        self.name, self.path, self.tokens, self.axis = name, model, tokens, str(axis)
        self.template, self.system, self._max_length = templates.check_name(template), system, max_length
        self.dtype, self.thoughts = dtype, thoughts
        self._told: list[list[list[float]]] = []
        if tokens not in TOKENS:
            raise InputError(f"scorer {name!r}: tokens: {tokens!r} is unknown{did_you_mean(tokens, TOKENS)}")
        if thoughts not in ("drop", "keep"):
            raise InputError(f"scorer {name!r}: thoughts: {thoughts!r} is neither drop nor keep")
        if max_length < 0:
            raise InputError(f"scorer {name!r}: max_length must be 0 or more")

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, missing = models.load_as(AutoModelForTokenClassification, self.path, models.pick_dtype(self.dtype))
        if missing:
            raise InputError(f"scorer {self.name!r}: {self.path} is no token classifier, it lacks {missing[0]}")
        return model.to(models.device()).eval(), models.load_tokenizer(self.path)

    @functools.cached_property
    def _encoder(self) -> encode.Encoder:
        options = encode.EncodeOptions(template=self.template, system=self.system, thoughts=self.thoughts)
        return encode.Encoder(self._loaded[1], options)

    @functools.cached_property
    def _output(self) -> int | None:
        """The index of the output that is the score; None for the mean of all."""
        config: Any = self._loaded[0].config
        names = [str(config.id2label[i]) for i in range(int(config.num_labels))]
        if self.axis in names:
            return names.index(self.axis)
        if self.axis.isdigit() and int(self.axis) < len(names):
            return int(self.axis)
        if self.axis == "mean" or (not self.axis and len(names) == 1):
            return 0 if len(names) == 1 else None
        said = f"has no output {self.axis!r}" if self.axis else f"has {len(names)} outputs; choose one by `axis`"
        raise InputError(f"scorer {self.name!r}: {self.path} {said}: {', '.join(names)}, or mean")

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """One score a response; None for an answer without a token.

        Raises:
            RecordError: a text is longer than the model can read.
        """
        self._told = [[self._scores(record, response) for response in record.responses] for record in sets]
        return [[self._reduced(each) if each else None for each in row] for row in self._told]

    def explain(self) -> list[Explanation]:
        """The list of each response of the last batch, as ``token_scores``."""
        return [Explanation({}, [{"token_scores": each} if each else {} for each in row]) for row in self._told]

    def fingerprint(self) -> dict[str, Any]:
        """Model, settings, and hashes of weights and tokenizer."""
        options = ("tokens", "axis", "template", "system", "dtype", "thoughts")
        return {
            "kind": "token_rewards",
            "model": self.path,
            **{option: getattr(self, option) for option in options},
            "max_length": self._max_length,
            "weights": models.weights_fingerprint(models.local_folder(self.path)),
            "config": config_of(self.path),
            "tokenizer": tokenizer_hash(self.path),
        }

    def _reduced(self, scores: Sequence[float]) -> float:
        if self.tokens == "last":
            return scores[-1]
        total = math.fsum(scores)
        return {"mean": total / len(scores), "min": min(scores), "sum": total}[self.tokens]

    @torch.inference_mode()
    def _scores(self, record: CandidateSet, response: Response) -> list[float]:
        """(T,) what the model says at each token of the answer."""
        model, _ = self._loaded
        prompt, [answer] = self._encoder.tokens(
            CandidateSet(record.id, record.prompt, [response], record.meta, record.origin)
        )
        config: Any = model.config.get_text_config()
        most = self._max_length or getattr(config, "max_position_embeddings", None) or len(prompt) + len(answer)
        if len(prompt) + len(answer) > most:
            reason = f"an answer of policy {response.policy!r} and its prompt have {len(prompt) + len(answer)} tokens"
            raise refusal(record, "responses", f"{reason}, more than {most}: the last ones would have no score")
        if not answer:
            return []
        logits = model(input_ids=torch.tensor([prompt + answer], device=model.device)).logits[0, len(prompt) :]
        values = logits.double().mean(-1) if self._output is None else logits.double()[:, self._output]
        found: list[float] = values.tolist()
        if not all(map(math.isfinite, found)):
            raise InputError(f"scorer {self.name!r}: {self.path} gives scores that are not finite to {record.id!r}")
        return found
