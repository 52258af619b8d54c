"""What PPO needs from the layers it may not import: a sampler over an engine's decode loop, a reward over a scorer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rankalign.data import load as data
from rankalign.data import templates
from rankalign.data.convert import Intake
from rankalign.data.encode import encode_text
from rankalign.data.records import CandidateSet
from rankalign.data.render import Rendering
from rankalign.engines import ENGINES, Policy, SamplingParams
from rankalign.engines.decode import Ending, sample
from rankalign.engines.hf import MAX_ROWS, MAX_TOKENS
from rankalign.engines.local import decoded
from rankalign.engines.sampling import uniforms
from rankalign.engines.uncached import rows_of
from rankalign.errors import InputError
from rankalign.evaluation.texts.likeness import RougeWatch, best_texts
from rankalign.evaluation.texts.while_training import Watch
from rankalign.models import load as models
from rankalign.scorers import SCORERS, Scorer
from rankalign.storage.jsonl import loads
from rankalign.training.arguments import PPOConfig, TrainConfig
from rankalign.training.ppo.math import Score
from rankalign.training.ppo.rollouts import Answer
from rankalign.training.rank import Watch as Measure
from rankalign.training.settings import DataSettings

SCORE = "reward"
WATCHED = 32
WATCHED_TOKENS = 64


class PolicySampler:
    """Draws an answer to each prompt from a policy in memory, with keys and values cached; finished rows leave.

    An answer depends on seed, prompt id and number of the draw (and the policy) alone, but for rounding.

    Args:
        tokenizer: the policy's.
        params: ``temperature``, ``max_new_tokens`` and ``seed`` are read.
        stop: strings that end an answer beside the end-of-sequence token.
        template: the prompts'; under the tokenizer's own the token that ends its turns ends an answer too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        stop: Sequence[str] = (),
        template: str = "raw",
    ) -> None:
        self.tokenizer, self.params, self.stop = tokenizer, params, tuple(stop)
        self._turn = {end for end in [Rendering(tokenizer, template).end_id()] if end is not None}

    def __call__(self, model: Any, prompts: Sequence[list[int]], keys: Sequence[tuple[str, int]]) -> list[Answer]:
        """Answers in order; see :class:`rankalign.training.ppo.rollouts.Sampler`."""
        answers: dict[int, Answer] = {}
        ends = Ending(self.tokenizer, models.end_ids(model, self.tokenizer) | self._turn, self.stop)
        for batch in self._batches(prompts):
            rows = rows_of(model, [prompts[i] for i in batch], self.params.max_new_tokens)
            draws = torch.stack([self._uniforms(*keys[i]) for i in batch])
            found = sample(rows, self.params, draws, ends)
            answers |= {i: self._answer(ids, ended, ends) for i, (ids, ended) in zip(batch, found, strict=True)}
        return [answers[i] for i in range(len(prompts))]

    def _batches(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Indices by falling length, cut as the engine ``hf`` cuts them."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found = []
        while order:
            longest = len(prompts[order[0]]) + self.params.max_new_tokens
            size = max(1, min(MAX_ROWS, MAX_TOKENS // longest))
            found.append(order[:size])
            order = order[size:]
        return found

    def _uniforms(self, ident: str, number: int) -> torch.Tensor:
        return uniforms(self.params.seed, ident, "ppo", number, self.params.max_new_tokens)

    def _answer(self, ids: list[int], ended: bool, ends: Ending) -> Answer:
        """The tokens as drawn, those of a stop string included; the text ends before it."""
        text, _ = templates.cut_at_stop(ends.text(ids[:-1] if ids[-1] in ends.eos else ids), self.stop)
        return Answer(ids, text, ended)


class VLLMSampler:
    """Draws an answer to each prompt with vLLM, to which the weights of a policy in memory are handed at each call.

    Args:
        start: name of the model that the policy was before any training.
        tokenizer: the policy's.
        params: how to draw, one answer a prompt.
        template: the prompts'; with its stop strings.

    Raises:
        InputError: vLLM is not installed.
    """

    def __init__(self, start: str, tokenizer: PreTrainedTokenizerBase, params: SamplingParams, template: str) -> None:
        policy = Policy("ppo", "vllm", model=start, template=template, sampling=params)
        self.engine: Any = ENGINES.load("vllm")(policy)
        self.start, self.tokenizer, self.stop = start, tokenizer, templates.stops(template)

    def __call__(self, model: Any, prompts: Sequence[list[int]], keys: Sequence[tuple[str, int]]) -> list[Answer]:
        """Answers in order; see :class:`rankalign.training.ppo.rollouts.Sampler`."""
        self.engine.take(model, self.tokenizer, self.start, object())
        written = self.engine.complete(prompts, keys)
        self.engine.rest()
        return [self._answer(*one) for one in written]

    def _answer(self, ids: list[int], ended: bool, end: int | None) -> Answer:
        text, _ = templates.cut_at_stop(decoded(self.tokenizer, ids), self.stop)
        return Answer(ids if end is None else [*ids, end], text, ended)


class ScorerReward:
    """A scorer as the reward of PPO; a function may give a number a token (trlX's ``reward_fn`` contract).

    Args:
        scorer: of :data:`rankalign.scorers.SCORERS`.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer: Any = scorer

    def __call__(self, sets: Sequence[CandidateSet]) -> list[Score | None]:
        """The score of each record's only response."""
        grade = getattr(self.scorer, "token_scores", self.scorer.score)
        return [row[0] for row in grade(sets)]

    def fingerprint(self) -> dict[str, Any]:
        """The scorer's: kind, options, hash of code or weights."""
        return dict(self.scorer.fingerprint())


def sampler_of(config: PPOConfig) -> PolicySampler | VLLMSampler:
    """The sampler that a run's settings ask for.

    Raises:
        InputError: vLLM is asked for and not there, or in several processes.
    """
    params = SamplingParams(temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=config.seed, n=1)
    tokenizer = models.load_tokenizer(config.model)
    if config.sampler == "vllm":
        if config.world_size > 1:
            raise InputError("--sampler vllm draws in the one process that trains; with several it is hf")
        return VLLMSampler(config.model, tokenizer, params, config.template)
    return PolicySampler(tokenizer, params, templates.stops(config.template), config.template)


def watch_of(config: TrainConfig) -> Measure | None:
    """What is measured on greedy answers to the prompts of ``--eval_data``: for ``--watch`` a grade against the start
    model's, for a best checkpoint by ROUGE the likeness to the held-out best responses."""
    asked = [(config.watch, _graded_watch), (config.best_by_rouge, _rouge_watch)]
    watches = [make(config) for wanted, make in asked if wanted]
    if not watches:
        return None
    return lambda model: {name: value for watch in watches for name, value in watch(model).items()}


def _graded_watch(config: TrainConfig) -> Measure:
    prompts, answers = (
        _held_out(config.data_settings)[:WATCHED],
        greedy(config.model, config.data_settings, WATCHED_TOKENS),
    )
    scorer = SCORERS.load("function")("watch", function=config.watch)
    first = os.environ.get("RANK", "0") == "0"  # all processes measure, one of them writes
    keep = Path(str(config.output_dir)) / "watched.jsonl" if first else None
    return Watch(prompts, answers, scorer, models.load_policy(config.model, dtype="float32"), keep)


def _rouge_watch(config: TrainConfig) -> Measure:
    """Answers as long as the longest response they are compared with may be, at most half of ``--max_length``."""
    sets = _held_out(config.data_settings)
    best = best_texts(sets, config.judge)
    tokenizer = models.load_tokenizer(config.model)
    longest = max((len(encode_text(tokenizer, text)) for text in best.values()), default=0)
    most = max(1, min(longest, config.max_length // 2))
    return RougeWatch(sets, best, greedy(config.model, config.data_settings, most))


def _held_out(settings: DataSettings) -> list[CandidateSet]:
    return list(data.load(settings.eval_data, settings.format, Intake(settings.skip_invalid, settings.ignore_columns)))


def greedy(
    start: str, settings: DataSettings, max_new_tokens: int
) -> Callable[[Any, Sequence[CandidateSet]], list[str]]:
    """Asks a model, always with temperature 0; prompts are encoded as in training and lose their beginning first.

    Args:
        start: the model whose tokenizer all models asked have.
        settings: how prompts become tokens.
        max_new_tokens: most tokens of an answer.
    """
    tokenizer = models.load_tokenizer(start)
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens, seed=0, n=1)
    sampler = PolicySampler(tokenizer, params, templates.stops(settings.template), settings.template)

    def answer(model: Any, sets: Sequence[CandidateSet]) -> list[str]:
        rendering = Rendering(
            tokenizer, settings.template, settings.system, settings.allow_special_in_text, settings.thoughts or "keep"
        )
        room = max(1, settings.max_length - max_new_tokens)
        rows = [rendering.shortened(rendering.prompt_of(s), room, s.prompt, s.meta) for s in sets]
        with torch.no_grad():
            return [found.text for found in sampler(model, rows, [(s.id, 0) for s in sets])]

    return answer


def reward_of(config: PPOConfig) -> ScorerReward:
    """The reward that a run's settings ask for: a server for an address, a function where ``--reward`` has a colon,
    else a reward model."""
    options = loads(config.reward_options)
    if config.reward.startswith(("http://", "https://")):
        return ScorerReward(SCORERS.load("reward_server")(SCORE, url=config.reward, **options))
    if ":" not in config.reward:
        return ScorerReward(SCORERS.load("reward_model")(SCORE, model=config.reward, **options))
    scorer = SCORERS.load("function")(SCORE, function=config.reward, **options)
    scorer.tokenizer = models.load_tokenizer(config.model)  # trlX hands its reward functions one
    return ScorerReward(scorer)
