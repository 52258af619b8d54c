"""One round of iterative training: the policies answer, the scorers grade, and the scores to train by are derived."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from rankalign.config import SampleConfig, ScoreConfig, ScorerConfig
from rankalign.data.encode import EncodeOptions, Encoder, TokenList
from rankalign.data.records import MIXED, ROUND, CandidateSet, read, score_of, write
from rankalign.engines import Policy, identity
from rankalign.engines.settings import policy_settings
from rankalign.models import load as models
from rankalign.rows import logps
from rankalign.scorers import Scorer
from rankalign.stages import ranks
from rankalign.stages.generation import Answerer, Grader, sample, score, seeded
from rankalign.stages.stage import Batch, run_here
from rankalign.storage import manifest
from rankalign.storage.files import sha256_file
from rankalign.storage.journal import Remembering
from rankalign.training.online import StartModel
from rankalign.training.settings import DataSettings

CURRENT = "current"
POLICY, SCORER = "policy", "scorer"
KL = "kl"
TOP = "top"
STRIDE = 1_000_003
"""Between the seeds of two rounds: more than anyone's seeds are apart, so that no round draws another run's numbers."""


@dataclass(frozen=True)
class IterateConfig:
    """Settings of ``rankalign iterate``.

    Attributes:
        output: folder of the run.
        prompts: records with the prompts, and with the answers that ``replay`` policies take.
        policies: who writes the candidates; those whose model is ``default`` or ``current`` sample with the weights
            of the moment, the others stay what they are.
        scorers: who grades.
        judge: the scorer to train by.
        model: the model to start from.
        rounds: IP: how many times all prompts are answered and a whole training run is made of them. Not read with
            ``refresh_every``, where ``num_train_epochs`` or ``max_steps`` of ``train`` say how long the run is.
        refresh_every: OP: answer anew every so many updates of one run; 0 is IP.
        kl_coef: train by ``score - kl_coef * (log policy - log start model)``, log-probabilities summed over tokens.
        keep_above: learn only from answers at or above this quantile of their prompt's scores, all alike: one number a
            round, begun again behind the last; for the loss ``raft``.
        train: settings of ``rankalign train``.
        seed: seed of sampling and training.
        max_prompts: take the first so many prompts; 0 takes all.
        keep: ``all`` models of IP's rounds, or the ``last``.
        overwrite: start over.
        num_processes: how many processes sample, grade and train; 0 is one, or with ``launch`` one a GPU.
        ahead: OP: 1 has a block answered while the one before it is learned, by the weights at its beginning; at 0
            the newest answer, while nothing is learned.
        launch: how they share the training: a name in :data:`rankalign.recipes.launch.FILES`.
    """

    output: str
    prompts: str
    policies: list[Policy]
    scorers: list[ScorerConfig]
    judge: str
    model: str = "default"
    rounds: int = 2
    refresh_every: int = 0
    kl_coef: float = 0.0
    keep_above: list[float] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_prompts: int = 0
    keep: str = "all"
    overwrite: bool = False
    ahead: int = 0
    num_processes: int = 0
    launch: str = ""


@dataclass(frozen=True)
class Current:
    """The weights that sample in a round.

    Attributes:
        number: of the round, from 1.
        step: updates made before it.
        weights: their fingerprint.
        folder: where they lie, or empty.
        model: the model that has them in memory, in eval mode, or None.
    """

    number: int
    step: int
    weights: str
    folder: str = ""
    model: Any = None

    @property
    def tag(self) -> dict[str, Any]:
        """What is noted with each answer they write."""
        return {ROUND: self.number, "step": self.step, "weights": self.weights[:16]}


def is_current(policy: Policy) -> bool:
    """Whether a policy samples with the weights of the moment."""
    return policy.engine in ("hf", "vllm") and policy.model in ("default", CURRENT)


class CurrentAnswerer(Answerer):
    """Answers with the weights of the moment, and notes them with each answer.

    Args:
        policy: its settings.
        now: the weights.
        start: the model that they were before any training, which may have a share in what is drawn.
        tokenizer: theirs, where an engine is to take them in; None where it loads what the policy names.
    """

    def __init__(
        self, policy: Policy, now: Current, start: StartModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        super().__init__(policy)
        # What the start model has a share in is not the policy's own.
        tag = {**now.tag, **({MIXED: policy.start_share} if policy.start_share else {})}
        self.now, self.start, self.tag = now, start, tag
        engine: Any = self.engine
        engine.start = start.beside
        if tokenizer is not None:
            engine.take(now.folder if now.model is None else now.model, tokenizer, start.name, now)

    def __reduce__(self) -> tuple[Any, ...]:
        start = StartModel(self.start.name, self.start.below_adapter)  # by name: it is loaded where it is asked
        return CurrentAnswerer, (self.policy, self.now, start, None)  # of weights in a folder: others stay

    def __call__(self, batch: Batch) -> list[Any]:
        """The responses to each prompt, as JSON."""
        answers = super().__call__(batch)
        return [[{**row, "sampling": {**row.get("sampling", {}), **self.tag}} for row in rows] for rows in answers]


class HeldGrader(Grader):
    """Grades with a scorer that is there already."""

    def __init__(self, config: ScorerConfig, scorer: Scorer) -> None:
        self.config, self.name, self.scorer = config, config.name, scorer


class Divergence:
    """Scores an answer by how much likelier the weights of the moment find it than the start model does.

    ``log policy(answer | prompt) - log start(answer | prompt)`` in nats, summed over the tokens that training sees;
    over the policy's own draws its mean estimates KL(policy || start), Schulman's k1.

    Args:
        now: the policy's weights.
        encoder: turns records into tokens as training does.
        start: the start model.
    """

    name = KL

    def __init__(self, now: Current, encoder: Encoder, start: StartModel) -> None:
        self.now, self.encoder, self.start = now, encoder, start

    @functools.cached_property
    def _policy(self) -> Any:
        return self.now.model if self.now.model is not None else models.load_policy(self.now.folder, dtype="float32")

    def fingerprint(self) -> dict[str, Any]:
        """The two models."""
        return {"kind": KL, "policy": self.now.weights, "start": self.start.name}

    @torch.no_grad()
    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """One number an answer; 0 for one without a token."""
        lists = [self._encode(record) for record in sets]
        policy = [self._logps(self._policy, tokens) for tokens in lists]
        with self.start.beside(self._policy) as model:
            start = [self._logps(model, tokens) for tokens in lists]
        return [
            self._spread(record, [a - b for a, b in zip(mine, theirs, strict=True)])
            for record, mine, theirs in zip(sets, policy, start, strict=True)
        ]

    def _encode(self, record: CandidateSet) -> TokenList | None:
        answers = [replace(response, scores={KL: 0.0}) for response in record.responses]
        return self.encoder.encode(replace(record, responses=answers))

    def _logps(self, model: Any, tokens: TokenList | None) -> list[float]:
        if tokens is None:
            return []
        sums: list[float] = (
            logps.list_logps(model, [tokens.prompt], [tokens.responses], unlearned=[tokens.unlearned])[0]
            .double()
            .tolist()
        )
        return sums

    def _spread(self, record: CandidateSet, values: list[float]) -> list[float | None]:
        rest = iter(values)
        return [next(rest) if self.encoder.says(response) else 0.0 for response in record.responses]


class Gatherer:
    """Makes the candidates of one round after the other; samplers of fixed policies and scorers stay in memory.

    Args:
        config: settings of the run.
        encoding: how training encodes records.
        start: the start model.
        lasting: one round's sampler takes the next round's weights in, where its engine can.
    """

    def __init__(self, config: IterateConfig, encoding: DataSettings, start: StartModel, lasting: bool = False) -> None:
        self.config, self.encoding, self.start, self.lasting = config, encoding, start, lasting
        self.tokenizer = models.load_tokenizer(start.name)
        self.options = EncodeOptions(
            judge=KL,
            template=encoding.template,
            system=encoding.system,
            max_length=encoding.max_length,
            stop_response=encoding.stop_response,
            allow_special_in_text=encoding.allow_special_in_text,
            thoughts=encoding.thoughts or "keep",
        )
        self._current = {policy.name for policy in config.policies if is_current(policy)}
        self.team = PartialState().num_processes > 1  # they train one model, and each has it in memory
        self._apart = bool(config.launch) or config.num_processes > 1  # rounds; memory is given back before training
        self._answerers: dict[str, Answerer] = {}
        self._engines: dict[str, Any] = {}
        self._described: dict[str, dict[str, Any]] = {}
        self._graders: dict[str, Grader] = {}

    def gather(self, folder: Path, now: Current, prompts: str, max_prompts: int = 0) -> Path:
        """``folder/candidates.jsonl``: sampled, scored, with the scores to train by.

        Where several processes train one model all of them come here. The first reads and writes; the others answer
        and grade what it sends them.

        Raises:
            InputError: bad settings, data or models; what was finished stays in the journal.
        """
        if not self.team:
            return self._gather(folder, now, prompts, max_prompts)
        if not PartialState().is_main_process:
            ranks.follow(functools.cache(functools.partial(self._worker, now)))
            return folder / "candidates.jsonl"
        well = False
        try:
            path = self._gather(folder, now, prompts, max_prompts)
            well = True
        finally:
            ranks.dismiss(well)
        return path

    def _gather(self, folder: Path, now: Current, prompts: str, max_prompts: int) -> Path:
        config, sampled, path = self.config, folder / "sampled.jsonl", folder / "candidates.jsonl"
        policies = [self._placed(policy, now) for policy in config.policies]
        apart = self._apart and now.model is None
        scale: dict[str, Any] = {"runner": "processes", "workers": config.num_processes} if apart else {}
        sample(
            SampleConfig(prompts, str(sampled), policies, config.seed, max_prompts, **scale),
            functools.partial(self._answerer, now),
            functools.partial(self._describe, now),
        )
        for engine in self._engines.values():
            getattr(engine, "rest", lambda: None)()
        quantile = quantile_of(config, now.number)
        derives = bool(config.kl_coef) or quantile is not None
        scored = folder / "scored.jsonl" if derives else path
        scorers = [*config.scorers, *([ScorerConfig(KL, KL)] if config.kl_coef else [])]
        score(ScoreConfig(str(sampled), str(scored), scorers, **scale), functools.partial(self._grader, now))
        if derives:
            _derive(scored, path, config.judge, config.kl_coef, quantile)
        return path

    def _placed(self, policy: Policy, now: Current) -> Policy:
        """A policy as it samples in a round: one of the weights of the moment gets those, and fresh random numbers."""
        if not is_current(policy):
            return policy
        seed = (policy.sampling.seed or self.config.seed) + STRIDE * (now.number - 1)
        return replace(policy, model=now.folder or CURRENT, sampling=replace(policy.sampling, seed=seed))

    def _worker(self, now: Current, key: str) -> Answerer | Grader:
        """A policy's or a scorer's, as the first process names it to the others."""
        kind, _, name = key.partition(" ")
        if kind == SCORER:
            scorers = [*self.config.scorers, ScorerConfig(KL, KL)]
            return self._grader(now, next(scorer for scorer in scorers if scorer.name == name))
        policy = next(policy for policy in self.config.policies if policy.name == name)
        return self._answerer(now, seeded(self._placed(policy, now), self.config.seed))

    def _run_by(self, kind: str, worker: Any, with_calls: bool) -> None:
        """Say by whom a worker's batches are computed: by the processes that train, or, where each call is kept by
        itself or nothing is computed at all, here."""
        if self.team:
            together = functools.partial(ranks.lead, f"{kind} {worker.name}")
            worker.runner, worker.stays = (ranks.lead_alone if with_calls else together), with_calls
        elif with_calls and self._apart:
            worker.runner, worker.stays = run_here, True

    def _answerer(self, now: Current, policy: Policy) -> Answerer:
        if policy.name not in self._current and policy.name in self._answerers:
            return self._answerers[policy.name]
        current = policy.name in self._current
        made = self._current_answerer(policy, now) if current else Answerer(policy)
        self._run_by(POLICY, made, policy.engine not in ("hf", "vllm"))
        if not current:
            self._answerers[policy.name] = made
        return made

    def _current_answerer(self, policy: Policy, now: Current) -> Answerer:
        takes_in = now.model is not None or (self.lasting and policy.engine == "vllm")
        made = CurrentAnswerer(policy, now, self.start, self.tokenizer if takes_in else None)
        if takes_in:
            self._engines[policy.name] = made.engine  # what a sampler has loaded stays for the next round
        return made

    def _describe(self, now: Current, policy: Policy) -> dict[str, Any]:
        """What a policy's answers depend on; weights in memory by their fingerprint."""
        if policy.name not in self._current:
            if policy.name not in self._described:
                self._described[policy.name] = policy_settings(policy)
            return self._described[policy.name]
        return {**identity(policy), "model_sha256": now.weights, **now.tag}

    def _grader(self, now: Current, config: ScorerConfig) -> Grader:
        if config.kind == KL:
            held = HeldGrader(config, Divergence(now, Encoder(self.tokenizer, self.options), self.start))
            self._run_by(SCORER, held, not self.team)  # apart from those that train it does not travel
            return held
        if config.name not in self._graders:
            made = self._graders[config.name] = Grader(config)
            self._run_by(SCORER, made, isinstance(made.scorer, Remembering))
        return self._graders[config.name]


