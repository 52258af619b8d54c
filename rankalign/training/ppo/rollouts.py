"""What passes between the parts of PPO: questions, answers and their scores, and all that is known of them before an
update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from rankalign.data.records import CandidateSet
from rankalign.errors import InputError
from rankalign.training.ppo.math import Score


@dataclass(frozen=True)
class Question:
    """A prompt as a record and in tokens."""

    record: CandidateSet
    tokens: list[int]


@dataclass(frozen=True)
class Answer:
    """What a policy wrote: the token ids it drew, a closing end-of-sequence token included, and its text without."""

    ids: list[int]
    text: str
    finished: bool


class Sampler(Protocol):
    """Writes one answer to each prompt."""

    def __call__(self, model: Any, prompts: Sequence[list[int]], keys: Sequence[tuple[str, int]]) -> list[Answer]:
        """Answers in order; each depends on its key (prompt id and number of the draw), prompt and model alone."""
        ...


class Reward(Protocol):
    """Grades answers; see :class:`rankalign.recipes.rollouts.ScorerReward`."""

    def __call__(self, sets: Sequence[CandidateSet]) -> list[Score | None]:
        """A number, one number a token, or None, for each record's only response."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the rewards depend on."""
        ...


@dataclass(frozen=True)
class Seen:
    """An answer and what was known of it when it was written; tensors are (T,), one number a token.

    Attributes:
        answer: as it was drawn.
        score: as the scorer gave it; None counts for nothing.
        logps: log-probabilities under the policy that wrote it.
        values: of the text before each token.
        refs: log-probabilities under the start model.
    """

    answer: Answer
    score: Score | None
    logps: Tensor
    values: Tensor
    refs: Tensor


@dataclass(frozen=True)
class Rollouts:
    """B answers and what was known of them before the update; tensors are (B, T).

    Attributes:
        prompts: token ids.
        responses: token ids.
        written: True at the tokens of each response.
        mask: the same but for responses without a score, which count for nothing.
        logps: log-probabilities under the policy that wrote them.
        values: of the text before each token.
        advantages: whitened.
        returns: what values are fitted to.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    written: Tensor
    mask: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


LARGEST_REWARD = 1e15  # squared in the value loss, and summed, in float32, which ends at 3e38


def check_size(scores: Sequence[Score], questions: Sequence[Question], limit: float, why: str) -> None:
    """Refuse rewards beyond a limit.

    Raises:
        InputError: naming the prompt.
    """
    for score, question in zip(scores, questions, strict=True):
        parts = [score] if isinstance(score, int | float) else score
        if (largest := max(map(abs, parts), default=0.0)) > limit:
            name = question.record.id
            raise InputError(
                f"the answer to prompt {name!r} has a reward of {largest:g}, beyond {limit:g}, where {why}"
            )


class Means:
    """Means by name over any number of batches."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, mask: Tensor, **values: Tensor) -> None:
        """Take in the values that the mask, of the same shape, lets count."""
        for name, value in values.items():
            pair = torch.stack([value.double()[mask].sum(), mask.double().sum()])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def read(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The means, over all processes where their accelerator is given; 0 where nothing counted."""
        total: Any = torch.stack(list(self.sums.values()))
        if accelerator is not None:
            total = accelerator.reduce(total)
        return {name: float(s / max(n, 1)) for name, (s, n) in zip(self.sums, total.tolist(), strict=True)}
