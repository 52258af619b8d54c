"""Sampling and scoring: resumable passes over a journal. Killed anywhere, they end in the uninterrupted run's file."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rankalign import manifest, models
from rankalign.config import SampleConfig, ScoreConfig, ScorerConfig
from rankalign.engines import ENGINES, Engine, Policy
from rankalign.errors import InputError
from rankalign.files import sha256_file, sync_directory
from rankalign.journal import Journal, Key
from rankalign.progress import Progress
from rankalign.records import CandidateSet, Checker, Response, parse_response, read, response_to_dict, write
from rankalign.scorers import SCORERS, Scorer

SCORE_BATCH = 32  # records handed to a scorer at once, and lost at most when a run is killed


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A pass over one input that leaves one output."""

    name: str
    source: Path
    output: Path
    settings: dict[str, Any]
    overwrite: bool

    def run(self, work: Callable[[Journal], Sequence[CandidateSet]]) -> dict[str, Any]:
        """Do the work unless it is finished; returns counts for the caller to show."""
        journal_path = self.output.with_name(self.output.name + ".journal")
        if self.overwrite:
            for path in (journal_path, manifest.path_for(self.output), self.output):
                path.unlink(missing_ok=True)
        elif manifest.is_finished(self.output, self.settings):
            print(f"{self.output} is finished already with these settings: nothing to do", file=sys.stderr)
            return {"output": str(self.output), "already_finished": True}
        started = time.time()
        with Journal(journal_path, self.settings) as journal:
            sets = work(journal)
            write(self.output, sets)
            counts = _counts(sets)
            seconds = round(time.time() - started, 1)
            manifest.write(
                self.output, self.name, self.settings, [self.source], [self.output], counts=counts, seconds=seconds
            )
            journal_path.unlink()
            sync_directory(self.output.parent)
        return {"output": str(self.output), "already_finished": False, **counts, "seconds": seconds}


def _counts(sets: Sequence[CandidateSet]) -> dict[str, int]:
    responses = [response for record in sets for response in record.responses]
    scores = [value for response in responses for value in response.scores.values()]
    return {
        "prompts": len(sets),
        "responses": sum(response.count for response in responses),
        "distinct": len(responses),
        "unfinished": sum(not response.finished for response in responses),
        "empty": sum(not response.text.strip() for response in responses),
        "scores": sum(value is not None for value in scores),
        "missing_scores": sum(value is None for value in scores),
    }


# --- sampling ----------------------------------------------------------------------------------------------------


def sample(config: SampleConfig) -> dict[str, Any]:
    """Let every policy answer every prompt.

    Responses stand in the order of the policies, then of their index; identical texts of one policy are merged with
    their count.

    Returns:
        ``{"output", "already_finished", "prompts", "responses", ...}``.

    Raises:
        InputError: bad settings, prompts or models; what was finished stays in the journal.
    """
    if not config.policies:
        raise InputError("policies: name at least one")
    names = [policy.name for policy in config.policies]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"policies: the name {', '.join(sorted(twice))} stands twice; responses are told apart by it")
    prompts = list(read(config.prompts))
    prompts = prompts[: config.max_prompts] if config.max_prompts else prompts
    policies = [_seeded(policy, config.seed) for policy in config.policies]
    settings = {
        "prompts": sha256_file(config.prompts),
        "max_prompts": config.max_prompts,
        "policies": [_policy_settings(policy) for policy in policies],
    }
    stage = _Stage("sample", Path(config.prompts), Path(config.output), settings, config.overwrite)
    return stage.run(lambda journal: _sample(prompts, policies, journal))


def _seeded(policy: Policy, seed: int) -> Policy:
    """A policy whose own seed is not set takes the run's."""
    return dataclasses.replace(policy, sampling=dataclasses.replace(policy.sampling, seed=policy.sampling.seed or seed))


def _policy_settings(policy: Policy) -> dict[str, Any]:
    """Everything a policy's answers depend on, weights and replayed files by content."""
    settings = dataclasses.asdict(policy)
    if policy.engine == "hf":
        for key in ("model", "adapter"):
            where = models.resolve(settings[key]) if settings[key] else ""
            settings[f"{key}_sha256"] = models.weights_fingerprint(where) if where and Path(where).is_dir() else where
    if policy.file:
        settings["file_sha256"] = sha256_file(policy.file)
    return settings


