"""A reward head in this process on hidden states that a server computes: ArmoRM, QRM, GRM and linear heads.

The server has the trunk alone and reads token ids, so template and places are ours and exact. States come as float32 in
base64, every digit of them.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankalign.data import encode
from rankalign.data.records import CandidateSet, Response
from rankalign.engines.openai_client import Again, Body, Failed
from rankalign.errors import InputError
from rankalign.models import head_alone
from rankalign.models import load as models
from rankalign.models.identity import config_of
from rankalign.rows import rewards
from rankalign.scorers.server_forms import Form, numbers

UNIT = 1e-3
"""Vectors whose lengths are all this near to 1 were normalised: a state of H numbers after the last norm is about
sqrt(H) long."""


class ServedHead:
    """Makes requests of texts, and outputs of replies.

    Args:
        folder: the reward model's own, or one with its config, tokenizer and head; its trunk is not read.
        form: ``token_embed`` or ``embed`` of :data:`rankalign.scorers.server_forms.FORMS`.
        template: as in :class:`rankalign.scorers.reward_model.RewardModelScorer`.
        system: likewise.
        thoughts: likewise.
        pooling: likewise.
        objectives: outputs are all that a gated head has, else its one reward.

    Raises:
        InputError: the folder holds no head of a known kind.
    """

    def __init__(
        self, folder: str, form: Form, template: str, system: str, thoughts: str, pooling: str, objectives: bool
    ) -> None:
        where = models.resolve(folder)
        if not Path(where).is_dir():
            raise InputError(f"head: {folder} is no folder; download the reward model first")
        self._folder, self._form = folder, form
        self._tokenizer = models.load_tokenizer(where)
        self._head = head_alone.read(where, self._tokenizer, 0 if objectives else 1, pooling)
        self._objectives = objectives
        options = encode.EncodeOptions(template=template, system=system, whole=True, thoughts=thoughts)
        self._encoder = encode.Encoder(self._tokenizer, options)
        self.names = self._head.names

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What the outputs depend on beside the server: the head's weights, its settings, tokenizer and template."""
        template = str(self._tokenizer.chat_template or "")
        return {
            "folder": self._folder,
            "weights": self._head.weights,
            "config": config_of(self._folder),
            "tokenizer": models.tokenizer_fingerprint(self._tokenizer),
            "chat_template": hashlib.sha256(template.encode()).hexdigest(),
            "pooling": self._head.pooling,
            "objectives": self._objectives,
        }

    def said(self) -> list[str]:
        """What is to be said of how texts were read."""
        return encode.said(self._encoder.counts)

    def body(self, record: CandidateSet, response: Response) -> Body:
        """The request for one answer: its ids whole, or up to each token whose state is read.

        Raises:
            InputError: the chat template refuses the record, or a gate finds no assistant's turn.
        """
        prompt, [answer] = self._encoder.tokens(dataclasses.replace(record, responses=[response]))
        if answer and self._head.pooling == rewards.FIRST_EOS:
            answer = rewards.cut_behind_end(answer, self._head.config)
        ids = prompt + answer
        try:
            places = self._head.places(ids)
        except InputError as error:
            raise InputError(f"record {record.id!r}: {error}") from None
        return self._form.body | {"input": [ids[: place + 1] for place in places] if self._form.ends else [ids]}

    def outputs(self, sent: Sequence[list[int]], reply: Body) -> list[float]:
        """What the head makes of a reply.

        Args:
            sent: ``input`` of the request.
            reply: the server's.

        Raises:
            Again: the reply is an error.
            Failed: it does not hold one state a token that was sent, or one that is not finite.
            InputError: its states are of another size or number, or normalised: so will all others be.
        """
        entries = reply.get("data")
        if reply.get("error") and not entries:
            raise Again(f"the reply is an error: {reply['error']}")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise Failed(f"the reply has no list data; it holds {', '.join(map(str, reply)) or 'nothing'}")
        usage = reply.get("usage")
        counted, total = (usage.get("prompt_tokens") if isinstance(usage, dict) else None), sum(map(len, sent))
        if counted is not None and counted != total:
            raise Failed(f"the server read {counted} tokens where {total} were sent: it adds some, or cuts")
        found = {entry["index"]: entry.get("data") for entry in entries if isinstance(entry.get("index"), int)}
        if len(entries) != len(sent) or set(found) != set(range(len(sent))):
            raise Failed(f"the reply has {len(entries)} entries for {len(sent)} texts, numbered {list(found)[:8]}")
        counts = [1 if self._form.ends else len(ids) for ids in sent]
        states = np.concatenate([self._states(found[n], count) for n, count in enumerate(counts)])
        if (np.abs(np.linalg.norm(states, axis=1) - 1) < UNIT).all():
            raise InputError(
                "the server sends vectors of length 1: it normalises states though asked not to (use_activation: "
                "false); start it with --pooler-config '{\"use_activation\": false}'"
            )
        places = slice(None) if self._form.ends else self._head.places(sent[0])
        return self._head.outputs(torch.from_numpy(states[places]))

    def _states(self, data: Any, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """States (count, H), finite, of base64 or of lists."""
        if isinstance(data, str):
            try:
                flat = np.frombuffer(base64.b64decode(data, validate=True), "<f4").astype(np.float64)
            except (binascii.Error, ValueError) as error:
                raise Failed(f"the reply's states are no float32 numbers in base64: {error}") from None
        else:
            known = numbers(data)
            rows = known if isinstance(known, list) and isinstance(known[0], list) else [known]
            if not all(isinstance(row, list) and all(isinstance(x, float) for x in row) for row in rows):
                raise Failed("the reply's states are no base64, nor lists of finite numbers")
            flat = np.array([x for row in rows for x in row])
            if len(rows) != count or len({len(row) for row in rows}) > 1:
                raise Failed(f"the reply has {len(rows)} states, or of different sizes, for {count} tokens")
        wanted = self._head.hidden
        if flat.size != count * wanted:
            raise InputError(
                f"the reply has {flat.size} numbers for {count} tokens, {flat.size / count:g} each, and the head reads "
                f"{wanted}: does the server hold the trunk of {self._folder}, and send every token's state?"
            )
        if not np.isfinite(flat).all():
            raise Failed("the reply's states are not finite")
        return flat.reshape(count, wanted)