# --- scores to train by ------------------------------------------------------------------------------------------


def ranked_by(config: IterateConfig, number: int) -> str:
    """The scores that a round is trained by: the judge's, or what is derived from them."""
    name = f"{config.judge}-{KL}" if config.kl_coef else config.judge
    return f"{name}-{TOP}" if quantile_of(config, number) is not None else name


def quantile_of(config: IterateConfig, number: int) -> float | None:
    """The entry of ``keep_above`` for a round, counted from 1."""
    shares = config.keep_above
    return shares[(number - 1) % len(shares)] if shares else None


def _derive(scored: Path, path: Path, judge: str, kl_coef: float, quantile: float | None) -> None:
    """Write the records with the scores to train by beside the given ones."""
    settings = {"scored": sha256_file(scored), "judge": judge, "kl_coef": kl_coef, "quantile": quantile}
    if manifest.is_finished(path, settings):
        return
    sets = list(read(scored))
    for record in sets:
        name = judge
        if kl_coef:
            name = _put(record, f"{name}-{KL}", penalised(record, name, kl_coef))
        if quantile is not None:
            _put(record, f"{name}-{TOP}", kept(record, name, quantile))
    write(path, sets)
    manifest.write(path, "derive", settings, [scored], [path])


def _put(record: CandidateSet, name: str, values: Sequence[float | None]) -> str:
    for response, value in zip(record.responses, values, strict=True):
        response.scores[name] = value
    return name


def penalised(record: CandidateSet, name: str, kl_coef: float) -> list[float | None]:
    """``score - kl_coef * (log policy - log start)`` of each answer; None where it has no score."""
    rows = [(score_of(record, r, name), score_of(record, r, KL)) for r in record.responses]
    return [None if value is None or kl is None else value - kl_coef * kl for value, kl in rows]


def kept(record: CandidateSet, name: str, quantile: float) -> list[float | None]:
    """1 for each answer at or above a quantile of the record's scores, 0 below it; None where it has no score.

    The quantile is linear between order statistics, over answers that differ, each counted once.
    """
    values = [score_of(record, r, name) for r in record.responses]
    there = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    border = float(there.quantile(quantile)) if len(there) else 0.0
    return [None if value is None else float(value >= border) for value in values]