def _sample(prompts: list[CandidateSet], policies: list[Policy], journal: Journal) -> list[CandidateSet]:
    total = len(prompts) * len(policies)
    with Progress("sampling", total, "prompt", done=len(journal.done)) as progress:
        for policy in policies:
            if all((policy.name, prompt.id) in journal.done for prompt in prompts):
                continue
            engine: Engine = ENGINES.load(policy.engine)(policy)
            for batch in engine.batches(prompts):
                _answer(engine, policy, [prompts[i] for i in batch], journal, progress)
    return [_assemble(prompt, policies, journal) for prompt in prompts]


def _answer(engine: Engine, policy: Policy, batch: list[CandidateSet], journal: Journal, progress: Progress) -> None:
    """Answer a batch of which anything is missing. It is computed whole even so: batch mates change the last bits of
    a matrix product, and a resumed run must repeat the first one's bytes."""
    missing = [prompt for prompt in batch if (policy.name, prompt.id) not in journal.done]
    if not missing:
        return
    answers = engine.generate(batch)
    items: list[tuple[Key, Any]] = [
        ((policy.name, prompt.id), [response_to_dict(response) for response in responses])
        for prompt, responses in zip(batch, answers, strict=True)
    ]
    journal.append(items)
    progress.add(len(missing))


def _assemble(prompt: CandidateSet, policies: list[Policy], journal: Journal) -> CandidateSet:
    responses: list[Response] = []
    for policy in policies:
        check = Checker(str(journal.path), 0)
        rows = journal.done[policy.name, prompt.id]
        responses += merge([parse_response(check, row, f"{policy.name}[{i}]") for i, row in enumerate(rows)])
    return CandidateSet(prompt.id, prompt.prompt, responses, prompt.meta)


def merge(responses: Sequence[Response]) -> list[Response]:
    """Responses with identical texts of one policy as one, at the place of the first, with their count."""
    kept: dict[tuple[str, str, bool], Response] = {}
    for response in responses:
        key = (response.policy, response.text, response.finished)
        if key in kept:
            kept[key].count += response.count
        else:
            kept[key] = dataclasses.replace(response)
    return list(kept.values())


# --- scoring -----------------------------------------------------------------------------------------------------


def build_scorer(config: ScorerConfig) -> Scorer:
    """The scorer behind a config.

    Raises:
        InputError: unknown kind or options.
    """
    kind = SCORERS.load(config.kind)
    try:
        scorer: Scorer = kind(config.name, **config.options)
    except TypeError as error:
        raise InputError(f"scorer {config.name!r}: {str(error).removeprefix(kind.__name__ + '.__init__() ')}") from None
    return scorer


def score(config: ScoreConfig) -> dict[str, Any]:
    """Let every scorer grade every response; the records come back with their scores added.

    Returns:
        ``{"output", "already_finished", "prompts", "scores", "missing_scores", ...}``.

    Raises:
        InputError: bad settings or records; what was scored stays in the journal.
    """
    if not config.scorers:
        raise InputError("scorers: name at least one")
    if Path(config.input).resolve() == Path(config.output).resolve():
        raise InputError(f"input and output are the same file, {config.input}; name another output")
    sets = list(read(config.input))
    scorers = [build_scorer(scorer) for scorer in config.scorers]
    settings = {
        "input": sha256_file(config.input),
        "scorers": [{"name": scorer.name, **scorer.fingerprint()} for scorer in scorers],
    }
    stage = _Stage("score", Path(config.input), Path(config.output), settings, config.overwrite)
    return stage.run(lambda journal: _score(sets, scorers, journal))


def _score(sets: list[CandidateSet], scorers: list[Scorer], journal: Journal) -> list[CandidateSet]:
    total = len(sets) * len(scorers)
    with Progress("scoring", total, "prompt", done=len(journal.done)) as progress:
        for scorer in scorers:
            for batch in _chunks(sets, SCORE_BATCH):
                missing = [record for record in batch if (scorer.name, record.id) not in journal.done]
                if missing:
                    _grade(scorer, batch, journal)
                    progress.add(len(missing))
    for record in sets:
        for scorer in scorers:
            values = journal.done[scorer.name, record.id]
            for response, value in zip(record.responses, values, strict=True):
                response.scores[scorer.name] = value
    return sets


def _grade(scorer: Scorer, batch: list[CandidateSet], journal: Journal) -> None:
    grades = scorer.score(batch)
    journal.append([((scorer.name, record.id), values) for record, values in zip(batch, grades, strict=True)])


def _chunks(sets: list[CandidateSet], size: int) -> Iterator[list[CandidateSet]]:
    yield from (sets[start : start + size] for start in range(0, len(sets), size))
