"""Engines write responses. One file each; add one by a file and a line in :data:`ENGINES`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rankalign.records import CandidateSet, Response
from rankalign.registry import Entry, Registry


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn.

    Attributes:
        n: responses a prompt.
        max_new_tokens: limit in tokens; an answer that reaches it is not ``finished``.
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this.
        min_p: drop tokens less likely than this times the likeliest.
        stop: strings that end an answer and are cut off with everything behind them.
        seed: base seed; every (prompt id, policy, index) derives its own from it.
    """

    n: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Policy:
    """Who answers: an engine with a model, a template and sampling settings.

    Attributes:
        name: stands in every response it writes.
        engine: a name in :data:`ENGINES`.
        model: ``default``, ``tiny``, a folder or a hub id; unused by ``replay``.
        adapter: folder of a LoRA adapter to put on the model, or empty.
        template: a name in ``rankalign.templates`` (``auto``: the model's chat template if it has one, else ``raw``).
        system: system message put before the prompt, or empty.
        file: ``replay`` only: records whose responses are taken; empty takes those of the prompt file.
        only: ``replay`` only: take responses of this policy; empty takes all.
        dtype: weights' type (``auto``, ``float32``, ``bfloat16``, ``float16``).
        sampling: how it draws.
    """

    name: str
    engine: str = "hf"
    model: str = "default"
    adapter: str = ""
    template: str = "auto"
    system: str = ""
    file: str = ""
    only: str = ""
    dtype: str = "auto"
    sampling: SamplingParams = field(default_factory=SamplingParams)


class Engine(Protocol):
    """Writes ``policy.sampling.n`` responses to each prompt (``replay``: as many as the data hold).

    Constructed as ``Engine(policy)``; anything heavy is loaded on the first ``generate``.
    """

    def batches(self, prompts: Sequence[CandidateSet]) -> list[list[int]]:
        """Group all prompts of a run into batches of indices. Depends on the whole list only, never on what is done:
        a resumed run recomputes the very same batches and so the very same bytes."""
        ...

    def generate(self, prompts: Sequence[CandidateSet]) -> list[list[Response]]:
        """Answer one batch; outer order is that of ``prompts``, and each answer depends on its own seed only."""
        ...


ENGINES = Registry(
    "engine",
    {
        "hf": Entry("rankalign.engines.hf:HFEngine", "transformers in this process, prompts prefilled once for all n"),
        "replay": Entry("rankalign.engines.replay:ReplayEngine", "answers that are already in the data"),
    },
)
